"""One worker per core: a training on a CPU as ranks of one thread each, forked from the process that was started.

    with workers(2, 1, Rank()) as rank: ...        # from here on in both processes; the one that was started is rank 0

Threads of one process meet at a barrier after every small operation, ranks once a step: they are faster, and lose less
next to other work. A fork costs nothing, since what was imported is there. A worker dies with its parent.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from engine.cli import BadInput, RunFailed
from engine.ranks import RANK_TIMEOUT, Rank

PR_SET_PDEATHSIG = 1  # of prctl(2)
SECONDS_TO_END = 10  # that a worker gets once rank 0 has ended
SECONDS_TO_DIE = 2  # in which a lost worker is seen to have ended


@contextlib.contextmanager
def workers(count: int, threads: int, alone: Rank) -> Iterator[Rank]:
    """Fork into `count` ranks of `threads` threads each, joined over gloo; a count of 1 forks nothing, and 0 threads
    are as many as PyTorch likes.

    Call it before the first operation of PyTorch that uses threads. The body runs in every process.
    """
    if threads:
        torch.set_num_threads(threads)
    if count == 1:
        yield alone
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    crew = Crew(count)
    memory = os.memfd_create("weights and gradients")
    index = crew.fork()
    rank = replace(alone, index=index, count=count, local=index, crew=None if index else crew, memory=memory)
    try:
        store = dist.FileStore(str(crew.folder / "store"), count)
        dist.init_process_group("gloo", store=store, rank=index, world_size=count, timeout=RANK_TIMEOUT)
        yield rank
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        if index == 0:
            crew.end()


class Crew:
    """The workers of one training, seen from rank 0: their processes, and what each of them wrote to stderr."""

    def __init__(self, count: int) -> None:
        self.count, self.folder = count, Path(tempfile.mkdtemp(prefix="muon-speedrun-"))
        self.running: dict[int, int] = {}  # process -> rank
        self.codes: dict[int, int] = {}  # rank -> exit code, negative for a signal

    def fork(self) -> int:
        """The rank of the process that returns from here: 0 in the one that called."""
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        for rank in range(1, self.count):
            child = os.fork()
            if child == 0:
                _become_worker(parent, self._words_file(rank))
                return rank
            self.running[child] = rank
        return 0

    def _words_file(self, rank: int) -> Path:
        return self.folder / f"stderr-{rank}"

    def _words(self, rank: int) -> str:
        path = self._words_file(rank)
        return path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""

    def look(self) -> None:
        """Note the exit code of every worker that has ended."""
        for child in list(self.running):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                self.codes[self.running.pop(child)] = os.waitstatus_to_exitcode(status)

    def cause(self, error: BaseException) -> BaseException:
        """Why a worker was lost, if one was lost before `error` was raised here; else the error itself."""
        deadline = time.monotonic() + SECONDS_TO_DIE
        while not any(self.codes.values()) and time.monotonic() < deadline:
            self.look()
            time.sleep(0.01)
        for rank, code in self.codes.items():
            if code < 0:
                return RunFailed(f"worker {rank} was killed by {signal.Signals(-code).name}")
            if code:
                last = (self._words(rank).splitlines() or [f"exit code {code}"])[-1]
                return BadInput(last.removeprefix("error: ")) if code == 2 else RunFailed(f"worker {rank}: {last}")
        return error

    def end(self) -> None:
        """Wait for the workers, end those that hang, and pass on what a bug wrote."""
        deadline = time.monotonic() + SECONDS_TO_END
        while self.running:
            self.look()
            for child in self.running if time.monotonic() > deadline else ():
                os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        for rank in range(1, self.count):
            if "Traceback" in (words := self._words(rank)):
                print(f"worker {rank}:\n{words}", file=sys.stderr, flush=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def _become_worker(parent: int, words: Path) -> None:
    """End with the parent, and write to a file what there is to say."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended meanwhile
        os._exit(1)
    descriptor = os.open(words, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 2)
    os.close(descriptor)
