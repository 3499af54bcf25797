"""The grids `solvers` and `causes`: what they declare, and their readings from rows by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megdet_hpc.study.__main__ import main
from megdet_hpc.study.causes import cause_readings, readings_of
from megdet_hpc.study.grids import CASES, Cell, expand
from megdet_hpc.study.outcome import Outcome, write_outcome
from megdet_hpc.study.report import score_of, tables_of, write_reports
from megdet_hpc.study.scales import SCALES, scale_named

SMALL = SCALES["small"]


def settings(cell: Cell) -> tuple[Any, ...]:
    config, batch = cell.run.config, cell.run.global_batch
    updates = round(SMALL.num_images / batch * config.solver.epochs)
    return batch, updates, cell.columns["rate"], config.solver.drop_epochs, config.solver.warmup_epochs


def test_each_cause_changes_one_thing() -> None:
    cells = {cell.columns["case"]: cell for cell in expand(SMALL, ["causes"])}
    assert list(cells) == list(CASES) and len(cells) <= 8
    rate = pytest.approx
    assert {case: settings(cell) for case, cell in cells.items()} == {
        "small": (16, 12_800, rate(0.01), (36, 45), 5),
        "large": (256, 800, rate(0.16), (36, 45), 5),
        "2x epochs": (256, 1600, rate(0.16), (72, 90), 5),
        "4x epochs": (256, 3200, rate(0.16), (144, 180), 5),
        "half rate": (256, 800, rate(0.08), (36, 45), 5),
        "quarter rate": (256, 800, rate(0.04), (36, 45), 5),
        "4x epochs, half rate": (256, 3200, rate(0.08), (144, 180), 5),
        "small, updates of large": (16, 800, rate(0.01), (2.25, 2.8125), 0.3125),
    }
    assert all(cell.run.config.norm.kind == "cgbn" for cell in cells.values())
    # four of the eight runs are those of other grids
    others = {cell.run.digest for cell in expand(SMALL, ["claim", "rates"])}
    assert sum(cell.run.digest in others for cell in cells.values()) == 4


@pytest.mark.parametrize("name", ["megdet_r50_fpn_256_safe", "dsod300_coco", "megdet_r50_fpn_16"])
def test_the_rates_of_causes_are_shares_of_the_configurations_own(name: str) -> None:
    """Whatever its reference batch is; that of the first is the large mini-batch."""
    scale = scale_named("coco", name)
    scale = replace(scale, settings={**scale.settings, "solver.iterations": None, "solver.drop_iterations": None})
    if name == "dsod300_coco":
        scale = replace(scale, settings={**scale.settings, "solver.drop_factors": (0.1, 0.1)})
    rates = {cell.columns["case"]: cell.columns["rate"] for cell in expand(scale, ["causes"])}
    for case, (is_large, _, share) in CASES.items():
        assert rates[case] == pytest.approx(share * rates["large" if is_large else "small"], rel=1e-4), case


def test_the_rates_of_each_solver_by_the_root_rule() -> None:
    cells = expand(SMALL, ["solvers"])
    rates = {
        (solver, batch): [
            cell.columns["rate"] for cell in cells if (cell.columns["solver"], cell.columns["batch"]) == (solver, batch)
        ]
        for solver in ("sgd", "agvm", "lars", "lamb")
        for batch in (16, 256, 1024)
    }
    assert rates == {
        ("sgd", 16): pytest.approx([0.01]),  # the reference, at which all exponents give one rate
        ("agvm", 16): [],  # one rank
        ("lars", 16): pytest.approx([0.125, 0.5, 2]),
        ("lamb", 16): pytest.approx([0.0003125, 0.00125, 0.005, 0.02]),
        ("sgd", 256): pytest.approx([0.16, 0.08, 0.04]),
        ("sgd", 1024): pytest.approx([0.64, 0.01 * 64**0.75, 0.08]),
        ("agvm", 256): pytest.approx([0.16, 0.08, 0.04]),
        ("agvm", 1024): pytest.approx([0.64, 0.01 * 64**0.75, 0.08]),
        ("lars", 256): pytest.approx([0.5, 2, 8]),
        ("lars", 1024): pytest.approx([1, 4, 16]),
        ("lamb", 256): pytest.approx([0.00125, 0.005, 0.02, 0.08]),
        ("lamb", 1024): pytest.approx([0.0025, 0.01, 0.04, 0.16]),
    }
    for cell in cells:
        solver, name = cell.run.config.solver, cell.columns["solver"]
        assert (solver.optimizer, solver.agvm) == (("sgd", True) if name == "agvm" else (name, False))
        assert cell.run.global_batch == cell.columns["batch"]
        assert cell.run.config.norm.size == min(32, cell.columns["batch"])
    assert len({cell.run.folder for cell in cells}) == len(cells) == 34


@pytest.mark.parametrize(("grid", "cells"), [("solvers", 34), ("causes", 8)])
def test_a_dry_run(grid: str, cells: int, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([grid, "--scale", "small", "--dry-run", "--seeds", "3", "--output", str(tmp_path)])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert f"{3 * cells} cells, {3 * cells + 1} runs" in said  # the first weights are one run more
    assert "minutes with 2 run(s) at a time" in said
    assert not list(tmp_path.iterdir())


def rows_of(scores: dict[str, float], *, seeds: int = 3, failed: str = "") -> list[dict[str, Any]]:
    """Rows of seeds whose scores differ by 0.01, so sd is 0.01."""
    return [
        {
            "seed": seed,
            "case": case,
            "batch": 16 if case.startswith("small") else 256,
            "AP": None if case == failed else scores[case] + 0.01 * seed,
            "status": "failed" if case == failed else "done",
        }
        for seed in range(seeds)
        for case in CASES
    ]


BEHIND = dict.fromkeys(CASES, 0.7) | {"small": 0.80, "small, updates of large": 0.60}


@pytest.mark.parametrize(
    ("changed", "conclusion"),
    [
        ({"4x epochs": 0.80}, "The cause: updates: enough to close the gap."),
        ({"half rate": 0.795}, "The cause: rate: enough to close the gap."),
        ({"half rate": 0.80, "2x epochs": 0.80}, "The cause: updates or rate: enough to close the gap."),
        ({"4x epochs": 0.75}, "The cause: updates: a part of the gap, not all."),
        ({"4x epochs, half rate": 0.80}, "The cause: updates and rate together: enough to close the gap."),
        ({}, "The cause: neither updates nor rate. Data or model are left, which these runs do not separate."),
    ],
)
def test_the_cause_of_a_gap(changed: dict[str, float], conclusion: str) -> None:
    said = cause_readings(rows_of(BEHIND | changed))
    assert said[-1] == conclusion
    assert "difference -0.100" in said[0] and "An update gains from its further images." in said[-2]
    closing = [line for line in said if "It closes the gap." in line]
    assert len(closing) == sum(score >= 0.795 for score in changed.values())


def test_no_gap_no_cause_and_few_seeds_say_nothing() -> None:
    said = cause_readings(rows_of(BEHIND | {"large": 0.80, "small, updates of large": 0.80}))
    assert "There is no gap to explain" in said[1] and not any("The cause" in line for line in said)
    assert said[-1].endswith("An update gains nothing from its further images: the number of updates decides.")
    assert cause_readings(rows_of(BEHIND, seeds=2))[1] == "Too few seeds to say what causes it."
    failed = cause_readings(rows_of(BEHIND, failed="4x epochs"))
    assert any("4x epochs" in line and "It does not narrow the gap." in line for line in failed)
    assert cause_readings([{**row, "status": "not run", "AP": None} for row in rows_of(BEHIND)]) == []


def test_a_large_batch_that_fails_is_said() -> None:
    rows = rows_of(BEHIND, failed="large")
    said = cause_readings(rows)
    assert said[1] == "The large mini-batch fails, with each of 3 seeds. Its gap has no size."
    assert "Rate, half rate: 256 (half rate) 0.710 +- 0.010 (3 seeds). With it 3 of 3 seeds train." in said
    assert not any("Too few seeds" in line for line in said)


def test_a_mean_of_two_seeds_says_nothing_of_a_cause() -> None:
    rows = rows_of(BEHIND | {"4x epochs": 0.80})
    rows = [{**row, "status": "failed"} if (row["case"], row["seed"]) == ("4x epochs", 0) else row for row in rows]
    said = cause_readings(rows)
    assert any("4x epochs:" in line and line.endswith("Too few seeds to say.") for line in said)
    assert said[-1] == "The cause: not to be told before all cases have their seeds."


def test_agvm_is_left_out_of_one_rank() -> None:
    """It compares halves of the ranks."""
    solvers = {
        cell.columns["solver"]
        for cell in expand(replace(SMALL, images_per_rank=256, solver_batches=(256,)), ["solvers"])
    }
    assert solvers == {"sgd", "lars", "lamb"}


def test_the_best_rate_of_each_solver_is_compared(tmp_path: Any) -> None:
    cells = [cell for seed in (0, 1, 2) for cell in expand(SMALL, ["causes", "solvers"], {"seed": seed})]
    best = {("sgd", 256): 0.08, ("lars", 256): 2.0, ("lamb", 256): 0.005, ("lamb", 16): 0.00125}
    for cell in cells:
        own = cell.columns
        score = 0.5 + 0.01 * cell.run.config.seed
        if cell.grid == "solvers" and best.get((own["solver"], own["batch"])) == pytest.approx(own["rate"]):
            score += {"sgd": 0.2, "agvm": 0.0, "lars": 0.3, "lamb": 0.1}[own["solver"]]
        status = "failed" if own["rate"] == 8 else "done"
        outcome = Outcome(status, "", 800, None if status == "failed" else score, 0.9, 2.0, 1.0, 60.0, 700.0)
        write_outcome(tmp_path / "runs" / cell.run.folder, outcome, {})
    tables = tables_of(cells, tmp_path / "runs")
    lines = [line for line in readings_of("solvers", tables["solvers"]) if "best of its rates" in line]
    said = sorted(line for line in lines if line.startswith("batch 256, "))  # agvm, lamb, lars
    assert said[2].startswith("batch 256, each at the best of its rates, chosen on these same runs: lars 2 0.810")
    assert "sgd 0.08 0.710" in said[2] and "difference +0.100. That is over two sd" in said[2]
    assert "agvm 0.16 0.510" in said[0] and "lamb 0.005 0.610" in said[1] and len(said) == 3
    over = [line for line in lines if " against batch 16" in line]
    assert [line.split(", ")[0] for line in over] == [
        f"{solver} at batch {batch} against batch 16" for solver in ("sgd", "lars", "lamb") for batch in (256, 1024)
    ]
    assert "lamb 0.005 0.610" in over[4] and "lamb 0.00125 0.610" in over[4] and "difference +0.000" in over[4]
    assert len(lines) == 8 + len(over)
    assert readings_of("solvers", []) == []
    files = write_reports(tables, score_of(cells), tmp_path, "test")
    assert {file.name for file in files if file.suffix == ".png"} == {"solvers.png", "causes.png"}
    assert "8 0 of 3" not in (tmp_path / "solvers.md").read_text()
