"""Real trainers of a few steps: one converges, one diverges, one breaks, one is cut; and the tables they leave."""

from __future__ import annotations

import csv
import json
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megdet_hpc.config import to_dict
from megdet_hpc.engine.checkpoint import load_newest
from megdet_hpc.errors import UserError
from megdet_hpc.log import read_metrics
from megdet_hpc.owner import may_be_held_by
from megdet_hpc.parallel.local_launch import rank_launcher
from megdet_hpc.study import plots, runner
from megdet_hpc.study.grids import Cell, Run, base_config, expand, with_settings
from megdet_hpc.study.outcome import LOG, Outcome, judge, read_outcome, write_outcome
from megdet_hpc.study.report import rows_of, score_of, tables_of, write_reports
from megdet_hpc.study.runner import DATA, DECLARED, Inputs, Runner, check_defaults, means_the_same, only_one
from megdet_hpc.study.scales import SCALES
from megdet_hpc.study.scatter import over_seeds

_SHORT = {
    "data.images_per_rank": 4,
    "data.val": None,
    "max_steps": 6,
    "solver.warmup_epochs": 0.0,
    "checkpoints.every_epochs": 0.0,
}


def _run(name: str, **settings: Any) -> Run:
    dotted = {key.replace("__", "."): value for key, value in settings.items()}
    return Run(name, with_settings(base_config(SCALES["tiny"]), {**_SHORT, **dotted}))


@pytest.fixture
def inputs(shapes: Path) -> Inputs:
    return Inputs(shapes / "train", shapes / "val", None)


def _train(folder: Path, runs: list[Run], inputs: Inputs, max_minutes: float | None = None) -> int:
    with only_one(folder) as lock:
        return Runner(folder, 2, max_minutes, lock).train(runs, inputs)


def test_divergence_is_a_result_and_what_is_finished_stays(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good, bad = replace(_run("good"), data="packs"), _run("bad", solver__base_lr=1e8)
    assert _train(tmp_path, [good, bad], inputs) == 0
    done, failed = read_outcome(tmp_path / good.folder), read_outcome(tmp_path / bad.folder)
    assert done and failed
    assert (done.status, done.step, done.reason) == ("done", 6, "")
    assert done.loss_last is not None and done.loss_first is not None and done.loss_last < done.loss_first
    assert done.train_seconds > 0 and done.images_per_s == pytest.approx(6 * 4 / done.train_seconds)
    assert failed.status == "failed" and failed.step < 6
    assert failed.reason.endswith(f"is not finite at step {failed.step}")
    assert (tmp_path / good.folder / DATA).read_text() == good.data
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.name != ".lock"}
    assert _train(tmp_path, [good, bad], inputs) == 0
    assert "2 runs, 2 finished, 0 to train" in capfd.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_a_broken_run_is_tried_again_and_a_cut_one_goes_on(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = _run("run")
    nowhere = Inputs(tmp_path / "nowhere", tmp_path / "nowhere", None)
    assert _train(tmp_path, [run], nowhere) == 1
    broken = read_outcome(tmp_path / run.folder)
    assert broken and broken.status == "error" and "nowhere does not exist" in broken.reason
    # 0.6 s: the trainer is still starting
    assert _train(tmp_path, [run], inputs, max_minutes=0.01) == 1
    assert "unfinished, continues next time" in capfd.readouterr().out
    assert _train(tmp_path, [run], inputs) == 0
    done = read_outcome(tmp_path / run.folder)
    assert done and (done.status, done.step) == ("done", 6)
    assert [row["step"] for row in read_metrics(tmp_path / run.folder / "metrics.jsonl")] == [*range(1, 7)]
    # other settings: said, trained in a folder of its own; here only the saying
    capfd.readouterr()
    assert _train(tmp_path, [_run("run", max_steps=7)], nowhere) == 1
    assert f"run: the declared settings changed since {tmp_path / run.folder}" in capfd.readouterr().out


def test_ranks_of_torchrun_save_and_stop(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """SIGUSR1 would end torchrun alone."""
    monkeypatch.setattr(runner, "rank_launcher", lambda ranks: rank_launcher(ranks, str(tmp_path / "no_mpi")))
    run = replace(_run("run", max_steps=1500), ranks=2)
    folder = tmp_path / run.folder
    metrics = folder / "metrics.jsonl"

    def stop() -> None:
        end = time.monotonic() + 200
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < end:
            time.sleep(0.1)
        signal.raise_signal(signal.SIGUSR1)

    threading.Thread(target=stop, daemon=True).start()
    assert _train(tmp_path, [run], inputs) == 1
    assert f"{run.folder}: unfinished, continues next time" in capfd.readouterr().out
    log = (folder / LOG).read_text()
    assert f"{folder}/stop is there; the state is saved" in log, log
    found = load_newest(folder / "checkpoints")
    assert found is not None and 0 < found[1]["step"] < 1500
    assert not (folder / "stop").exists() and not may_be_held_by(folder)


def test_two_studies_do_not_share_a_folder(tmp_path: Path) -> None:
    with only_one(tmp_path), pytest.raises(UserError, match="still runs there"), only_one(tmp_path):
        pass
    with only_one(tmp_path):
        pass


def _metrics(folder: Path, losses: list[float], score: float | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"step": i + 1, "epoch": i + 1.0, "loss": loss, "step_max_s": 0.5} for i, loss in enumerate(losses)]
    scores = (
        []
        if score is None
        else [{"step": len(losses), "epoch": float(len(losses)), "val/AP": score, "val/AP50": 2 * score}]
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *scores]))


