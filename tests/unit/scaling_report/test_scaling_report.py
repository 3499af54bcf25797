"""`megdet scaling-report`: the table, the parts of an update, and the two files, from runs written here."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megdet_hpc.config import from_dict
from megdet_hpc.config.run import completed
from megdet_hpc.errors import UserError
from megdet_hpc.scaling_report.__main__ import main
from megdet_hpc.scaling_report.estimate import stored_config
from megdet_hpc.scaling_report.runs import PARTS, UNSPLIT, read_scaling
from megdet_hpc.scaling_report.text import facts, verdict

SPEEDS = {1: 100.0, 2: 190.0, 4: 280.0}
TINY = Path(__file__).resolve().parents[3] / "megdet_hpc" / "configs" / "tiny.yaml"
CONFIG = completed({**yaml.safe_load(TINY.read_text(encoding="utf-8")), "norm": {"size": 0}})


def written(folder: Path, nodes: int, speed: float, batch: int, *, gpu: bool = False, one_host: bool = False) -> None:
    """A run of one rank a node: two rows of warm-up and three others."""
    folder.mkdir(parents=True)
    config = json.loads(json.dumps(CONFIG))
    config["data"]["images_per_rank"], config["solver"]["accumulate"] = 2, batch // (2 * nodes)
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    step = batch / speed
    own = {"own_mean_s": 0.6 * step, "own_max_s": 0.7 * step, "gradients_mean_s": 0.1 * step}
    times = {"step_max_s": step, "step_mean_s": step, "data_mean_s": 0.05 * step, "data_max_s": 0.1 * step}
    if not gpu and nodes > 1:
        times |= own
    rows = [{"images_per_s": now, **times} for now in (1.0, 1.0, speed - 5, speed, speed + 9)]
    lines = [json.dumps({"step": 5 * number, "loss": 1.0, **row}) for number, row in enumerate(rows, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    hosts = ["here"] * nodes if one_host else [f"node{number}" for number in range(nodes)]
    start = {"event": "start", "time": 1.0, "ranks": nodes, "hosts": hosts, "global_batch": batch, "device": "cpu"}
    (folder / "starts.jsonl").write_text(json.dumps(start) + "\n", encoding="utf-8")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for nodes, speed in SPEEDS.items():
        written(tmp_path / f"nodes_{nodes}", nodes, speed, 2 * nodes)
    for nodes, speed in ((1, 100.0), (2, 180.0)):
        written(tmp_path / f"strong_{nodes}", nodes, speed, 8)
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    main([str(word) for word in words])
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error


def test_the_table(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = said(capsys, runs, "--table")
    assert shown.splitlines() == [
        "nodes ranks   images/s   per node efficiency",
        "    1     1      100.0      100.0     100.0%",
        "    2     2      190.0       95.0      95.0%",
        "    4     4      280.0       70.0      70.0%",
        "strong scaling:",
        "nodes ranks   images/s   per node efficiency",
        "    1     1      100.0      100.0     100.0%",
        "    2     2      180.0       90.0      90.0%",
        "    4     4      280.0       70.0      70.0%",
    ]
    assert {path.suffix for path in runs.iterdir()} == {""}


def test_the_parts_of_an_update_add_up(runs: Path) -> None:
    scaling = read_scaling(runs)
    two = scaling.weak[1]
    shares = [two.share(name) for name in PARTS]
    # messages are 0.4 of the step: 0.1 wait for the slowest rank, the rest is shared out as 3 to 1
    assert shares == pytest.approx([0.55, 0.05, 0.225, 0.075, 0.1])
    for run in (*scaling.weak, *scaling.strong):
        assert sum(run.parts.values()) == pytest.approx(run.step_s)
    assert set(scaling.weak[0].parts) == {"compute", "data"}  # one rank sends nothing
    assert verdict(scaling.weak, 0.75, "weak") == ("Weak scaling stays at 75% or above up to 2 node(s); 4 reach 70.0%.")
    assert verdict(scaling.weak, 0.7, "weak").endswith("up to 4 node(s), the largest size.")


def test_a_verdict_does_not_contradict_itself(runs: Path) -> None:
    one, two, four = read_scaling(runs).weak
    near = [one, two, replace(four, images_per_s=4 * 74.6)]
    assert verdict(near, 0.75, "weak") == "Weak scaling stays at 75% or above up to 2 node(s); 4 reach 74.6%."
    near[-1] = replace(four, images_per_s=4 * 74.96)
    assert verdict(near, 0.75, "weak").endswith("4 reach 74.96%.")
    assert verdict(near, 0.749, "weak").startswith("Weak scaling stays at 74.9% or above up to 4 node(s)")


def test_the_rows_of_each_run_count(runs: Path) -> None:
    log = runs / "nodes_2" / "metrics.jsonl"
    log.write_text("\n".join(log.read_text(encoding="utf-8").splitlines()[:3]) + "\n", encoding="utf-8")
    assert "the median of 1 to 3 row(s) of the log" in facts(read_scaling(runs))[-1]
    written(runs / "nodes_02", 2, 190.0, 4)
    with pytest.raises(UserError, match=r"nodes_2 and nodes_02: two runs on 2 node"):
        read_scaling(runs)
    (runs / "nodes_2").rename(runs / "elsewhere")
    assert [run.folder.name for run in read_scaling(runs).weak] == ["nodes_1", "nodes_02", "nodes_4"]


def test_gpus_have_two_parts(tmp_path: Path) -> None:
    written(tmp_path / "nodes_2", 2, 100.0, 4, gpu=True)
    [run] = read_scaling(tmp_path).weak
    assert {name: run.share(name) for name in run.parts} == pytest.approx({UNSPLIT: 0.95, "data": 0.05})


def test_the_report(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = said(capsys, runs, "--output", tmp_path / "out", "--title", "Scaling at $_$", "--network", "ib-edr")
    assert shown.endswith(f"wrote {tmp_path}/out/scaling.pdf and {tmp_path}/out/scaling.md\n")
    text = (tmp_path / "out" / "scaling.md").read_text(encoding="utf-8")
    assert text.startswith("# Scaling at $_$\n") and "one host" not in text
    cells = [re.split(r" *\| *", line.strip("| ")) for line in text.splitlines() if re.match(r"\| \d", line)]
    assert [row[:6] for row in cells[:3]] == [
        ["1", "1", "2", "100.0 (95.0, 109.0)", "0.020", "100.0%"],
        ["2", "2", "4", "190.0 (185.0, 199.0)", "0.021", "95.0%"],
        ["4", "4", "8", "280.0 (275.0, 289.0)", "0.029", "70.0%"],
    ]
    assert [row[1:6] for row in cells[3:6]] == [
        ["95.0%", "5.0%", "-", "-", "-"],
        *[["55.0%", "5.0%", "22.5%", "7.5%", "10.0%"]] * 2,
    ]
    expected = [float(row[6]) for row in cells[:3]]
    # the first is calibrated on its own compute; messages make each node slower
    assert expected[0] == pytest.approx(100 / 0.95, rel=0.01) and expected[1] < 2 * expected[0]
    assert "Weak scaling stays at 75% or above up to 2 node(s); 4 reach 70.0%." in text
    assert "Strong scaling stays at 75% or above up to 2 node(s); 4 reach 70.0%." in text
    pdf = (tmp_path / "out" / "scaling.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and len(re.findall(rb"/Type /Page\b", pdf)) == 2
    assert "--overwrite replaces it" in refused(capsys, runs, "--output", tmp_path / "out")
    assert "wrote" in said(capsys, runs, "--output", tmp_path / "out", "--overwrite")


def test_processes_of_one_host_are_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for nodes, speed in SPEEDS.items():
        written(tmp_path / f"nodes_{nodes}", nodes, speed, 2 * nodes, one_host=True)
    said(capsys, tmp_path, "--cores-per-node", "2")
    text = (tmp_path / "scaling.md").read_text(encoding="utf-8")
    assert "All ranks ran on one host, here:" in text and "Not measured." in text


def test_what_is_refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no nodes_*/metrics.jsonl" in refused(capsys, tmp_path / "nowhere")
    assert "--line 0; accepted: above 0" in refused(capsys, runs, "--line", "0")
    assert "--cores-per-node 0; accepted: 1 or more" in refused(capsys, runs, "--cores-per-node", "0")
    (runs / "nodes_4").rename(runs / "else")
    (runs / "strong_1").rename(runs / "more")
    (runs / "strong_2").rename(runs / "most")
    assert "runs on 2 number(s) of nodes (1, 2); accepted: 3 or more" in refused(capsys, runs)
    written(runs / "strong_1", 1, 100.0, 6)
    assert "mini-batches of [4, 6] images; accepted: one, that of nodes_2" in refused(capsys, runs, "--table")
    lines = (runs / "nodes_1" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (runs / "nodes_1" / "metrics.jsonl").write_text("\n".join(lines[:2]), encoding="utf-8")
    assert "no row after the 2 of the warm-up; train more steps" in refused(capsys, runs, "--table")


@pytest.mark.parametrize("nodes", [0, 2])
def test_ranks_that_do_not_fit_the_nodes_are_refused(tmp_path: Path, nodes: int) -> None:
    written(tmp_path / f"nodes_{nodes}", 3, 100.0, 6)
    with pytest.raises(UserError, match=rf"nodes_{nodes}: 3 rank\(s\) on {nodes} node\(s\); accepted: as many on each"):
        read_scaling(tmp_path)


def test_a_run_of_version_0_1_0_has_an_estimate(tmp_path: Path) -> None:
    """It may have kept one checkpoint, which this version refuses."""
    old = {**CONFIG, "checkpoints": {**CONFIG["checkpoints"], "keep": 1}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(old))))
    assert from_dict(stored_config(tmp_path)).checkpoints.keep == 2
