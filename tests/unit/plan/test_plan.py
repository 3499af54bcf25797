"""`python -m megdet_hpc.plan`: arithmetic against tables by hand, refusals, warnings, the cost model's limits."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megdet_hpc.command_line import config_parser, parse_config
from megdet_hpc.config import Config
from megdet_hpc.errors import UserError
from megdet_hpc.models.weights import find_weights
from megdet_hpc.plan import validate
from megdet_hpc.plan.__main__ import main
from megdet_hpc.plan.collectives import mpi_allreduce
from megdet_hpc.plan.cost import BACKWARD_SHARE, Work, cgbn_seconds, step_time, walltime_pieces
from megdet_hpc.plan.curve import ascii_curve
from megdet_hpc.plan.describe import describe_run, marks
from megdet_hpc.plan.job_plan import COCO_TRAIN2017_IMAGES, JobPlan, TrainingSet, place_ranks, plan_job
from megdet_hpc.plan.network import NETWORKS, Network, choose_network
from megdet_hpc.plan.noise import noise_scales
from megdet_hpc.plan.risks import warnings_of
from tests.conftest import environment

COCO = TrainingSet(COCO_TRAIN2017_IMAGES, 80, "test")
# 1 us and 1 byte/us inside a node, 10 us and 0.1 byte/us between: times by hand
SLOW = Network("test", 1e-6, 1e6, 10e-6, 1e5)


def config_of(*arguments: str) -> Config:
    return parse_config(config_parser("megdet_hpc.plan", "test"), list(arguments))[0]


def plan_of(*arguments: str, ranks: int = 128, per_node: int | None = 8) -> JobPlan:
    weights = ["--model.backbone_weights", "elsewhere/resnet50.pth"]
    config = config_of("--config", "megdet_r50_fpn_256", *weights, *arguments)
    return plan_job(config, place_ranks(ranks, None, per_node), COCO)


def test_the_papers_run() -> None:
    plan = plan_of()
    assert (plan.epoch.global_batch, plan.epoch.steps_per_epoch, plan.total_steps) == (256, 463, 5093)
    assert [(step, what) for step, what in marks(plan)] == [
        (0, "start"),
        (463, "warmup ends"),
        (8 * 463, "drop x 0.1"),
        (10 * 463, "drop x 0.1"),
        (5092, "last step"),
    ]
    assert [plan.schedule.lr_at(step) for step, _ in marks(plan)] == pytest.approx([0.02, 0.32, 0.032, 0.0032, 0.0032])
    assert (plan.groups.num_groups, plan.ranks_per_statistics, plan.nodes_per_group()) == (8, 16, 2)
    text = "\n".join(describe_run(plan))
    assert "group 1: ranks 16 to 31 on nodes 2 to 3" in text
    assert "463 an epoch = ceil(118287 / 256); aspect groups may add 1" in text


def test_a_rank_with_several_groups_sends_nothing() -> None:
    plan = plan_of("--norm.size", "2", "--data.images_per_rank", "8", ranks=32)
    assert (plan.ranks_per_statistics, plan.groups.per_rank) == (1, 4)
    assert "128 BN group(s) of 2 image(s), 4 in each rank: no messages" in "\n".join(describe_run(plan))


@pytest.mark.parametrize("key", ["data.train", "data.val"])
def test_a_folder_that_is_no_pack_is_not_taken_for_coco(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only a folder that is not on this host is assumed to be COCO."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "manifest.json").touch()
    command = ["--config", "small_set", "--ranks", "1", "--images-per-second", "5"]
    with pytest.raises(SystemExit) as ended:
        main([*command, f"--{key}", str(tmp_path)])
    assert ended.value.code == 2
    assert f"{tmp_path}: holds packed sets and is none; name one of them: train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "per_node", "across"),
    [(16, 8, 1), (32, 8, 2), (256, 8, 16), (32, 16, 1), (2, 8, 1), (16, 4, 2), (32, 32, 1)],
)
def test_nodes_of_a_group(size: int, per_node: int, across: int) -> None:
    assert plan_of("--norm.size", str(size), per_node=per_node).nodes_per_group() == across


def test_a_group_that_starts_inside_a_node_spans_two() -> None:
    """96 ranks on nodes of 6, groups of 4: ranks 4 to 7 lie on nodes 0 and 1."""
    assert plan_of("--norm.size", "8", ranks=96, per_node=6).nodes_per_group() == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "128", "--norm.size", "24"], "128 ranks x 2 images per rank / BN size 24 = 10.67 groups"),
        (["--ranks", "100"], "a multiple of 8, or other --nodes"),
        (["--ranks", "128", "--nodes", "3"], "42.67 ranks per node"),
        (["--ranks", "128", "--nodes", "8", "--ranks-per-node", "8"], "= 64 ranks, not --ranks 128"),
        (["--ranks", "0"], "--ranks 0"),
        (["--ranks", "16", "--emulate.ranks", "4"], "accepted: --ranks 1"),
        (
            ["--ranks", "7", "--ranks-per-node", "7", "--norm.size", "0", "--solver.agvm", "true"],
            "even number of ranks",
        ),
        (["--ranks", "128", "--norm.sise", "24"], "--norm.size?"),
        (["--ranks", "128", "--images", "0"], "--images 0"),
        (["--ranks", "128", "--images-per-second", "-1"], "--images-per-second -1; accepted: a number above 0"),
        (["--ranks", "128", "--images-per-second", "nan"], "--images-per-second nan"),
        (["--ranks", "128", "--images-per-second", "5", "--queue-limit", "nan"], "--queue-limit nan"),
        (["--ranks", "128", "--restart-minutes", "-60"], "--restart-minutes -60; accepted: a number of 0 or more"),
        (["--ranks", "128", "--png", "/tmp"], "--png /tmp: cannot be written (Is a directory)"),
        (["--ranks", "128", "--images-per-rank", "4", "--data.images_per_rank", "8"], "accepted: one of them"),
        (["--ranks", "128", "--solver.agvm", "true", "--model.frozen_stages", "5"], "frozen_stages 5 leaves none"),
        (["--ranks", "128", "--bandwidth-gbps", "0"], "--bandwidth-gbps 0"),
        (["--ranks", "128", "--measured", "/nowhere"], "/nowhere"),
        (
            ["--ranks", "128", "--norm.size", "1", "--norm.where", "[backbone,heads]"],
            "the heads of faster_rcnn normalize regions, which are not shared out",
        ),
    ],
)
def test_what_cannot_be_ends_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--config", "megdet_r50_fpn_256", *arguments])
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.out == ""


@pytest.mark.parametrize(
    ("arguments", "ranks", "part"),
    [
        (["--norm.kind", "frozen"], 32, "constant normalization"),
        (["--norm.kind", "bn"], 32, "statistics of 2 images normalization"),
        (["--norm.where", "[fpn]"], 128, "constant normalization"),
        (["--solver.warmup_epochs", "0"], 128, "without warmup"),
        (["--norm.size", "64"], 128, "BN size 64 images"),
        (
            ["--norm.size", "0", "--solver.base_lr", "0.1"],
            8,
            "over 0.04 (2 times the linear rule from 0.02 at",
        ),
        (["--norm.size", "2"], 128, "one rank's images"),
        (["--norm.size", "1"], 128, "BN size 1 is less than one rank's 2 images"),
        (["--solver.base_lr", "0.03"], 128, "over 0.32 (the linear rule at 256 images from 0.02 at 16; published"),
        ([], 256, "over 0.38 (published configurations have 0.24 at 256 images and 0.38 at 512)"),
        (["--solver.epochs", "6"], 128, "the rate never falls"),
        (["--solver.accumulate", "2", "--solver.scaling_exponent", "0.5"], 64, "solver.accumulate 2"),
        (["--solver.warmup_epochs", "9"], 128, "never reaches its peak"),
    ],
)
def test_one_warning_for_each_risk(arguments: list[str], ranks: int, part: str) -> None:
    found = warnings_of(plan_of(*arguments, ranks=ranks))
    assert len(found) == 1 and part in found[0]


@pytest.mark.parametrize(
    ("arguments", "ranks"),
    [([], 128), (["--norm.size", "0"], 16), (["--norm.kind", "frozen"], 16), (["--norm.kind", "gn"], 128)],
)
def test_sound_runs_have_no_warning(arguments: list[str], ranks: int) -> None:
    assert warnings_of(plan_of(*arguments, ranks=ranks)) == []


@pytest.mark.parametrize(
    ("name", "ranks", "warmup", "rate", "note"),
    [
        ("megdet_r50_fpn_256", 128, 463, 0.32, True),  # the paper's own: 1 epoch
        ("megdet_r50_fpn_256_safe", 128, 1852, 0.24, False),
        ("megdet_r50_fpn_256_agvm", 128, 920, 0.16 * 2**0.5, False),
        ("megdet_r50_fpn_512_agvm", 256, 460, 0.38, False),
        ("megdet_r50_fpn_16", 8, 518, 0.02, False),
    ],
)
def test_published_warmups(name: str, ranks: int, warmup: int, rate: float, note: bool) -> None:
    config = config_of("--config", name, "--model.backbone_weights", "elsewhere/resnet50.pth")
    plan = plan_job(config, place_ranks(ranks, None, 8), COCO)
    text = "\n".join(describe_run(plan))
    assert ("published configurations of 256 and 512 images warm up 2 to 5 epochs" in text) == note
    assert plan.schedule.peak_lr == pytest.approx(rate)
    assert plan.schedule.warmup_steps == warmup
    assert warnings_of(plan) == []


def test_a_run_without_weights_is_warned_of_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEGDET_ROOT", raising=False)
    auto, null = (["--model.backbone_weights", value] for value in ("auto", "null"))
    if not find_weights(config_of(*auto).model):  # which a checkout may have
        (found,) = warnings_of(plan_of(*auto))
        assert "begins with random weights" in found and "This run is 0.91x" in found
        found = warnings_of(plan_of(*auto, "--model.frozen_stages", "2"))[1]
        assert found.startswith("the run will be refused if it finds no weights: model.frozen_stages 2")
    assert warnings_of(plan_of(*null)) == []
    with pytest.raises(UserError, match=r"norm\.kind frozen would keep random weights"):
        plan_of(*null, "--norm.kind", "frozen")
    assert plan_of(*null, "--norm.kind", "frozen", "--model.fixed_from_scratch", "true").total_steps == 5093


def test_collectives_by_hand() -> None:
    # 8 ranks on 2 nodes: inside 4 ranks, 6 hops of 1 us and 1.5 x 800 us; between 2 nodes, 2 hops and 800 bytes
    assert SLOW.ring(800, 8, 2) == pytest.approx(6e-6 + 1.5 * 800e-6 + 2 * 10e-6 + 8000e-6)
    assert SLOW.short(8, 8, 2) == pytest.approx(2 * (1e-6 + 8e-6) + 10e-6 + 80e-6)
    assert SLOW.gather(8, 8, 2) == pytest.approx(2e-6 + 3 * 8e-6 + 10e-6 + 4 * 80e-6)
    # 6 ranks: two give their message away, 4 exchange twice, two get the sum; an allgather takes 3 rounds
    assert SLOW.short(8, 6, 1) == pytest.approx(4 * (1e-6 + 8e-6))
    assert SLOW.gather(8, 6, 1) == pytest.approx(3e-6 + 5 * 8e-6)
    for time in (SLOW.ring, SLOW.short, SLOW.gather):
        assert time(1e6, 1, 1) == 0


def test_messages_of_a_layer() -> None:
    """Two ranks of a node, 10 channels: 11 and 10 doubles, backward 20; packed 21 from the other rank, and 20."""
    backward = 1e-6 + 8 * 20e-6
    assert cgbn_seconds((10,), "two_stage", SLOW, 2, 1) == pytest.approx((2e-6 + 8 * 21e-6, backward))
    assert cgbn_seconds((10,), "packed", SLOW, 2, 1) == pytest.approx((1e-6 + 8 * 21e-6, backward))
    assert cgbn_seconds((10,), "two_stage", SLOW, 1, 1) == (0, 0)


def test_over_horovod_each_message_waits_for_its_cycle() -> None:
    for exchange, messages in (("two_stage", 3), ("packed", 2)):
        times = []
        for transport in ("mpi", "horovod"):
            work = Work(2, 4, 2, 0, (10, 20), exchange, transport=transport)  # type: ignore[arg-type]
            times.append(step_time(work, SLOW, ranks=8, ranks_per_node=8, group_ranks=8, group_nodes=1).cgbn)
        # 2 passes over 2 layers, 1 ms a message
        assert times[1] - times[0] == pytest.approx(2 * 2 * messages * 1e-3)


def test_the_doctor_counts_the_messages_of_the_papers_detector() -> None:
    from megdet_hpc.doctor.network import CGBN_MESSAGES
    from megdet_hpc.plan.model_size import measure_model

    size = measure_model(config_of("--config", "megdet_r50_fpn_256"), 80)
    assert 3 * len(size.cgbn_channels) == CGBN_MESSAGES == 183


def test_step_time() -> None:
    work = Work(images_per_second=2, images_per_rank=4, accumulate=3, gradient_bytes=1000, cgbn_channels=(10,))
    alone = step_time(work, SLOW, ranks=1, ranks_per_node=1, group_ranks=1, group_nodes=1)
    assert (alone.compute, alone.gradients, alone.cgbn, alone.efficiency) == (6, 0, 0, 1)
    hidden = step_time(work, SLOW, ranks=8, ranks_per_node=8, group_ranks=8, group_nodes=1)
    # half of Horovod's cycle, its threads' row of bits in 3 rounds, and the last gradients over MPI
    late = 0.005 + 3 * (1e-6 + 8e-6)
    assert hidden.gradients == pytest.approx(late + mpi_allreduce(SLOW, 1000, 8, 1))
    assert hidden.cgbn == pytest.approx(3 * sum(cgbn_seconds((10,), "two_stage", SLOW, 8, 1)))
    assert hidden.losses == pytest.approx(3 * SLOW.short(80, 8, 1))  # three passes
    assert hidden.total == hidden.compute + hidden.gradients + hidden.cgbn + hidden.losses
    slow = Network("test", 0, 100, 0, 100)
    shown = step_time(
        replace(work, gradient_bytes=1_000_000), slow, ranks=8, ranks_per_node=8, group_ranks=1, group_nodes=1
    )
    assert shown.gradients == pytest.approx(2 * 7 / 8 * 10_000 - BACKWARD_SHARE * 2)
    # while the backward pass waits for its layers' messages, gradients travel on
    waits = step_time(
        replace(work, gradient_bytes=1_000_000), slow, ranks=8, ranks_per_node=8, group_ranks=8, group_nodes=1
    )
    assert shown.gradients - waits.gradients == pytest.approx(cgbn_seconds((10,), "two_stage", slow, 8, 1)[1])


def test_gradients_that_are_not_hidden_take_all_their_time() -> None:
    """Horovod's cycle is 1 ms on GPUs, half of which is waited; 10 ms where MPI carries the layers' messages."""
    work = Work(2, 4, 1, 1000, (10,), device_type="cuda")

    def gradients(work: Work, group: int) -> float:
        return step_time(work, SLOW, ranks=8, ranks_per_node=8, group_ranks=group, group_nodes=1).gradients

    late = 0.0005 + SLOW.short(8, 8, 1)
    after, hidden = SLOW.ring(1000, 8, 1) + late, SLOW.ring(0, 8, 1) + late
    assert gradients(work, 8) == pytest.approx(after)  # two NCCL communicators would be in use at once
    assert gradients(work, 1) == pytest.approx(hidden)  # the layers send nothing
    assert gradients(replace(work, overlap=True), 8) == pytest.approx(hidden)
    assert gradients(replace(work, overlap=False), 1) == pytest.approx(after)
    assert gradients(replace(work, transport="mpi"), 8) == pytest.approx(hidden + 0.0045)


def test_each_library_of_gradients_has_its_time() -> None:
    """60 MiB: torch sends 25 + 25 + 10 MiB, the last of them after the backward pass; mpi sends all after it."""
    mib = 2**20
    work = Work(1e-3, 4, 1, 60 * mib, (), device_type="cpu")

    def gradients(library: str, overlap: bool) -> float:
        own = replace(work, gradients=library, overlap=overlap)
        return step_time(own, SLOW, ranks=8, ranks_per_node=8, group_ranks=1, group_nodes=1).gradients

    assert gradients("torch", True) == pytest.approx(SLOW.ring(10 * mib, 8, 1))
    assert gradients("torch", False) == pytest.approx(2 * SLOW.ring(25 * mib, 8, 1) + SLOW.ring(10 * mib, 8, 1))
    for overlap in (True, False):
        assert gradients("mpi", overlap) == pytest.approx(mpi_allreduce(SLOW, 60 * mib, 8, 1))
    late = 0.005 + SLOW.short(8, 8, 1)
    assert gradients("horovod", False) == pytest.approx(mpi_allreduce(SLOW, 60 * mib, 8, 1) + late)
    assert gradients("auto", True) == pytest.approx(mpi_allreduce(SLOW, 2**16, 8, 1) + late)


def test_each_transport_of_the_layers_has_its_time() -> None:
    """Sums of 1,000 doubles are halved by MPI among 8 ranks, and sent whole by Gloo and NCCL."""
    times = {}
    for transport, device in (("mpi", "cpu"), ("horovod", "cpu"), ("torch", "cpu"), ("auto", "cpu"), ("auto", "cuda")):
        work = Work(1, 1, 1, 0, (1024,), transport=transport, device_type=device)
        times[transport, device] = step_time(work, SLOW, ranks=8, ranks_per_node=8, group_ranks=8, group_nodes=1).cgbn
    whole = sum(SLOW.short(8 * values, 8, 1) for values in (1025, 1024, 2048))
    halved = sum(mpi_allreduce(SLOW, 8 * values, 8, 1) for values in (1025, 1024, 2048))
    assert times["torch", "cpu"] == times["auto", "cuda"] == pytest.approx(whole)
    assert times["mpi", "cpu"] == times["auto", "cpu"] == pytest.approx(halved)
    assert times["horovod", "cpu"] == pytest.approx(halved + 3 * 0.001)


def test_the_report_says_when_gradients_travel(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "megdet_r50_fpn_256", "--ranks", "128", "--images-per-second", "8"]
    main(words)
    assert "gradients travel after the backward pass (solver.overlap auto)" in capsys.readouterr().out
    main([*words, "--device", "cpu"])
    assert "CPUs: gradients hide behind 2/3 of a pass (solver.overlap auto)" in capsys.readouterr().out


def test_ranks_share_the_cores_of_a_node() -> None:
    work = Work(2, 4, 1, 0, (), cores=2)
    times = [
        step_time(work, SLOW, ranks=ranks, ranks_per_node=8, group_ranks=1, group_nodes=1).compute
        for ranks in (1, 2, 4, 8, 16)
    ]
    assert times == [2, 2, 4, 8, 8]


@pytest.mark.parametrize(
    ("hours", "limit", "minutes", "pieces"), [(10, 2.5, 30, 5), (10.1, 2.5, 30, 6), (1, 24, 10, 1)]
)
def test_walltime_pieces(hours: float, limit: float, minutes: float, pieces: int) -> None:
    assert walltime_pieces(hours, limit, minutes) == pieces


def test_given_values_replace_a_networks() -> None:
    changed = choose_network("ib-hdr", alpha_us=3, node_bandwidth_gbps=8)
    assert (changed.alpha, changed.node_bandwidth) == (pytest.approx(3e-6), 1e9)
    assert changed.bandwidth == NETWORKS["ib-hdr"].bandwidth
    with pytest.raises(UserError, match="--alpha-us -1"):
        choose_network("ib-hdr", alpha_us=-1)


def test_a_row_that_cannot_be_is_told_and_the_plan_stays(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--config megdet_r50_fpn_256 --ranks 6 --ranks-per-node 3 --norm.size 0 --images-per-second 5"
    main([*words.split(), "--solver.agvm", "true", "--max_steps", "50"])
    shown = capsys.readouterr().out
    assert "     9 cannot be: solver.agvm needs an even number of ranks, --ranks is 9" in shown
    assert "step  0" in shown and shown.split("step  0")[1].split()[0] == "50"  # the curve's end


def test_a_validation_that_cannot_be_is_refused(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "tiny", "--data.train", str(shapes / "train"), "--images-per-rank", "2", "--ranks", "8"]
    for sizes, message in (("0", "--validate 0; accepted: numbers of ranks"), ("3", "BN size 4 = 1.5 groups")):
        with pytest.raises(SystemExit) as ended:
            main([*words, "--norm.size", "4", "--validate", "1", sizes])
        assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "other", ["--from x", "--png x.png", "--mtbf-hours 9", "--write-seconds 3", "--measured x", "--cores-per-node 2"]
)
def test_an_option_that_a_validation_does_not_use_is_refused(other: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*["--config", "tiny", "--ranks", "8", "--validate", "1"], *other.split()])
    assert ended.value.code == 2 and f"{other.split()[0]} does not go with --validate" in capsys.readouterr().err


def test_a_validation_of_too_few_or_too_slow_updates_is_refused(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--config", "tiny", "--data.train", str(shapes / "train")]
    monkeypatch.setattr(validate, "_STEPS", 2)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"^1 rank\(s\): the run ended after 2 updates; accepted: a run of more than 4"):
        validate.quickest_step(words, 1)
    monkeypatch.setattr(validate, "_TIMEOUT", 0.1)
    with pytest.raises(UserError, match=r"^1 rank\(s\) did not end 2 updates within 0.1 s"):
        validate.quickest_step(words, 1)


def test_a_missing_run_of_from_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone: no such folder; accepted: the folder of a run"):
        noise_scales(tmp_path / "gone")


def test_the_curve_climbs_and_falls() -> None:
    rows = ascii_curve(plan_of().schedule, plan_of().total_steps, width=50, height=7).splitlines()
    assert len(rows) == 9 and all(len(row) <= 62 for row in rows)
    assert rows[0].startswith("     0.32 |") and rows[0].count("*") > 30
    assert rows[6].startswith("   0.0032 |") and rows[6].rstrip().endswith("*")
    columns = [[row[11:].ljust(50)[column] for row in rows[:7]].count("*") for column in range(50)]
    assert columns == [1] * 50


def test_sizes_of_the_papers_model() -> None:
    from megdet_hpc.plan.model_size import largest_input, measure_model

    config = config_of("--config", "megdet_r50_fpn_256")
    size = measure_model(config, 80)
    assert size.parameters == size.trained == 41_759_204
    assert len(size.cgbn_channels) == 53 + 8 and sum(size.cgbn_channels) == 26_560 + 8 * 256
    assert size.state_bytes == 3 * 4 * size.parameters and size.gradient_bytes == 4 * size.parameters
    assert size.image_size == (800, 1344)
    assert largest_input(config_of("--config", "tiny", "--data.padding", "fixed")) == (192, 192)
    averaged = measure_model(config_of("--config", "megdet_r50_fpn_256", "--solver.ema_decay", "0.999"), 80)
    assert averaged.state_bytes - size.state_bytes == 4 * size.trained
    double = measure_model(config_of("--config", "megdet_r50_fpn_256", "--data.images_per_rank", "4"), 80)
    assert double.activation_bytes / size.activation_bytes == pytest.approx(2, rel=0.01)
    assert double.macs == size.macs and double.backbone_macs == size.backbone_macs  # both of one image
    assert size.backbone_macs is not None and 87e9 < size.backbone_macs < size.macs  # 4.09e9 at 224 pixels
    lean = measure_model(
        config_of("--config", "megdet_r50_fpn_256", "--norm.kind", "frozen", "--model.frozen_stages", "2"), 80
    )
    assert lean.cgbn_channels == () and lean.trained < lean.parameters
    assert lean.activation_bytes < 0.7 * size.activation_bytes


def test_activations_are_what_autograd_keeps() -> None:
    """A real forward pass of the same parts on the CPU keeps the same bytes."""
    import torch

    from megdet_hpc.models.factory import build_detector
    from megdet_hpc.parallel.serial import SerialCommunicator
    from megdet_hpc.plan.model_size import largest_input, measure_model

    config, alone = config_of("--config", "tiny", "--norm.kind", "bn"), SerialCommunicator()
    model = build_detector(config, num_categories=5, group=alone)
    kept: dict[int, torch.Tensor] = {}
    weights = {p.data_ptr() for p in [*model.parameters(), *model.buffers()]}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        levels = model.backbone(torch.zeros(4, 3, *largest_input(config)))
        outputs = model.rpn.head(list(levels.values()))
        pooled = torch.zeros(4 * 64, 64, 7, 7, requires_grad=True)
        scores = model.roi_heads.box_predictor(model.roi_heads.box_head(pooled))
    real = sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in weights)
    assert measure_model(config, 5).activation_bytes == pytest.approx(real, rel=0.02)
    assert outputs and scores


def test_the_whole_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "a blank" / "rate.png"
    words = "--config tiny --ranks 8 --images 1000 --images-per-second 10 --queue-limit 0.2 --norm.size 16"
    main([*words.split(), "--png", str(picture), "--restart-minutes", "6"])
    shown = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit) as ended:
        main([*words.split(), "--png", str(picture)])
    assert ended.value.code == 2 and f"--png {picture}: exists already" in capsys.readouterr().err
    # 8 epochs of ceil(1000 / 32) steps; 0.4 s of compute a step alone is 0.028 h, and a job has 0.1 h for it
    assert "256 in all" in shown and "1 job(s) of 0.2 h" in shown
    rows = [line.split() for line in shown.splitlines() if line.endswith("%") and line[:6].strip().isdigit()]
    assert [int(row[0]) for row in rows] == [8 * 2**n for n in range(8)]
    efficiency = [float(row[6].rstrip("%")) for row in rows]
    assert all(0 < value <= 100 for value in efficiency) and efficiency == sorted(efficiency, reverse=True)


def test_a_picture_is_refused_in_one_line_where_matplotlib_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    picture = tmp_path / "rate.png"
    with pytest.raises(SystemExit) as ended:
        main(["--config", "tiny", "--ranks", "4", "--png", str(picture)])
    shown = capsys.readouterr()
    assert ended.value.code == 2 and not shown.out and not picture.exists()
    assert f"--png {picture} is drawn by matplotlib, which is" in shown.err and "pip install" in shown.err


def test_measured_runs_give_the_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two ranks of 4 images at 0.5 s a step: 8 images/s a rank; the first row, which warms up, does not count."""
    rows = [(9.0, 8 / 9), (0.5, 16.0), (0.5, 16.0)]
    lines = [f'{{"step": {n}, "step_max_s": {t}, "images_per_s": {v}}}\n' for n, (t, v) in enumerate(rows)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    settings = {"data": {"images_per_rank": 4}, "solver": {"accumulate": 1}, "emulate": {"ranks": 0}}
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    options = ["--config", "tiny", "--ranks", "8", "--images", "1000", "--measured", str(tmp_path)]
    main(options)
    shown = capsys.readouterr().out
    assert "8 images/s on one rank" in shown and "2 rank(s)" in shown

    # a later start found the run finished
    (tmp_path / "config-00000002.yaml").write_text(json.dumps(settings))
    main(options)
    assert "8 images/s on one rank" in capsys.readouterr().out
    (tmp_path / "config-00000002.yaml").unlink()

    # where a rank had another number of images, or was none, its speed would be read wrongly
    for key, part, value in (
        ("images_per_rank and solver.accumulate were (2, 1)", "data", {"images_per_rank": 2}),
        ("emulated 128 ranks", "emulate", {"ranks": 128}),
    ):
        (tmp_path / "config.yaml").write_text(json.dumps({**settings, part: value}))
        with pytest.raises(SystemExit) as ended:
            main(options)
        assert ended.value.code == 2 and key in capsys.readouterr().err


def test_the_scaling_table_keeps_the_nodes_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    """With 6 ranks a node every row is of whole nodes, or no message would leave a node."""
    options = ["--config", "megdet_r50_fpn_256", "--norm.size", "0", "--images-per-second", "8"]
    main([*options, "--ranks", "96", "--ranks-per-node", "6"])
    table = capsys.readouterr().out.split("efficiency images/s   CGBN\n")[1]
    rows = [line.split() for line in table.splitlines() if line[:6].strip().isdigit()]
    assert [int(row[0]) for row in rows] == [12, 18, 36, 66, 132, 258, 516, 1026]


def test_the_ranks_of_an_emulated_group_are_held_together(capsys: pytest.CaptureFixture[str]) -> None:
    kept = []
    for emulated in ("0", "8"):
        main(["--config", "tiny", "--ranks", "1", "--images", "64", "--emulate.ranks", emulated])
        shown = capsys.readouterr().out
        kept.append(float(re.search(r"([\d.]+) GiB kept", shown)[1]))  # type: ignore[index]
    assert kept[1] == pytest.approx(8 * kept[0], rel=0.1)
    assert "8 of the 8 emulated ranks run together" in shown
    assert re.search(r"arithmetic +[\d.]+ GMAC forward for an image of \d+ x \d+, [\d.]+ of them in the", shown)


def test_it_needs_no_torch_to_refuse() -> None:
    code = (
        "import sys\nfrom megdet_hpc.plan.__main__ import main\n"
        "try: main('--config tiny --ranks 7 --norm.size 8'.split())\nexcept SystemExit as e: assert e.code == 2\n"
        "assert not {'torch', 'mpi4py', 'horovod'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "norm.size 8" in done.stderr


def test_the_mini_batch_beyond_which_gpus_no_longer_pay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        {"step": step, "loss": 1.0, "gradient_signal": signal, "gradient_variance_per_image": 60.0}
        for step, signal in ((10, 30.0), (20, 10.0), (30, 1.0), (40, 2.0), (50, 0.6), (60, 0.4))
    ]
    text = "".join(json.dumps(row) + "\n" for row in [*rows, {"step": 60, "val/AP": 0.1}])
    (tmp_path / "metrics.jsonl").write_text(text)
    words = ["--config", "tiny", "--ranks", "64", "--norm.size", "32", "--solver.base_lr", "0.01", "--images", "1000"]
    main([*words, "--from", "."])
    said = capsys.readouterr().out
    assert "first  steps 10 to 20: 3 images" in said and "last   steps 50 to 60: 120 images" in said
    assert "beyond a mini-batch of 120 images more GPUs no longer pay" in said
    # 1 + 120 / 256 and 1 + 256 / 120
    assert "this plan's 256: 1.47 times the least number of updates, 3.13 times the least number of images" in said
    assert "variance probe none in this run" in said
    probed = [
        {"state": state, "norm": "cgbn all", "part": part, "batch": batch, "draws": 12, "noise_scale": scale}
        for state, part, batch, scale in (
            ("start", "all", 16, None),
            ("step 20", "all", 32, 8.41),
            ("step 20", "rpn", 32, 900.0),
            ("step 20", "all", 16, 700.0),
        )
    ]
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "variance.json").write_text(json.dumps({"rows": probed}))
    for further in ([], ["--probe", "probe"]):
        main([*words, "--from", ".", *further])
        said = capsys.readouterr().out
        assert said.index("this plan's 256") < said.index("variance probe of probe")
        assert "start, cgbn all, 16 images: lost in its noise, 12 draws" in said
        assert "step 20, cgbn all, 32 images: 8.41 images, 12 draws" in said and "00 images, 12" not in said
        assert "The probe: independent draws" in said
    for wrong, text in (
        (["--from", ".", "--probe", "."], "--probe .: has no variance.json; accepted: the --output of"),
        (["--probe", "probe"], "name the run by --from RUN"),
    ):
        with pytest.raises(SystemExit):
            main([*words, *wrong])
        assert text in capsys.readouterr().err
    (tmp_path / "probe" / "variance.json").write_text("{}")
    with pytest.raises(SystemExit):
        main([*words, "--from", "."])
    assert "cannot be read as results of megdet variance-probe (KeyError('rows'))" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(SystemExit) as ended:
        main([*words, "--from", "."])
    assert ended.value.code == 2
    assert "has no row with a gradient noise scale; accepted: 3 or more" in capsys.readouterr().err
