"""The grid `scratch`: its runs, a short training of two of them, and what its tables say of made-up scores."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megdet_hpc.log import read_metrics
from megdet_hpc.study import scratch_plots as plots
from megdet_hpc.study.__main__ import main
from megdet_hpc.study.data import export_backbone
from megdet_hpc.study.grids import Cell, distinct, with_settings
from megdet_hpc.study.outcome import Outcome, read_outcome, write_outcome
from megdet_hpc.study.runner import Inputs, Runner, only_one
from megdet_hpc.study.scratch import NUM_SEEDS, SCRATCH_SCALES, scratch_cells
from megdet_hpc.study.scratch_claims import sample_of
from megdet_hpc.study.scratch_report import write_scratch_reports


@pytest.fixture(scope="module", params=list(SCRATCH_SCALES))
def cells(request: pytest.FixtureRequest) -> list[Cell]:
    return scratch_cells(SCRATCH_SCALES[request.param])


def test_every_run_is_what_its_row_says(cells: list[Cell]) -> None:
    for cell in cells:
        row, config = cell.columns, cell.run.config
        model: Any = config.model
        assert cell.run.global_batch == row["batch"], cell.run.folder
        assert config.seed == row["seed"] and config.solver.accumulate == 1
        assert (config.solver.clip_norm is not None) == row["clip"]
        assert cell.run.from_scratch == model.fixed_from_scratch == (row["first"] == "scratch")
        assert (row["detector"] == "two") == hasattr(model, "roi_pool")
        assert row["pool"] == getattr(model, "roi_pool", "")
        if row["norm"] == "none":
            assert (config.norm.kind, config.norm.where, config.norm.size) == ("frozen", ("backbone",), 0)
        elif row["norm"] == "gn":
            assert (config.norm.kind, config.norm.size) == ("gn", 0)
        else:
            size = row["batch"] if row["norm"] == "all" else int(row["norm"][2:])
            assert (config.norm.kind, config.norm.size) == ("cgbn", size)
            assert size % config.data.images_per_rank == 0
        if row["norm"] != "none":
            assert ("heads" in config.norm.where) == (row["where"] != "backbone" and "heads" in _all_parts(cells, cell))


def _all_parts(cells: list[Cell], cell: Cell) -> tuple[str, ...]:
    """The parts that a run of the same detector normalizes where nothing else is said."""
    like = next(c for c in cells if (c.columns["detector"], c.columns["where"]) == (cell.columns["detector"], "all"))
    return like.run.config.norm.where


def test_each_line_has_its_seeds_and_dsods_own_comparison_differs_in_the_size_alone(cells: list[Cell]) -> None:
    by_name: dict[str, set[int]] = {}
    for cell in cells:
        by_name.setdefault(cell.run.name.rpartition("-")[0], set()).add(cell.columns["seed"])
    assert len(by_name) > 30
    assert all(seeds == set(range(NUM_SEEDS)) for seeds in by_name.values())
    four, twelve = (
        next(c.run.config for c in cells if c.columns["detector"] == "dsod" and c.columns["norm"] == f"bn{size}")
        for size in (4, 12)
    )
    same = {"norm.size": 12, "data.images_per_rank": 12, "emulate.ranks": twelve.emulate.ranks}
    assert with_settings(four, same) == twelve


def test_runs_of_several_lines_are_trained_once() -> None:
    tiny = scratch_cells(SCRATCH_SCALES["tiny"])
    assert len(distinct(tiny)) == len({cell.run.name for cell in tiny}) < len(tiny)
    later = scratch_cells(SCRATCH_SCALES["tiny"], range(NUM_SEEDS, NUM_SEEDS + 1))
    assert {cell.columns["line"] for cell in scratch_cells(SCRATCH_SCALES["tiny"], [0], ["dsod"])} == {"dsod"}
    assert not {cell.run.digest for cell in tiny} & {cell.run.digest for cell in later}


def test_a_run_begins_with_the_backbone_of_another(shapes: Path, tmp_path: Path) -> None:
    short = {"max_steps": 2, "data.val": None, "checkpoints.every_epochs": 0.0, "data.images_per_rank": 4}
    wanted = {("none", "scratch"): "first", ("all", "weights"): "second"}
    runs = {}
    for cell in scratch_cells(SCRATCH_SCALES["tiny"]):
        name = wanted.get((cell.columns["norm"], cell.columns["first"]))
        if name and cell.columns["detector"] == "one":
            settings = {**short, "norm.size": 0}
            runs.setdefault(name, replace(cell.run, name=name, config=with_settings(cell.run.config, settings)))
    inputs = Inputs(shapes / "train", shapes / "val", None, tmp_path / "backbone.pth")
    with only_one(tmp_path) as lock:
        runner = Runner(tmp_path, 1, None, lock)
        assert runner.train([runs["first"]], inputs) == 0
        export_backbone(tmp_path / runs["first"].folder, tmp_path / "backbone.pth", whole_names=True)
        assert runner.train([runs["second"]], inputs) == 0
    for run in runs.values():
        done = read_outcome(tmp_path / run.folder)
        assert done and (done.status, done.step) == ("done", 2)
    first, second = (tmp_path / runs[name].folder for name in ("first", "second"))
    assert "backbone.pth (state dict): " in (second / "log.txt").read_text()
    assert "backbone.pth" not in (first / "log.txt").read_text()
    assert [row["step"] for row in read_metrics(second / "metrics.jsonl")] == [1, 2]


def test_tables_plot_and_readings_of_made_up_scores(tmp_path: Path) -> None:
    cells, runs = scratch_cells(SCRATCH_SCALES["tiny"]), tmp_path / "runs"
    scores = {("dsod", "bn12"): 0.6, ("dsod", "bn4"): 0.5, ("one", "all"): 0.6, ("one", "bn2"): 0.3}
    for cell in cells:
        row = cell.columns
        score = scores.get((row["detector"], row["norm"]))
        if score is None or (row["rate"], row["clip"], row["first"], row["where"]) != (
            "usual",
            False,
            "scratch",
            "all",
        ):
            continue
        score += 0.01 * row["seed"]
        status = "failed" if score == 0.3 else "done"
        (runs / cell.run.folder).mkdir(parents=True, exist_ok=True)
        write_outcome(runs / cell.run.folder, Outcome(status, "", 192, score, 0.9, 9.0, 2.0, 5.0, 100.0), {})
    files = write_scratch_reports(cells, runs, tmp_path / "scratch", "test")
    assert [file.name for file in files] == ["scratch.csv", "scratch.md", "scratch.png"]
    with open(tmp_path / "scratch.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(cells)
    assert {row["status"] for row in rows} == {"done", "failed", "not run"}
    text = (tmp_path / "scratch.md").read_text()
    assert "| dsod | bn12 | usual |  | no | scratch | all | 3 | 0 | 0.610 | 0.010 | 0.600 0.610 0.620 |" in text
    assert "difference +0.100 (standard error 0.008). Appears: BN over 12 is above in 9 of 9 pairs" in text
    assert "BN over 2 0.310 +- 0.010 (3 seeds, 1 failed)" in text
    assert "GN: no run is finished" in text
    with Image.open(tmp_path / "scratch.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**6) or []) > 50


def test_a_failed_seed_is_a_cross_beside_the_dots_of_others() -> None:
    rows = [{"seed": seed, "status": "done", "AP": 0.5 + 0.1 * seed} for seed in range(2)]
    rows.append({"seed": 2, "status": "failed", "AP": None})
    _, axes = plots.plt.subplots()
    plots._dots(axes, 0, rows, "tab:blue")
    dots, crosses, mean = axes.lines
    assert (dots.get_marker(), list(dots.get_ydata())) == ("o", [0.5, 0.6])
    assert (crosses.get_marker(), list(crosses.get_ydata())) == ("x", [0.0])
    assert list(mean.get_ydata()) == [pytest.approx(1.1 / 3)] * 2
    plots.plt.close("all")


def test_reports_of_other_seeds_lie_beside_those_of_the_usual_ones(tmp_path: Path) -> None:
    for words, folder in ((["--seeds", "4"], "seeds_0_1_2_3"), ([], "."), (["--seed", "1", "--seeds", "1"], "seed_1")):
        with pytest.raises(SystemExit) as ended:
            main(["scratch", "--report", "--lines", "dsod", "--output", str(tmp_path), *words])
        assert ended.value.code == 0
        assert (tmp_path / "tiny" / folder / "scratch-dsod.md").is_file(), folder
    assert "seeds 0, 1, 2\n" in (tmp_path / "tiny" / "scratch-dsod.md").read_text()


def test_a_failed_run_without_ap_counts_as_zero() -> None:
    row = {"detector": "one", "norm": "all", "rate": "usual", "pool": "", "clip": False, "first": "scratch"}
    row = {**row, "where": "all", "seed": 0, "status": "failed", "AP": None}
    rows = [row, row, {**row, "seed": 1, "status": "done", "AP": 0.5}, {**row, "seed": 2, "status": "error"}]
    assert sample_of(rows, detector="one", norm="all").scores == (0.0, 0.5)
    assert sample_of(rows, detector="one", norm="all").failed == 1
