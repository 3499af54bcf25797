"""The plan of a run on N ranks: batch, schedule, BN groups by node. A run that cannot work is refused.

`plan` and `submit` refuse the same runs, since both call `plan_job`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megdet_hpc.config import Config
from megdet_hpc.data.shard_format import read_manifest
from megdet_hpc.errors import UserError
from megdet_hpc.models.weights import AUTO, check_constants, find_weights
from megdet_hpc.solver.run_plan import RunPlan

COCO_TRAIN2017_IMAGES = 118_287
_DEFAULT_RANKS_PER_NODE = 8


@dataclass(frozen=True)
class TrainingSet:
    """Numbers of images and categories of a plan, and their source."""

    num_images: int
    num_categories: int
    source: str


@dataclass(frozen=True)
class Nodes:
    """Ranks in consecutive blocks on nodes of equal size, as launchers number them."""

    num_ranks: int
    ranks_per_node: int

    def __post_init__(self) -> None:
        if self.num_ranks < 1 or self.ranks_per_node < 1:
            raise UserError(f"--ranks {self.num_ranks}, {self.ranks_per_node} ranks per node; accepted: 1 or more each")
        if self.num_ranks % self.ranks_per_node:
            raise UserError(
                f"--ranks {self.num_ranks}: {self.num_ranks} ranks / {self.ranks_per_node} ranks per node = "
                f"{self.num_ranks / self.ranks_per_node:.4g} nodes; accepted: a multiple of {self.ranks_per_node}, or "
                "other --nodes or --ranks-per-node"
            )

    @property
    def num_nodes(self) -> int:
        return self.num_ranks // self.ranks_per_node

    def of_ranks(self, first: int, last: int) -> range:
        """The nodes of the ranks first to last, both included."""
        return range(first // self.ranks_per_node, last // self.ranks_per_node + 1)


@dataclass(frozen=True)
class JobPlan(RunPlan):
    """A run that the trainer would accept, on nodes and images."""

    nodes: Nodes
    training_set: TrainingSet

    def group_ranks(self, group: int) -> range:
        """The ranks of a BN group."""
        size = self.groups.ranks_per_group
        return range(group * size, (group + 1) * size)

    def nodes_per_group(self) -> int:
        """Number of nodes of the BN group with most nodes."""
        groups = map(self.group_ranks, range(self.groups.num_groups))
        return max(len(self.nodes.of_ranks(ranks[0], ranks[-1])) for ranks in groups)


def place_ranks(num_ranks: int, num_nodes: int | None, ranks_per_node: int | None) -> Nodes:
    """Nodes from the user's numbers. Without --nodes and --ranks-per-node: nodes of 8 ranks, or one node of fewer.

    Raises:
        UserError: the numbers do not fit each other.
    """
    if num_nodes is not None and num_nodes < 1:
        raise UserError(f"--nodes {num_nodes}; accepted: 1 or more")
    if num_nodes is not None and ranks_per_node is not None and num_nodes * ranks_per_node != num_ranks:
        raise UserError(
            f"--nodes {num_nodes} x --ranks-per-node {ranks_per_node} = {num_nodes * ranks_per_node} ranks, "
            f"not --ranks {num_ranks}"
        )
    if num_nodes is not None and num_ranks % num_nodes:
        raise UserError(f"--ranks {num_ranks} / --nodes {num_nodes} = {num_ranks / num_nodes:.4g} ranks per node")
    if ranks_per_node is None:
        ranks_per_node = num_ranks // num_nodes if num_nodes else min(max(num_ranks, 1), _DEFAULT_RANKS_PER_NODE)
    return Nodes(num_ranks, ranks_per_node)


def find_training_set(config: Config, num_images: int | None) -> TrainingSet:
    """The training set: the given number of images, else the pack data.train if it is here, else COCO train2017.

    Raises:
        UserError: fewer than one image.
        PackError: data.train is a folder and no pack, or its manifest is broken.
    """
    if num_images is not None and num_images < 1:
        raise UserError(f"--images {num_images}; accepted: 1 or more")
    folder = Path(config.data.train)
    if num_images is None and folder.is_dir():
        manifest = read_manifest(folder)
        return TrainingSet(manifest["totals"]["images"], len(manifest["coco"]["categories"]), f"manifest of {folder}")
    if num_images is None:
        return TrainingSet(COCO_TRAIN2017_IMAGES, 80, f"assumed: COCO train2017, since {folder} is not here")
    return TrainingSet(num_images, 80, "--images; 80 categories assumed")


def plan_job(config: Config, nodes: Nodes, training_set: TrainingSet, *, goes_on: bool = False) -> JobPlan:
    """The plan of a run, by the trainer's own arithmetic.

    Steps per epoch do not count the aspect groups, since those need the data. With data.group_by_aspect_ratio an epoch
    may have one step more.

    Args:
        config: the run's configuration.
        nodes: places of its ranks.
        training_set: its images and categories.
        goes_on: whether the run continues from a checkpoint, and so needs no first weights.

    Raises:
        UserError: the trainer would refuse the run: BN groups that are not whole, emulation on several ranks, AGVM on
            an odd number of ranks, constant parts on random weights.
    """
    if config.emulate.ranks and nodes.num_ranks > 1:
        raise UserError(f"emulate.ranks {config.emulate.ranks} with --ranks {nodes.num_ranks}; accepted: --ranks 1")
    if config.solver.agvm and not config.emulate.ranks and nodes.num_ranks % 2:
        raise UserError(f"solver.agvm needs an even number of ranks, --ranks is {nodes.num_ranks}")
    if config.solver.agvm and config.model.frozen_stages == config.model.num_stages:
        raise UserError(
            f"solver.agvm compares with the backbone, and model.frozen_stages {config.model.num_stages} "
            "leaves none of it to train"
        )
    if (
        config.model.backbone_weights != AUTO and not goes_on
    ):  # whether auto finds weights is known only on the host where the run starts
        check_constants(config, find_weights(config.model))
    run = RunPlan.of(config, nodes.num_ranks, np.zeros(training_set.num_images, np.bool_))
    return JobPlan(run.config, run.groups, run.epoch, run.schedule, nodes, training_set)
