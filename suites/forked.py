"""Run scripts as forks of a process that has imported PyTorch: a training starts in 1 second instead of 7.

    process = Forked(words, environment, log, lock); process.start(); process.poll()

That process is multiprocessing's fork server. It imports and computes nothing, so its forks inherit neither threads nor
random numbers. It lives until the last of them has ended, whatever becomes of the process that asked for them.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver, reduction
from pathlib import Path
from typing import Any

from engine import files

FORKING = multiprocessing.get_context("forkserver")
# What runs import; train.py first, since it says how libgomp's threads wait. Every optimizer imports torch._dynamo.
FORKING.set_forkserver_preload(["train", "torch._dynamo", "experiments"])


class Forked(FORKING.Process):
    """`words`, a script and its arguments, run by Python in its own session, with the methods of subprocess.Popen that
    a launcher needs. The log gets its output; it holds `lock`, a file descriptor, as long as it lives."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], log: Path, lock: int) -> None:
        arguments = (list(words), os.getcwd(), {**os.environ, **environment}, log.absolute(), _Inherited(lock))
        super().__init__(target=_run, args=arguments)
        self.environment = environment

    def start(self) -> None:
        _serve(self.environment)
        super().start()

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self.exitcode

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


class _Inherited:
    """A file descriptor that a fork has too."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple:
        return _detached, (reduction.DupFd(self.number),)


def _detached(copy: Any) -> int:
    return copy.detach()


def _serve(environment: Mapping[str, str]) -> None:
    """Start the fork server if there is none. Libraries read the environment when they are imported. SIGTERM to a whole
    group is the launcher's to pass on, and blocked in the server, which must live to tell how the runs end."""
    before, path = dict(os.environ), os.pathsep.join(filter(None, (str(files.ROOT), os.environ.get("PYTHONPATH"))))
    os.environ.update({**environment, "PYTHONPATH": path})
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        os.environ.clear()
        os.environ.update(before)


def _run(words: list[str], folder: str, environment: dict[str, str], log: Path, lock: int) -> None:
    """In the fork: become what a new process would be, then run the script. `lock` stays open."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    with contextlib.suppress(OSError):  # another system than Linux
        Path("/proc/self/comm").write_text(Path(words[0]).name, encoding="utf-8")  # for top and pgrep
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
