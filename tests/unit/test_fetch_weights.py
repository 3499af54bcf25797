"""`megdet fetch-weights` as far as it goes without a network: torch's own cache stands for the download."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.models import ResNet18_Weights, resnet18

from megdet_hpc.config import DETECTORS as FAMILIES
from megdet_hpc.fetch_weights import DETECTORS, main


def test_a_file_that_was_fetched_is_written_and_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    cached = tmp_path / "cache" / "hub" / "checkpoints" / ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    state = resnet18().state_dict()
    torch.save(state, cached)
    main(["resnet18"])
    assert "--model.backbone resnet18 --model.backbone_weights weights/resnet18.pth" in capsys.readouterr().out
    written = torch.load(tmp_path / "weights" / "resnet18.pth", weights_only=True)
    assert all(torch.equal(written[key], state[key]) for key in state)
    with pytest.raises(SystemExit) as ended:
        main(["resnet18"])
    assert ended.value.code == 2 and "weights/resnet18.pth exists already" in capsys.readouterr().err


def test_the_keys_it_prints_are_a_familys() -> None:
    for keys in DETECTORS.values():
        words = keys.split()
        values = dict(zip(words[::2], words[1::2], strict=True))
        family = FAMILIES[values["--model.detector"]]
        assert family(backbone=values["--model.backbone"], backbone_weights=None)


def test_another_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fasterrcnn_resnet51"])
    assert ended.value.code == 2 and "fasterrcnn_resnet50_fpn" in capsys.readouterr().err


def test_what_is_not_the_published_file_and_what_cannot_be_written_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    cached = tmp_path / "cache" / "hub" / "checkpoints" / ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"PK\x03\x04 the page of a proxy")
    with pytest.raises(SystemExit, match=r"resnet18: its file is not the published one .* delete it in .*checkpoints"):
        main(["resnet18", "--output", str(tmp_path / "weights.pth")])
    torch.save(resnet18().state_dict(), cached)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        main(["resnet18", "--output", str(tmp_path / "file" / "weights.pth")])
    assert f"{tmp_path / 'file'}: cannot be written" in str(ended.value) and "internet" not in str(ended.value)
