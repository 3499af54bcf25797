"""JPEG decoders side by side: images per second of one thread, and the distance of their pixels from Pillow's."""

from __future__ import annotations

import importlib
import statistics
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megdet_hpc.data.decode import DECODER, decode_rgb, decode_with_pillow

Decode = Callable[[bytes], Tensor]


def _torchvision() -> Decode:
    io = importlib.import_module("torchvision.io")
    return lambda encoded: io.decode_jpeg(
        torch.frombuffer(bytearray(encoded), dtype=torch.uint8), mode=io.ImageReadMode.RGB
    )


def _torchcodec() -> Decode:
    decode: Decode = importlib.import_module("torchcodec.decoders").decode_jpeg
    return decode


def _simplejpeg() -> Decode:
    decode = importlib.import_module("simplejpeg").decode_jpeg
    return lambda encoded: torch.from_numpy(decode(encoded, "RGB")).permute(2, 0, 1)


def _turbojpeg() -> Decode:
    module = importlib.import_module("turbojpeg")
    decode = module.TurboJPEG().decode
    return lambda encoded: torch.from_numpy(decode(encoded, pixel_format=module.TJPF_RGB)).permute(2, 0, 1)


def _opencv() -> Decode:
    cv2 = importlib.import_module("cv2")
    cv2.setNumThreads(1)
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    return lambda encoded: torch.from_numpy(cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)).permute(2, 0, 1)


_OTHERS: dict[str, tuple[str, Callable[[], Decode]]] = {
    "simplejpeg": ("simplejpeg", _simplejpeg),
    "torchvision.io": ("torchvision", _torchvision),
    "torchcodec": ("torchcodec", _torchcodec),
    "OpenCV": ("opencv-python-headless", _opencv),
    "PyTurboJPEG": ("PyTurboJPEG", _turbojpeg),
}


def decoder_rows(encoded: list[bytes], repeats: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Measure every installed decoder on the same JPEGs, in turns.

    Args:
        encoded: image files; those that are not JPEG are left out.

    Returns:
        A row for each decoder, and the reasons why others are missing. to_pillow compares processor time.
        max_difference is the largest difference from Pillow over all values of all images [0 to 255]; None where shapes
        differ, since the decoder turns images by their EXIF data.
    """
    jpegs = [data for data in encoded if data[:3] == b"\xff\xd8\xff"]
    if not jpegs:
        return [], ["no JPEG among the images"]
    decoders: dict[str, tuple[str, Decode]] = {
        f"decode_rgb ({DECODER})": ("megdet_hpc", decode_rgb),
        "Pillow": ("pillow", decode_with_pillow),
    }
    missing = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torchvision warns once per image
        for name, (package, make) in _OTHERS.items():
            try:
                decode = make()
                decode(jpegs[0])
                decoders[name] = (metadata.version(package), decode)
            except Exception as error:  # if its own libraries are missing, a decoder may raise any error
                missing.append(f"{name}: {str(error).splitlines()[0]}")
        speeds: dict[str, list[float]] = {name: [] for name in decoders}
        cpu: dict[str, list[float]] = {name: [] for name in decoders}
        for _ in range(repeats):
            for name, (_, decode) in decoders.items():
                begin, begin_cpu = time.perf_counter(), time.process_time()
                for data in jpegs:
                    decode(data)
                speeds[name].append(len(jpegs) / (time.perf_counter() - begin))
                cpu[name].append((time.process_time() - begin_cpu) / len(jpegs) * 1e3)
        differences = {name: _difference(decode, jpegs) for name, (_, decode) in decoders.items()}
    rows = [
        {
            "decoder": name,
            "version": metadata.version("pillow") if version == "pillow" else version,
            "images_per_s": statistics.median(speeds[name]),
            "least": min(speeds[name]),
            "most": max(speeds[name]),
            "cpu_ms": statistics.median(cpu[name]),
            "to_pillow": statistics.median(b / a for a, b in zip(cpu[name], cpu["Pillow"], strict=True)),
            "max_difference": differences[name],
        }
        for name, (version, _) in decoders.items()
    ]
    return rows, missing


def _difference(decode: Decode, jpegs: list[bytes]) -> int | None:
    largest = 0
    for data in jpegs:
        found, expected = decode(data), decode_with_pillow(data)
        if found.shape != expected.shape:
            return None
        largest = max(largest, int((found.int() - expected.int()).abs().max()))
    return largest
