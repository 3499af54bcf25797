"""The main job on generated data: train, resume, evaluate, fail; with real Horovod over real MPI."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from megdet_hpc.engine.checkpoint import load_checkpoint
from megdet_hpc.log import read_metrics
from tests.conftest import Launch, mpirun, run
from tests.parallel.test_doctor import mpmd

pytestmark = pytest.mark.parallel

SMALL = [
    *("--config", "tiny", "--device", "cpu", "--seed", "3", "--log_every", "2", "--solver.epochs", "2"),
    *("--data.images_per_rank", "2", "--data.short_sides", "[64]", "--data.val_short_side", "64"),
    *("--model.neck_channels", "16", "--model.box_head_channels", "32", "--evaluation.every_epochs", "0"),
    *("--evaluation.score_threshold", "0.0", "--checkpoints.every_epochs", "0"),
]


def arguments(shapes: Path, output: Path, *further: str) -> list[str]:
    folders = ["--data.train", str(shapes / "train"), "--data.val", str(shapes / "val"), "--output", str(output)]
    return ["-m", "megdet_hpc.train", *SMALL, *folders, *further]


@pytest.fixture(scope="module")
def trained(launch: Launch, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of 2 ranks: 24 images, 4 an update, 2 epochs = 12 steps (14 where grouping fills a batch)."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    done = launch(2, *arguments(shapes, output))
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"result: AP=0\.\d+ AP50=0\.\d+ output={output}", done.stdout.splitlines()[-1])
    assert "2 ranks x 2 images x 1 passes = 4 images" in done.stdout
    return output


def newest(output: Path) -> Path:
    return sorted((output / "checkpoints").glob("*.pt"))[-1]


def test_a_run_leaves_what_a_user_looks_for(trained: Path) -> None:
    rows = read_metrics(trained / "metrics.jsonl")
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == list(range(2, steps[-1] + 1, 2))
    assert {"images_per_s", "step_max_s", "lr", "loss_classifier", "gradient_norm"} <= set(rows[0])
    assert "val/AP50" in rows[-1]
    for name in ("curves.png", "predictions.png", "config.yaml", "detections.json"):
        assert (trained / name).stat().st_size > 0
    state = load_checkpoint(newest(trained))
    assert state["step"] == steps[-1]
    assert state["config"]["data"]["images_per_rank"] == 2


def test_a_run_cut_and_resumed_ends_with_the_same_bits(
    launch: Launch, shapes: Path, trained: Path, tmp_path: Path
) -> None:
    first = launch(2, *arguments(shapes, tmp_path / "cut", "--max_steps", "5"))
    assert first.returncode == 0, first.stderr
    again = launch(2, *arguments(shapes, tmp_path / "cut"))
    assert again.returncode != 0
    assert "holds a run already; continue it with --resume auto" in again.stderr
    # loader workers started beside MPI change no bit
    second = launch(2, *arguments(shapes, tmp_path / "cut", "--resume", "auto", "--data.num_workers", "1"))
    assert second.returncode == 0, second.stderr
    assert re.search(r"start: +step 5 of \d+, from .*step_00000005\.pt", second.stdout)
    assert "changed since" in second.stdout and "data.num_workers: 0 -> 1" in second.stdout
    whole, cut = (load_checkpoint(newest(folder)) for folder in (trained, tmp_path / "cut"))
    assert whole["step"] == cut["step"]
    for key, value in whole["model"].items():
        assert torch.equal(value, cut["model"][key]), key
    momenta = [s["state"][0]["momentum_buffer"] for s in (whole["optimizer"], cut["optimizer"])]
    assert torch.equal(*momenta)
    losses = [
        {row["step"]: row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row}
        for folder in (trained, tmp_path / "cut")
    ]
    assert losses[0][10] == losses[1][10]


def test_a_run_goes_on_with_more_ranks(launch: Launch, shapes: Path, tmp_path: Path) -> None:
    """One rank makes 5 updates of 2 images, two ranks the rest; cut once more, the end has the same bits."""
    first = launch(1, *arguments(shapes, tmp_path / "a", "--max_steps", "5"))
    assert first.returncode == 0, first.stderr
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    auto = ("--resume", "auto")
    whole = launch(2, *arguments(shapes, tmp_path / "a", *auto))
    assert whole.returncode == 0, whole.stderr
    assert "re-planned: num_ranks 1 -> 2; global batch 2 -> 4 images" in whole.stdout
    cut = launch(2, *arguments(shapes, tmp_path / "b", *auto, "--max_steps", "7"))
    assert cut.returncode == 0, cut.stderr
    again = launch(2, *arguments(shapes, tmp_path / "b", *auto, "--data.num_workers", "1"))
    assert again.returncode == 0, again.stderr
    assert "re-planned" not in again.stdout
    assert re.search(r"start: +step 7 of \d+, from .*step_00000007\.pt", again.stdout)
    states = [load_checkpoint(newest(tmp_path / name)) for name in ("a", "b")]
    assert states[0]["step"] == states[1]["step"] > 7
    for key, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][key]), key
    rows = [row for row in read_metrics(tmp_path / "b" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    assert rows[0]["step"] == 2 and rows[-1]["epoch"] == 2
    # the first rank saw 10 of 24 images; the schedule goes on at that place
    after = next(row for row in rows if row["step"] > 7)
    assert 10 / 24 < after["epoch"] - 2 * (after["step"] - 7) / 14 < 1


def test_evaluation_is_the_same_at_any_number_of_ranks(
    launch: Launch, shapes: Path, trained: Path, tmp_path: Path
) -> None:
    outputs, results = [], []
    for ranks in (0, 2, 3):
        file = tmp_path / f"{ranks}.json"
        command = ["--checkpoint", str(newest(trained)), "--data.val", str(shapes / "val"), "--results", str(file)]
        done = launch(ranks, "-m", "megdet_hpc.evaluate", *command)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.splitlines()[-1])
        results.append(json.loads(file.read_text()))
    assert re.fullmatch(r"result: AP=0\.\d{3} AP50=0\.\d{3} images=10", outputs[0])
    assert outputs[1:] == outputs[:1] * 2
    assert results[1:] == results[:1] * 2
    assert len(results[0]) > 10


def test_an_evaluation_whose_ranks_differ_is_refused(shapes: Path, trained: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megdet_hpc.evaluate", "--checkpoint", str(newest(trained))]
    command += ["--results", str(tmp_path / "results.json"), "--data.val"]
    done = mpmd([*command, str(shapes / "val")], [*command, str(shapes / "train"), "--limit", "3"])
    assert done.returncode == 2, done.stdout + done.stderr
    assert "the command line is " in done.stderr and "--limit 3 on " in done.stderr
    assert not (tmp_path / "results.json").exists()


def test_only_rank_0_opens_the_checkpoint(shapes: Path, trained: Path, tmp_path: Path) -> None:
    """A rank on another host may see an older state of a shared folder; here it stands where there is no such file."""
    program = [sys.executable, "-m", "megdet_hpc.evaluate", "--checkpoint", newest(trained).name, "--limit", "2"]
    program += ["--data.val", str(shapes / "val"), "--results", str(tmp_path / "found.json")]
    places = [["-np", "1", "-wdir", str(folder), *program] for folder in (newest(trained).parent, tmp_path)]
    done = run([*mpirun(), *places[0], ":", *places[1]])
    assert done.returncode == 0, done.stderr
    assert "2 rank(s)" in done.stdout and (tmp_path / "found.json").stat().st_size > 0
    wrong = [[*place, "--norm.momentum", "7"] for place in places]
    refused = run([*mpirun(), *wrong[0], ":", *wrong[1]])
    assert refused.returncode == 2
    assert refused.stderr.count("norm.momentum is 7.0; accepted: 0 to 1") == 1 and "Traceback" not in refused.stderr


def test_a_checkpoint_of_other_data_is_refused(shapes: Path, trained: Path, launch: Launch, tmp_path: Path) -> None:
    other = launch(1, *arguments(shapes, tmp_path / "other", "--resume", str(newest(trained)), "--seed", "4"))
    assert other.returncode != 0
    assert "seed 3 (now 4); a run continues only with the same data, groups and seed" in other.stderr
    assert "Traceback" not in other.stderr


def test_a_resumed_model_must_be_the_same_and_older_files_stay(shapes: Path, trained: Path, launch: Launch) -> None:
    other = launch(2, *arguments(shapes, trained, "--resume", "auto", "--norm.kind", "gn"))
    assert other.returncode != 0
    assert "was trained with another model; changed: norm.kind: cgbn -> gn" in other.stderr
    early = trained.parent / "early.pt"
    torch.save({**load_checkpoint(newest(trained)), "step": 1}, early)
    done = launch(2, *arguments(shapes, trained, "--resume", str(early)))
    assert done.returncode != 0
    assert "is at step 1, but output" in done.stderr


def test_bad_bn_size_fails_with_the_equation(launch: Launch, shapes: Path, tmp_path: Path) -> None:
    done = launch(2, *arguments(shapes, tmp_path / "never", "--norm.size", "3"))
    assert done.returncode != 0
    assert "2 ranks x 2 images per rank / BN size 3" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "never").exists()


def test_without_data_it_explains_what_it_needs(launch: Launch, tmp_path: Path) -> None:
    done = launch(0, "-m", "megdet_hpc.train", "--data.train", str(tmp_path / "nowhere"))
    assert done.returncode == 2
    for text in ("nowhere does not exist", "data_prep/pack_coco.py", "megdet_r50_fpn_256", "horovodrun -np 128"):
        assert text in done.stderr


@pytest.mark.horovod
def test_horovodrun_as_the_readme_types_it(launch: Launch, shapes: Path, tmp_path: Path) -> None:
    command = [
        "horovodrun",
        "-np",
        "2",
        "python",
        *arguments(shapes, tmp_path / "hvd", "--max_steps", "2", "--norm.size", "2"),
    ]
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert "2 rank(s) on 1 host(s), Horovod over MPI" in done.stdout
    assert "2 BN group(s) of 1 rank(s) = 2 images each, two_stage over mpi" in done.stdout
    assert load_checkpoint(newest(tmp_path / "hvd"))["step"] == 2
