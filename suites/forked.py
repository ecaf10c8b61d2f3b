"""Fork the runs of a CPU from a process that has imported what they need, so that each begins at once.

    forks = Forks(TRAIN, environment); run = forks.start(arguments, log, lock); run.poll(); forks.close()

That process is suites/nursery.py. It computes nothing, so that no run inherits threads or random numbers, and has a
session of its own, so that no signal to the launcher's group reaches it. All runs have the code of the moment when it
started, and record that commit. It ends with the launcher; the runs go on.
"""

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.cli import RunFailed
from suites import nursery

LOST = 255  # the exit code of a run that ends when its nursery has gone


class Forks:
    """A nursery, seen from the launcher: starts `main()` of a script in forks, and knows how they ended. All of them
    are in this folder and have this environment and `environment`, which libraries read when they are imported."""

    def __init__(self, script: Path, environment: Mapping[str, str]) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, nursery.__file__, str(script), str(theirs.fileno())],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        self.codes: dict[int, int] = {}

    def start(self, arguments: Sequence[str], log: int, lock: int) -> "Fork":
        """A fork with these arguments; its output goes to the descriptor `log`, and it holds `lock` as
        long as it lives. RunFailed where the nursery has ended, as at an error in the script, which it has printed."""
        with contextlib.suppress(BrokenPipeError):
            socket.send_fds(self.socket, [json.dumps(list(arguments)).encode()], [log, lock])
        while True:
            message = self._receive()
            if message is None:
                raise RunFailed(f"the process that starts the runs has ended, exit code {self.process.wait()}")
            if "code" not in message:
                return Fork(self, message["pid"])

    def look(self) -> None:
        """Note the exit codes that have come."""
        while select.select([self.socket], [], [], 0)[0] and self._receive() is not None:
            pass

    def _receive(self) -> dict[str, int] | None:
        """The next message, None at the end; an exit code is noted."""
        try:
            message = json.loads(self.socket.recv(nursery.MOST_BYTES) or "null")
        except ConnectionResetError:
            return None
        if message is not None and "code" in message:
            self.codes[message["pid"]] = message["code"]
        return message

    def close(self) -> None:
        """End the nursery, not the runs."""
        self.socket.close()
        self.process.wait()


class Fork:
    """A run, with the methods of subprocess.Popen that a launcher needs."""

    def __init__(self, forks: Forks, pid: int) -> None:
        self.forks, self.pid = forks, pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        self.forks.look()
        if self.pid not in self.forks.codes and self.forks.process.poll() is not None and not _lives(self.pid):
            self.forks.codes[self.pid] = LOST
        return self.forks.codes.get(self.pid)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