@pytest.mark.parametrize(
    ("losses", "score", "status"),
    [([2, 1], 0.3, "done"), ([2, 1], 0.001, "failed"), ([2, 3], 0.3, "failed"), ([2, 1], None, "done")],
)
def test_a_run_that_ends_is_judged_by_its_numbers(
    losses: list[float], score: float | None, status: str, tmp_path: Path
) -> None:
    _metrics(tmp_path, losses, score)
    outcome = judge(tmp_path, 0, 8)
    assert (outcome.status, outcome.step, outcome.ap) == (status, 2, score)
    assert (outcome.train_seconds, outcome.images_per_s) == (1.0, 16.0)
    assert judge(tmp_path, 1, 8).status == "error"


def test_tables_and_plots_come_from_the_records(tmp_path: Path) -> None:
    names = ["batch", "bn_size", "epochs", "warmup", "ranks"]
    cells = expand(SCALES["tiny"], names)
    runs = tmp_path / "runs"
    epochs = [cell for cell in cells if cell.grid == "epochs" and cell.columns["batch"] in (16, 256)]
    for number, cell in enumerate(epochs):
        _metrics(runs / cell.run.folder, [2, 1, 0.5], 0.25 * (number + 1))
        write_outcome(runs / cell.run.folder, judge(runs / cell.run.folder, 0, cell.run.global_batch), {})
    diverged = next(c for c in cells if c.columns == {"norm": "frozen", "warmup": False, "batch": 256})
    failed = Outcome("failed", "a loss is not finite at step 3", 3, None, None, 2.0, 9.0, 1.0, 700.0)
    write_outcome(runs / diverged.run.folder, failed, {})
    files = write_reports(tables_of(cells, runs), score_of(cells), tmp_path, "test")
    assert {file.name for file in files if file.suffix == ".png"} == {"batch.png", "epochs.png", "warmup.png"}
    with open(tmp_path / "batch.csv") as file:
        table = list(csv.DictReader(file))
    assert [row["status"] for row in table].count("done") == 2 and len(table) == 20
    assert table[4]["batch"] == "256" and float(table[4]["AP"]) == 0.5
    markdown = (tmp_path / "warmup.md").read_text()
    assert "| frozen | no | 256 | failed | 3 | - | - | 9 | 1 | 700 | a loss is not finite at step 3 |" in markdown
    assert "| cgbn | no | 256 | not run |" in markdown
    assert [(row["batch"], row["epoch"], row["AP"]) for row in rows_of(epochs, runs)] == [
        (16, 3.0, 0.25),
        (256, 3.0, 0.5),
    ]


