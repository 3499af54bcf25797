"""ReFrame checks of a site: preflight, batch normalization, 20 training steps; 2 nodes, under 5 minutes.

    reframe -C SITE.py -c tests/site/megdet_reframe.py -r -S num_tasks=16 -S num_tasks_per_node=8

SITE.py is the site's own configuration, with its partitions, launchers and modules; the environment of
tools/setup_env.sh must be on PATH in it, or be activated by `-S venv=/path/.venv`. A reference of images/s is set by
`-S least_images_per_s=400`. docs/packaging.md says what was tried.
"""

# ruff: noqa: RUF012 - ReFrame's variables are class attributes

from __future__ import annotations

from pathlib import Path

import reframe as rfm
import reframe.utility.sanity as sn
from reframe.core.builtins import performance_function, run_before, sanity_function, variable

ROOT = Path(__file__).resolve().parents[2]


class MegdetCheck(rfm.RunOnlyRegressionTest):
    """What the checks share: ranks, the environment, and the checkout as the folder of the modules."""

    valid_systems = ["*"]
    valid_prog_environs = ["*"]
    num_tasks = 2
    num_tasks_per_node = 1
    time_limit = "5m"
    executable = "python"
    device = variable(str, value="auto")
    venv = variable(str, value="")
    tags = {"megdet", "site"}

    @run_before("run")
    def set_environment(self) -> None:
        """Let ranks find package and environment."""
        self.env_vars = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if self.venv:
            self.prerun_cmds = [f"source {self.venv}/bin/activate", *self.prerun_cmds]
        # the script goes on after a failure, and its own status is that of its last command
        self.postrun_cmds = ['echo "megdet status $?"', *self.postrun_cmds]

    def ended_well(self) -> object:
        """The launcher's status is 0."""
        return sn.assert_found(r"(?m)^megdet status 0$", self.stdout)


@rfm.simple_test
class PreflightCheck(MegdetCheck):
    """Versions, devices, folders and one message on every node."""

    @run_before("run")
    def set_options(self) -> None:
        """The doctor's quick form."""
        self.executable_opts = ["-m", "megdet_hpc.doctor", "--preflight", "--device", self.device]
        self.executable_opts += ["--output", "run", "--timeout", "150"]

    @sanity_function
    def all_ranks_are_fine(self) -> object:
        """Its last line counts all ranks, and nothing is wrong on any."""
        line = rf"preflight of {self.num_tasks} rank\(s\): \d+ fine, \d+ slow, 0 wrong"
        return sn.all([sn.assert_found(line, self.stdout), self.ended_well()])


@rfm.simple_test
class BatchNormCheck(MegdetCheck):
    """Statistics and gradients over all ranks, equal to those of one process on the whole batch."""

    @run_before("run")
    def set_options(self) -> None:
        """All cases of bn_check."""
        self.executable_opts = ["-m", "megdet_hpc.bn_check", "--device", self.device]

    @sanity_function
    def within_tolerance(self) -> object:
        """Its last line says that all are."""
        line = r"bn_check: all \d+ checks within tolerance"
        return sn.all([sn.assert_found(line, self.stdout), self.ended_well()])


@rfm.simple_test
class TrainingCheck(MegdetCheck):
    """20 steps of `tiny` on generated images."""

    least_images_per_s = variable(float, value=0.0)

    @run_before("run")
    def set_options(self) -> None:
        """Draw and pack 160 images, then train."""
        self.prerun_cmds = [
            f"python {ROOT}/data_prep/make_shapes.py --output coco --train 160 --val 8",
            f"python {ROOT}/data_prep/pack_coco.py --annotations coco/annotations/instances_train.json "
            "--images coco/train --output train",
        ]
        options = (
            f"--device {self.device} --data.train train --data.val null --norm.size 0 --max_steps 20 --log_every 5"
        )
        self.executable_opts = ["-m", "megdet_hpc.train", "--config", "tiny", *options.split(), "--output", "run"]
        self.postrun_cmds += ["cat run/metrics.jsonl"]
        # a third below is a fault; None: no upper limit
        self.reference = {"*": {"images_per_s": (self.least_images_per_s, -0.33, None, "images/s")}}

    @sanity_function
    def trained(self) -> object:
        """All steps were made, and no loss is missing."""
        rows = sn.count(sn.findall(r'"loss": \d', self.stdout))
        return sn.all([sn.assert_found(r"trained 20 steps", self.stdout), sn.assert_eq(rows, 4), self.ended_well()])

    @performance_function("images/s")
    def images_per_s(self) -> object:
        """Speed of the last row."""
        return sn.extractsingle(r'"images_per_s": ([\d.]+)', self.stdout, 1, float, -1)
