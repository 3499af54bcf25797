"""The libraries that followers hand a run's rows to, one small class each. They load with their class."""

from __future__ import annotations

import os
import re
import secrets
import time
from pathlib import Path
from typing import Any, Protocol

from megdet_hpc.config import flatten

PROJECT = "megdet_hpc"
"""Name under which the runs are found, where the library's own variable names no other."""
# MLflow's server takes so many parameters at a time.
_PARAMETERS_AT_ONCE = 100


class Library(Protocol):
    """A library's view of one run. Made with folder, configuration and the run's name there, None for a new one."""

    run: str
    """Name of the run in the library, by which a resumed run is found."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Hand over numbers of the state after `step` updates."""

    def end(self, how: str) -> None:
        """End the run there; how is finished, stopped or failed."""


class Mlflow:
    """MLflow: a store of files in the run's `mlflow/`, or what MLFLOW_TRACKING_URI names.

    Args:
        folder: folder of the run.
        config: configuration as a nested dict.
        run: name of the run that goes on; None for a new one.
    """

    def __init__(self, folder: Path, config: dict[str, Any], run: str | None) -> None:
        # MLflow 3 asks for this variable; a database on a shared file system would need locks
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        store = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlflow").absolute().as_uri()
        self._client, self._metric = MlflowClient(tracking_uri=store), Metric
        if run:
            try:
                self._client.update_run(run, status="RUNNING")
                self.run = run
                return
            except MlflowException as error:
                print(f"run {run} is not in {store} ({error}): a new one begins", flush=True)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self.run = self._client.create_run(number, run_name=folder.absolute().name).info.run_id
        parameters = [Param(key, str(value)) for key, value in flatten(config).items()]
        for first in range(0, len(parameters), _PARAMETERS_AT_ONCE):
            self._client.log_batch(self.run, params=parameters[first : first + _PARAMETERS_AT_ONCE])

    def log(self, step: int, metrics: dict[str, float]) -> None:
        now = int(1000 * time.time())
        points = [self._metric(mlflow_key(key), value, now, step) for key, value in metrics.items()]
        self._client.log_batch(self.run, metrics=points)

    def end(self, how: str) -> None:
        status = {"finished": "FINISHED", "stopped": "KILLED"}.get(how, "FAILED")
        self._client.set_terminated(self.run, status=status)


def mlflow_key(key: str) -> str:
    """A metric's name as MLflow takes it.

    Its store makes a folder of what is before a slash, so val/AP and val/AP/person cannot both be: it is val/AP.person.
    """
    first, slash, rest = key.partition("/")
    return re.sub(r"[^\w\-. :/]", "_", first + slash + rest.replace("/", "."))


class Wandb:
    """Weights & Biases: files in the run's `wandb/`, without network unless WANDB_MODE says online.

    Args:
        folder: folder of the run.
        config: configuration as a nested dict.
        run: name of the run that goes on; None for a new one.
    """

    def __init__(self, folder: Path, config: dict[str, Any], run: str | None) -> None:
        mode: Any = os.environ.get("WANDB_MODE") or "offline"
        if mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            id=run or secrets.token_hex(4),
            resume=None if mode == "offline" else "allow",
            dir=str(folder.absolute()),
            mode=mode,
            name=folder.absolute().name,
            config=config,
            settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
        )
        self.run = str(self._run.id)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def end(self, how: str) -> None:
        self._run.finish(exit_code=int(how == "failed"))


LIBRARIES: dict[str, type[Mlflow] | type[Wandb]] = {"mlflow": Mlflow, "wandb": Wandb}
