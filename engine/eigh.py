"""Eigenvalues of symmetric matrices and a few leading eigenvectors, by LAPACK, with the interpreter free meanwhile.

    eigenvalues, vectors = eigh_leading(gram, 5); eigenvalues = eigh_values(gram)

`torch.linalg.eigh` computes every vector; the few that are wanted come from the tridiagonal form at no visible cost.
SciPy's own wrappers hold the interpreter's lock during each call, which would stall a training loop that shares the
process; the same routines called through their C addresses do not. https://netlib.org/lapack/lug/node70.html
"""

import ctypes
import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import cython_lapack
from threadpoolctl import ThreadpoolController
from torch import Tensor

BLOCK = 64  # columns reduced at a time, for the size of the work space


@functools.cache
def routine(name: str) -> Callable[..., None]:
    """LAPACK's `name`; arguments as in Fortran, by pointer."""
    capsule = cython_lapack.__pyx_capi__[name]
    get_name = ctypes.pythonapi.PyCapsule_GetName
    get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return ctypes.CFUNCTYPE(None)(get_pointer(capsule, get_name(capsule)))


@functools.cache
def one_thread_per_call() -> None:
    """Limit SciPy's OpenBLAS to one thread: matrices run in parallel instead, and a second pool during a training on
    the CPU would slow every step."""
    for library in ThreadpoolController().lib_controllers:
        if "scipy.libs" in library.filepath:
            library.set_num_threads(1)


def call(name: str, *arguments: bytes | int | NDArray[np.float64] | NDArray[np.int32]) -> int:
    """Run LAPACK's `name`, its last argument `info` supplied and returned: 0 is success."""
    info = ctypes.c_int(0)
    pointers = [
        ctypes.c_void_p(a.ctypes.data)
        if isinstance(a, np.ndarray)
        else ctypes.c_char_p(a)
        if isinstance(a, bytes)
        else ctypes.byref(ctypes.c_int(a))
        for a in arguments
    ]
    routine(name)(*pointers, ctypes.byref(info))
    return info.value


def eigh_leading(matrices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All eigenvalues (B, n) and the k leading eigenvectors (B, n, k) of symmetric matrices (B, n, n) in float64 on the
    CPU, both from the largest down; NaN for a matrix on which LAPACK does not converge. Reads the lower
    triangle; works on as many matrices at a time as torch has threads."""
    batch, n = matrices.shape[:2]
    values, vectors = np.full((batch, n), math.nan), np.full((batch, k, n), math.nan)
    work = matrices.contiguous().numpy()

    def solve(i: int) -> None:
        found = _leading(np.array(work[i]), k)
        if found is not None:
            values[i], vectors[i] = found

    _for_each(batch, solve)
    return torch.from_numpy(values).flip(-1), torch.from_numpy(vectors).flip(-2).mT


def eigh_values(matrices: Tensor) -> Tensor:
    """The eigenvalues of `eigh_leading`, in two thirds of its time or less."""
    values, work = np.full(matrices.shape[:2], math.nan), matrices.contiguous().numpy()

    def solve(i: int) -> None:
        failed, values_i, *_ = _reduce(np.array(work[i]))
        if not failed:
            values[i] = values_i

    _for_each(len(values), solve)
    return torch.from_numpy(values).flip(-1)


def _for_each(count: int, solve: Callable[[int], None]) -> None:
    one_thread_per_call()
    threads = min(count, torch.get_num_threads())
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(solve, range(count)))
    else:
        for i in range(count):
            solve(i)


def _leading(A: NDArray[np.float64], k: int) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Ascending eigenvalues (n,) and the k last eigenvectors as rows (k, n); overwrites A. Row-major A read by Fortran
    is its transpose, so its lower triangle is Fortran's upper."""
    n = len(A)
    failed, values, diagonal, off_diagonal, tau, work = _reduce(A)
    integers = np.empty(10 * n, np.int32)
    found, leading, support = np.empty(1, np.int32), np.empty(n), np.empty(2 * n, np.int32)
    vectors, nothing = np.empty((k, n)), np.zeros(1)
    failed |= call(
        "dstemr", b"V", b"I", n, diagonal, off_diagonal, nothing, nothing, n - k + 1, n, found, leading, vectors, n, k,
        support, np.ones(1, np.int32), work, work.size, integers, integers.size,
    )  # fmt: skip
    failed |= call("dormtr", b"L", b"U", b"N", n, k, A, n, tau, vectors, n, work, work.size)
    return None if failed else (values, vectors)


def _reduce(A: NDArray[np.float64]) -> tuple[int, NDArray[np.float64], *tuple[NDArray[np.float64], ...]]:
    """Whether LAPACK failed, ascending eigenvalues, A's tridiagonal form (diagonal, off-diagonal, reflectors, which A
    holds the rest of) and work space."""
    n = len(A)
    diagonal, off_diagonal, tau, work = (np.empty(size) for size in (n, n, n, max(18, BLOCK) * n))
    failed = call("dsytrd", b"U", n, A, n, diagonal, off_diagonal, tau, work, work.size)
    values, scratch = diagonal.copy(), off_diagonal.copy()
    return failed | call("dsterf", n, values, scratch), values, diagonal, off_diagonal, tau, work
