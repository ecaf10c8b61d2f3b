"""Where documents come from: this machine's Python files, local text, Hugging Face datasets, and mixes of them.

A source's `open(position)` gives an iterator of documents (str, or the token ids of a pre-tokenised dataset) that knows
its `position()`, a JSON value from which `open` goes on, so that an interrupted build neither repeats nor loses one.
Nothing is held but the current piece; a dropped connection is taken up again where it broke.
"""

import io
import itertools
import os
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from engine.cli import BadInput, first_line

Document = str | np.ndarray
PIECE_BYTES = 64 * 1024  # a longer .txt is cut at the next newline
OPENING = Lock()  # `datasets` looks for files in threads of its own and takes away tqdm's lock after: one at a time
RETRIES, LONGEST_WAIT_SECONDS = 10, 60  # of a lost connection: 1 + 2 + 4 + ... s, five minutes in all
TRANSPORTS = {"httpx2", "httpx", "httpcore2", "httpcore", "requests", "urllib3", "aiohttp"}  # who raise their own kinds


class Reader(Protocol):
    """Documents in order, from a position on."""

    def __iter__(self) -> Iterator[Document]: ...

    def position(self) -> Any:
        """Where the next document begins; a JSON value."""


class Source(Protocol):
    """A fixed sequence of documents."""

    def open(self, position: Any = None) -> Reader: ...


@dataclass(frozen=True)
class Repeated:
    """Documents from a function that gives the same ones at each call; its position is how many were read."""

    make: Callable[[], Iterable[Document]]

    def open(self, position: int | None = None) -> "_Counted":
        return _Counted(self.make, position or 0)


class _Counted:
    def __init__(self, make: Callable[[], Iterable[Document]], read: int) -> None:
        self.make, self.read = make, read

    def __iter__(self) -> Iterator[Document]:
        for document in itertools.islice(self.make(), self.read, None):
            self.read += 1
            yield document

    def position(self) -> int:
        return self.read


def embedded_files(scope: Literal["stdlib", "all"]) -> Iterator[Path]:
    """The Python sources of this machine: the standard library, with `all` also site-packages."""
    paths = sysconfig.get_paths()
    roots = [Path(paths["stdlib"])] + ([Path(paths["purelib"])] if scope == "all" else [])
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            if root == roots[0] and "site-packages" in path.parts[len(root.parts) :]:
                continue
            yield path


