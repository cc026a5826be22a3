"""Joules, the driver's view of a GPU, the size of a checkpoint: None where they cannot be had, never 0."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import nn

from harness.analysis.run_facts import analyse
from harness.cell.measure import checkpoint_size, energy, gpu
from harness.cell.measure.energy import EnergyMeter
from harness.cell.measure.gpu import GpuWatch
from harness.cell.measure.memory import PeakMeter
from harness.cell.measure.phases import PhaseClock
from harness.records.cost import Checkpoint, Energy, GpuPhase, GpuState
from harness.records.record import Status
from harness.report import view
from harness.report.export import rows
from support import recorded_run
from support.report_page import row

UUID = "GPU-8a3c"


class RefusedError(Exception):
    """Stands for NVMLError."""


class Driver(ModuleType):
    """Stands for the module `pynvml`: one GPU, which can be told what to say. What is None is not supported."""

    NVMLError = RefusedError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.says: dict[str, Any] = {
            "TotalEnergyConsumption": 5_000, "MemoryInfo": SimpleNamespace(used=7), "PowerUsage": 310_500,
            "Temperature": 61, "CurrentClocksEventReasons": 0x4 | 0x1, "ClockInfo": 1755,
        }  # fmt: skip

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's name
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802 - NVML's name
        if uuid != UUID:
            raise RefusedError("Not Found")
        return "handle"

    def __getattr__(self, name: str) -> Any:
        what = name.removeprefix("nvmlDeviceGet")
        if what == name or what not in self.says:
            raise AttributeError(name)

        def ask(handle: str, *_: int) -> Any:
            assert handle == "handle"
            if self.says[what] is None:
                raise RefusedError("Not Supported")
            return self.says[what]

        return ask


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", made)
    return made


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that moves when it is told to."""
    made = SimpleNamespace(now=100.0)
    monkeypatch.setattr(energy.time, "monotonic", lambda: made.now)
    return made


def spent(meter: EnergyMeter, clock: SimpleNamespace, seconds: float, do: Any = lambda: None) -> float | None:
    meter.start()
    clock.now += seconds
    do()
    return meter.joules()


def test_a_gpu_counts_the_joules_of_a_window(driver: Driver, clock: SimpleNamespace) -> None:
    found, why = gpu.find(UUID)
    assert (why, found is not None) == ("", True)
    meter = energy.meter(found, cuda=True)
    assert (meter.source, meter.because) == ("nvml", "")
    assert spent(meter, clock, 3, lambda: driver.says.update(TotalEnergyConsumption=905_250)) == 900.25
    driver.says["TotalEnergyConsumption"] = 0  # the driver was loaded anew
    assert spent(meter, clock, 3, lambda: driver.says.update(TotalEnergyConsumption=None)) is None
    driver.says["TotalEnergyConsumption"] = 9_000
    assert spent(meter, clock, 3, lambda: driver.says.update(TotalEnergyConsumption=10)) is None


def test_a_window_that_no_counter_resolves_is_not_measured(driver: Driver, clock: SimpleNamespace) -> None:
    meter = energy.meter(gpu.find(UUID)[0], cuda=True)
    grown = lambda: driver.says.update(TotalEnergyConsumption=6_000)  # noqa: E731
    assert spent(meter, clock, energy.LEAST_S - 0.1, grown) is None
    assert spent(meter, clock, energy.LEAST_S, lambda: driver.says.update(TotalEnergyConsumption=8_000)) == 2.0


