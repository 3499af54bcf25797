"""The two programs a site runs before its first job: bn_check and bench cgbn, as it would type them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megdet_hpc import bn_check
from tests.conftest import CARRIERS, HAS_HOROVOD, Launch, run

pytestmark = pytest.mark.parallel

PASSED = "bn_check: all 49 checks within tolerance"


def test_alone(launch: Launch) -> None:
    done = launch(0, "-m", "megdet_hpc.bn_check", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == PASSED
    assert done.stdout.count("  ok\n") == 7


@pytest.mark.parametrize(
    "arguments", [("--exchange", "packed", "--virtual-ranks", "6", "--group-size", "3"), ("--virtual-ranks", "1")]
)
def test_alone_with_options(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    bn_check.main(["--device", "cpu", *arguments])
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == PASSED
    assert shown.count("  ok\n") == 7


@pytest.mark.parametrize("transport", ["mpi", "horovod", "torch"])
def test_under_mpirun(launch: Launch, transport: str) -> None:
    options = ["--device", "cpu", "--transport", transport, "--group-size", "2", "--exchange", "packed"]
    done = launch(4, "-m", "megdet_hpc.bn_check", *options)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"4 ranks, transport {transport}; 2 group(s) of 2, packed, cpu"
    assert lines[-1] == PASSED


@pytest.mark.horovod
def test_under_horovodrun() -> None:
    done = run(["horovodrun", "-np", "2", "python", "-m", "megdet_hpc.bn_check", "--device", "cpu"])
    assert done.returncode == 0, done.stderr
    assert PASSED in done.stdout


@pytest.mark.parametrize("ranks", [0, 2])
def test_an_error_out_of_tolerance_is_a_failure(launch: Launch, ranks: int) -> None:
    done = launch(ranks, "-m", "megdet_hpc.bn_check", "--device", "cpu", "--tolerance-factor", "1e-3")
    assert done.returncode != 0
    assert "bn_check: FAILED, " in done.stdout
    assert "  FAIL output" in done.stdout


def test_a_group_size_that_does_not_fit(launch: Launch) -> None:
    done = launch(0, "-m", "megdet_hpc.bn_check", "--device", "cpu", "--group-size", "3")
    assert done.returncode == 2
    assert "4 ranks do not part into groups of 3; accepted: 1, 2, 4, or 0" in done.stderr


def test_bench_cgbn(launch: Launch, tmp_path: Path) -> None:
    small = ["--backbone", "resnet18", "--image-size", "64", "--repeats", "2", "--warmup", "1", "--device", "cpu"]
    for ranks, sent in ((0, 0), (2, 3 * 20)):
        file = tmp_path / f"{ranks}.json"
        further = ["--per-layer", "--step", "--json", str(file), "--transports", *CARRIERS]
        done = launch(ranks, "-m", "megdet_hpc.bench", "cgbn", *small, *further)
        assert done.returncode == 0, done.stderr
        assert "local nn.BatchNorm2d" in done.stdout
        report = json.loads(file.read_text())
        rows = {row["variant"]: row for row in report["variants"]}
        ours = rows["CGBN mpi two_stage" if ranks else "CGBN serial two_stage"]
        assert ours["messages"] == sent
        assert 0 < ours["ms_min"] <= ours["ms_median"] <= ours["ms_max"]
        assert 0 < ours["share_of_step"] < 1
        assert ours["in_messages_ms"] is None if not ranks else 0 < ours["in_messages_ms"] <= ours["ms_max"]
        assert len(report["per layer, ms"]) == 20
    assert {*(f"CGBN {name} packed" for name in CARRIERS[1:]), "one pass, gloo"} <= rows.keys()
    assert {row["sender"] for row in report["one message, microseconds"]} == {"bare mpi4py", *CARRIERS}


def test_bench_gradients_on_all_paths_in_one_run(launch: Launch, tmp_path: Path) -> None:
    small = ["--device", "cpu", "--image-size", "64", "--repeats", "2", "--warmup", "1", "--json", str(tmp_path / "r")]
    done = launch(2, "-m", "megdet_hpc.bench", "gradients", *small)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "r").read_text())["a step of the slowest rank"]
    during, after = ", during the backward pass", ", after it"
    named = [f"horovod{during}", f"horovod{after}"] if HAS_HOROVOD else []
    named += [f"torch{during}", f"torch{after}", f"mpi{after}"]
    assert [row["gradients"] for row in rows] == ["nothing sent", *named]
    assert all(0 < row["quickest_s"] <= row["median_s"] <= row["quartile_3_s"] for row in rows)


def test_bench_refuses_what_no_layer_fits(launch: Launch) -> None:
    for wrong, text in ((("--backbone", "resnet51"), "no such classifier"), (("--images", "0"), "must be 1 or more")):
        done = launch(0, "-m", "megdet_hpc.bench", "cgbn", *wrong)
        assert done.returncode == 2
        assert text in done.stderr
        assert "Traceback" not in done.stderr
