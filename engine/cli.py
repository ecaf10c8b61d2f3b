"""What every command shares: how it reads a count, how it refuses bad input, and what an expected failure is.

Raise `BadInput` for anything the user can fix (a flag, a file) and wrap a command's `main` in `exit_with_a_sentence`:
one sentence on stderr, exit code 2. `RunFailed` is an expected failure of a run (a full disk, a lost rank): exit code 1
and one sentence in summary.json. A bug keeps its traceback.
"""

import contextlib
import functools
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TextIO, get_args, get_type_hints

import tyro

MIN_COLUMNS = 40  # of --help; below 6 the layout of its boxes never ends
GIB = 2**30
MOST_LETTERS = 1000  # of a sentence, which may quote a file
# The type of token counts: flags accept 2e6 as well as 2000000.
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


class BadInput(ValueError):
    """A flag or file of the user's cannot be used; the message is one sentence that names it.

    Newlines and terminal commands that the sentence quotes from a file are shown escaped.
    """

    def __init__(self, sentence: str) -> None:
        shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in sentence[:MOST_LETTERS])
        super().__init__(shown + "…" * (len(sentence) > MOST_LETTERS))


class RunFailed(RuntimeError):
    """An expected failure of a run; the message is the sentence that summary.json records as the reason."""


class TrainingFailed(RunFailed):
    """The loss or a gradient is not finite. Every rank raises it."""


class CannotWrite(RunFailed):
    """A file cannot be written (full disk, read-only folder); the message names it."""


def exit_with_a_sentence(main: Callable[[], int | None]) -> Callable[[], int]:
    """Wrap a command: `BadInput` becomes its sentence on stderr and exit code 2, `RunFailed` its and 1, Ctrl-C 130.

    A command continues when nobody reads its output; --help is at least `MIN_COLUMNS` wide.
    """

    @functools.wraps(main)
    def command() -> int:
        streams = sys.stdout, sys.stderr
        open_standard_descriptors()
        sys.stdout, sys.stderr = map(Unfailing, streams)
        if shutil.get_terminal_size().columns < MIN_COLUMNS:
            os.environ["COLUMNS"] = str(MIN_COLUMNS)
        try:
            return main() or 0
        except BadInput as refusal:
            print(f"error: {refusal}", file=sys.stderr, flush=True)
            return 2
        except RunFailed as failure:
            print(f"error: {failure}", file=sys.stderr, flush=True)
            return 1
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            return 130
        finally:
            sys.stdout.flush()
            sys.stdout, sys.stderr = streams

    return command


class Unfailing:
    """A standard stream that never raises: its reader may go away, its disk fill up, its encoding lack a letter, or the
    stream be closed (None). What cannot be printed is dropped, letters that it lacks are escaped."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def isatty(self) -> bool:
        return self.stream is not None and self.stream.isatty()

    def _try(self, method: str, *arguments: str) -> None:
        if self.stream is None:
            return
        try:
            getattr(self.stream, method)(*arguments)
        except (OSError, ValueError):  # ValueError: the stream is closed
            with contextlib.suppress(OSError, ValueError):  # what its buffer still holds is dropped
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)
            self.stream = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream or sys.__stderr__, name)


def open_standard_descriptors() -> None:
    """Open the null device as each standard descriptor that is closed: else the next file would become it, and a
    library's warning would be written into that file."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def make_folder(path: Path, exist_ok: bool = False) -> None:
    """Create a folder and its parents; BadInput if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=exist_ok)
    except OSError as error:
        raise BadInput(f"{path}: cannot be created ({error.strerror})") from None


def first_line(error: BaseException) -> str:
    """The first line of a library's error message."""
    return (str(error).splitlines() or [repr(error)])[0]


def parse_count(text: str) -> int:
    """'2000000', '2_000_000' or '2e6' -> 2000000; ValueError for anything else."""
    number = float(text.replace("_", ""))
    if not math.isfinite(number) or number != int(number):
        raise ValueError(f"{text} is not a whole number")
    return int(number)


class Limit(NamedTuple):
    """A condition on a flag's value: the end of an error sentence, and the test. Put it into the field's type:
    `Annotated[int, AT_LEAST_1]`."""

    sentence: str
    holds: Callable[[Any], bool]


AT_LEAST_1 = Limit("must be at least 1", lambda value: value >= 1)
POSITIVE = Limit("must be a positive number", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Limit("must be 0 or a positive number", lambda value: 0 <= value < math.inf)
BELOW_1 = Limit("must be at least 0 and below 1", lambda value: 0 <= value < 1)
SHARE = Limit("must be between 0 and 1", lambda value: 0 <= value <= 1)


def one_of(names: Iterable[str]) -> Limit:
    return Limit(f"choose from {', '.join(names)}", lambda value: value in names)


def check_limits(flags: object) -> None:
    """BadInput for the first field of a dataclass whose value breaks the limit in its type; None breaks none."""
    for name, hint in get_type_hints(type(flags), include_extras=True).items():
        value = getattr(flags, name)
        for limit in (found for part in (hint, *get_args(hint)) for found in getattr(part, "__metadata__", ())):
            if isinstance(limit, Limit) and value is not None and not limit.holds(value):
                raise BadInput(f"--{name.replace('_', '-')} {value}: {limit.sentence}")
