"""A detector as a graph from one image to its objects, in two formats.

Shape legend: image (3, H, W) uint8 RGB; n objects, best first; M x M the grid of a mask on its box.
"""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

from megdet_hpc.config import Geometry
from megdet_hpc.data.batch import Batch
from megdet_hpc.errors import UserError
from megdet_hpc.files import atomic_write
from megdet_hpc.models.detector import Detector

Format = Literal["onnx", "torchscript"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torchscript": ".ts"}
_OUTPUTS = ("boxes", "scores", "labels")
ABOUT = "megdet_hpc.json"
"""Name of the description within the file; of an ONNX file's metadata entry too."""
OPSET = 17
"""Version of ONNX's operators; RoIAlign has torchvision's meaning of a half pixel from 16 on."""

Found = tuple[Tensor, ...]
Run = Callable[[Tensor], Found]


class DetectorGraph(nn.Module):
    """The detector of one image: normalization, padding and postprocessing included, resizing not.

    A detector of squares has one size, since its default boxes are constants of the graph. The file refuses others.

    Args:
        detector: detector in evaluation mode, on the CPU.
        geometry: sizes of its images.
    """

    def __init__(self, detector: Detector, geometry: Geometry) -> None:
        super().__init__()
        self.detector, self.divisible, self.one_size = detector, geometry.divisible, geometry.square
        self.outputs = (*_OUTPUTS, "masks") if detector.has_masks else _OUTPUTS

    def forward(self, image: Tensor) -> Found:
        """The outputs of an image.

        Returns:
            Boxes (n, 4) float32 xyxy in pixels of the image, scores (n,) float32, labels (n,) int64 from 1 on; of a
            detector of masks also (n, M, M) float32, the probability of each cell of the object's box.
        """
        height, width = image.shape[1:]
        # padded by the mean colour, which is 0 once it is normalized, as the loader's padding is
        mean = self.detector.pixel_mean
        pixels = torch.cat([image[None].float(), mean.expand(1, 3, height, -width % self.divisible)], dim=3)
        pixels = torch.cat([pixels, mean.expand(1, 3, -height % self.divisible, pixels.shape[3])], dim=2)
        (found,) = self.detector.found(Batch(pixels, [(height, width)], [(1.0, 1.0)], [0], []))
        masks = (found["masks"][:, 0],) if self.detector.has_masks else ()
        return found["boxes"], found["scores"], found["labels"], *masks


@torch.no_grad()
def write(graph: DetectorGraph, kind: Format, file: Path, example: Tensor, about: dict[str, Any]) -> None:
    """Write a detector's graph into a file.

    Args:
        graph: graph in evaluation mode.
        kind: format.
        file: replaced if it exists.
        example: an image to follow through the detector, best one with objects.
        about: what a program that runs the graph should know; goes into the file as JSON.

    Raises:
        UserError: a library is missing, or the detector has operators that the format cannot hold.
        OSError: the file cannot be written.
    """
    deformable = next((path for path, m in graph.detector.named_modules() if isinstance(m, DeformConv2d)), None)
    if kind == "onnx" and deformable:
        raise UserError(
            f"--format onnx: {deformable} is a deformable convolution (model.conv), which ONNX's operators of version "
            f"{OPSET} have not; accepted: --format torchscript"
        )
    write_format = {"onnx": _write_onnx, "torchscript": _write_torchscript}[kind]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracers warn of each size that they take for a constant
            content = write_format(graph, example, json.dumps(about, ensure_ascii=False))
    except (RuntimeError, TypeError, ValueError, torch.onnx.errors.OnnxExporterError) as error:
        raise UserError(
            f"--format {kind}: {type(graph.detector).__name__} cannot be written so: {str(error)[:300]}"
        ) from error
    with atomic_write(file) as stream:
        stream.write(content)


def _write_torchscript(graph: DetectorGraph, example: Tensor, about: str) -> bytes:
    buffer = io.BytesIO()
    # torch's own check runs the example alone; the caller's runs other sizes too
    traced = torch.jit.trace(graph, example, check_trace=False)
    if graph.one_size:
        traced = torch.jit.script(_OfOneSize(traced, *example.shape[1:]))
    torch.jit.save(traced, buffer, _extra_files={ABOUT: about})
    return buffer.getvalue()


class _OfOneSize(nn.Module):
    """A graph that refuses images of other sizes than its own, once it is a script."""

    def __init__(self, graph: torch.jit.ScriptModule, height: int, width: int) -> None:
        super().__init__()
        self.graph, self.height, self.width = graph, height, width

    def forward(self, image: Tensor) -> Any:
        if image.shape[1] != self.height or image.shape[2] != self.width:
            raise ValueError("this detector takes images of " + str(self.height) + " x " + str(self.width) + " pixels")
        return self.graph(image)


def _write_onnx(graph: DetectorGraph, example: Tensor, about: str) -> bytes:
    onnx, _ = onnx_libraries()
    buffer: Any = io.BytesIO()
    sizes = {} if graph.one_size else {"image": {1: "height", 2: "width"}}
    with contextlib.redirect_stdout(io.StringIO()):
        # the exporter that follows a run: torch.export makes a graph that fails on an image without objects
        torch.onnx.export(
            graph,
            (example,),
            buffer,
            opset_version=OPSET,
            dynamo=False,
            input_names=["image"],
            output_names=list(graph.outputs),
            dynamic_axes={**sizes, **{name: {0: "objects"} for name in graph.outputs}},
        )
    model = onnx.load_model_from_string(buffer.getvalue())
    onnx.helper.set_model_props(model, {ABOUT: about})
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def read(file: Path, kind: Format) -> Run:
    """The graph of a file as a function, run by onnxruntime or torch.

    Raises:
        UserError: a library is missing.
    """
    if kind == "torchscript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch advises torch.export
            script: Run = torch.jit.load(str(file))
        return script
    _, onnxruntime = onnx_libraries()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: it warns of sizes that torchvision's pooling leaves open
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> Found:
        return tuple(torch.from_numpy(value) for value in session.run(None, {"image": image.numpy()}))

    return run


def onnx_libraries() -> tuple[Any, Any]:
    """onnx and onnxruntime; raises UserError where one is not installed."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f"--format onnx needs {error.name}, which is not installed: pip install onnx onnxruntime"
        ) from error
    return onnx, onnxruntime
