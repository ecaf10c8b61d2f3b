"""Local files -> documents: pieces of .txt, one column of .jsonl and .parquet; plain, .gz or .zst.

    found = find_files([Path("notes")]); print(found.left_out); reader = TextFiles(found.files).open()

Each reader looks at one column and at nothing else: other columns may hold anything, and change from row to
row. Memory is bounded by a piece, a line or a batch of rows. An incomplete or damaged file is BadInput that names it.
"""

import contextlib
import gzip
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from corpus.sources import TEXT, Column, Document, kind
from engine.cli import BadInput, first_line

PIECE_BYTES = 64 * 1024  # a longer .txt is cut at the next newline, or after as much again without one
MOST_LINE_BYTES = 2**28  # of a .jsonl
ROWS_WITHOUT_COLUMN = 10_000  # of a .jsonl before it is refused: the others may be many
COMPRESSED, DECOMPRESSED_BYTES = (".gz", ".zst"), 2**18
BATCH_BYTES, MOST_BATCH_ROWS = 2**22, 256  # of a .parquet, decoded at a time: pages may repeat a value often
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
    left_out: list[str] = []
    for path in paths:
        try:
            readable, others = _inside(path)
        except OSError as error:
            raise BadInput(f"{error.filename or path}: cannot be read ({error.strerror})") from None
        if not readable:
            raise BadInput(f"{path}: no .txt, .jsonl (also .gz, .zst) or .parquet here")
        empty = {file for file in readable if _is_empty(file)}
        files += [file for file in readable if file not in empty]
        left_out += [*map(_name, others), *(f"{_name(file)} (empty)" for file in readable if file in empty)]
    more = f" and {len(left_out) - NAMED_AT_MOST:,} more" if len(left_out) > NAMED_AT_MOST else ""
    names = ", ".join(left_out[:NAMED_AT_MOST]) + more
    return FilesFound(files, f"left out {len(left_out):,} file{'s' * (len(left_out) > 1)}: {names}" if left_out else "")


def _inside(path: Path) -> tuple[list[Path], list[Path]]:
    """The files at and below a path that are not hidden: those of a readable kind, and the others."""
    if not path.exists():
        raise BadInput(f"{path}: no such file or folder")
    if not path.is_dir():
        if not path.is_file():  # opening a pipe would wait for its other end
            raise BadInput(f"{path}: not a file or folder")
        return ([path], []) if kind(path) else ([], [path])
    readable, others = [], []
    folders, seen = [path], {_identity(path)}
    for folder in folders:  # grows; a folder that links lead to twice is walked once
        for entry in sorted(entry for entry in folder.iterdir() if not entry.name.startswith(".")):
            if not entry.is_dir():
                (readable if entry.is_file() and kind(entry) else others).append(entry)  # others: also broken links
            elif _identity(entry) not in seen:
                seen.add(_identity(entry))
                folders.append(entry)
    return sorted(readable), sorted(others)


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _name(path: Path) -> str:
    """A file's name on one line, whatever letters it has."""
    return path.name if path.name.isprintable() else ascii(path.name)


