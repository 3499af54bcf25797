"""The plan's hours beside measured updates: those of docs/results.md for whole runs."""

from __future__ import annotations

import pytest

from megdet_hpc.plan.gpu_hours import describe_gpu_hours, gpus_of, update_seconds
from megdet_hpc.study.report import _on_gpus


def test_the_papers_runs_take_the_hours_of_the_results_page() -> None:
    # 81,323 updates of 16 images and 5,093 of 256: 33.0 h (set) and 2.09 h
    assert 81_323 * update_seconds(16) / 3600 == pytest.approx(33.0, abs=0.05)
    assert 5_093 * update_seconds(256) / 3600 == pytest.approx(2.09, abs=0.005)


def test_mini_batches_of_whole_nodes_are_told_and_compared() -> None:
    assert [gpus_of(batch) for batch in (8, 16, 17, 64, 100, 256, 512)] == [None, 8, None, 32, None, 128, None]
    lines = describe_gpu_hours({256: [240], 16: [3840], 8: [9000]}, 0.7)
    assert lines[0] == "updates to AP 0.7 as GPUs would make them, by the plan of megdet_r50_fpn_256:"
    assert lines[1] == "  mini-batch   16 on   8 GPUs: 3,840 updates of 1.46 s = 1.56 h"
    assert lines[2] == "  mini-batch  256 on 128 GPUs: 240 updates of 1.48 s = 0.0985 h"
    assert lines[3] == "  time 15.8 : 1, GPUs 1 : 16; in the paper's whole runs 33 h on 8 and 4 h on 128, 8.25 : 1"
    assert describe_gpu_hours({16: [3840], 512: [100]}, 0.7) == []


def test_the_table_of_the_claim_has_the_hours_of_the_mean_updates() -> None:
    rows = [
        {"norm": norm, "batch": batch, "updates_to_AP": updates, "status": status}
        for norm, batch, updates, status in (
            ("cgbn", 16, 3000, "done"),
            ("cgbn", 16, 4000, "unfinished"),
            ("cgbn", 16, None, "not run"),
            ("cgbn", 256, 240, "done"),
            ("cgbn", 256, None, "done"),
            ("cgbn", 256, None, "failed"),
            ("frozen", 256, 80, "done"),
        )
    ]
    lines = _on_gpus(rows, 0.7)
    assert "3,500 updates" in lines[1] and " 240 updates" in lines[2] and len(lines) == 5
    assert lines[1].endswith(" h") and lines[2].endswith(" h, 1 of 3 runs reached it")
    assert _on_gpus(rows, None) == [] and _on_gpus(rows[:3], 0.7) == []
