from __future__ import annotations

import json
from pathlib import Path

import pytest

from megdet_hpc.bench.__main__ import main


def test_both_steps_have_the_same_layers_and_are_timed(tmp_path: Path) -> None:
    command = ["step", "--backbone", "resnet18", "--image-size", "64", "96", "--images", "1", "--repeats", "1"]
    main([*command, "--warmup", "0", "--device", "cpu", "--profile", "--json", str(tmp_path / "r.json")])
    report = json.loads((tmp_path / "r.json").read_text())
    theirs, ours = report["steps"]
    assert (theirs["step"], ours["step"]) == ("torchvision", "megdet_hpc")
    assert theirs["parameters"] == ours["parameters"] > 10_000_000
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.5)  # other first weights and samples
    assert theirs["speed to torchvision"] == 1 and ours["seconds, median"] > 0
    assert len(report["operators of one step, own milliseconds"]) == 15


def test_a_size_of_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["step", "--image-size", "0"])
    assert ended.value.code == 2
    assert "--image-size takes one or two numbers" in capsys.readouterr().err
