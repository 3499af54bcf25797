"""Feature maps of a known rank have that dimension, and sums of ranks are those of one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megdet_hpc.eigenspectrum.__main__ import main
from megdet_hpc.eigenspectrum.moments import ChannelSums, Spectrum, add_ranks, dimensions, spectra, spectrum
from megdet_hpc.errors import UserError
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.threads import run_ranks


def _maps(rank: int, channels: int = 12, seed: int = 0) -> torch.Tensor:
    """(2, channels, 5, 7), white in `rank` orthogonal directions, with a mean that is no part of the variance."""
    rng = np.random.default_rng(seed)
    white, _ = np.linalg.qr(rng.normal(size=(70, rank + 1)) - 0.0)
    white = white - white.mean(0)
    white, _ = np.linalg.qr(white[:, :rank])
    directions, _ = np.linalg.qr(rng.normal(size=(channels, rank)))
    flat = white @ directions.T + 3.0
    return torch.from_numpy(flat).reshape(2, 5, 7, channels).permute(0, 3, 1, 2)


def _of(maps: torch.Tensor) -> Spectrum:
    sums = ChannelSums(maps.shape[1], torch.device("cpu"))
    sums.add(maps)
    return spectrum("layer", sums)


@pytest.mark.parametrize("rank", [1, 4, 10])
def test_white_features_of_rank_r_have_dimension_r(rank: int) -> None:
    found = _of(_maps(rank))
    assert found.participation_ratio == pytest.approx(rank)
    assert found.entropy_dimension == pytest.approx(rank)
    assert found.stable_rank == pytest.approx(rank)
    assert found.components == tuple(int(np.ceil(rank * share - 1e-9)) for share in (0.9, 0.95, 0.99))
    assert sum(value > 0 for value in found.eigenvalues) == rank
    assert (found.positions, found.dead) == (70, 0)


def test_a_rotation_of_the_channels_changes_nothing() -> None:
    maps = torch.randn(2, 8, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    maps *= torch.arange(1, 9).view(1, 8, 1, 1)
    rotation, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(8, 8)))
    before, after = _of(maps), _of(torch.einsum("ij,njhw->nihw", torch.from_numpy(rotation), maps))
    np.testing.assert_allclose(after.eigenvalues, before.eigenvalues, rtol=1e-10)
    for key in ("participation_ratio", "entropy_dimension", "stable_rank", "components"):
        assert getattr(after, key) == pytest.approx(getattr(before, key)), key


def test_the_spectrum_is_that_of_numpy_and_unequal_eigenvalues_part_the_measures() -> None:
    maps = torch.randn(3, 6, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 5
    flat = maps.permute(1, 0, 2, 3).flatten(1).numpy()
    np.testing.assert_allclose(_of(maps).eigenvalues, np.linalg.eigvalsh(np.cov(flat, bias=True))[::-1], rtol=1e-9)
    ratio, entropy, stable, components = dimensions(np.array([8.0, 1.0, 1.0, 0.0]))
    assert (ratio, stable, components) == (pytest.approx(100 / 66), pytest.approx(1.25), (2, 3, 3))
    assert entropy == pytest.approx(np.exp(-(0.8 * np.log(0.8) + 0.2 * np.log(0.1))))


def test_channels_that_never_change_are_dead_zero_or_not() -> None:
    maps = torch.rand(2, 5, 4, 4, generator=torch.Generator().manual_seed(4))
    maps[:, 1], maps[:, 3], maps[:, 4] = 0.0, 0.7, maps[:, 4] * 1e-3
    assert _of(maps).dead == 2
    nothing = _of(torch.full((1, 3, 4, 4), 0.3))
    assert (nothing.dead, nothing.participation_ratio, nothing.components) == (3, 0.0, (0, 0, 0))


def test_two_ranks_equal_one_process_and_an_idle_rank_adds_nothing() -> None:
    maps = [torch.randn(1, 4, 3, 5 + k, generator=torch.Generator().manual_seed(k)) for k in range(5)]

    def body(world: Communicator) -> tuple[list[Spectrum], int]:
        sums = {name: ChannelSums(4, torch.device("cpu")) for name in ("a", "unseen", "b")}
        for index in range(world.rank, len(maps), world.size):
            sums["a"].add(maps[index])
            if world.rank == 0:
                sums["b"].add(maps[index])
        add_ranks(sums, world)
        return list(spectra(sums)), int(sums["b"].values[0])

    (one, _), *_ = run_ranks(1, body)
    (first, seen), (second, _) = run_ranks(2, body)
    assert first == second and [own.layer for own in first] == ["a", "b"] and seen == 3 * (5 + 7 + 9)
    assert first[0].positions == one[0].positions == 3 * (5 + 6 + 7 + 8 + 9)
    np.testing.assert_allclose(first[0].eigenvalues, one[0].eigenvalues, rtol=1e-12)


def test_what_is_not_finite_is_refused_by_layer() -> None:
    with pytest.raises(UserError, match="layer: feature maps are not finite"):
        _of(torch.tensor([1.0, float("nan")]).view(1, 1, 1, 2))


def test_layers_that_no_image_reached_are_named() -> None:
    sums = {f"head.{k}": ChannelSums(3, torch.device("cpu")) for k in range(6)}
    with pytest.raises(UserError, match=r"any of the 6 chosen layers, head\.0, .*head\.3, \.\.\.; choose"):
        spectra(sums)
    sums["head.5"].add(torch.rand(1, 3, 2, 2))
    assert [one.layer for one in spectra(sums)] == ["head.5"]


def test_one_run_in_two_spellings_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--checkpoint", "runs/a", "./runs/b/../a", "--output", "out"])
    assert ended.value.code == 2 and "accepted: one, or two different ones" in capsys.readouterr().err
