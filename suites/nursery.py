"""The process that forks the runs of a CPU: a script that imports theirs, train.py, and calls its `main()` in forks.

    python suites/nursery.py train.py 5            # 5 is the descriptor of a socket; suites/forked.py is its other end

A message has a run's arguments and the descriptors of its log and of its lock; the answer is its process, later its
exit code. Folder and environment are those of this process.
"""

import contextlib
import functools
import importlib
import json
import os
import select
import socket
import sys
from pathlib import Path
from typing import NoReturn

LOOK_SECONDS = 0.1  # for runs that have ended
MOST_BYTES = 2**20  # of a message


def main(script: Path, connection: socket.socket) -> NoReturn:
    sys.path[:0] = str(script.parent), str(Path(__file__).parent.parent)
    identity = importlib.import_module("engine.identity")
    identity.provenance = functools.partial(dict, identity.provenance())  # of this code, whatever is committed later
    module = importlib.import_module(script.stem)
    if "torch" in sys.modules:
        importlib.import_module("torch._dynamo")  # every optimizer does
    sys.argv = [str(script), *serve(connection)]
    sys.exit(module.main())


def serve(connection: socket.socket) -> list[str]:
    """Fork for every message and tell how the forks end, until the launcher has gone; returns in a fork, with its
    arguments."""

    def tell(**message: int) -> None:
        try:
            connection.send(json.dumps(message).encode())
        except BrokenPipeError:  # the launcher has gone
            sys.exit()

    while True:
        if select.select([connection], [], [], LOOK_SECONDS)[0]:
            message, descriptors, *_ = socket.recv_fds(connection, MOST_BYTES, 2)
            if not message:
                sys.exit()
            pid = os.fork()
            if pid == 0:
                connection.close()
                os.setsid()
                log, _lock = descriptors  # _lock stays open
                for number in (1, 2):
                    os.dup2(log, number)
                return json.loads(message)
            for descriptor in descriptors:
                os.close(descriptor)
            tell(pid=pid)
        with contextlib.suppress(ChildProcessError):  # there is none
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                tell(pid=ended[0], code=os.waitstatus_to_exitcode(ended[1]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), socket.socket(fileno=int(sys.argv[2])))
