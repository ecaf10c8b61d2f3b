"""Local files -> documents: pieces of .txt, one column of .jsonl and .parquet; plain, .gz or .zst.

    found = find_files([Path("notes")]); print(found.left_out); reader = TextFiles(found.files).open()

Each reader looks at one column and at nothing else: other columns may hold anything, and change from row to
row. Memory is bounded by a piece, a line or a batch of rows. An incomplete or damaged file is BadInput that names it.
"""

import gzip
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from corpus.sources import TEXT, Column, Document, kind
from engine.cli import BadInput, first_line

PIECE_BYTES = 64 * 1024  # a longer .txt is cut at the next newline, or after as much again without one
MOST_LINE_BYTES = 2**28  # of a .jsonl
COMPRESSED_BYTES = 2**13  # decompressed at a time
BATCH_BYTES, MOST_BATCH_ROWS = 2**23, 8192  # of a .parquet, decoded at a time
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
NAMED_AT_MOST = 5  # of the files that are left out


class FilesFound(NamedTuple):
    """Files to read, in order, and one line about what a folder holds besides, empty if there is nothing."""

    files: list[Path]
    left_out: str


def find_files(paths: Iterable[Path]) -> FilesFound:
    """The given files, and the readable ones in the given folders; BadInput for a missing file or an unknown kind.

    A path is a path, never a pattern. Folders are walked through links, each once; hidden files are skipped.
    """
    files: list[Path] = []
    others: list[str] = []
    for path in paths:
        if not path.exists():
            raise BadInput(f"{path}: no such file or folder")
        inside = sorted(_walk(path, set())) if path.is_dir() else [path]
        readable = [file for file in inside if kind(file)]
        if not readable:
            raise BadInput(f"{path}: no .txt, .jsonl (also .gz, .zst) or .parquet here")
        others += [file.name for file in inside if not kind(file)]
        for file in readable:
            (others if _is_empty(file) else files).append(f"{file.name} (empty)" if _is_empty(file) else file)
    more = f" and {len(others) - NAMED_AT_MOST:,} more" if len(others) > NAMED_AT_MOST else ""
    names = ", ".join(others[:NAMED_AT_MOST]) + more
    return FilesFound(files, f"left out {len(others):,} file{'s' * (len(others) > 1)}: {names}" if others else "")


def _walk(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """Every file below a folder that is not hidden; a folder that links lead to twice is walked once."""
    try:
        identity = (found := folder.stat()).st_dev, found.st_ino
        if identity in seen:
            return
        seen.add(identity)
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise BadInput(f"{folder}: cannot be read ({error.strerror})") from None
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry, seen)
        elif entry.is_file():
            yield entry


def _is_empty(path: Path) -> bool:
    """Whether a file has no bytes, or a .parquet no rows."""
    try:
        if path.stat().st_size == 0:
            return True
        if kind(path) != "parquet":
            return False
        with _parquet(path) as file:
            return file.metadata.num_rows == 0
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror or first_line(error)})") from None


@dataclass
class TextFiles:
    """The documents of local files, file by file; `without_text` counts rows whose column is null or absent.

    The position is the number of the file and `at`, the position in it.
    """

    files: Sequence[Path]
    column: Column = TEXT
    file: int = 0
    at: Any = None
    without_text: int = 0

    def open(self, position: dict[str, Any] | None = None) -> "TextFiles":
        return TextFiles(self.files, self.column, **(position or {}))

    def __iter__(self) -> Iterator[Document]:
        while self.file < len(self.files):
            path = self.files[self.file]
            read = {"text": _txt_pieces, "json": _jsonl_rows, "parquet": _parquet_rows}[kind(path)]
            try:
                for document, at in read(path, self.column, self.at):
                    self.at = at
                    if document is None:
                        self.without_text += 1
                    else:
                        yield document
            except UnicodeDecodeError as error:
                raise BadInput(f"{path}: not UTF-8 text ({error.reason})") from None
            except BadInput:
                raise
            except Exception as error:  # each decompressor and pyarrow raise their own kinds
                raise BadInput(f"{path}: cannot be read ({first_line(error)})") from None
            self.file, self.at = self.file + 1, None

    def position(self) -> dict[str, Any]:
        return {"file": self.file, "at": self.at}