def test_a_study_by_vocs_metric_names_it(tmp_path: Path) -> None:
    cells = expand(SCALES["tiny"], ["epochs"], {"evaluation.metric": "voc07"})[:1]
    folder = tmp_path / "runs" / cells[0].run.folder
    _metrics(folder, [2, 1], 0.25)
    log = folder / "metrics.jsonl"
    log.write_text(log.read_text().replace('"val/AP": 0.25', '"val/AP": 0.25, "val/AP50_voc07": 0.75'))
    outcome = judge(folder, 0, 16, "AP50_voc07")
    assert (outcome.ap, outcome.score_name) == (0.75, "AP50_voc07")
    write_outcome(folder, outcome, {})
    write_reports(tables_of(cells, tmp_path / "runs"), score_of(cells), tmp_path, "test")
    with open(tmp_path / "epochs.csv") as file:
        (row,) = csv.DictReader(file)
    assert float(row["AP50_voc07"]) == 0.75 and "AP" not in row
    assert (tmp_path / "epochs.md").read_text().startswith("### test: AP50_voc07 by epoch, ")


def test_the_rows_of_an_epoch_are_those_of_every_seed(tmp_path: Path) -> None:
    """One seed ends, one fails after its first evaluation, one never began."""
    runs = tmp_path / "runs"
    cells = [cell for seed in (0, 1, 2) for cell in expand(SCALES["tiny"], ["epochs"], {"seed": seed})]
    cells = [cell for cell in cells if cell.columns["batch"] == 16]
    for seed, losses, last in ((0, [4, 3, 2, 1], 4), (1, [4, 3, 9], 2)):
        folder = runs / cells[seed].run.folder
        _metrics(folder, losses)
        scores = [
            {"step": step, "epoch": step / 2, "val/AP": 0.1 * step, "val/AP50": 0.9} for step in range(2, last + 1, 2)
        ]
        with open(folder / "metrics.jsonl", "a") as file:
            file.writelines(json.dumps(score) + "\n" for score in scores)
    (runs / cells[1].run.folder / LOG).write_text("NotFiniteError: step 40: a loss is not finite")
    for seed, status in ((0, 0), (1, 1)):
        folder = runs / cells[seed].run.folder
        write_outcome(folder, judge(folder, status, 16), {})
    tables = tables_of(cells, runs)
    first, end = over_seeds(tables["epochs"])
    assert (first["epoch"], first["runs"], first["failed"], first["by seed"]) == (
        1.0,
        "2 of 3",
        1,
        "0.200, failed at 40, -",
    )
    assert (end["epoch"], end["runs"], end["failed"], end["by seed"]) == (2.0, "2 of 3", 1, "0.400, failed at 40, -")
    assert (first["steps"], first["train_s"], end["train_s"]) == (2, 1.0, 2.0)
    row = next(row for row in tables["epochs"] if row["epoch"] == 1.0)
    assert (row["steps"], row["run_steps"], row["loss"], row["images_per_s"]) == (2, 4, 3, 32.0)
    write_reports(tables, score_of(cells), tmp_path, "test")
    assert (tmp_path / "epochs.png").is_file()


def test_averaged_weights_are_scored_where_a_run_has_them(tmp_path: Path) -> None:
    cells = expand(SCALES["tiny"], ["epochs"], {"solver.ema_decay": 0.9})[:1]
    folder = tmp_path / cells[0].run.folder
    _metrics(folder, [2, 1], 0.5)
    log = folder / "metrics.jsonl"
    log.write_text(log.read_text().replace('"val/AP": 0.5', '"val/AP": 0.5, "val/ema_AP": 0.3, "val/ema_AP50": 0.4'))
    outcome = judge(folder, 0, 16)
    assert (outcome.ap, outcome.ap50) == (0.3, 0.4)
    write_outcome(folder, outcome, {})
    assert [(row["AP"], row["AP50"]) for row in rows_of(cells, tmp_path)] == [(0.3, 0.4)]


