"""Where first weights come from, and what a run without them is told."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from megdet_hpc.config import Config, FasterRcnnConfig, NormConfig
from megdet_hpc.errors import UserError
from megdet_hpc.models.weights import (
    check_constants,
    find_weights,
    random_constants,
    resolve_weights,
    resumed_weights,
    scratch_warning,
)

MODEL = FasterRcnnConfig()
PAPERS_IMAGES = 11 * 118_287


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder without weights, and a checkout without any."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr("megdet_hpc.models.weights._CHECKOUT", tmp_path / "checkout")
    return work


def put(folder: Path, name: str = "resnet50.pth", content: bytes = b"weights") -> Path:
    (folder / "weights").mkdir(parents=True)
    (folder / "weights" / name).write_bytes(content)
    return folder / "weights" / name


def test_auto_takes_the_working_folders_file_then_the_jobs_then_the_checkouts(folder: Path, tmp_path: Path) -> None:
    jobs = {"MEGDET_ROOT": str(tmp_path / "root")}
    assert find_weights(MODEL, jobs) is None
    for place, environ in ((tmp_path / "checkout", {}), (tmp_path / "root", jobs), (folder, jobs)):
        file = put(place)
        found = find_weights(MODEL, environ)
        assert found is not None and found.resolve() == file
    assert find_weights(replace(MODEL, backbone="resnet18"), jobs) is None
    for nothing in (None, "none"):
        assert find_weights(replace(MODEL, backbone_weights=nothing), jobs) is None


def test_the_jobs_setting_is_the_file_that_auto_means(folder: Path, tmp_path: Path) -> None:
    put(folder)
    mine = tmp_path / "mine.pth"
    setting = {"MEGDET_BACKBONE": str(mine)}
    with pytest.raises(UserError, match=rf"^MEGDET_BACKBONE \(model.backbone_weights is auto\) {mine}: no such file"):
        resolve_weights(MODEL, setting)
    mine.write_bytes(b"weights")
    assert find_weights(MODEL, setting) == mine and resolve_weights(MODEL, setting).backbone_weights == str(mine)
    assert find_weights(MODEL, {"MEGDET_BACKBONE": ""}) == Path("weights/resnet50.pth")
    assert find_weights(replace(MODEL, backbone_weights=None), setting) is None  # from scratch on purpose
    assert find_weights(replace(MODEL, backbone_weights="other.pth"), setting) == Path("other.pth")


def test_a_run_stores_the_file_and_its_sum_and_another_file_is_refused(folder: Path) -> None:
    file = put(folder)
    resolved = resolve_weights(MODEL, {})
    assert (resolved.backbone_weights, resolved.backbone_sha256) == (str(file), hashlib.sha256(b"weights").hexdigest())
    assert resolve_weights(resolved, {}) == resolved
    file.write_bytes(b"others")
    with pytest.raises(UserError, match=rf"{file}: its SHA-256 is .*backbone_sha256 says {resolved.backbone_sha256}"):
        resolve_weights(resolved, {})
    file.unlink()
    with pytest.raises(UserError, match=f"{file}: no such file \\(python -m megdet_hpc.fetch_backbone"):
        resolve_weights(resolved, {})
    # a run that goes on reads no file
    stored = {"backbone_weights": resolved.backbone_weights, "backbone_sha256": resolved.backbone_sha256}
    assert resumed_weights(MODEL, stored) == resolved
    assert resumed_weights(MODEL, {}).backbone_weights is None  # of a version without these keys


def test_only_a_run_that_was_not_told_so_is_warned(folder: Path) -> None:
    warning = scratch_warning(MODEL, PAPERS_IMAGES, {})
    assert warning is not None
    for part in (
        "36.8 against 40.3 at 2x",
        "41.3 against 41.1 at 6x",
        "ICCV 2019",
        "This run is 0.9x",
        "python -m megdet_hpc.fetch_backbone --backbone resnet50 --output weights/resnet50.pth",
        "--model.backbone_weights weights/resnet50.pth",
    ):
        assert part in warning
    assert scratch_warning(replace(MODEL, backbone_weights=None), PAPERS_IMAGES, {}) is None
    assert scratch_warning(replace(MODEL, backbone="resnet10"), PAPERS_IMAGES, {}) is None
    put(folder)
    assert scratch_warning(MODEL, PAPERS_IMAGES, {}) is None


@pytest.mark.parametrize(
    ("model", "norm", "keys"),
    [
        (FasterRcnnConfig(frozen_stages=2), NormConfig(), ["model.frozen_stages 2"]),
        (MODEL, NormConfig(kind="frozen"), ["norm.kind frozen"]),
        (MODEL, NormConfig(where=("fpn",)), ["norm.where [fpn], which leaves the backbone fixed statistics"]),
        (MODEL, NormConfig(kind="gn"), []),
        (MODEL, NormConfig(kind="bn", where=("backbone", "fpn")), []),
    ],
)
def test_constant_parts_on_random_weights_are_refused(
    model: FasterRcnnConfig, norm: NormConfig, keys: list[str]
) -> None:
    config = Config(model=model, norm=norm)
    assert random_constants(config) == keys
    check_constants(config, "weights.pth")
    check_constants(replace(config, model=replace(model, fixed_from_scratch=True)), None)
    if not keys:
        return check_constants(config, None)
    with pytest.raises(UserError) as refused:
        check_constants(config, None)
    for part in (*keys, "model.backbone_weights is auto, and weights/resnet50.pth is not here", "fixed_from_scratch"):
        assert part in str(refused.value)
