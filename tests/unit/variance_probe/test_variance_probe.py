from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import nn

from megdet_hpc.command_line import config_parser, parse_config
from megdet_hpc.config import Config
from megdet_hpc.engine.checkpoint import save_checkpoint
from megdet_hpc.errors import UserError
from megdet_hpc.layers.cgbn import CrossGpuBatchNorm2d
from megdet_hpc.parallel.runtime import Runtime
from megdet_hpc.parallel.threads import run_ranks
from megdet_hpc.variance_probe.__main__ import check_groups, main, parse_norms, parse_sizes, run
from megdet_hpc.variance_probe.draws import GradientDraws, MeasuredNorm, Setting, buffers_restored
from megdet_hpc.variance_probe.estimator import (
    Exponent,
    Moments,
    Variance,
    by_part,
    fit_exponent,
    flat_gradients,
    variance,
)

SMALL = ["--config", "tiny", "--device", "cpu", "--data.short_sides", "[48]"]
SMALL += ["--data.images_per_rank", "2"]


def _config(shapes: Path, *more: str) -> Config:
    config, _ = parse_config(config_parser("test", ""), [*SMALL, "--data.train", str(shapes / "train"), *more])
    return config


def _linear_draws(batch: int, draws: int, seed: int, shared: float = 0.0) -> Variance:
    """Loss w.x averaged over `batch` Gaussian x of 40 entries: the gradient is the mean of x, its variance 40 / N.

    `shared` is the variance of a part of each entry that all images of a draw have in common.
    """
    generator = torch.Generator().manual_seed(seed)
    weight, moments = nn.Parameter(torch.zeros(40)), Moments()
    for _ in range(draws):
        x = torch.randn(batch, 40, generator=generator) + shared**0.5 * torch.randn(40, generator=generator)
        weight.grad = None
        (x @ weight).mean().backward()
        moments.add(flat_gradients({"all": [weight]})["all"])
    return variance(batch, moments.contrasts, moments.squared_mean)


def test_variance_is_the_unbiased_sample_variance() -> None:
    vectors = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)) + 3
    moments = Moments()
    for vector in vectors:
        moments.add(vector)
    found = variance(4, moments.contrasts, moments.squared_mean)
    exact = vectors.double()
    assert found.value == pytest.approx(float(exact.var(dim=0, correction=1).sum()), rel=1e-12)
    squared = float(exact.mean(0).square().sum())
    assert found.squared_mean == pytest.approx(squared - found.value / 7, rel=1e-12)
    assert found.noise_scale == pytest.approx(4 * found.value / found.squared_mean)


@pytest.mark.parametrize("batch", [4, 32])
def test_known_variance_of_a_linear_model(batch: int) -> None:
    draws = 120
    found = _linear_draws(batch, draws, seed=batch)
    # draws - 1 times 40 degrees of freedom
    relative = (2 / ((draws - 1) * 40)) ** 0.5
    assert found.value == pytest.approx(40 / batch, rel=4 * relative)
    assert found.error is not None and found.low is not None and found.high is not None
    assert found.error == pytest.approx(40 / batch * relative, rel=0.3)
    assert found.low < found.value < found.high
    assert found.high - found.low == pytest.approx(4 * found.error, rel=0.3)
    assert found.noise_scale is None  # the true mean is 0


def test_exponent_of_independent_images_is_one() -> None:
    fit = fit_exponent([_linear_draws(batch, 60, seed=batch) for batch in (4, 8, 16, 32)])
    assert fit is not None and fit.error is not None
    assert fit.value == pytest.approx(1, abs=4 * fit.error) and fit.error < 0.05


def test_exponent_of_images_with_a_common_part_is_below_one() -> None:
    fit = fit_exponent([_linear_draws(batch, 60, seed=batch, shared=0.1) for batch in (4, 8, 16, 32)])
    assert fit is not None and fit.error is not None and fit.value < 1 - 4 * fit.error
    assert fit.reading().startswith("slower than 1/N")


