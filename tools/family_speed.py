"""Images that a training step of each configuration gets through in a second of CPU time, on one thread.

CPU time does not count what other programs do meanwhile. The configurations take turns, so that all see the same
machine. NAME+efficient is a configuration with memory-efficient dense layers. With --memory, what such steps add to the
memory of a process at most follows, from one process for each configuration.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from megdet_hpc.command_line import config_parser, parse_config
from megdet_hpc.data.batch import collate
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.engine.passes import RankPasses
from megdet_hpc.models.factory import build_detector
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.solver.optimizer import build_optimizer

WARM_UP = 2  # steps before the first that counts


class _Timed:
    """A configuration whose steps are timed.

    Args:
        name: name of the configuration.
        data: folder of a packed set.
        images: images of a step; None: data.images_per_rank.
    """

    def __init__(self, name: str, data: str, images: int | None) -> None:
        self.name = name
        config_name, *efficient = name.split("+")
        words = ["--model.memory_efficient", "true"] if efficient else []
        config, _ = parse_config(config_parser("family_speed", ""), ["--config", config_name, *words])
        geometry, masks = config.model.geometry, config.model.needs_masks
        self.size = images or config.data.images_per_rank
        self.dataset = DetectionDataset.open(data, config.data, training=True, seed=0, masks=masks, geometry=geometry)
        self.geometry, alone = geometry, SerialCommunicator()
        self.model = build_detector(config, num_categories=len(self.dataset.categories), group=alone)
        self.optimizer = build_optimizer(self.model, config.solver, decay_norm=True)
        self.passes = RankPasses(self.model, alone)

    def step(self, number: int) -> float:
        """Images in a second of CPU time; reading them does not count."""
        images = [(number * self.size + i) % len(self.dataset) for i in range(self.size)]
        batch = collate([self.dataset[(0, index)] for index in images], geometry=self.geometry)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-3
        begin = time.process_time()
        self.optimizer.zero_grad()
        self.passes.forward_backward([batch], step=number, seed=0)
        self.optimizer.step()
        return self.size / (time.process_time() - begin)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, metavar="DIR", help="Folder of a packed set with masks.")
    parser.add_argument("--steps", type=int, default=20, help="Steps that count [steps].")
    parser.add_argument("--images", type=int, metavar="N", help="Images of a step; default: data.images_per_rank.")
    parser.add_argument("--memory", action="store_true", help="Measure the memory of steps, too.")
    parser.add_argument("configs", nargs="+", metavar="NAME", help="Configurations; NAME+efficient.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = [_Timed(name, options.data, options.images) for name in options.configs]
    before = _peak()
    speeds = [[run.step(number) for run in runs] for number in range(WARM_UP + options.steps)][WARM_UP:]
    for run, seen in zip(runs, zip(*speeds, strict=True), strict=True):
        parameters = sum(p.numel() for p in run.model.parameters())
        peak = ""
        if options.memory:
            words = ["--data", options.data, "--steps", "1", "--images", str(run.size), run.name]
            alone = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
            peak = f", {alone.stdout.split()[-2]} MiB in a step of {run.size} images"
        print(f"{run.name}: {statistics.median(seen):.2f} images/s, {parameters:,} parameters{peak}", flush=True)
    if len(runs) == 1:
        print(f"steps added {_peak() - before:.0f} MiB")


def _peak() -> float:
    """The largest memory of this process so far [MiB], as Linux tells it; what a parent had does not count."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