def test_why_no_gpu_is_asked(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.find("GPU-of-somebody") == (None, "the GPU's driver refuses: Not Found")
    driver.says["TotalEnergyConsumption"] = None
    old = energy.meter(gpu.find(UUID)[0], cuda=True)
    assert (old.source, old.because) == ("", "this GPU's driver counts no energy")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found, why = gpu.find(UUID)
    assert found is None
    assert "pip install nvidia-ml-py" in why
    assert energy.meter(None, why, cuda=True) == EnergyMeter(None, why)


def test_the_state_of_a_gpu_in_base_units(driver: Driver) -> None:
    found, _ = gpu.find(UUID)
    assert found is not None
    assert found.state() == GpuState(
        uuid=UUID, sm_clock_Hz=1_755_000_000, memory_clock_Hz=1_755_000_000, power_W=310.5, temperature_C=61.0,
        throttle=["idle", "power-cap"],
    )  # fmt: skip
    driver.says.update(dict.fromkeys(driver.says))
    assert found.state() == GpuState(uuid=UUID)
    assert found.memory() is None
    # A driver of before CUDA 12 has another name for it; and a bit that nobody knows yet is not kept silent.
    driver.says["CurrentClocksThrottleReasons"] = 0x40 | 0x8000
    del driver.says["CurrentClocksEventReasons"]
    assert found.state().throttle == ["hardware-thermal", "other"]


def packages(root: Path, **joules: int) -> None:
    """Write the kernel's counters of CPU packages, and zones that must not be counted with them."""
    for name, number in {**joules, "core": 10**12, "psys": 10**12}.items():
        zone = root / {"core": "intel-rapl:0:0", "psys": "intel-rapl:9"}.get(name, f"intel-rapl:{name[-1]}")
        zone.mkdir(exist_ok=True, parents=True)
        (zone / "name").write_text(name.replace("package", "package-") + "\n")
        (zone / "energy_uj").write_text(f"{number}\n")
        (zone / "max_energy_range_uj").write_text("262143328850\n")


def test_the_packages_of_a_cpu_are_summed_and_start_anew(tmp_path: Path, clock: SimpleNamespace) -> None:
    packages(tmp_path, package0=1_000_000, package1=262_143_000_000)
    meter = energy.meter(None, root=tmp_path)
    assert meter.source == "rapl"
    found = spent(meter, clock, 5, lambda: packages(tmp_path, package0=3_500_000, package1=671_150))
    assert found is not None
    assert round(found, 6) == 3.5  # 2.5 of the one; the other ran over its end
    assert spent(meter, clock, 3600) is None  # it may have run over several times


def test_a_cpu_whose_counters_are_absent_or_closed(tmp_path: Path) -> None:
    absent = energy.meter(None, root=tmp_path)
    assert absent.because == f"this machine shows no energy counter of its CPU ({tmp_path})"
    packages(tmp_path, package0=1)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    (tmp_path / "intel-rapl:0" / "energy_uj").mkdir()  # which root may not read either
    closed = energy.meter(None, root=tmp_path)
    assert "may not be read" in closed.because
    for meter in (absent, closed):
        meter.start()
        assert (meter.source, meter.joules()) == ("", None)


def test_a_phase_on_a_gpu_has_its_peaks_and_its_edges(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {"num_alloc_retries": 3, "num_ooms": 1}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda _: dict(stats))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 4096)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=UUID.removeprefix("GPU-")))
    device = torch.device("cuda")
    monkeypatch.setattr(gpu, "_SAMPLE_S", 3600)  # the edges alone look
    watch = GpuWatch(device, gpu.find(UUID)[0])
    phases = PhaseClock(PeakMeter(torch.device("cpu")), lambda _: None, gpu=watch)

    def work() -> None:
        driver.says.update(Temperature=80, MemoryInfo=SimpleNamespace(used=9000))
        stats.update(num_alloc_retries=5)
        raise RuntimeError("a phase that fails is told of too")

    with pytest.raises(RuntimeError, match="fails"), phases.phase("train"):
        work()
    (phase,) = phases.done
    seen = phase.gpu
    assert seen is not None
    assert (seen.reserved_B, seen.driver_B, seen.alloc_retries, seen.ooms) == (4096, 9000, 2, 0)
    assert seen.start is not None
    assert seen.end is not None
    assert (seen.start.temperature_C, seen.end.temperature_C) == (61, 80)
    assert phase.energy_J is None
    blind = GpuWatch(device, None)
    blind.begin()
    assert blind.end() == GpuPhase(reserved_B=4096, alloc_retries=0, ooms=0)


def test_a_checkpoint_is_as_large_as_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = {"q.A": torch.zeros(4, 64), "q.B": torch.zeros(64, 4).T}
    head = {"score.weight": torch.zeros(2, 64, dtype=torch.bfloat16)}
    written: list[bytes] = []
    plain = checkpoint_size.save
    monkeypatch.setattr(checkpoint_size, "save", lambda held: written.append(plain(held)) or written[-1])
    found = checkpoint_size.measure(adapter, head, 5, tmp_path)
    assert found == Checkpoint(adapter_file_B=len(written[0]), head_B=2 * 64 * 2, model_B=5)
    assert set(load(written[0])) == {"q.A", "q.B", "head.score.weight"}
    assert list(tmp_path.iterdir()) == []
    assert checkpoint_size.measure({}, {}, 5, tmp_path).because == "nothing is trained"
    whole = checkpoint_size.measure({}, head, 5, tmp_path, trains_base=True)
    assert (whole.adapter_file_B, whole.model_B) == (None, 5)
    assert "all of them are saved" in whole.because


def test_a_full_disk_costs_a_size_and_no_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint_size, "TemporaryFile", full)
    found = checkpoint_size.measure({"A": torch.zeros(3)}, {}, 5, tmp_path)
    assert (found.adapter_file_B, found.because) == (None, "the file could not be written: No space left on device")


def test_a_whole_model_counts_tied_weights_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False))
    assert checkpoint_size.model_bytes(model) == (64 + 8 + 64) * 4
    model[1].weight = model[0].weight
    assert checkpoint_size.model_bytes(model) == (64 + 8) * 4


# --- what a reader sees ----------------------------------------------------------------------------------------------


