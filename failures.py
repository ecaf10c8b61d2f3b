"""Why a run ended before its time, in one sentence: a state of the world, where a bug is left to its traceback.

reason_of(error, step=120, ranks=2, misfit=lambda: "--micro-batch 16 does not fit this device; 8 should")
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from cli import BadInput, first_line
from loader import LoaderDied
from runfiles import CannotWrite
from spectra import WorkerFailed


class TrainingFailed(RuntimeError):
    """The run cannot go on; the message is the reason that summary.json records. Every rank raises it."""


def reason_of(error: BaseException, *, step: int, ranks: int, misfit: Callable[[], str]) -> str | None:
    """The sentence for what `error` says of the world, None for a bug; `misfit` tells what memory would hold."""
    if isinstance(error, torch.OutOfMemoryError):
        return misfit()
    if isinstance(error, TrainingFailed | WorkerFailed | LoaderDied | BadInput | CannotWrite):
        return str(error)
    lost = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
    if lost and ranks > 1:
        return f"another rank was lost after step {step}: {first_line(error)}"
    return None