def test_fit_by_hand() -> None:
    def point(batch: int, value: float, error: float | None, draws: int = 9) -> Variance:
        return Variance(batch, draws, value, error, None, None, 0.0, None)

    exact = fit_exponent([point(n, 3 * n**-0.5, 0.1 * 3 * n**-0.5) for n in (2, 4, 8)])
    assert exact is not None
    # error of a slope: 0.1 / sqrt(sum of squared distances of log N from their mean)
    assert exact == Exponent(pytest.approx(0.5), pytest.approx(0.1 / (2 * np.log(2) ** 2) ** 0.5), 24)
    # a size of few draws that agree by chance gets neither weight nor a small error from it
    lucky = fit_exponent([point(2, 1.0, 1e-9, 3), point(4, 0.5, 0.05), point(8, 0.25, 0.025)])
    assert lucky is not None and lucky.error is not None and lucky.error > 0.05
    assert fit_exponent([point(2, 1.0, None, 2), point(4, 0.5, None, 2)]) == Exponent(pytest.approx(1.0), None)
    assert fit_exponent([point(2, 1.0, 0.1)]) is None
    assert fit_exponent([point(2, 0.0, 0.0), point(4, 0.0, 0.0)]) is None


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (0.9, 0.06, "agrees"),
        (0.8, 0.06, "slower"),
        (1.2, 0.06, "faster"),
        (0.2, 0.3, "uncertain"),
        (1.0, None, "too few"),
    ],
)
def test_readings(value: float, error: float | None, words: str) -> None:
    assert words in Exponent(value, error).reading()
    assert "too few" in Exponent(value, error, 19).reading()


def test_parts_sum_to_the_whole() -> None:
    whole, parts = Moments(), {"backbone": Moments(), "heads": Moments()}
    for vector in torch.randn(6, 9, generator=torch.Generator().manual_seed(2)):
        whole.add(vector)
        parts["backbone"].add(vector[:4])
        parts["heads"].add(vector[4:])
    found = by_part(8, parts)
    assert found["all"].value == pytest.approx(found["backbone"].value + found["heads"].value, rel=1e-12)
    alone = variance(8, whole.contrasts, whole.squared_mean)
    assert found["all"].value == pytest.approx(alone.value, rel=1e-12)
    assert found["all"].error == pytest.approx(alone.error, rel=1e-9)


def test_buffers_come_back() -> None:
    layer = nn.BatchNorm2d(3)
    with buffers_restored([layer]):
        layer(torch.randn(2, 3, 4, 4) + 5)
        assert float(layer.running_mean.sum()) > 0
    assert torch.equal(layer.running_mean, torch.zeros(3)) and int(layer.num_batches_tracked) == 0


def test_draws_are_separate_reproducible_and_leave_no_trace(shapes: Path) -> None:
    probe = GradientDraws(_config(shapes), None, start=True, device=torch.device("cpu"))
    images = [[i for batch in draw for i in batch.image_ids] for draw in probe._draws(4, 4)]
    assert all(len(draw) == 4 for draw in images)
    assert len({image for draw in images for image in draw}) == 16
    assert images == [[i for batch in draw for i in batch.image_ids] for draw in probe._draws(4, 4)]
    other_size = [i for draw in probe._draws(2, 8) for batch in draw for i in batch.image_ids]
    assert other_size != [image for draw in images for image in draw]
    setting = Setting("start", MeasuredNorm("cgbn"), 4)
    two, three = probe.measure(setting, 2, None), probe.measure(setting, 3, None)
    assert sorted(two) == ["backbone", "fpn", "heads", "rpn"]
    for part, own in two.items():
        # the first contrast is of draws 1 and 2 alone, the third draw changes nothing in it
        assert own.contrasts == pytest.approx(three[part].contrasts[:1], rel=1e-5)
        assert own.contrasts[0] > 0
    assert probe.measure(setting, 3, 0.0)["backbone"].draws == 0


