"""A detector of one convolution, all in this file: `python -m tests.toy ARGUMENTS` trains it."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megdet_hpc.config import DETECTORS, EvaluationConfig, ModelConfig, NormConfig
from megdet_hpc.config.ranges import AT_LEAST_1, ranged
from megdet_hpc.data.batch import Batch
from megdet_hpc.layers.norm import norm_layer
from megdet_hpc.models.detector import Detections, Detector, Draws
from megdet_hpc.models.factory import BUILDERS
from megdet_hpc.models.losses import Loss, Losses
from megdet_hpc.parallel.communicator import Communicator

STRIDE = 16


@dataclass(frozen=True)
class ToyConfig(ModelConfig):
    """Every cell of a grid says what lies at its centre."""

    detector: Literal["toy"] = "toy"
    backbone: Literal["none"] = "none"
    channels: int = ranged(8, AT_LEAST_1)


class Toy(Detector):
    def __init__(self, channels: int, num_labels: int, norm: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, channels, STRIDE, STRIDE), norm, nn.ReLU())
        self.head = nn.Conv2d(channels, num_labels, 1)

    def losses(self, batch: Batch, draws: Draws) -> Losses:
        scores = self.dense(self.normalized(batch))[0]
        cells = scores.new_zeros(scores[:, 0].shape, dtype=torch.int64)
        for grid, target in zip(cells, [own.without_crowds() for own in batch.targets], strict=True):
            x, y = ((target.boxes[:, :2] + target.boxes[:, 2:]) / 2 / STRIDE).long().unbind(1)
            grid[y.clamp(max=grid.shape[0] - 1), x.clamp(max=grid.shape[1] - 1)] = target.labels
        each = F.cross_entropy(scores, cells, reduction="none")
        every = {"objects": cells > 0, "empty": cells == 0}
        return {name: Loss(each[chosen].sum(), chosen.sum()) for name, chosen in every.items()}

    def detect(self, batch: Batch) -> list[Detections]:
        found = []
        for scores in self.dense(self.normalized(batch))[0].softmax(1):
            best, label = scores[1:].flatten(1).max(0)
            kept = best.topk(min(10, len(best))).indices
            x, y = kept % scores.shape[2] * STRIDE, kept // scores.shape[2] * STRIDE
            boxes = torch.stack([x, y, x + 2 * STRIDE, y + 2 * STRIDE], dim=1).float()
            found.append(Detections(boxes, best[kept], label[kept] + 1))
        return found

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {name: list(part.parameters()) for name, part in self.named_children()}

    def class_layers(self) -> dict[str, tuple[int, int]]:
        return {"head": (1, 1)}

    def coordinate_modules(self) -> list[nn.Module]:
        return [self.head]

    def dense(self, images: Tensor) -> list[Tensor]:
        return [self.head(self.backbone(images))]


def build(config: ToyConfig, norm: NormConfig, _: EvaluationConfig, num_labels: int, group: Communicator) -> Toy:
    return Toy(config.channels, num_labels, (norm_layer(norm, "backbone", group) or nn.Identity)(config.channels))


if __name__ == "__main__":
    from megdet_hpc import train

    DETECTORS["toy"], BUILDERS["toy"] = ToyConfig, build
    train.main()
