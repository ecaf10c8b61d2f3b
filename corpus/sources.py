"""Where documents come from: this machine's Python files and Hugging Face datasets; local files are in local_files.py.

    for document in hub_dataset("me/data", None, "train", TEXT).open(): ...    # text, or token ids of a column

A source knows its `position()`, a JSON value from which `open` continues, so that an interrupted build neither repeats
nor loses a document. Only the current piece is in memory; reading continues where a connection broke.
"""

import contextlib
import errno
import itertools
import re
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple, NoReturn, Protocol, Self

import numpy as np
from tqdm import tqdm

from engine.cli import BadInput, first_line

Document = str | np.ndarray
OPENING = Lock()  # one dataset at a time: `datasets` lists files in threads and deletes tqdm's lock when it is done
RETRIES, LONGEST_WAIT_SECONDS = 10, 60  # after a lost connection: waits of 1, 2, 4, ... s, five minutes in all
TRANSPORTS = {"httpx2", "httpx", "httpcore2", "httpcore", "requests", "urllib3", "aiohttp"}  # raise errors of their own


class Source(Protocol):
    """A fixed sequence of documents that can be read from any position."""

    without_text: int  # rows read that had no document

    def open(self, position: Any = None) -> Self:
        """The documents from a position on (default: all of them)."""

    def __iter__(self) -> Iterator[Document]: ...

    def position(self) -> Any:
        """Where the next document begins; a JSON value."""


@dataclass
class Repeated:
    """Documents from a function that gives the same ones at each call; the position counts those already read."""

    make: Callable[[], Iterable[Document]]
    read: int = 0
    without_text: int = 0

    def open(self, position: int | None = None) -> "Repeated":
        return Repeated(self.make, position or 0)

    def __iter__(self) -> Iterator[Document]:
        for document in itertools.islice(self.make(), self.read, None):
            self.read += 1
            yield document

    def position(self) -> int:
        return self.read


def embedded_files(scope: Literal["stdlib", "all"]) -> Iterator[Path]:
    """The Python sources on this machine: the standard library, with `all` also site-packages."""
    paths = sysconfig.get_paths()
    roots = [Path(paths["stdlib"])] + ([Path(paths["purelib"])] if scope == "all" else [])
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            if root == roots[0] and "site-packages" in path.parts[len(root.parts) :]:
                continue
            yield path


