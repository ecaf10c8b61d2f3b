"""What every command shares: how it reads a count, and how it says no, one sentence on stderr and exit code 2.

Raise `BadInput` for anything the user can mend (a flag, a file); wrap a command's `main` in `exit_with_a_sentence`.
A bug stays a traceback with exit code 1.
"""

import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

MOST_LETTERS = 1000  # of a sentence; what it repeats from a file may be long


class BadInput(ValueError):
    """The user's flag or file cannot be used; the message is one sentence that names it, on one line: what it repeats
    from a file may hold newlines and a terminal's commands, which are shown, not sent."""

    def __init__(self, sentence: str) -> None:
        shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in sentence[:MOST_LETTERS])
        super().__init__(shown + "…" * (len(sentence) > MOST_LETTERS))


def exit_with_a_sentence(main: Callable[[], int | None]) -> Callable[[], int]:
    """Turn a `BadInput` raised by `main` into its sentence on stderr and exit code 2, Ctrl-C into a word and 130."""

    @functools.wraps(main)
    def command() -> int:
        try:
            return main() or 0
        except BadInput as refusal:
            print(f"error: {refusal}", file=sys.stderr, flush=True)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            return 130

    return command


def make_folder(path: Path, exist_ok: bool = False) -> None:
    """Create a folder and its parents; BadInput where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=exist_ok)
    except OSError as error:
        raise BadInput(f"{path}: cannot be created ({error.strerror})") from None


def first_line(error: BaseException) -> str:
    """What an error of somebody else's says, on one line."""
    return (str(error).splitlines() or [repr(error)])[0]


def parse_count(text: str) -> int:
    """'2000000', '2_000_000' or '2e6' -> 2000000; ValueError for anything that is no whole number."""
    number = float(text.replace("_", ""))
    if not math.isfinite(number) or number != int(number):
        raise ValueError(f"{text} is not a whole number")
    return int(number)


# Token counts are long: flags of this type accept 2e6 as well.
Count = Annotated[
    int,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="COUNT",
        instance_from_str=lambda words: parse_count(words[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    ),
]
