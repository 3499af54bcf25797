"""The log of a run: JSON lines, lines on rank 0's terminal, and the trackers that show a run elsewhere."""

from megdet_hpc.log.metrics import MetricsLog, config_files, read_metrics, time_of_steps, time_to_ap
from megdet_hpc.log.terminal import progress_bar

__all__ = ["MetricsLog", "config_files", "progress_bar", "read_metrics", "time_of_steps", "time_to_ap"]