def on_gpu(name: str, made: Any) -> Any:
    """Give the fused Cell a GPU that was throttled, joules and a checkpoint."""
    if name != "fused":
        return made
    edge = GpuState(uuid=UUID, sm_clock_Hz=1_980_000_000, power_W=200.0, temperature_C=40.0, throttle=["idle"])
    end = edge.model_copy(update={"sm_clock_Hz": 1_200_000_000, "throttle": ["software-thermal"]})
    seen = GpuPhase(start=edge, end=end, reserved_B=3 * 2**20, alloc_retries=1, ooms=0)
    phases = [
        p.model_copy(update={"gpu": seen, "energy_J": 450.0}) if p.name == "train" else p for p in made.phases
    ]  # fmt: skip
    saved = Checkpoint(adapter_file_B=2**20, head_B=2**18, model_B=2**26)
    more = {"checkpoint": saved, "energy": Energy(source="nvml")}
    return made.model_copy(update={"phases": phases, "measurements": made.measurements.model_copy(update=more)})


def test_the_report_shows_what_was_measured_and_says_what_was_not(tmp_path: Path) -> None:
    run = recorded_run.write_run(tmp_path / "run", change=on_gpu)
    built = view.build([analyse(run)])["runs"][0]
    records = {r.cell.implementation: r for r in run.records if r.cell.method == "lora"}
    fused, other = (row(built["costs"], records[name]) for name in ("fused", "hf-peft"))
    assert fused["Adapter's file, MiB"]["text"] == "1.00"
    assert (fused["Head in it, MiB"]["text"], fused["Whole model, MiB"]["text"]) == ("0.25", "64")
    assert fused["Energy of training, J"]["text"] == "450"
    tokens = sum(records["fused"].measurements.training.tokens)
    assert fused["Per 1000 tokens, J"]["value"] == 450_000 / tokens
    assert {f["value"] for f in other.values()} == {None}
    assert all("older than this measurement" in f["why"] for f in other.values())
    seen = row(built["gpus"], records["fused"])
    assert (seen["Clock, MHz"]["text"], seen["Clock, MHz"]["small"]) == ("1,200", "[1,980]")
    assert (seen["Throttled by"]["text"], seen["Throttled by"]["flag"]) == ("software-thermal", "throttled")
    assert seen["Driver's peak, MiB"]["value"] is None
    assert len([r for g in built["gpus"]["groups"] for r in g["rows"]]) == 1


@pytest.mark.parametrize("source", ["rapl", "nvml"])
def test_joules_of_a_whole_machine_are_not_those_of_one_of_its_cells(source: str, tmp_path: Path) -> None:
    note = ["up to 2 Cells ran at once: the times are those of a shared machine"]

    def beside_another(name: str, made: Any) -> Any:
        made = on_gpu(name, made)
        energy_of = made.measurements.model_copy(update={"energy": Energy(source=source)}) if name == "fused" else None
        return made.model_copy(update={"measurements": energy_of, "notes": note}) if energy_of else made

    run = recorded_run.write_run(tmp_path / "run", change=beside_another)
    fused = next(r for r in run.records if r.cell.method == "lora" and r.cell.implementation == "fused")
    costs = view.build([analyse(run)])["runs"][0]["costs"]
    figures = row(costs, fused)
    if source == "rapl":  # without a number, the column is left out, and the reason stands below the table
        why = "the counter (rapl) covers the whole machine, where up to 2 Cells ran at once"
        assert "Energy of training, J" not in figures
        assert any(remark.startswith("Energy of training") and why in remark for remark in costs["remarks"])
    else:
        assert (figures["Energy of training, J"]["text"], figures["Energy of training, J"]["why"]) == ("450", "by nvml")
    exported = rows.cell(fused, "a", latest=True)
    joules = None if source == "rapl" else 450.0
    assert (exported["training_energy_J"], exported.get("phase_energy_J.train")) == (joules, joules)
    failed = recorded_run.failed(fused, Status.TIMEOUT).model_copy(update={"phases": fused.phases, "notes": note})
    assert "phase_energy_J.train" not in rows.cell(failed, "a", latest=True)


def test_the_tables_hold_them_too(tmp_path: Path) -> None:
    run = recorded_run.write_run(tmp_path / "run", change=on_gpu)
    made = {r.cell.implementation: rows.cell(r, "a", latest=True) for r in run.records if r.cell.method == "lora"}
    fused, other = made["fused"], made["hf-peft"]
    assert (fused["training_energy_J"], fused["phase_energy_J.train"], fused["energy.source"]) == (450.0, 450.0, "nvml")
    assert (fused["checkpoint.adapter_file_B"], fused["gpu.reserved_B"]) == (2**20, 3 * 2**20)
    assert (fused["gpu.end.throttle"], fused["gpu.end.sm_clock_Hz"]) == ("software-thermal", 1_200_000_000)
    assert {other[name] for name in fused if name.startswith(("gpu.", "checkpoint.", "energy."))} == {None}
    assert json.dumps(other)
