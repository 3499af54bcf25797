"""The parts of `bench index`, each run as `python -m megdet_hpc.bench.set_parts NAME JSON` in a process without torch.

The last line of a part's output is a JSON object: wall and processor time in seconds, largest resident memory in MiB.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from megdet_hpc.config import DataConfig
from megdet_hpc.data.pack_index import INDEX_NAME
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.data.sampler import EpochPlan, RankSampler, aspect_groups
from megdet_hpc.data.shard_local import ShardLocal
from megdet_hpc.errors import UserError

NUM_FILES = 64
"""Image files of a generated set, which its records share."""
_WIDTH, _HEIGHT = 32, 24  # pixels
_CATEGORIES = 365
_PLANNED_RANKS, _RANKS_OF_A_NODE = 128, 8  # of the epochs that are planned
_WORKERS = 2  # of the loader that gives a first batch


def write_source(folder: Path, num_images: int, num_boxes: int) -> None:
    """Write a COCO set whose image records share a few files, and whose annotations are in no order of images."""
    (folder / "images").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for number in range(NUM_FILES):
        pixels = draw.integers(256, size=(2, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((_WIDTH, _HEIGHT)).save(folder / "images" / f"{number}.jpg", quality=10)
    with open(folder / "set.json", "w") as file:
        file.write('{"images": [')
        for index in range(num_images):
            file.write(
                f'{"," * (index > 0)}{{"id":{index + 1},"width":{_WIDTH},"height":{_HEIGHT},'
                f'"file_name":"{index % NUM_FILES}.jpg"}}'
            )
        file.write('], "annotations": [')
        for begin in range(0, num_boxes, 2**16):
            number = min(2**16, num_boxes - begin)
            columns = (
                draw.integers(1, num_images + 1, number),
                draw.integers(1, _CATEGORIES + 1, number),
                *draw.uniform(0, _HEIGHT / 2, (2, number)).round(2),
                *draw.uniform(1, _HEIGHT / 2, (2, number)).round(2),
            )
            rows = zip(*(column.tolist() for column in columns), strict=True)
            text = ",".join(
                f'{{"id":{key},"image_id":{image},"category_id":{label},"bbox":[{x},{y},{w},{h}],"area":{w * h:.4f},'
                '"iscrowd":0}'
                for key, (image, label, x, y, w, h) in enumerate(rows, begin + 1)
            )
            file.write("," * (begin > 0) + text)
        names = [{"id": key, "name": f"class {key}"} for key in range(1, _CATEGORIES + 1)]
        file.write(f'], "categories": {json.dumps(names)}}}')


def pack_source(source: Path, pack: Path, shard_mib: float) -> None:
    """Pack a generated set in this process."""
    from data_prep import pack_coco

    given = {"annotations": source / "set.json", "images": source / "images", "output": pack, "shard-mib": shard_mib}
    with contextlib.redirect_stdout(io.StringIO()):
        status = pack_coco.main([word for key, value in given.items() for word in (f"--{key}", str(value))])
    if status:
        raise UserError(f"{source} could not be packed; the packer's message is above")


def verify(pack: Path) -> None:
    """Verify a pack in this process."""
    from data_prep import verify_pack

    with contextlib.redirect_stdout(io.StringIO()):
        status = verify_pack.main([str(pack)])
    if status:
        raise UserError(f"{pack} is not right; the findings are above")


def plan_epoch(folder: Path, local: bool) -> None:
    """Plan an epoch of 128 ranks on nodes of 8, 2 images a rank."""
    pack = PackedCoco(folder)
    nodes = tuple(rank // _RANKS_OF_A_NODE for rank in range(_PLANNED_RANKS))
    near = ShardLocal(nodes, pack.images_per_shard, DataConfig().shuffle_buffer) if local else None
    EpochPlan(aspect_groups(pack, DataConfig()), 2, _PLANNED_RANKS, 1, 0, near).epoch(0)


def score_guesses(folder: Path, per_image: int) -> None:
    """Score detections near the boxes of a set, so many an image."""
    from megdet_hpc.evaluation.coco import score
    from megdet_hpc.evaluation.columns import Truth
    from megdet_hpc.evaluation.detections import DetectionTable

    truth, draw = Truth(PackedCoco(folder)), np.random.default_rng(1)
    near = draw.integers(len(truth.boxes), size=truth.num_images * per_image)
    boxes = truth.boxes.boxes_xywh[near] + draw.normal(0, 0.5, (len(near), 4))
    boxes[:, 2:] = np.abs(boxes[:, 2:])
    ids = truth.image_ids[truth.boxes.images[near]], truth.category_ids[truth.boxes.classes[near]]
    score(truth, DetectionTable(ids[0], boxes, draw.random(len(near)), ids[1]))


def first_batch(folder: Path) -> None:
    """Open a pack as a rank does, plan an epoch, and take a batch from a loader with two workers."""
    from megdet_hpc.data.dataset import DetectionDataset
    from megdet_hpc.data.loader import make_loader

    config = DataConfig(short_sides=(64,), val_short_side=64, max_side=128)
    dataset = DetectionDataset.open(folder, config, training=True, seed=0)
    plan = EpochPlan(aspect_groups(dataset.pack, config), 2, _PLANNED_RANKS, 1, 0)
    batches = RankSampler(plan, [0], 0, plan.steps_per_epoch)
    loader = make_loader(dataset, batches, num_workers=_WORKERS, pin_memory=False)
    next(iter(loader))


def open_and_hold(folder: Path) -> None:
    """Open a pack on the word of standard input, look at every page of its index, and weigh it on another word.

    It prints a line of wall and processor seconds, and one of MiB.
    """
    print("ready", flush=True)
    sys.stdin.readline()
    wall, processor = time.perf_counter(), time.process_time()
    pack = PackedCoco(folder)
    print(time.perf_counter() - wall, time.process_time() - processor, flush=True)
    for array in pack.index.block.arrays.values():
        array.reshape(-1).view(np.uint8)[::4096].max(initial=0)
    print("looked", flush=True)
    sys.stdin.readline()  # all have mapped all pages now
    print(index_mib(os.getpid(), folder / INDEX_NAME), flush=True)
    sys.stdin.readline()


def index_mib(process: int, index: Path) -> float:
    """A process's share of the pages of an index file that it maps, each divided by the number of its mappers [MiB]."""
    inside, total = False, 0.0
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        key, _, rest = line.partition(" ")
        if not key.endswith(":"):
            inside = line.endswith(str(index.resolve()))
        elif inside and key == "Pss:":
            total += int(rest.split()[0]) / 2**10
    return total


def peak_mib(status: str) -> float:
    """The largest resident memory that a /proc/PID/status tells; getrusage's begins with that of the parent."""
    return next(int(line.split()[1]) / 2**10 for line in status.splitlines() if line.startswith("VmHWM:"))


PARTS: Mapping[str, Callable[..., None]] = {
    "packing": pack_source,
    "verifying": verify,
    "planning": plan_epoch,
    "scoring": score_guesses,
    "first batch": first_batch,
    "open": open_and_hold,
}


def main() -> None:
    """Run the part that the command line names."""
    name, given = sys.argv[1], json.loads(sys.argv[2])
    wall, processor = time.perf_counter(), time.process_time()
    try:
        PARTS[name](*(Path(value) if isinstance(value, str) else value for value in given))
    except UserError as error:
        sys.exit(f"bench index, {name}: {error}")
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    peak = peak_mib(Path("/proc/self/status").read_text())
    print(json.dumps({"wall": wall, "processor": processor, "mib": peak}))


if __name__ == "__main__":
    main()