def embedded_documents(scope: Literal["stdlib", "all"]) -> Iterator[str]:
    """Those of `embedded_files` that are readable text."""
    for path in embedded_files(scope):
        try:
            yield path.read_bytes().decode("utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # test files with deliberately broken encodings


def stamp(files: Iterable[Path]) -> list[list[Any]]:
    """What tells whether files have changed: path, size and time of change of each."""
    return [[str(path), (found := path.stat()).st_size, found.st_mtime_ns] for path in files if path.exists()]


def text_files(paths: Iterable[Path]) -> list[Path]:
    """Files as given, folders searched for readable ones; BadInput for what is missing or of no known kind."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise BadInput(f"{path}: no such file or folder")
        found = sorted(p for p in path.rglob("*") if p.is_file() and kind(p)) if path.is_dir() else [path]
        if not found or not all(map(kind, found)):
            raise BadInput(f"{path}: no .txt, .jsonl (also .gz, .zst) or .parquet here")
        files += found
    return files


def kind(path: Path) -> str | None:
    """The builder of `datasets` for a file, by its name; None where it is of no kind that is read here."""
    if path.suffix == ".parquet":  # compressed inside, never outside
        return "parquet"
    suffixes = [s for s in path.suffixes[-2:] if s not in (".gz", ".zst")]
    return {".txt": "text", ".jsonl": "json"}.get(suffixes[-1] if suffixes else "")


class Column(NamedTuple):
    """Which column of a row is the document: text, or with `ids` the tokens of a pre-tokenised dataset."""

    name: str = "text"
    ids: bool = False

    def of(self, row: dict[str, Any], where: str) -> Document | None:
        """The document of a row, None where it is null; BadInput where there is no such column or it holds no text."""
        if self.name not in row:
            flag = "--ids-column" if self.ids or "input_ids" in row else "--text-column"
            raise BadInput(f"{where}: no column {self.name!r}; it has {', '.join(row)}; choose with {flag}")
        value = row[self.name]
        if value is None or (isinstance(value, str) and not self.ids):
            return value
        try:
            if not self.ids:
                raise TypeError
            ids = np.array(value)
            if ids.ndim != 1 or (len(ids) and (ids.dtype.kind != "i" or ids.min() < 0)):
                raise TypeError
            return ids.astype(np.int64)
        except (TypeError, ValueError, OverflowError):
            wanted = "token ids" if self.ids else "text"
            raise BadInput(f"{where}: column {self.name!r} holds {type(value).__name__}, not {wanted}") from None


TEXT = Column()


@dataclass(frozen=True)
class TextFiles:
    """Rows of .jsonl and .parquet through `datasets`; pieces of .txt cut at a newline after each 64 KiB.

    .txt is read here because `datasets` either forgets where a file ends or loads a whole file at once.
    """

    files: Sequence[Path]
    column: Column = TEXT

    def open(self, position: dict[str, Any] | None = None) -> "_TextReader":
        return _TextReader(self, **(position or {"file": 0, "at": None}))


class _TextReader:
    def __init__(self, source: TextFiles, file: int, at: Any) -> None:
        self.source, self.file, self.at, self.rows = source, file, at, None

    def __iter__(self) -> Iterator[Document]:
        files = self.source.files
        while self.file < len(files):
            path = files[self.file]
            if path.stat().st_size == 0:
                pass  # `datasets` fails on them
            elif kind(path) == "text":
                for piece, end in _txt_pieces(path, self.at or 0):
                    self.at = end
                    yield piece
            else:
                self.rows = local_file(path, self.source.column).open(self.at)
                yield from self.rows
            self.file, self.at, self.rows = self.file + 1, None, None

    def position(self) -> dict[str, Any]:
        return {"file": self.file, "at": self.rows.position() if self.rows else self.at}


def _txt_pieces(path: Path, begin: int) -> Iterator[tuple[str, int]]:
    """The pieces of a .txt from byte `begin` of its text on, and where each ends."""
    import fsspec

    try:
        with fsspec.open(str(path), "rb", compression="infer") as opened, io.BufferedReader(opened) as file:
            _skip(file, begin)
            while piece := file.read(PIECE_BYTES) + file.readline():
                begin += len(piece)
                yield piece.decode("utf-8"), begin
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text ({error.reason})") from None
    except Exception as error:  # every decompressor has its own
        raise BadInput(f"{path}: cannot be read ({first_line(error)})") from None


def _skip(file: io.BufferedReader, size: int) -> None:
    """Pass over bytes; what is not seekable, as .zst, is read."""
    if file.seekable():
        file.seek(size)
        return
    while size:
        size -= len(file.read(min(size, 2**20))) or size


def local_file(path: Path, column: Column) -> "Rows":
    """The rows of a .jsonl or .parquet file."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing to ask the hub
    from datasets import load_dataset
    from datasets.utils import logging

    logging.set_verbosity(logging.CRITICAL)  # what is raised is said, in one sentence
    load = partial(load_dataset, kind(path), data_files=str(path), split="train", streaming=True)
    return Rows(load, column, str(path))


def hub_dataset(name: str, config: str | None, split: str, column: Column) -> "Rows":
    """A Hugging Face dataset, streamed: a name on the hub, or a local folder that `datasets` understands."""
    kinds = sorted({kind(path) for path in Path(name).rglob("*")} - {None}) if Path(name).is_dir() else []
    if len(kinds) > 1:
        found = ", ".join(kinds)
        raise BadInput(
            f"{name}: holds files of several kinds ({found}), of which `datasets` reads one; name them to text"
        )

    def open_rows() -> Any:
        from datasets import load_dataset

        return load_dataset(name, config, split=split, streaming=True)

    return Rows(open_rows, column, " ".join(filter(None, (name, config))))


@dataclass(frozen=True)
class Rows:
    """The rows of a streamed dataset, which `load` opens; `where` names it in sentences."""

    load: Callable[[], Any]
    column: Column
    where: str

    def open(self, position: dict[str, Any] | None = None) -> "_RowReader":
        return _RowReader(self, position)


class _RowReader:
    """Reads on where a connection was lost: from the last position, less what was read since."""

    def __init__(self, source: Rows, position: dict[str, Any] | None) -> None:
        self.source, self.known, self.since = source, position, 0
        self.dataset, self.failures, self.was_connected = None, 0, False

    def __iter__(self) -> Iterator[Document]:
        rows = None
        while True:
            try:
                if rows is None:
                    rows = self._open()
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # datasets, pyarrow and every decompressor and transport have their own
                self._wait_or_give_up(error)
                rows = None
                continue
            self.since += 1
            self.failures, self.was_connected = 0, True
            document = self.source.column.of(row, self.source.where)
            if document is not None:
                yield document

    def _open(self) -> Iterator[dict[str, Any]]:
        with OPENING:
            self.dataset = self.source.load()
        if self.known is not None:
            self.dataset.load_state_dict(self.known)
        return itertools.islice(iter(self.dataset), self.since, None)

    def _wait_or_give_up(self, error: Exception) -> None:
        where = self.source.where
        if not is_network_error(error):
            raise BadInput(f"{where}: cannot be read ({first_line(error)})") from None
        if not self.was_connected:  # the libraries below tried several times
            raise BadInput(f"{where}: cannot be reached ({first_line(error)}); is there a network?") from None
        if self.failures == RETRIES:
            raise BadInput(f"{where}: connection lost, {RETRIES} times tried again ({first_line(error)})") from None
        seconds = min(LONGEST_WAIT_SECONDS, 2**self.failures)
        self.failures += 1
        tqdm.write(f"{where}: no connection ({first_line(error)}), trying again in {seconds} s", file=sys.stderr)
        time.sleep(seconds)

    def position(self) -> dict[str, Any] | None:
        if self.dataset is not None and self.since:
            self.known, self.since = self.dataset.state_dict(), 0
        return self.known


def is_network_error(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, is of a connection, so that trying again may help."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
        if isinstance(status, int):
            return status in (408, 429) or status >= 500
        modules = {cls.__module__.split(".")[0] for cls in type(error).__mro__}
        if isinstance(error, ConnectionError | TimeoutError) or modules & TRANSPORTS:
            return True
        error = error.__cause__ or error.__context__
    return False
