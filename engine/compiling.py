"""torch.compile: where its cache is, and whether it pays on a CPU for the tokens that are to come.

    prepare_compiling(); pays(FLOPs to come, layers, ranks, key); mark_warm(key)

On a GPU it always pays. On a CPU it saves an eighth of the time and costs seconds per layer, fewer where the cache has
the code already: a run marks the cache with a key of everything that its code depends on.
"""

import hashlib
import json
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch

from engine.files import ROOT

COMPILE_CACHE = ROOT / ".cache" / "inductor"
SOURCES = ("model.py", "kernels/attention.py", "kernels/cross_entropy.py", "kernels/grouped_matmul.py")
# Of nano's forward and backward on one core of a Zen 5 (bench/LOG.md): FLOP/s without compiling, the share of the time
# that compiling saves, and its seconds per layer.
EAGER_FLOPS_PER_SECOND, SAVED_SHARE = 1e11, 0.12
COLD_SECONDS_PER_LAYER, WARM_SECONDS_PER_LAYER = 4.5, 0.75


def prepare_compiling() -> None:
    """Let the cache outlive the run, and be shared by all runs and ranks."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(COMPILE_CACHE))


def pays(flops: float, layers: int, cores: int, key: str) -> bool:
    """Whether compiling ends a run of so many FLOPs on so many cores of a CPU sooner."""
    seconds = flops / (cores * EAGER_FLOPS_PER_SECOND)
    return SAVED_SHARE * seconds > layers * (WARM_SECONDS_PER_LAYER if _mark(key).exists() else COLD_SECONDS_PER_LAYER)


def cache_key(**what: Any) -> str:
    """Names the code that is compiled: settings that shape it, our sources, PyTorch's version."""
    sources = [(ROOT / source).read_text(encoding="utf-8") for source in SOURCES]
    text = json.dumps([torch.__version__, what, sources], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def mark_warm(key: str) -> None:
    """Note that the cache now has the code of `key`; a cache that cannot be written stays cold."""
    try:
        _mark(key).parent.mkdir(parents=True, exist_ok=True)
        _mark(key).touch()
    except OSError:
        pass


def _mark(key: str) -> Path:
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", COMPILE_CACHE)) / "warm" / key


def why_no_compiler() -> str | None:
    """What torch.compile lacks on a CPU, where it writes C++; None if nothing."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}) is installed"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python's headers (Python.h) are not installed"
    return None
