"""Expansion of the grids: counts, shared runs, hashes, settings that the paper's form asks for."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from megdet_hpc.errors import UserError
from megdet_hpc.solver.lr_schedule import LrSchedule, resolve_schedule
from megdet_hpc.study.__main__ import main
from megdet_hpc.study.grids import (
    PAPER_GRIDS,
    Run,
    base_config,
    distinct,
    estimated_seconds,
    expand,
    peak_rate,
    queue,
    with_settings,
)
from megdet_hpc.study.scales import SCALES, scale_named
from megdet_hpc.study.scratch import SCRATCH_SCALES


def test_the_tiny_grids_share_runs() -> None:
    cells = expand(SCALES["tiny"], list(PAPER_GRIDS))
    numbers = {name: sum(cell.grid == name for cell in cells) for name in PAPER_GRIDS}
    assert numbers == {"batch": 20, "bn_size": 6, "epochs": 5, "warmup": 4, "ranks": 3}
    # shared with batch: BN size 32 at 64, all of epochs, both with warmup
    assert len(distinct(cells)) == 38 - 8
    assert len({run.folder for run in distinct(cells)}) == 30
    assert [run.ranks for run in distinct(cells)[-3:]] == [1, 2, 4]


@pytest.mark.parametrize("name", list(SCALES))
def test_every_run_has_its_declared_batch_and_bn_size(name: str) -> None:
    for cell in expand(SCALES[name], list(PAPER_GRIDS)):
        config = cell.run.config
        assert cell.run.global_batch == cell.columns["batch"], cell.run.folder
        if cell.grid == "bn_size":
            assert config.norm.size == cell.columns["bn_size"]
        if cell.grid == "batch":
            assert config.norm.kind == cell.columns["norm"]
            assert config.solver.base_lr == pytest.approx(
                base_config(SCALES[name]).solver.base_lr * cell.columns["rate"]
            )
        if cell.grid == "warmup":
            assert (config.solver.warmup_epochs > 0) == cell.columns["warmup"]
        if config.norm.kind == "cgbn" and cell.grid != "ranks":
            own = sorted((config.norm.size, config.data.images_per_rank))
            assert own[1] % own[0] == 0
            assert cell.run.global_batch % config.norm.size == 0


def test_a_run_at_256_is_emulated_as_128_ranks_of_two() -> None:
    cell = next(c for c in expand(SCALES["coco"], ["epochs"]) if c.columns["batch"] == 256)
    assert (cell.run.config.emulate.ranks, cell.run.config.data.images_per_rank) == (128, 2)


def test_the_hash_follows_what_decides_the_result_and_nothing_else() -> None:
    run = expand(SCALES["tiny"], ["epochs"])[0].run
    same = replace(run, config=with_settings(run.config, {"output": "elsewhere", "resume": "auto"}))
    other = replace(run, config=with_settings(run.config, {"solver.weight_decay": 2e-4}))
    assert same.digest == run.digest
    assert len({run.digest, other.digest, replace(run, ranks=1).digest, replace(run, data="other").digest}) == 4
    assert expand(SCALES["tiny"], ["epochs"], {"seed": 1})[0].run.digest != run.digest


def test_settings_are_checked_together() -> None:
    config = base_config(SCALES["tiny"])
    changed = with_settings(config, {"data.max_side": 40, "data.short_sides": (32,), "data.val_short_side": 32})
    assert (changed.data.max_side, changed.data.short_sides) == (40, (32,))
    assert changed.model == config.model
    with pytest.raises(UserError, match=r"norm\.sice: the configuration has no such key"):
        with_settings(config, {"norm.sice": 2})
    with pytest.raises(UserError, match=r"data\.max_side"):
        with_settings(config, {"data.max_side": 40})


def test_the_estimate_grows_with_the_work() -> None:
    tiny = SCALES["tiny"]
    seconds = {c.columns["bn_size"]: estimated_seconds(c.run, tiny) or 0.0 for c in expand(tiny, ["bn_size"])}
    assert seconds[2] == seconds[32] > seconds[64] > 0  # a rank shares its images out
    assert estimated_seconds(expand(SCALES["coco"], ["epochs"])[0].run, SCALES["coco"]) is None


def test_the_whole_tiny_study_is_declared_within_its_time() -> None:
    """About an hour of two idle cores."""
    runs = distinct(expand(SCALES["tiny"], list(PAPER_GRIDS)))
    assert sum(estimated_seconds(run, SCALES["tiny"]) or 0.0 for run in runs) / 2 < 70 * 60


def test_other_packs_or_weights_are_other_runs() -> None:
    ours, theirs = (expand(SCALES["bccd"], ["batch"], inputs=text)[0].run for text in ("one", "other"))
    assert ours.name == theirs.name and ours.folder != theirs.folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["batches"], "grid batches: accepted are all, batch, bn_size"),
        (["all", "--scale", "huge"], "--scale huge: accepted are tiny, small, bccd, coco"),
        (["all", "--scale", "bccd", "--data", "/nowhere"], "/nowhere/train does not exist; name a folder"),
        (["all", "--jobs", "0"], "--jobs 0: accepted are 1 or more"),
        (["all", "--max-minutes", "0"], "--max-minutes 0: accepted is more than 0"),
        (["all", "--max-minutes", "nan"], "--max-minutes nan: accepted is more than 0"),
        (["all", "foo"], "grid foo: accepted are all, batch, bn_size"),
        ([], "name a grid: all, batch"),
        (["scratch", "batch"], "scratch has detectors and weights of its own: name it without other grids"),
        (["scratch", "--lines", "dsd"], "--lines dsd: accepted are dsod, norm, rate, pool, where, clip, first, size"),
        (["scratch", "--seeds", "11"], "--seeds 11: accepted are 1 to 10"),
        (["batch", "--lines", "dsod"], "--lines belongs to scratch"),
        (["batch", "--data", "packs"], "--data packs: --scale tiny generates its data and trains its first weights"),
        (["batch", "--scale", "small", "--backbone-weights", "w.pth"], "accepted at the scales bccd, coco"),
        (["scratch", "--data", "packs"], "--data packs: --scale tiny generates its data"),
        (["scratch", "--scale", "bccd"], "--scale bccd: with scratch accepted are tiny, voc, coco"),
        (["scratch", "--scale", "voc", "--data", "/nowhere"], "/nowhere/train does not exist; name a folder"),
    ],
)
def test_bad_input_ends_with_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--output", str(tmp_path)])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_folders_of_images_are_no_packs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    study = ["batch", "--scale", "bccd", "--data", str(tmp_path), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main(study)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert f"{tmp_path}/train is no pack: it has no manifest.json" in error and "pack_coco.py" in error
    with pytest.raises(SystemExit) as ended:
        main([*study, "--dry-run"])
    assert ended.value.code == 0


def test_a_failure_of_the_machine_may_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs do not try again after status 2."""
    for code, status in ((errno.EIO, 1), (errno.ENOTDIR, 2)):

        def fail(options: object, code: int = code) -> int:
            raise OSError(code, "no", "result.json")

        monkeypatch.setattr("megdet_hpc.study.__main__.run_study", fail)
        with pytest.raises(SystemExit) as ended:
            main(["claim"])
        assert ended.value.code == status


