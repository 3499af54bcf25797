from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megdet_hpc.engine.energy import EnergyMeter, energy_line, energy_row
from megdet_hpc.engine.step_clock import StepClock
from megdet_hpc.parallel.serial import SerialCommunicator

CPU = torch.device("cpu")


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """Linux's folder of a host with two packages; one has its memory counted apart."""
    for zone, name in {"0": "package-0", "0:0": "core", "0:1": "dram", "1": "package-1", "2": "psys"}.items():
        folder = tmp_path / f"intel-rapl:{zone}"
        folder.mkdir()
        (folder / "name").write_text(f"{name}\n")
        (folder / "energy_uj").write_text("900000000\n")
        (folder / "max_energy_range_uj").write_text("1000000000\n")
    return tmp_path


def put(powercap: Path, zone: str, joules: float) -> None:
    (powercap / f"intel-rapl:{zone}" / "energy_uj").write_text(f"{joules * 1e6:.0f}\n")


def test_packages_and_memory_count_and_a_counter_may_start_again(powercap: Path) -> None:
    meter = EnergyMeter(CPU, first_on_host=True, powercap=powercap)
    assert meter.text == "RAPL: package-0, dram, package-1 of each host"
    put(powercap, "0", 950)
    put(powercap, "0:0", 990)  # in the package already
    put(powercap, "2", 990)
    assert meter.joules() == (pytest.approx(50), None)
    put(powercap, "0", 20)  # 1,000 J and it starts again
    put(powercap, "0:1", 907)
    assert meter.joules() == (pytest.approx(127), None)


def test_one_rank_of_a_host_reads_the_processors(powercap: Path) -> None:
    meter = EnergyMeter(CPU, first_on_host=False, powercap=powercap)
    assert meter.joules() == (None, None)


def test_what_cannot_be_read_is_said(tmp_path: Path, powercap: Path) -> None:
    assert EnergyMeter(CPU, first_on_host=True, powercap=tmp_path / "none").text.startswith(
        "not readable here (RAPL: no"
    )
    (powercap / "intel-rapl:1" / "energy_uj").unlink()
    (powercap / "intel-rapl:1" / "energy_uj").mkdir()  # root reads every file
    meter = EnergyMeter(CPU, first_on_host=True, powercap=powercap)
    assert "not readable here (RAPL: [Errno" in meter.text and meter.joules() == (None, None)


def test_a_row_has_the_energy_of_its_steps_alone() -> None:
    joules = [0.0]
    clock = StepClock(joules=lambda: (joules[0], None))
    for _ in range(2):
        with clock.step():
            joules[0] += 30
    with clock.pause():
        joules[0] += 1000  # an evaluation
    with clock.step():
        joules[0] += 30
    row = clock.speeds(SerialCommunicator(), 4)
    assert row["energy_cpu_j"] == pytest.approx(90) and row["energy_per_image_j"] == pytest.approx(90 / 12)
    assert "energy_gpu_j" not in row
    clock.restart()
    with clock.step():
        joules[0] += 8
    assert clock.speeds(SerialCommunicator(), 4)["energy_cpu_j"] == pytest.approx(8)


def test_ranks_are_added_and_the_run_has_a_line() -> None:
    row = energy_row([(300.0, 500.0), (None, 400.0)], 24)
    assert row == {"energy_cpu_j": 300.0, "energy_gpu_j": 900.0, "energy_per_image_j": 50.0}
    assert energy_row([(None, None)], 24) == {} and energy_line([{"loss": 1.0}]) == ""
    assert (
        energy_line([row, {"loss": 1.0}, row]) == "energy of the steps: 0.6 kJ of CPUs + 1.8 kJ of GPUs = 50 J an image"
    )


def test_a_counter_that_fails_later_ends_no_training(powercap: Path) -> None:
    meter = EnergyMeter(CPU, first_on_host=True, powercap=powercap)
    (powercap / "intel-rapl:0" / "energy_uj").write_text("")
    assert meter.joules() == (None, None)