def _txt_pieces(path: Path, column: Column, at: int | None) -> Iterator[tuple[str, int]]:
    """The pieces of a .txt from byte `at` of its text on, each with the byte where it ends."""
    end = at or 0
    with _open(path) as file:
        _skip(file, end)
        while piece := file.read(PIECE_BYTES) + file.readline(PIECE_BYTES):
            # Without a newline, read to the end of a character: its further bytes are 10xxxxxx.
            while (following := file.peek(1)[:1]) and not piece.endswith(b"\n") and following[0] & 0xC0 == 0x80:
                piece += file.read(1)
            text = piece.removeprefix(BYTE_ORDER_MARK) if end == 0 else piece
            end += len(piece)
            yield text.decode("utf-8"), end


def _jsonl_rows(path: Path, column: Column, at: list[int] | None) -> Iterator[tuple[Document | None, list[int]]]:
    """The column of each row, None where it is null or absent, with the byte where the row ends and its number."""
    end, row = at or (0, 0)
    first_keys, has_column = None, at is not None
    with _open(path) as file:
        _skip(file, end)
        while line := file.readline(MOST_LINE_BYTES):
            end, row = end + len(line), row + 1
            if len(line) == MOST_LINE_BYTES:
                raise BadInput(f"{path}: row {row} is longer than {MOST_LINE_BYTES:,} bytes")
            if not line.strip():
                continue
            try:
                value = json.loads((line.removeprefix(BYTE_ORDER_MARK) if row == 1 else line).decode("utf-8"))
            except UnicodeDecodeError:
                raise
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{path}: row {row} is not JSON ({first_line(error)})") from None
            if not isinstance(value, dict):
                raise BadInput(f"{path}: row {row} holds a JSON {type(value).__name__}, not an object")
            first_keys = first_keys or list(value)
            has_column = has_column or column.name in value
            yield column.document(value.get(column.name), f"{path}: row {row}"), [end, row]
    if first_keys is not None and not has_column:
        column.refuse_missing(str(path), first_keys)


def _parquet_rows(path: Path, column: Column, at: int | None) -> Iterator[tuple[Document | None, int]]:
    """The column of each row from row `at` on, None where it is null, with the number of rows read so far."""
    done = at or 0
    with _parquet(path) as file:
        if column.name not in file.schema_arrow.names:
            column.refuse_missing(str(path), file.schema_arrow.names)
        first = 0
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            first, begin = first + group.num_rows, first
            if first <= done:
                continue
            stored = [group.column(i) for i in range(group.num_columns)]
            size = sum(c.total_uncompressed_size for c in stored if c.path_in_schema.split(".")[0] == column.name)
            rows = min(MOST_BATCH_ROWS, max(1, BATCH_BYTES * group.num_rows // max(1, size)))
            for batch in file.iter_batches(rows, [number], [column.name], use_threads=False):
                values = batch.column(0).to_pylist()
                for value in values[max(0, done - begin) :]:
                    done += 1
                    yield column.document(value, f"{path}: row {done}"), done
                begin += len(values)


def _parquet(path: Path) -> Any:
    """Open a .parquet that reads a column page by page, not a row group at a time."""
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(os.fspath(path), pre_buffer=False, buffer_size=2**20)
    except Exception as error:  # pyarrow raises many kinds on a damaged file
        raise BadInput(f"{path}: cannot be read ({first_line(error)})") from None


def _open(path: Path) -> io.BufferedReader:
    """A file's bytes, decompressed by its ending; a stream that ends early raises EOFError when it is read to there."""
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(gzip.open(path))
    return io.BufferedReader(_Zstandard(path)) if path.suffix.lower() == ".zst" else path.open("rb")


class _Zstandard(io.RawIOBase):
    """The decompressed bytes of a .zst; unlike the library's reader it notices that the last frame is incomplete."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self.new_frame = zstandard.ZstdDecompressor().decompressobj
        self.failure = zstandard.ZstdError
        self.file, self.frame, self.waiting = path.open("rb"), None, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.waiting:
            after_frame = self.frame.unused_data if self.frame is not None and self.frame.eof else b""
            chunk = after_frame or self.file.read(COMPRESSED_BYTES)
            if not chunk:
                if self.frame is not None and not self.frame.eof:
                    raise EOFError("the compressed stream ends early")
                return 0
            if self.frame is None or self.frame.eof:
                self.frame = self.new_frame()
            try:
                self.waiting = self.frame.decompress(chunk)
            except self.failure as error:
                raise OSError(first_line(error)) from None
        size = min(len(buffer), len(self.waiting))
        buffer[:size], self.waiting = self.waiting[:size], self.waiting[size:]
        return size

    def close(self) -> None:
        self.file.close()
        super().close()


def _skip(file: io.BufferedReader, size: int) -> None:
    """Move forward by `size` bytes, by reading: compressed streams cannot seek."""
    if file.seekable():
        file.seek(size)
        return
    while size:
        size -= len(file.read(min(size, 2**20))) or size