@pytest.mark.parametrize(("configured", "measured", "images"), [(0, 2, 2), (2, 0, 0), (2, 4, 0), (2, 8, 0), (4, 2, 2)])
def test_the_layers_have_the_size_that_is_measured(shapes: Path, configured: int, measured: int, images: int) -> None:
    """Of 4 images a rank, whatever norm.size the configuration has; 0: whole ranks share statistics."""
    config = _config(shapes, "--data.images_per_rank", "4", "--norm.size", str(configured))
    probe = GradientDraws(config, None, start=True, device=torch.device("cpu"))
    model = probe.model(Setting("start", MeasuredNorm("cgbn", measured), 8))
    assert {m.images for m in model.modules() if isinstance(m, CrossGpuBatchNorm2d)} == {images}


def test_reuse_of_images_lowers_the_variance_as_stated(shapes: Path) -> None:
    probe = GradientDraws(_config(shapes), None, start=True, device=torch.device("cpu"))
    in_epoch = probe.mini_batches(8)
    assert in_epoch == 3
    assert probe.reuse_bias(8, 3) == pytest.approx(0)
    stated = probe.reuse_bias(8, 6)
    # 24 numbers in place of images, two epochs of three batches
    generator = np.random.default_rng(3)
    numbers = generator.normal(size=24)
    ratios = []
    for _ in range(5000):
        means = [generator.permutation(numbers).reshape(3, 8).mean(1) for _ in range(2)]
        ratios.append(np.concatenate(means).var(ddof=1) / (numbers.var(ddof=1) / 8))
    assert np.mean(ratios) == pytest.approx(1 - stated, abs=0.04)
    assert stated == pytest.approx(0.2)


def test_command_writes_table_report_and_picture(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SMALL, "--data.train", str(shapes / "train"), "--output", str(tmp_path)]
    arguments += ["--batches", "2,4", "--draws", "2", "--norms", "cgbn,frozen"]
    main(arguments)
    printed = capsys.readouterr().out
    assert "result: 20 rows" in printed and "what the linear scaling rule assumes" in printed
    with open(tmp_path / "variance.csv") as file:
        rows = list(csv.DictReader(file))
    assert {(row["norm"], row["batch"], row["draws"]) for row in rows} == {
        (norm, batch, "2") for norm in ("cgbn all", "frozen") for batch in ("2", "4")
    }
    for norm in ("cgbn all", "frozen"):
        values = {row["part"]: float(row["variance"]) for row in rows if row["norm"] == norm and row["batch"] == "4"}
        assert values["all"] == pytest.approx(sum(values[key] for key in ("backbone", "fpn", "rpn", "heads")))
    report: dict[str, Any] = json.loads((tmp_path / "variance.json").read_text())
    assert len(report["exponents"]) == 10 and report["failed"] == []
    assert report["config"]["data"]["short_sides"] == [48]
    assert imread(tmp_path / "variance.png").std() > 0.05
    with pytest.raises(SystemExit):
        main(arguments)
    assert "variance.csv already" in capsys.readouterr().err


def test_one_that_measured_nothing_leaves_its_folder_free(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SMALL, "--data.train", str(shapes / "train"), "--output", str(tmp_path), "--max_minutes", "1e-6"]
    for _ in range(2):
        with pytest.raises(SystemExit):
            main([*arguments, "--batches", "2", "--norms", "frozen"])
        assert "nothing was measured: 0 of 1 settings failed" in capsys.readouterr().err


