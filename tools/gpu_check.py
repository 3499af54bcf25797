#!/usr/bin/env python3
"""Measure a machine with one GPU: one command, under 9 minutes, without network.

It takes whatever PyTorch there is (2.4 and up), with Horovod and MPI or without. Each part is a process of its own with
a time limit, so a part that fails costs itself only. The report is OUTPUT/gpu_check.json, and OUTPUT/gpu_check.md for
docs/benchmarks.md; the output of each part lies beside them. With --device cpu the same parts run at small sizes, which
shows that the program works and measures nothing of interest.

Exit status: 0 if no part failed, 1 otherwise. A part that this machine cannot run is named with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

Rows = list[dict[str, Any]]
Read = Callable[[dict[str, Any]], Rows]
_LEAST_SECONDS = 5.0
_LAST_LINES = 12
# torchrun ends its ranks when it is told to end, and needs a moment for it [seconds].
_GRACE_SECONDS, _KILL_SECONDS = 10.0, 10.0
_MARK = "MEGDET_GPU_CHECK_PART"


@dataclass(frozen=True)
class Part:
    """A measurement in a process of its own.

    Attributes:
        title: title of its table.
        command: arguments of Python; {json} is the file of its report.
        seconds: time limit.
        read: rows of the table from its report; None: it says only whether it passed.
        ranks: processes that torchrun starts; 1: no launcher.
    """

    title: str
    command: tuple[str, ...]
    seconds: float
    read: Read | None = None
    ranks: int = 1


def parts(device: str, minutes: float) -> Iterator[Part]:
    """All parts, the most telling first. A part may take a fifth of the whole, the tests twice that."""
    small = device == "cpu"
    most = minutes * 60 / 5
    shared = "cpu" if small else "cuda_shared"
    me = str(Path(__file__).resolve())
    size = ("--image-size", "96") if small else ("--image-size", "800", "1333")
    number = ("--repeats", "1", "--warmup", "0") if small else ("--repeats", "8", "--warmup", "3")
    net = ("--backbone", "resnet18") if small else ()
    images = ("--images", "1") if small else ("--images", "2")
    exact = ("-m", "megdet_hpc.bn_check", "--device", device)
    yield Part("the layer is exact", exact, most)
    yield Part("the layer is exact, packed", (*exact, "--exchange", "packed"), most)
    step = ("-m", "megdet_hpc.bench", "step", "--device", device, *net, *images, *size, *number, "--json", "{json}")
    for precision in ("float32", "bfloat16"):
        for layout in ("contiguous", "channels_last"):
            form = ("--precision", precision, "--reference-precision", precision, "--memory-format", layout)
            further = ("--profile",) if precision == "bfloat16" else ()
            yield Part(f"training step, {precision}, {layout}", (*step, *form, *further), most, step_rows)
    yield Part("tests on the GPU", ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"), 2 * most)
    layers = ("-m", "megdet_hpc.bench", "cgbn", "--device", device, *net, *images, *size, *number, "--json", "{json}")
    for dtype in ("float32", "bfloat16", "float16"):
        for layout in ("contiguous", "channels_last"):
            form = ("--dtype", dtype, "--memory-format", layout)
            yield Part(f"normalization layers, {dtype}, {layout}", (*layers, *form), most, layer_rows)
    for ranks in (2, 4):
        check = ("-m", "megdet_hpc.bn_check", "--device", shared)
        yield Part(f"the layer is exact on {ranks} ranks of one device", check, most, ranks=ranks)
        yield Part(f"the same, packed, {ranks} ranks", (*check, "--exchange", "packed"), most, ranks=ranks)
    yield Part("a training of 2 ranks on one device", (me, "--body", "training", shared, "{json}"), most, ranks=2)
    found = ("--images", "0", "--detect", "8", "--batches", "1", "2", "8", "--detect-repeats", "8")
    found = ("--images", "0", "--detect", "2", "--batches", "1", "2", "--detect-repeats", "1") if small else found
    for precision in ("float32", "bfloat16"):
        detect = ("-m", "megdet_hpc.bench", "evaluation", "--device", device, *net, *size, *found)
        command = (*detect, "--precision", precision, "--json", "{json}")
        yield Part(f"detection, {precision}", command, most, detection_rows)
    yield Part("decoding", (me, "--body", "decoding", device, "{json}"), most, table_rows)


def table_rows(report: dict[str, Any]) -> Rows:
    """The rows of a body of this program."""
    return list(report["rows"])


def detection_rows(report: dict[str, Any]) -> Rows:
    """The rows of `bench evaluation` about detection."""
    return list(report["images/s"])


def step_rows(report: dict[str, Any]) -> Rows:
    """The rows of `bench step`, with what its profile counted."""
    counted = report.get("counted in one step") or {}
    rows = [dict(row) for row in report["steps"]]
    for row in rows[1:]:
        row |= {"planned": report.get("planned", ""), "counted": ", ".join(f"{k} {v}" for k, v in counted.items())}
    return rows


def layer_rows(report: dict[str, Any]) -> Rows:
    """The rows of `bench cgbn` with what tells most."""
    keys = ("variant", "ms_median", "ms_min", "ms_max", "to_local", "min_to_local", "messages")
    return [{key: row[key] for key in keys} for row in report["variants"]]


def run(part: Part, index: int, folder: Path, left: float) -> dict[str, Any]:
    """Run a part. Its output and report lie in the folder; the answer has its state, reason, seconds and rows."""
    answer: dict[str, Any] = {"part": part.title, "state": "left out", "why": "", "seconds": 0.0, "rows": []}
    limit = min(part.seconds, left)
    if limit < _LEAST_SECONDS:
        return answer | {"why": "no time left"}
    report, log = folder / f"{index:02d}.json", folder / f"{index:02d}.log"
    own = [argument.replace("{json}", str(report)) for argument in part.command]
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={part.ranks}"]
    command = [sys.executable, *(start if part.ranks > 1 else []), *own]
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", _MARK: mark}
    begin, late = time.monotonic(), ""
    with open(log, "wb") as file:
        file.write(f"{' '.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status, late = None, log.read_text(errors="replace")  # torchrun has more to say when it is ended
        finally:
            end(process, mark)
    answer["seconds"] = round(time.monotonic() - begin, 1)
    lines = log.read_text(errors="replace").splitlines()
    answer["command"], answer["log"] = " ".join(part.command), lines[1:][-_LAST_LINES:]
    if status is None:
        last = last_word(late.splitlines()[1:])
        return answer | {"state": "failed", "why": f"not done in {limit:.0f} s; last line: {last}"}
    last = last_word(lines[1:])
    if status:
        return answer | {"state": "failed", "why": f"status {status}: {last}"}
    answer |= {"state": "passed", "why": last if part.read is None else ""}
    if part.read is not None:
        try:
            answer["rows"] = part.read(json.loads(report.read_text()))
        except (OSError, ValueError, KeyError) as error:
            return answer | {"state": "failed", "why": f"its report cannot be read: {error!r}"}
    return answer


def end(process: subprocess.Popen[bytes], mark: str) -> None:
    """End a part and all that it started. torchrun's ranks have sessions of their own, and outlive its death."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
    late = time.monotonic() + _KILL_SECONDS
    while (left := marked(mark)) and time.monotonic() < late:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    process.wait()


