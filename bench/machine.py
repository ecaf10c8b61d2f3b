"""The machine and the source that made a figure, as every record keeps them.

    described = describe(); print(label(described))

Asks the system and, where there is one, nvidia-smi; what cannot be learned is null. Under a second.
"""

import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from engine import identity

SAMPLE_SECONDS = 0.5
QUERY = {
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "most_sm_clock_mhz": "clocks.max.sm",
    "power_limit_watts": "power.limit",
}


def describe() -> dict[str, Any]:
    """Device, driver, clocks, processor, versions, commit and date."""
    import torch

    cuda = torch.cuda.is_available()
    described: dict[str, Any] = {"device": torch.cuda.get_device_name() if cuda else "cpu"}
    described["gpus"] = torch.cuda.device_count() if cuda else 0
    described |= gpu_state() if cuda else dict.fromkeys(QUERY)
    described |= {"cuda_version": torch.version.cuda, "cpu": cpu_name(), "cpu_mhz": cpu_mhz(), "cores": cores()}
    described |= {"system": f"{platform.system()} {platform.machine()}", "busy_cores": busy_cores()}
    return described | {"date": time.strftime("%Y-%m-%d", time.gmtime())} | identity.provenance()


def label(described: dict[str, Any]) -> str:
    """The device in a few words, as tables name it."""
    if described["device"] != "cpu":
        count = described["gpus"]
        return described["device"].removeprefix("NVIDIA ") + (f" x {count}" if count > 1 else "")
    return f"{described['cores']} CPU cores ({described['cpu'] or 'unknown'})"


def gpu_state() -> dict[str, Any]:
    """Driver, clocks in MHz and power limit of the first GPU, as they are now."""
    if shutil.which("nvidia-smi") is None:
        return dict.fromkeys(QUERY)
    query = ("nvidia-smi", f"--query-gpu={','.join(QUERY.values())}", "--format=csv,noheader,nounits")
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    cells = answer.stdout.splitlines()[0].split(",") if answer.returncode == 0 and answer.stdout else []
    values = [cell.strip() for cell in cells] if len(cells) == len(QUERY) else [""] * len(QUERY)
    return {name: _number_or_text(value) for name, value in zip(QUERY, values, strict=True)}


def _number_or_text(value: str) -> float | str | None:
    """Clocks as numbers; a driver's version has two points; what the device does not tell is in brackets."""
    try:
        return float(value)
    except ValueError:
        return None if not value or value.startswith("[") else value


def cpu_name() -> str | None:
    return _cpu_field("model name") or platform.processor() or None


def cpu_mhz() -> float | None:
    value = _cpu_field("cpu MHz")
    return float(value) if value else None


def _cpu_field(field: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), None)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy_cores() -> float | None:
    """How many cores work right now, over half a second: others are at work where it is not about 0 before a start."""
    before = _core_times()
    time.sleep(SAMPLE_SECONDS)
    after = _core_times()
    if before is None or after is None or after[1] <= before[1]:
        return None
    return round(cores() * (after[0] - before[0]) / (after[1] - before[1]), 2)


def _core_times() -> tuple[int, int] | None:
    """Ticks that our cores worked, and all of theirs, since the system started (proc(5), /proc/stat)."""
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    names = {f"cpu{core}" for core in mine}
    try:
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        ticks = [sum(column) for column in zip(*(map(int, w[1:9]) for w in lines if w and w[0] in names), strict=True)]
    except (OSError, ValueError):
        return None
    if len(ticks) < 8:
        return None
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)  # without idle and waiting for a disk
