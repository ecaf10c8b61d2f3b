"""How many cores are free for this process; importing it does not import torch.

workers = free_cores()
"""

import contextlib
import math
import os
from pathlib import Path

import psutil

LOOKS, LOOK_SECONDS = 3, 0.25  # for busy cores: a process that just ends is gone in the next look


def free_cores() -> int:
    """Cores that this process may use, less those that others keep busy: next to a busy process one thread on the other
    core is faster than two that wait for each other. Limits are the affinity (taskset), the control group's quota and
    OMP_NUM_THREADS. Looks for a quarter of a second, and twice more where that was busy."""
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    allowed = min(len(affinity), _quota(), int(wanted) if wanted.isdecimal() and int(wanted) else math.inf)
    idle = 0.0
    for _ in range(LOOKS if allowed > 1 else 0):
        shares = psutil.cpu_percent(LOOK_SECONDS, percpu=True)
        busy = sum(share for core, share in enumerate(shares) if core in affinity) / 100
        idle = max(idle, len(affinity) - busy)
        if round(idle) >= allowed:
            break
    return max(1, int(min(allowed, round(idle))))


def _quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Cores that the control group of this process and those around it grant; infinite where nothing is limited."""
    least = math.inf
    try:
        group = next(line[3:] for line in own.read_text(encoding="utf-8").splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        group = "/"
    folder = root / group.strip("/")
    for place in (folder, *folder.parents):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (place / "cpu.max").read_text(encoding="utf-8").split()
            least = min(least, int(quota) / int(period))  # ValueError for "max"
        if place == root:
            break
    return least