def marked(mark: str) -> list[int]:
    """The processes with a part's mark in their environment, which children inherit whoever their parent is by now."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{_MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def last_word(lines: list[str]) -> str:
    """The line that says how a part ended: that of our own error, else the last one with a letter in it."""
    spoken = [line.strip() for line in lines if any(letter.isalpha() for letter in line)]
    own = [line for line in spoken if line.startswith("megdet_hpc: ")]
    return (own or spoken or ["no output"])[-1]


def machine(device: str) -> dict[str, Any]:
    """Versions and hardware. A library that is missing is named as such."""
    found: dict[str, Any] = {"python": platform.python_version(), "device": device}
    for name in ("torch", "torchvision", "horovod", "mpi4py", "pycocotools", "hotcoco", "h5py"):
        try:
            from importlib.metadata import version

            found[name] = version(name)
        except Exception:
            found[name] = "missing"
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "memory GiB": round(properties.total_memory / 2**30, 1)}
        found |= {"cuda or rocm": torch.version.cuda or torch.version.hip, "cudnn": torch.backends.cudnn.version()}
        smi = shutil.which("nvidia-smi")
        if smi:
            command = [smi, "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            found["driver, clock"] = done.stdout.strip()
    return found


def markdown(report: dict[str, Any]) -> str:
    """The report as a section of docs/benchmarks.md."""
    machine_text = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    lines = ["## One GPU", "", f"    {report['command']}", "", f"{report['date']}. {machine_text}.", ""]
    lines += ["| part | state | seconds | |", "|---|---|---|---|"]
    lines += [
        f"| {p['part']} | {p['state']} | {p['seconds']} | {p['why'].replace('|', '/')} |" for p in report["parts"]
    ]
    for part in report["parts"]:
        if part["rows"]:
            keys = list(dict.fromkeys(key for row in part["rows"] for key in row))
            lines += ["", f"### {part['part']}", "", f"| {' | '.join(keys)} |", f"|{'---|' * len(keys)}"]
            lines += [f"| {' | '.join(_cell(row.get(key)) for key in keys)} |" for row in part["rows"]]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def body_decoding(device: str, folder: Path) -> Rows:
    """Images a second of decoding, on the device beside one core."""
    import io

    import numpy as np
    import torch
    from PIL import Image

    from megdet_hpc.data.gpu_decode import decode_batch

    draw = np.random.default_rng(0)
    files = []
    for _ in range(4 if device == "cpu" else 64):
        blocks = Image.fromarray(draw.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        file = io.BytesIO()
        blocks.resize((640, 480)).save(file, "JPEG", quality=92)
        files.append(file.getvalue())
    rows, here = [], decode_batch(files, torch.device("cpu"))
    for name in dict.fromkeys(("cpu", device)):
        seconds = []
        for _ in range(4):
            begin = time.perf_counter()
            found = decode_batch(files, torch.device(name))
            if name != "cpu":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        apart = [float((a.cpu().int() - b.int()).abs().float().mean()) for a, b in zip(found, here, strict=True)]
        rows.append({"decoder": name, "images/s": len(files) / min(seconds), "mean difference": max(apart)})
    return rows


def body_training(device: str, folder: Path) -> Rows:
    """Two steps of the tiny configuration over generated images; every rank runs this."""
    from megdet_hpc import train

    folder /= f"training-{os.environ.get('TORCHELASTIC_RUN_ID', os.getppid())}"
    ready = folder / "ready"
    if int(os.environ.get("RANK", "0")) == 0:
        make = ["data_prep/make_shapes.py", "--output", str(folder / "shapes"), "--train", "16", "--val", "4"]
        pack = ["data_prep/pack_coco.py", "--annotations", str(folder / "shapes/annotations/instances_train.json")]
        pack += ["--images", str(folder / "shapes/train"), "--output", str(folder / "pack")]
        plain = {k: v for k, v in os.environ.items() if "RANK" not in k and "WORLD" not in k and "TORCH" not in k}
        for command in (make, pack):
            subprocess.run([sys.executable, *command], cwd=ROOT, env=plain, check=True)
        ready.touch()
    while not ready.exists():
        time.sleep(0.1)
    arguments = ["--config", "tiny", "--device", device, "--data.train", str(folder / "pack"), "--data.val", "null"]
    arguments += ["--output", str(folder / "run"), "--max_steps", "2", "--log_every", "1", "--data.num_workers", "0"]
    train.main(arguments)
    return []


BODIES: dict[str, Callable[[str, Path], Rows]] = {
    "decoding": body_decoding,
    "training": body_training,
}


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the program at small sizes"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu_check", help="folder of the report")
    parser.add_argument("--minutes", type=float, default=9.0, help="time of all parts together (default: 9)")
    parser.add_argument("--only", metavar="TEXT", help="only the parts whose title has this text")
    parser.add_argument("--body", nargs=3, metavar=("NAME", "DEVICE", "JSON"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.body:
        name, device, file = options.body
        rows = BODIES[name](device, Path(file).resolve().parent)
        if int(os.environ.get("RANK", "0")) == 0:
            Path(file).write_text(json.dumps({"rows": rows}))
        return 0
    chosen = [part for part in parts(options.device, options.minutes) if not options.only or options.only in part.title]
    if not chosen:
        titles = "; ".join(part.title for part in parts(options.device, options.minutes))
        parser.error(f"--only {options.only}: no part has it; parts: {titles}")
    try:
        import torch
    except ImportError as error:
        parser.error(f"PyTorch is missing ({error}); run this with the Python that has it")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} shows no GPU here; --device cpu tries the program at small sizes")
    options.output.mkdir(parents=True, exist_ok=True)
    words = [f"--device {options.device}"] if options.device != "cuda" else []
    words += [f"--only '{options.only}'"] if options.only else []
    report: dict[str, Any] = {
        "command": " ".join(["python tools/gpu_check.py", *words]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(options.device),
        "parts": [],
    }
    end = time.monotonic() + options.minutes * 60
    for index, part in enumerate(chosen):
        answer = run(part, index, options.output, end - time.monotonic())
        report["parts"].append(answer)
        print(f"{answer['state']:8s} {answer['seconds']:6.1f} s  {part.title}  {answer['why']}", flush=True)
        # after each part, so that an end from outside keeps what there is
        (options.output / "gpu_check.json").write_text(json.dumps(report, indent=1))
        (options.output / "gpu_check.md").write_text(markdown(report))
    print(f"report: {options.output / 'gpu_check.md'}")
    return int(any(part["state"] == "failed" for part in report["parts"]))


if __name__ == "__main__":
    raise SystemExit(main())
