"""The table of all commands, `megdet NAME`. It has names and lines only, so that it is printed without loading more."""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A line of the table."""

    name: str
    program: str
    """The module that `python -m` runs, or a shell script below the folder that holds the packages."""
    text: str
    """Purpose of the command, in one line."""


GROUPS = {
    "data": (
        Command("fetch-coco", "data_prep/fetch_coco.sh", "get COCO 2017: resumes, checks, says what disk it needs"),
        Command("convert", "data_prep.convert", "labels of YOLO, VOC, CVAT and more as COCO; packs as YOLO"),
        Command("pack", "data_prep.pack_coco", "check a COCO set and pack it, without loss, into a few HDF5 files"),
        Command("verify", "data_prep.verify_pack", "check a pack against its sums and its source"),
        Command("show", "data_prep.show_pack", "draw images of a pack with their boxes, and its statistics"),
        Command("stage", "data_prep.stage_pack", "copy a pack to a node's own disk, checked"),
        Command("rebuild", "data_prep.rebuild_coco", "get the COCO JSON of a pack back"),
        Command("shapes", "data_prep.make_shapes", "draw a small set to try things with"),
    ),
    "run": (
        Command("plan", "megdet_hpc.plan", "batch, schedule, BN groups, memory and hours of a run, before queueing"),
        Command("submit", "megdet_hpc.submit", "make a SLURM or PBS job of a configuration and submit it"),
        Command(
            "augmented", "megdet_hpc.augmented", "draw training images as a configuration's augmentation makes them"
        ),
        Command("train", "megdet_hpc.train", "train a detector, alone or under horovodrun, mpirun, srun or torchrun"),
        Command("watch", "megdet_hpc.watch", "a running job in the terminal: progress, losses, AP, slowest rank"),
        Command("evaluate", "megdet_hpc.evaluate", "score a checkpoint, a run as it goes, or any COCO results file"),
        Command("analyze", "megdet_hpc.analyze", "what a run's detections get wrong: a page with pictures, CSV, JSON"),
        Command("compare", "megdet_hpc.compare", "runs beside each other: a table, CSV, JSON and curves"),
        Command("ensemble", "megdet_hpc.ensemble", "merge the detections of several runs into one file, and score it"),
        Command("export", "megdet_hpc.export", "write a trained detector as ONNX or TorchScript, checked"),
        Command("predict", "megdet_hpc.predict", "detect objects in pictures and videos of your own"),
    ),
    "check": (
        Command("doctor", "megdet_hpc.doctor", "what is fine, slow or wrong on the hosts of a job"),
        Command("bn-check", "megdet_hpc.bn_check", "compare cross-GPU batch normalization with one process"),
        Command(
            "scaling-report", "megdet_hpc.scaling_report", "PDF of weak and strong scaling from runs of bench_scaling"
        ),
        Command("link-check", "megdet_hpc.link_check", "the plan's time of a step beside ranks joined by slow links"),
        Command("bench", "megdet_hpc.bench", "measure loader, normalization, training step, messages and evaluation"),
    ),
    "study": (
        Command("study", "megdet_hpc.study", "repeat the paper's comparisons at the size of a machine"),
        Command("variance-probe", "megdet_hpc.variance_probe", "measure whether a larger mini-batch pays on a set"),
        Command("eigenspectrum", "megdet_hpc.eigenspectrum", "how many dimensions of its channels a detector uses"),
    ),
    "weights": (
        Command("fetch-weights", "megdet_hpc.fetch_weights", "get a detector to begin with, where there is internet"),
        Command("fetch-backbone", "megdet_hpc.fetch_backbone", "get ImageNet weights on a machine with internet"),
    ),
}
"""The commands, in the order of a run."""

COMMANDS = {command.name: command for group in GROUPS.values() for command in group}

_FOOT = """megdet NAME --help teaches a command. Under a launcher: horovodrun -np 8 megdet train ...
python -m megdet_hpc is the same as megdet; megdet --version says which this is."""


def table() -> str:
    """All commands by group, one line each."""
    width = max(map(len, COMMANDS))
    lines = ["usage: megdet NAME [options]"]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {command.name:{width}}  {command.text}" for command in commands)]
    return "\n".join([*lines, "", _FOOT])


def nearest(name: str) -> str:
    """The command that a wrong name may mean, or that the name of a module means; "" for none."""
    meant = {command.program.replace("/", ".").split(".")[1]: command.name for command in COMMANDS.values()}
    meant |= {name: name for name in COMMANDS}
    close = difflib.get_close_matches(name.removesuffix(".py"), meant, n=1, cutoff=0.5)
    return meant[close[0]] if close else ""