def test_an_output_that_cannot_be_is_said_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        main(["warmup", "--output", str(tmp_path / "file")])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and f"{tmp_path}/file" in error


@pytest.mark.parametrize(
    ("grid", "name", "estimated", "num_first"),
    [
        *(("all", name, name in ("tiny", "small"), None) for name in SCALES),
        *(("scratch", name, name == "tiny", 2 if name == "tiny" else 0) for name in SCRATCH_SCALES),
    ],
)
def test_a_dry_run_needs_no_data_and_writes_nothing(
    grid: str,
    name: str,
    estimated: bool,
    num_first: int | None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """The number of runs that train first weights is checked where it is given."""
    with pytest.raises(SystemExit) as ended:
        main([grid, "--scale", name, "--dry-run", "--output", f"{tmp_path}/study"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert ("\nestimate: " in text) == estimated
    assert num_first is None or text.count("pretraining-") == num_first
    assert list(tmp_path.iterdir()) == []


def test_other_seeds_are_other_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    names = []
    for seed in ("0", "1"):
        with pytest.raises(SystemExit):
            main(["warmup", "--seed", seed, "--dry-run", "--output", str(tmp_path)])
        lines = capsys.readouterr().out.splitlines()
        names.append([line.split()[0] for line in lines if line.startswith(("cgbn", "frozen", "pretraining"))])
    assert len(names[0]) == len(names[1]) == 5
    # all begin with the same first weights
    assert set(names[0]) & set(names[1]) == {names[0][0]} and names[0][0].startswith("pretraining")


SMALL = SCALES["small"]


def test_small_gives_256_enough_updates() -> None:
    run = next(c.run for c in expand(SMALL, ["claim"]) if c.columns == {"norm": "cgbn", "batch": 256})
    solver = run.config.solver
    updates = SMALL.num_images / 256
    assert updates * solver.epochs >= 800 and updates * solver.warmup_epochs >= 80
    assert SMALL.num_images * solver.epochs >= 200_000
    assert peak_rate(run) == pytest.approx(0.16) and run.config.emulate.ranks == 8
    everything = queue([expand(SMALL, ["claim", "bn_size", "warmups", "rates"], {"seed": seed}) for seed in range(3)])
    assert sum(estimated_seconds(run, SMALL) or 0.0 for run in everything) / 2 < 8 * 3600


def test_the_most_telling_runs_come_first() -> None:
    runs = queue([expand(SMALL, ["bn_size", "rates", "warmups", "claim"], {"seed": seed}) for seed in range(3)])
    names = [(run.name, run.config.seed) for run in runs]
    small, large, fixed = "cgbn16-b16-lr1", "cgbn32-b256-lr1", "frozen-b256-lr1"
    assert names[:3] == [(small, 0), (large, 0), (fixed, 0)]
    assert names[3:9] == [(small, 1), (large, 1), (small, 2), (large, 2), (fixed, 1), (fixed, 2)]
    assert names.index(("cgbn32-b256-lr1-nowarmup", 0)) < names.index(("cgbn32-b64-lr1", 1))
    assert len(set(names)) == len(names) == 54


def test_only_named_runs_are_trained(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    study = ["warmups", "--scale", "small", "--seeds", "2", "--dry-run", "--output", str(tmp_path)]
    with pytest.raises(SystemExit):
        main([*study, "--only", "*nowarmup*", "*exp1*"])
    lines = [line for line in capsys.readouterr().out.splitlines() if " rank(s) x " in line]
    assert len(lines) == 5 and lines[0].startswith("pretraining")
    assert all("nowarmup" in line or "exp1" in line for line in lines[1:])
    with pytest.raises(SystemExit):
        main([*study, "--only", "*nowarmup*", "nothing"])
    assert "--only nothing: no run has such a name; the runs are cgbn32" in capsys.readouterr().err


def test_a_key_with_its_default_does_not_change_the_name() -> None:
    """A version with further keys goes on with the runs of an earlier one."""
    run = next(c.run for c in expand(SMALL, ["claim"]) if c.columns == {"norm": "cgbn", "batch": 256})
    assert run.folder == "cgbn32-b256-lr1-2fef3e34"  # recorded runs have this name: changing it trains them anew


IMAGES_OF_COCO = SCALES["coco"].num_images


def schedule(run: Run) -> LrSchedule:
    """The schedule of a run on COCO."""
    steps = IMAGES_OF_COCO / run.global_batch
    return resolve_schedule(run.config.solver, global_batch=run.global_batch, steps_per_epoch=steps)


@pytest.mark.parametrize("name", ["rethinking_r50_fpn_cgbn_2x", "rethinking_r50_fpn_cgbn_3x"])
def test_a_warmup_in_iterations_is_left_out_too(name: str) -> None:
    cells = expand(scale_named("coco", name), ["warmup"])
    assert [schedule(cell.run).warmup_steps > 0 for cell in cells] == [True, False] * 2


@pytest.mark.parametrize(
    "name", ["rethinking_r50_fpn_cgbn_2x", "scratchdet300_coco", "dsod300_coco", "megdet_r50_fpn_256_regime"]
)
def test_real_ranks_train_one_epoch_of_any_configuration(name: str) -> None:
    for cell in expand(scale_named("coco", name), ["ranks"]):
        assert cell.run.global_batch == 2 * cell.columns["ranks"] and cell.run.config.solver.accumulate == 1
        assert schedule(cell.run).total_steps == round(IMAGES_OF_COCO / cell.run.global_batch)


def test_another_configurations_lengths_give_way_to_the_scales() -> None:
    for name in ("rethinking_r50_fpn_cgbn_2x", "scratchdet300_coco", "small_set"):
        run = expand(scale_named("bccd", name), ["epochs"])[0].run
        solver = run.config.solver
        found = resolve_schedule(solver, global_batch=16, steps_per_epoch=10)
        assert (found.warmup_steps, found.drop_steps, found.total_steps) == (40, (360, 440), 480), name


def test_the_images_of_an_update_are_those_of_its_row() -> None:
    """A configuration may accumulate passes, or let them grow."""
    for grid in ("batch", "claim", "epochs", "ranks"):
        for cell in expand(scale_named("coco", "dsod300_coco"), [grid]):
            solver = cell.run.config.solver
            assert (solver.accumulate, solver.grow_to) == (1, 0)
            assert cell.run.global_batch == cell.columns["batch"]
    run = expand(SCALES["tiny"], ["epochs"])[0].run
    twice = replace(run, config=with_settings(run.config, {"solver.accumulate": 2}))
    assert twice.global_batch == 2 * run.global_batch


def test_warmups_of_one_length_are_one_cell() -> None:
    cells = expand(SCALES["coco"], ["warmups"])
    assert [(cell.columns["form"], cell.columns["epochs"]) for cell in cells] == [
        ("none", 0),
        ("linear", 1),
        ("exp", 1),
    ]


@pytest.mark.parametrize(
    ("grid", "name", "message"),
    [
        ("warmup", "dsod300_coco", "warmup with solver.warmup_epochs 0.0: accepted are configurations with a warmup"),
        ("warmups", "megdet_r50_fpn_256_agvm", "warmups with solver.warmup_iterations 920"),
        ("rates", "megdet_r50_fpn_256_safe", "rates with solver.reference_batch 256: accepted are"),
        ("solvers", "megdet_r50_fpn_256_safe", "another one than the mini-batch, 256 or 1024"),
        ("causes", "rethinking_r50_fpn_cgbn_2x", "causes with solver.warmup_iterations 500"),
        ("causes", "scratchdet300_coco", "causes with solver.iterations 325000"),
        ("causes", "megdet_r50_fpn_256_regime", "causes with solver.policy regime"),
    ],
)
def test_a_configuration_that_a_grid_cannot_vary_is_refused(grid: str, name: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        expand(scale_named("coco", name), [grid])
    assert message in str(refused.value)
