"""The data path and a short training on a GPU, beside the CPU's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megdet_hpc import train
from megdet_hpc.command_line import config_parser, parse_config
from megdet_hpc.data.ahead import on_device
from megdet_hpc.data.batch import Batch
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.data.gpu_decode import decode_batch
from megdet_hpc.engine.arithmetic import has_fixed_shapes
from megdet_hpc.log import read_metrics


def test_nvjpeg_reads_what_the_processor_reads(gpu: torch.device, shapes: Path) -> None:
    """The two decoders round differently, and smooth colour differently at sharp edges."""
    dataset = DetectionDataset(str(shapes / "val"))
    files = [bytes(dataset.pack.read_image_bytes(index)) for index in range(8)]
    for here, there in zip(decode_batch(files, torch.device("cpu")), decode_batch(files, gpu), strict=True):
        assert here.shape == there.shape
        assert float((here.int() - there.cpu().int()).abs().float().mean()) < 2


@pytest.mark.parametrize(
    ("config", "there"),
    [
        ("tiny", ()),
        ("tiny", ("--data.decode_on_gpu", "true")),
        ("tiny", ("--model.compile", "true")),
        ("tiny_dsod", ()),  # its images have one size, so cuDNN measures its algorithms
    ],
)
def test_training_on_the_gpu_starts_as_on_the_cpu(
    gpu: torch.device, shapes: Path, tmp_path: Path, config: str, there: tuple[str, ...]
) -> None:
    named, _ = parse_config(config_parser("test", "a test"), ["--config", config])
    assert has_fixed_shapes(named) is (config == "tiny_dsod")
    losses = {}
    for device, more in (("cpu", ()), ("cuda", there)):
        arguments = ["--config", config, "--device", device, "--data.train", str(shapes / "train")]
        arguments += ["--data.val", "null", "--output", str(tmp_path / device), "--max_steps", "2", "--log_every", "1"]
        train.main([*arguments, *more])
        losses[device] = [row["loss"] for row in read_metrics(tmp_path / device / "metrics.jsonl") if "loss" in row]
    assert len(losses["cpu"]) == 2
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.2)  # the devices draw other samples


def test_batches_arrive_whole_from_another_stream(gpu: torch.device) -> None:
    """Large batches, each gone as soon as it is added up, so that memory is used again at once."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (2, 3, 512, 512), dtype=torch.uint8, generator=generator) for _ in range(12)]
    batches = ([Batch(one.pin_memory(), [], [], [], [])] for one in images)
    found = []
    for (batch,) in on_device(batches, gpu):
        assert batch.images.device == gpu
        torch.cuda._sleep(10_000_000)  # the copies are then long done, and their memory must not be free
        found.append(batch.images.sum(dtype=torch.int64))
    assert [int(total) for total in found] == [int(one.sum(dtype=torch.int64)) for one in images]