def test_one_that_is_ended_has_what_was_measured(shapes: Path, tmp_path: Path) -> None:
    arguments = [*SMALL, "--data.train", str(shapes / "train"), "--output", str(tmp_path)]
    arguments += ["--batches", "2", "--draws", "3", "--norms", "frozen,cgbn"]
    program = (
        "import sys\nfrom megdet_hpc.variance_probe.__main__ import main\n"
        "from megdet_hpc.variance_probe.draws import GradientDraws\n"
        "measure = GradientDraws.measure\n"
        "def ended(self, setting, *rest):\n"
        "    if setting.norm.kind == 'cgbn':\n        raise KeyboardInterrupt\n"
        "    return measure(self, setting, *rest)\n"
        "GradientDraws.measure = ended\nmain(sys.argv[1:])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr.endswith(f"the results so far are in {tmp_path}\n")
    with open(tmp_path / "variance.csv") as file:
        assert {(row["norm"], row["draws"]) for row in csv.DictReader(file)} == {("frozen", "3")}
    assert json.loads((tmp_path / "variance.json").read_text())["rows"] and (tmp_path / "variance.png").is_file()


def test_the_papers_configuration_measures_by_itself(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """norm.size 32 is larger than the smallest mini-batch; this set is too small for the default ones."""
    arguments = ["--config", "tiny", "--norm.size", "32", "--data.train", str(shapes / "train")]
    with pytest.raises(SystemExit):
        main([*arguments, "--device", "cpu", "--output", str(tmp_path)])
    assert "--batches: 32 images, of 24" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--device", "cpu", "--batches", "4", "--output", "/dev/null/x"])
    assert "output /dev/null/x: cannot be written" in capsys.readouterr().err


def test_refusals(shapes: Path, tmp_path: Path) -> None:
    for sizes in ("3", "0,2", "a", ""):
        with pytest.raises(UserError, match="--batches"):
            parse_sizes(sizes, 2)
    assert parse_sizes("8,4,4", 2) == [4, 8]
    for norms in ("sync", "bn:4", "cgbn:x", ""):
        with pytest.raises(UserError, match="--norms"):
            parse_norms(norms)
    assert parse_norms("cgbn,cgbn:4,gn") == [MeasuredNorm("cgbn"), MeasuredNorm("cgbn", 4), MeasuredNorm("gn")]
    config = _config(shapes, "--output", str(tmp_path))
    with pytest.raises(UserError, match=r"--norms cgbn 4 with --batches 6: .*BN size 4"):
        check_groups(config, [MeasuredNorm("cgbn", 4)], [8, 6])
    heads = _config(shapes, "--output", str(tmp_path), "--norm.where", "[backbone,heads]")
    with pytest.raises(UserError, match=r"--norms cgbn 1 with --batches 4: .*normalize regions"):
        check_groups(heads, [MeasuredNorm("cgbn", 1)], [4])
    probe = GradientDraws(config, None, start=True, device=torch.device("cpu"))
    with pytest.raises(UserError, match="26 images, of 24"):
        probe.mini_batches(26)
    with pytest.raises(UserError, match="no such file"):
        GradientDraws(config, tmp_path / "none.pt", start=True, device=torch.device("cpu"))
    with pytest.raises(UserError, match="2 were started"):
        run_ranks(2, lambda comm: run(config, None, Runtime(comm)))


def test_a_checkpoint_is_a_second_state_and_must_fit(shapes: Path, tmp_path: Path) -> None:
    config, cpu = _config(shapes), torch.device("cpu")
    start = GradientDraws(config, None, start=True, device=cpu)
    model = start.model(Setting("start", MeasuredNorm("cgbn"), 4))
    with torch.no_grad():
        model.roi_heads.box_predictor.bbox_pred.bias.fill_(7)
    ids = [1, 2, 4, 7, 8]
    good = save_checkpoint(tmp_path, 7, {"step": 7, "model": model.state_dict(), "category_ids": ids}, keep=2)
    probe = GradientDraws(config, good, start=True, device=cpu)
    assert list(probe.states) == ["start", "step 7"]
    for kind in ("cgbn", "bn", "frozen"):
        bias = probe.model(Setting("step 7", MeasuredNorm(kind), 4)).roi_heads.box_predictor.bbox_pred.bias
        assert float(bias.detach().min()) == 7
    with pytest.raises(UserError, match=r"norm\.kind gn"):
        probe.model(Setting("step 7", MeasuredNorm("gn"), 4))
    other = save_checkpoint(tmp_path, 8, {"step": 8, "model": {}, "category_ids": ids[:2]}, keep=2)
    with pytest.raises(UserError, match=r"2 categories, data\.train has 5"):
        GradientDraws(config, other, start=False, device=cpu)
