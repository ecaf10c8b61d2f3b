"""Makes PyTorch's CUDA build believe in one GPU of a given capability, on a machine without one.

    restart_with(89)      # at the start of a program: runs it again with the pretended GPU, and returns there
    with tracing(): ...   # FakeTensorMode and Inductor, told not to allocate or launch anything

PyTorch asks the runtime for devices in C++: device guards, autograd's streams, the choice of an attention kernel.
bench/pretended_gpu.c answers, compiled by gcc and loaded before the real libraries. Needs PyTorch's CUDA build.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from bench.static import LIMITS
from engine.cli import BadInput

SOURCE = Path(__file__).with_suffix(".c")
MARK = "PRETENDED_CAPABILITY"


def why_not() -> str | None:
    """What is missing, in one sentence; None if nothing."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build: install PyTorch's CUDA build, which needs no GPU for this"
    if shutil.which("gcc") is None:
        return "the pretended GPU is a small C library: install gcc"
    if not _headers():
        return "cuda_runtime_api.h is not installed: pip install nvidia-cuda-runtime"
    return None


def _headers() -> list[Path]:
    return sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("*/include/cuda_runtime_api.h"))


def restart_with(capability: int) -> None:
    """Start this program again with the pretended GPU; returns in the second start. BadInput where it cannot."""
    if os.environ.get(MARK) == str(capability):
        return
    if wrong := why_not():
        raise BadInput(wrong)
    limits, folder = LIMITS[capability], Path(tempfile.mkdtemp(prefix="pretended-gpu-"))
    library = folder / "libcuda.so.1"  # the name under which others look for the driver
    (folder / "crt").mkdir()
    (folder / "crt" / "host_defines.h").touch()  # comes with nvcc alone; our source defines what it would
    include = (f"-I{folder}", f"-I{_headers()[0].parent}")
    subprocess.run(
        ["gcc", "-shared", "-fPIC", *include, f"-Wl,-soname,{library.name}", "-o", library, SOURCE], check=True
    )
    pretended = {MARK: capability, "PRETENDED_SM_THREADS": limits.sm_threads}
    pretended |= {"PRETENDED_SM_SHARED_BYTES": limits.sm_shared_bytes, "LD_PRELOAD": library}
    sys.stdout.flush()
    command = [sys.executable, *sys.orig_argv[1:]]
    try:
        code = subprocess.run(command, env=os.environ | {k: str(v) for k, v in pretended.items()}).returncode
    finally:
        shutil.rmtree(folder)
    sys.exit(code)


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Everything on the way from a model to Triton's source that would allocate on the GPU, turned off."""
    import triton
    from torch._inductor import config
    from torch._inductor.runtime import triton_helpers
    from torch._subclasses import fake_tensor
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", int(os.environ[MARK]), 32)
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: target))
    off = {"compile_threads": 1, "force_disable_caches": True, "use_static_cuda_launcher": False}
    off["joint_graph_constant_folding"] = False  # computes one-element tensors on the device
    with contextlib.ExitStack() as stack:
        stack.enter_context(config.patch(off))
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", return_value=None))
        stack.enter_context(mock.patch.object(fake_tensor.FakeTensorMode, "avoid_device_init", True))
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu", return_value=None))
        yield
