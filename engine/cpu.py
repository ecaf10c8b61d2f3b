"""What a CPU needs to train fast: the faster of two libraries for fp32 products, and memory that is reused.

    prepare_cpu()

Changes how fast the process computes, never what: the products are exact fp32 either way, which is checked.
"""

import contextlib
import ctypes
from pathlib import Path

import torch

KEEP_BYTES = 2**30  # freed blocks up to this size return to malloc, not to the system
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
EXACT = 1e-5  # bf16 products are off by 2e-3, fp32 ones by 3e-7


def prepare_cpu() -> None:
    """Settings of the whole process. New pages cost more than what is computed on them: a step of nano frees and
    allocates 100 MB, and takes 1.3 times as long where malloc returns them to the system (bench/LOG.md)."""
    if torch.cuda.is_available():
        return
    with contextlib.suppress(AttributeError, OSError):  # another libc than glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, KEEP_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * KEEP_BYTES - 1)
    if mkl_leaves_half():
        _multiply_by_onednn()


def mkl_leaves_half(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU has AVX-512 that MKL does not use: it takes the AVX2 code on AMD, half the rate of a Zen 5."""
    try:
        amd = "AuthenticAMD" in cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return amd and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _multiply_by_onednn() -> None:
    """Send fp32 products to oneDNN, which has AVX-512 code for AMD too. PyTorch does so where oneDNN *may* round to
    bf16; it does not without AMX, and where the check finds that it did, MKL is chosen again."""
    products = torch.backends.mkldnn.matmul
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    if product_error() > EXACT:
        products.fp32_precision = before


def product_error() -> float:
    """The relative error of an fp32 product, against float64."""
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(128, 128, generator=generator) for _ in range(2))
    exact = A.double() @ B.double()
    return (((A @ B).double() - exact).norm() / exact.norm()).item()