def embedded_documents(scope: Literal["stdlib", "all"]) -> Iterator[str]:
    """The text of `embedded_files`, except files that are not UTF-8."""
    for path in embedded_files(scope):
        try:
            yield path.read_bytes().decode("utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # test files with deliberately broken encodings


def stamp(files: Iterable[Path]) -> list[list[Any]]:
    """Path, size and modification time of each file: differs if one has changed."""
    return [[str(path), (found := path.stat()).st_size, found.st_mtime_ns] for path in files if path.exists()]


def kind(path: Path) -> str | None:
    """The kind of a file by the end of its name, as `datasets` calls it: text, json or parquet; None for others."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes[-1:] == [".parquet"]:  # compressed inside, never as a whole
        return "parquet"
    if suffixes[-1:] and suffixes[-1] in (".gz", ".zst"):
        suffixes.pop()
    else:
        suffixes = suffixes[-1:]
    return {".txt": "text", ".jsonl": "json"}.get(suffixes[-1] if suffixes else "")


class Column(NamedTuple):
    """The column that holds the document: text, or with `ids` the tokens of a pre-tokenised dataset."""

    name: str = "text"
    ids: bool = False

    def of(self, row: dict[str, Any], where: str) -> Document | None:
        """The document of a row, None if it is null; BadInput if the column is missing or holds something else."""
        if self.name not in row:
            self.refuse_missing(where, row)
        return self.document(row[self.name], where)

    def refuse_missing(self, where: str, names: Iterable[str]) -> NoReturn:
        flag = "--ids-column" if self.ids or "input_ids" in names else "--text-column"
        raise BadInput(f"{where}: no column {self.name!r}; it has {', '.join(names)}; choose with {flag}")

    def document(self, value: Any, where: str) -> Document | None:
        """The document that a value of the column is, None for null; BadInput if it is something else."""
        if value is None or (isinstance(value, str) and not self.ids):
            return value
        if self.ids:
            with contextlib.suppress(TypeError, ValueError, OverflowError):  # not numbers
                ids = np.array(value)
                if ids.ndim == 1 and (not len(ids) or (ids.dtype.kind == "i" and ids.min() >= 0)):
                    return ids.astype(np.int64)
        wanted = "token ids" if self.ids else "text"
        raise BadInput(f"{where}: column {self.name!r} holds {type(value).__name__}, not {wanted}")


TEXT = Column()


def hub_dataset(name: str, config: str | None, split: str, column: Column) -> "Rows":
    """A Hugging Face dataset, streamed: a name on the hub, or a local folder that `datasets` understands."""
    kinds = sorted({kind(path) for path in Path(name).rglob("*")} - {None}) if Path(name).is_dir() else []
    if len(kinds) > 1:
        raise BadInput(f"{name}: holds {', '.join(kinds)} files and `datasets` reads one kind; use python data.py text")
    if kinds and re.search(r"[*?[]|::", name):
        raise BadInput(f"{name}: `datasets` takes *, ?, [ and :: for a pattern; use python data.py text")

    def open_rows() -> Any:
        from datasets import load_dataset

        return load_dataset(name, config, split=split, streaming=True)

    return Rows(open_rows, column, " ".join(filter(None, (name, config))))


@dataclass
class Rows:
    """The rows of a streamed dataset, which `load` opens; `where` names it in messages.

    After a lost connection reading continues: the dataset is opened at the last known position, and the rows that were
    read since are skipped.
    """

    load: Callable[[], Any]
    column: Column
    where: str
    known: dict[str, Any] | None = None  # the last position, as the dataset describes it
    since: int = 0  # rows read after it
    dataset: Any = None
    without_text: int = 0  # rows whose column is null
    failures: int = 0  # in a row
    was_connected: bool = False

    def open(self, position: dict[str, Any] | None = None) -> "Rows":
        return Rows(self.load, self.column, self.where, known=position)

    def __iter__(self) -> Iterator[Document]:
        rows = None
        while True:
            try:
                if rows is None:
                    rows = self._open()
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # datasets, pyarrow, each decompressor and transport raise their own kinds
                self._wait_or_give_up(error)
                rows = None
                continue
            self.since += 1
            self.failures, self.was_connected = 0, True
            document = self.column.of(row, self.where)
            if document is None:
                self.without_text += 1
            else:
                yield document

    def _open(self) -> Iterator[dict[str, Any]]:
        with OPENING:
            self.dataset = self.load()
        if self.known is not None:
            self.dataset.load_state_dict(self.known)
        return itertools.islice(iter(self.dataset), self.since, None)

    def _wait_or_give_up(self, error: Exception) -> None:
        reason = first_line(error)
        if not is_network_error(error):
            advice = ""
            if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR):
                advice = "; `datasets` needs a cache: set HF_HOME to a folder that can be written"
            raise BadInput(f"{self.where}: cannot be read ({reason}){advice}") from None
        if not self.was_connected:  # the libraries below have retried already
            raise BadInput(f"{self.where}: cannot be reached ({reason}); is there a network?") from None
        if self.failures == RETRIES:
            raise BadInput(f"{self.where}: connection lost, {RETRIES} retries failed ({reason})") from None
        seconds = min(LONGEST_WAIT_SECONDS, 2**self.failures)
        self.failures += 1
        tqdm.write(f"{self.where}: connection lost ({reason}), retrying in {seconds} s", file=sys.stderr)
        time.sleep(seconds)

    def position(self) -> dict[str, Any] | None:
        if self.dataset is not None and self.since:
            self.known, self.since = self.dataset.state_dict(), 0
        return self.known


def is_network_error(error: BaseException | None) -> bool:
    """Whether a connection caused the error, directly or through a chained one, so that a retry may help."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
        if isinstance(status, int):
            return status in (408, 429) or status >= 500
        modules = {cls.__module__.split(".")[0] for cls in type(error).__mro__}
        if isinstance(error, ConnectionError | TimeoutError) or modules & TRANSPORTS:
            return True
        error = error.__cause__ or error.__context__
    return False