def _is_empty(path: Path) -> bool:
    """Whether a file is whole and has nothing in it: no bytes, or a .parquet no rows."""
    with _refusing(path):
        if kind(path) == "parquet":
            with _parquet(path) as file:
                return file.metadata.num_rows == 0
        return path.suffix.lower() not in COMPRESSED and path.stat().st_size == 0


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turn what libraries raise about a damaged file into BadInput that names it."""
    try:
        yield
    except BadInput:
        raise
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text ({error.reason})") from None
    except Exception as error:  # each decompressor and pyarrow raise their own kinds
        raise BadInput(f"{path}: cannot be read ({first_line(error)})") from None


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
            with _refusing(path):
                for document, at in read(path, self.column, self.at):
                    self.at = at
                    if document is None:
                        self.without_text += 1
                    else:
                        yield document
            self.file, self.at = self.file + 1, None

    def position(self) -> dict[str, Any]:
        return {"file": self.file, "at": self.at}


def _txt_pieces(path: Path, column: Column, at: int | None) -> Iterator[tuple[str, int]]:
    """The pieces of a .txt from byte `at` of its text on, each with the byte where it ends."""
    end = at or 0
    with _open(path) as file:
        _skip(file, end)
        while piece := file.read(PIECE_BYTES) + file.readline(PIECE_BYTES):
            if not piece.endswith(b"\n"):
                piece += _rest_of_character(file)
            text = piece.removeprefix(BYTE_ORDER_MARK) if end == 0 else piece
            end += len(piece)
            if text:
                yield text.decode("utf-8"), end


def _rest_of_character(file: io.BufferedReader) -> bytes:
    """The bytes that continue a character in UTF-8: at most three, each 10xxxxxx."""
    rest = b""
    while len(rest) < 3 and (following := file.peek(1)[:1]) and following[0] & 0xC0 == 0x80:
        rest += file.read(1)
    return rest


def _jsonl_rows(path: Path, column: Column, at: list[int] | None) -> Iterator[tuple[Document | None, list[int]]]:
    """The column of each row, None where it is null or absent, with the byte where the row ends and its number."""
    end, row = at or (0, 0)
    first_keys, has_column = None, at is not None
    name = str(path)
    with _open(path) as file:
        _skip(file, end)
        while line := file.readline(MOST_LINE_BYTES):
            end, row = end + len(line), row + 1
            if len(line) == MOST_LINE_BYTES:
                raise BadInput(f"{path}: row {row} is longer than {MOST_LINE_BYTES:,} bytes")
            if not line.strip():
                continue
            where = f"{name}: row {row}"
            value = _parsed(line.removeprefix(BYTE_ORDER_MARK) if row == 1 else line, where)
            first_keys = first_keys or list(value)
            has_column = has_column or column.name in value
            if not has_column and row >= ROWS_WITHOUT_COLUMN:
                column.refuse_missing(f"{path}: first {row:,} rows", first_keys)
            document = column.document(value.get(column.name), where)
            if (b"\\ud" in line or b"\\uD" in line) and isinstance(document, str) and not _is_unicode(document):
                raise BadInput(f"{where}: column {column.name!r} holds half of a surrogate pair")
            yield document, [end, row]
    if first_keys is not None and not has_column:
        column.refuse_missing(str(path), first_keys)


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    """The object on a line; BadInput if it is something else."""
    try:
        text = line.decode("utf-8")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            raise
        except ValueError:  # an integer of over 4,300 digits, which Python does not convert
            value = json.loads(text, parse_int=float)
    except UnicodeDecodeError as error:
        raise BadInput(f"{where} is not UTF-8 text ({error.reason})") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where} is not JSON ({first_line(error)})") from None
    if not isinstance(value, dict):
        raise BadInput(f"{where} holds a JSON {type(value).__name__}, not an object")
    return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _parquet_rows(path: Path, column: Column, at: int | None) -> Iterator[tuple[Document | None, int]]:
    """The column of each row from row `at` on, None where it is null, with the number of rows read so far."""
    done = at or 0
    with _parquet(path) as file:
        names = file.schema_arrow.names
        if column.name not in names:
            column.refuse_missing(str(path), names)
        if names.count(column.name) > 1:
            raise BadInput(f"{path}: has {names.count(column.name)} columns {column.name!r}")
        begin = 0
        for number in range(file.num_row_groups):
            # Of all columns: asking for the size of one ends the process where a damaged file lies about it.
            group = file.metadata.row_group(number)
            end = begin + group.num_rows
            if end > done:
                rows = min(MOST_BATCH_ROWS, max(1, BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)))
                for batch in file.iter_batches(rows, [number], [column.name], use_threads=False):
                    for value in batch.column(0)[max(0, done - begin) :].to_pylist():
                        done += 1
                        yield column.document(value, f"{path}: row {done}"), done
                    begin += batch.num_rows
                if begin != end:
                    raise BadInput(f"{path}: row group {number} has {group.num_rows:,} rows by its footer, not in fact")
            begin = end
        if begin != file.metadata.num_rows:
            raise BadInput(
                f"{path}: has {file.metadata.num_rows:,} rows by its footer, and {begin:,} in its row groups"
            )


def _parquet(path: Path) -> Any:
    """Open a .parquet that reads a column page by page, not a row group at a time."""
    from pyarrow import parquet

    file = path.open("rb")  # here: the library takes no path that is not UTF-8
    try:
        return parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**20, page_checksum_verification=True)
    except BaseException:
        file.close()
        raise


def _open(path: Path) -> io.BufferedReader:
    """A file's bytes, decompressed by its ending; a stream that ends early raises EOFError or OSError at its end."""
    ending = path.suffix.lower()
    if ending in COMPRESSED and path.stat().st_size == 0:
        raise EOFError("the compressed stream is empty")
    if ending == ".gz":
        return io.BufferedReader(gzip.open(path))
    if ending == ".zst":
        import pyarrow  # unlike zstandard's reader, it notices that the last frame is incomplete

        return io.BufferedReader(pyarrow.CompressedInputStream(path.open("rb"), "zstd"), DECOMPRESSED_BYTES)
    return path.open("rb")


def _skip(file: io.BufferedReader, size: int) -> None:
    """Move forward by `size` bytes, by reading: compressed streams cannot seek."""
    if file.seekable():
        file.seek(size)
        return
    while size:
        size -= len(file.read(min(size, 2**20))) or size
