"""Describes the machine and the source that made a figure, as every record keeps them.

    described = describe(); print(label(described))

Reads psutil, py-cpuinfo and, where there is one, nvidia-smi; what cannot be learned is null. About two seconds.
"""

import importlib.util
import platform
import shutil
import subprocess
import time
from types import ModuleType
from typing import Any

import engine.cores
from engine import identity
from engine.cores import own_cores

SAMPLE_SECONDS = 0.5
QUERY = {
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "most_sm_clock_mhz": "clocks.max.sm",
    "power_limit_watts": "power.limit",
}


def describe() -> dict[str, Any]:
    """What `facts` says, and how busy the machine is now."""
    return facts() | {"busy_cores": busy_cores()}


def facts() -> dict[str, Any]:
    """Device, driver, clocks, processor, versions, commit and date."""
    import torch

    cuda = torch.cuda.is_available()
    found: dict[str, Any] = {"device": device_name(), "gpus": torch.cuda.device_count() if cuda else 0}
    found |= gpu_state() if cuda else dict.fromkeys(QUERY)
    found |= {"cuda_version": torch.version.cuda, "cpu": cpu_name(), "cpu_mhz": cpu_mhz(), "cores": cores()}
    found |= {"system": f"{platform.system()} {platform.machine()}", "date": time.strftime("%Y-%m-%d", time.gmtime())}
    return found | identity.provenance()


def device_name() -> str:
    """As torch.cuda calls the first GPU; cpu without one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


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
    """Clocks become numbers, a driver's version stays text; nvidia-smi puts what it does not know in brackets."""
    try:
        return float(value)
    except ValueError:
        return None if not value or value.startswith("[") else value


def cpu_name() -> str | None:
    cpuinfo = _installed("cpuinfo")
    return (cpuinfo and cpuinfo.get_cpu_info().get("brand_raw")) or platform.processor() or None


def cpu_mhz() -> float | None:
    """The present clock, mean over all cores."""
    psutil = _installed("psutil")
    frequency = psutil and psutil.cpu_freq()
    return frequency.current if frequency else None


def cores() -> int:
    """How many cores this process may use."""
    return len(own_cores())


def busy_cores() -> float | None:
    """Busy cores, averaged over 0.5 s; should be near 0 before a benchmark."""
    busy = engine.cores.busy_cores(SAMPLE_SECONDS)
    return None if busy is None else round(busy, 2)


def _installed(package: str) -> ModuleType | None:
    """A package that a training machine may lack."""
    return importlib.import_module(package) if importlib.util.find_spec(package) else None
