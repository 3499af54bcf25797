"""The grid of modules: its content, its ranks and front on known numbers, its picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megdet_hpc.plan.model_size import count_model
from megdet_hpc.study.front import RANKED, pareto_front, ranked
from megdet_hpc.study.grids import BACKBONES, HEADS, LEVELS, PAPER_GRIDS, base_config, expand
from megdet_hpc.study.plots import draw
from megdet_hpc.study.report import counts_of, tables_of
from megdet_hpc.study.scales import SCALES
from megdet_hpc.study.scatter import over_seeds


@pytest.mark.parametrize("scale", ["tiny", "bccd", "coco"])
def test_the_grid_is_the_whole_product_from_scratch(scale: str) -> None:
    cells = expand(SCALES[scale], ["modules"])
    coarsest = base_config(SCALES[scale]).model.anchor_sizes[-1]  # type: ignore[attr-defined]
    inputs = {f"{long}x{short}" for short, long in SCALES[scale].module_inputs}
    found = {tuple(cell.columns[key] for key in ("backbone", "head", "levels", "input")) for cell in cells}
    levels = {
        head: [f"P{first}-P{last}" for first, last in LEVELS["retinanet" if head == "retinanet" else "two_stage"]]
        for head in HEADS
    }
    assert found == {(b, h, own, i) for b in BACKBONES for h in HEADS for own in levels[h] for i in inputs}
    assert len(cells) == len({cell.run.folder for cell in cells}) == 160
    for cell in cells:
        config, row = cell.run.config, cell.columns
        model: Any = config.model
        assert (model.backbone, model.backbone_weights, model.frozen_stages) == (row["backbone"], None, 0)
        assert (model.conv, config.norm.kind) == ("weight_standardized", "gn")
        assert config.norm.where == ("backbone", "fpn", "heads")
        assert f"{config.data.max_side}x{config.data.short_sides[0]}" == row["input"]
        assert config.data.val_short_side == config.data.short_sides[0]
        assert "P{}-P{}".format(*model.levels) == row["levels"]
        assert model.anchor_sizes[-1] == coarsest
        if row["head"].startswith("cascade"):
            assert len(model.stage_ious) == int(row["head"][-1])
        assert cell.run.global_batch == 16
        assert cell.run.from_scratch


def test_coco_has_the_published_inputs() -> None:
    inputs = {cell.columns["input"] for cell in expand(SCALES["coco"], ["modules"])}
    assert inputs == {"512x512", "800x600", "1080x720", "1333x800"}


def test_all_stands_for_the_grids_of_the_paper() -> None:
    assert PAPER_GRIDS == ("batch", "bn_size", "epochs", "warmup", "ranks")


def test_weights_change_no_run_from_scratch() -> None:
    one, other = (expand(SCALES["coco"], ["modules"], inputs=f"packs {w}", packs="packs") for w in ("a", "b"))
    assert [cell.run.digest for cell in one] == [cell.run.digest for cell in other]
    changed = expand(SCALES["coco"], ["modules"], packs="others")
    assert changed[0].run.digest != one[0].run.digest


def test_counts_grow_with_stages_and_input() -> None:
    cells = {cell.run.name: cell for cell in expand(SCALES["tiny"], ["modules"])}
    names = tuple(f"resnet18-{rest}" for rest in ("cascade2-P2-P6-64x48", "cascade3-P2-P6-64x48"))
    names += ("resnet18-cascade3-P2-P6-96x64", "resnet18-cascade3-P3-P6-96x64")
    counts = [count_model(cells[name].run.config, 5) for name in names]
    assert counts[0][0] < counts[1][0] == counts[2][0]
    assert counts[1][1] < counts[2][1]
    assert counts[3][0] < counts[2][0] and counts[3][1] < counts[2][1]


def test_seeds_share_the_count_of_their_detector(tmp_path: Path) -> None:
    cells = [cell for seed in (3, 4) for cell in expand(SCALES["tiny"], ["modules"], {"seed": seed})[:1]]
    counts_of.cache_clear()
    rows = tables_of(cells, tmp_path)["modules"]
    assert counts_of.cache_info().misses == 1
    parameters, macs = count_model(cells[1].run.config, cells[1].num_categories)
    assert [(row["seed"], row["params_M"], row["gmac"]) for row in rows] == [
        (seed, parameters / 1e6, macs / 1e9) for seed in (3, 4)
    ]


def test_the_front_of_known_points() -> None:
    points = [(0.2, 10.0), (0.3, 20.0), (0.25, 20.0), (0.3, 25.0), (0.4, 40.0), (0.1, 50.0), (0.2, 10.0)]
    assert pareto_front(points) == [True, True, False, False, True, False, True]
    assert pareto_front([]) == []


def _row(name: str, ap: float | None, speed: float | None, status: str = "done") -> dict[str, Any]:
    names = {"backbone": name, "head": "rcnn", "levels": "P2-P6", "input": "64x48"}
    return {**names, "status": status, "AP": ap, "images_per_s": speed}


def test_seeds_are_one_row_whatever_their_ranks() -> None:
    measured = {"steps": 6, "train_s": 2.0}
    rows = [
        {"seed": seed, **row}
        for seed, second in ((0, 0.3), (1, 0.5))
        for row in ranked([{**_row(name, ap, 100.0 + seed), **measured}
                           for name, ap in (("resnet18", 0.4), ("resnet34", second))])
    ]  # fmt: skip
    assert [(row["seed"], row["backbone"], row["rank_AP"]) for row in rows] == [
        (0, "resnet18", 1),
        (0, "resnet34", 2),
        (1, "resnet34", 1),
        (1, "resnet18", 2),
    ]
    joined = {row["backbone"]: row for row in over_seeds(rows)}
    assert len(over_seeds(rows)) == 2 and not set(RANKED) & set(joined["resnet34"])
    assert (joined["resnet34"]["runs"], joined["resnet34"]["by seed"]) == ("2 of 2", "0.300, 0.500")
    assert joined["resnet34"]["AP"] == pytest.approx(0.4) and joined["resnet18"]["AP"] == pytest.approx(0.4)


def test_ranks_and_picture(tmp_path: Path) -> None:
    rows = ranked([
        _row("resnet34", None, None, "not run"), _row("resnet18", 0.2, 100.0), _row("resnet50", 0.4, 25.0),
        _row("slow", 0.1, 20.0), _row("broke", 0.001, 200.0, "failed"),
    ])  # fmt: skip
    keys = ("backbone", "rank_AP", "rank_time", "pareto", "ms_per_image")
    assert [tuple(row[key] for key in keys) for row in rows] == [
        ("resnet50", 1, 2, True, 40.0),
        ("resnet18", 2, 1, True, 10.0),
        ("slow", 3, 3, False, 50.0),
        ("resnet34", None, None, None, None),
        ("broke", None, None, None, None),
    ]
    draw("modules", rows, "study tiny", tmp_path / "modules.png")
    with Image.open(tmp_path / "modules.png") as picture:
        assert picture.size == (825, 506)
        assert len(picture.convert("RGB").getcolors(10**6) or []) > 50
    draw("modules", rows[-1:], "study tiny", tmp_path / "none.png")
