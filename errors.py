"""How a command says no: one sentence on stderr, exit code 2, no traceback.

Raise `BadInput` for anything the user can mend (a flag, a file); wrap a command's `main` in `exit_with_a_sentence`.
A bug stays a traceback with exit code 1.
"""

import functools
import sys
from collections.abc import Callable


class BadInput(ValueError):
    """The user's flag or file cannot be used; the message is one sentence that names it."""


def exit_with_a_sentence(main: Callable[[], int | None]) -> Callable[[], int]:
    """Turn a `BadInput` raised by `main` into its sentence on stderr and exit code 2."""

    @functools.wraps(main)
    def command() -> int:
        try:
            return main() or 0
        except BadInput as refusal:
            print(f"error: {refusal}", file=sys.stderr, flush=True)
            return 2

    return command