def test_several_seeds_are_means_and_dots_in_the_bars_and_over_ranks() -> None:
    rows = [
        {"seed": seed, "norm": norm, "warmup": warm, "batch": 256, "status": "done", "AP": ap + 0.1 * seed, "steps": 3}
        for norm, warm, ap in (("cgbn", True, 0.5), ("frozen", False, 0.2))
        for seed in range(3)
    ]
    rows[-1] |= {"status": "failed", "AP": None}
    _, axes = plots.plt.subplots()
    plots._warmup(axes, rows)
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([0.6, 0.25])
    assert [list(line.get_ydata()) for line in axes.lines] == [
        pytest.approx([0.5, 0.6, 0.7]),
        pytest.approx([0.2, 0.3]),
    ]
    assert [text.get_text() for text in axes.texts] == ["0.600", "0.250, 1 of 3 failed"]
    rows = [
        {"seed": seed, "ranks": ranks, "train_s": 8 / ranks + seed, "steps": 48 // ranks, "status": "done", "AP": None}
        for seed in range(3)
        for ranks in (1, 2)
    ]
    _, axes = plots.plt.subplots()
    plots._ranks(axes, rows)
    dots, means = axes.lines
    assert len(dots.get_xdata()) == 6 and (list(means.get_xdata()), list(means.get_ydata())) == ([1, 2], [9.0, 5.0])
    assert [text.get_text() for text in axes.texts] == ["48 steps", "24 steps"]
    plots.plt.close("all")


def test_findings_of_other_grids_are_other_files(tmp_path: Path) -> None:
    cells = expand(SCALES["small"], ["claim", "epochs", "rates"])
    tables = tables_of(cells, tmp_path / "runs")
    for table in tables.values():
        for row in table:
            row |= {"status": "failed", "steps": 3}
    for grids, name in ((["claim", "epochs", "rates"], "findings-claim-epochs.md"), (["claim"], "findings-claim.md")):
        files = write_reports({grid: tables[grid] for grid in grids}, "AP", tmp_path, "test")
        assert files[-1] == tmp_path / name
    assert len(list(tmp_path.glob("findings*"))) == 2


def test_seeds_are_one_row_with_their_scatter(tmp_path: Path) -> None:
    cells = [cell for seed in (0, 1, 2) for cell in expand(SCALES["small"], ["claim", "warmups"], {"seed": seed})]
    runs = tmp_path / "runs"
    scores = {(16, 0): 0.5, (16, 1): 0.52, (256, 0): 0.4}
    for cell in cells:
        key = cell.columns["batch"], cell.run.config.seed
        if cell.grid == "claim" and cell.columns["norm"] == "cgbn" and key in scores:
            _metrics(runs / cell.run.folder, [2, 1, 0.5], scores[key])
            write_outcome(runs / cell.run.folder, judge(runs / cell.run.folder, 0, cell.run.global_batch), {})
        if cell.columns == {"norm": "frozen", "batch": 256} and cell.run.config.seed == 0:
            failed = Outcome("failed", "a loss is not finite at step 3", 3, None, None, 2.0, 9.0, 1.0, 700.0)
            write_outcome(runs / cell.run.folder, failed, {})
    files = write_reports(tables_of(cells, runs), score_of(cells), tmp_path, "test")
    assert {file.name for file in files if file.suffix == ".png"} == {"claim.png", "warmups.png"}
    table = (tmp_path / "claim.md").read_text()
    assert "| cgbn | 16 | 2 of 3 | 0 | 0.510 | 0.014 | 0.500, 0.520, - | 3 |" in table
    assert "| cgbn | 256 | 1 of 3 | 0 | 0.400 | - | 0.400, -, - | 3 |" in table
    assert "| frozen | 256 | 1 of 3 | 1 | - | - | failed at 3, -, - | 3 |" in table
    assert "| one rank | 64 | 0 of 3 | 0 | - | - | -, -, - | - |" in table
    with open(tmp_path / "claim.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 27 and [row["seed"] for row in rows[::9]] == ["0", "1", "2"]


def test_a_run_under_an_earlier_hash_is_taken_up(
    tmp_path: Path, inputs: Inputs, capfd: pytest.CaptureFixture[str]
) -> None:
    run, other = _run("run"), _run("run", max_steps=7)
    for old, declared in (("run-00000000", other), ("run-11111111", run)):
        (tmp_path / old).mkdir()
        settings = json.loads(json.dumps(to_dict(with_settings(declared.config, {"data.train": str(inputs.train)}))))
        del settings["data"]["cache"], settings["solver"]["grow_to"]  # a version without these keys
        (tmp_path / old / "study.yaml").write_text(yaml.safe_dump(settings))
        write_outcome(tmp_path / old, Outcome("done", "", 6, None, None, 2.0, 1.0, 1.0, 1.0), {})
    assert _train(tmp_path, [run], inputs) == 0
    said = capfd.readouterr().out
    assert f"{tmp_path / 'run-11111111'}: has the settings of {run.folder}" in said and "1 finished" in said
    assert (tmp_path / run.folder).is_dir() and (tmp_path / "run-00000000").is_dir()


@pytest.mark.parametrize("knows_data", [True, False])
def test_a_run_of_other_weights_or_data_is_not_taken_up(tmp_path: Path, inputs: Inputs, knows_data: bool) -> None:
    """A version that wrote the configuration alone is known by the path of the weights."""
    ours, theirs = (replace(inputs, weights=tmp_path / name) for name in ("ours.pth", "theirs.pth"))
    run = replace(_run("run"), data="packs of now, weights of now")
    old = tmp_path / "run-00000000"
    old.mkdir()
    weights = {"data.train": str(inputs.train), "model.backbone_weights": str(theirs.weights)}
    settings = json.loads(json.dumps(to_dict(with_settings(run.config, weights))))
    (old / DECLARED).write_text(yaml.safe_dump(settings))
    write_outcome(old, Outcome("done", "", 6, None, None, 2.0, 1.0, 1.0, 1.0), {})

    def taken_up(own: Inputs, data: str = "") -> bool:
        if knows_data:
            (old / DATA).write_text(data)
        return means_the_same(old / DECLARED, run, own)

    assert taken_up(ours, run.data) == knows_data  # the same weights at another path
    assert not taken_up(ours, "packs of now, weights of then")
    assert taken_up(theirs, "packs of then, weights of now") == (not knows_data)  # other packs at the same path
    assert not taken_up(replace(theirs, train=inputs.val), run.data)
    assert taken_up(theirs, run.data)
    for first, last, found in ((1.0, 2.0, False), (2.0, 2.0, True)):
        for own, value in ((ours, first), (theirs, last)):
            torch.save({"conv1.weight": torch.full((2,), value)}, own.weights)  # type: ignore[arg-type]
        assert taken_up(ours, run.data) == (knows_data or found)  # the same tensors in another file
    (tmp_path / "ours.pth").write_bytes(b"no weights")
    if knows_data:
        (old / DATA).write_text("packs of now, weights of then")
    with only_one(tmp_path) as lock:
        Runner(tmp_path, 1, 0.001, lock)._take_up(run, ours)
        assert old.is_dir() and not (tmp_path / run.folder).exists()
        if knows_data:
            (old / DATA).write_text(run.data)
        Runner(tmp_path, 1, 0.001, lock)._take_up(run, theirs)
    assert not old.exists() and (tmp_path / run.folder / DECLARED).is_file()


def test_a_default_that_changed_is_named(tmp_path: Path) -> None:
    run = _run("run")
    folder = tmp_path / run.folder
    folder.mkdir()
    settings = json.loads(json.dumps(to_dict(run.config)))
    settings["solver"]["momentum"], settings["output"] = 0.8, "elsewhere"
    del settings["solver"]["clip_norm"]  # a version without this key
    write_outcome(folder, Outcome("done", "", 6, None, None, 2.0, 1.0, 1.0, 1.0), settings)
    with pytest.raises(UserError, match=r"other defaults \(solver.momentum 0.8, now 0.9\)"):
        check_defaults(folder, run)
    check_defaults(tmp_path / "none", run)


def test_a_cell_without_a_record_is_not_run(tmp_path: Path) -> None:
    run = _run("none")
    assert read_outcome(tmp_path / run.folder) is None
    assert [row["status"] for row in rows_of([Cell("batch", {"batch": 4}, run)], tmp_path)] == ["not run"]
