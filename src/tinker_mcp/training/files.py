"""A file to its rows, one after the other: JSONL, a JSON array, CSV, Parquet, or lines of text.

Knows bytes and places; knows nothing of what a row means. Holds one row (of Parquet: one small
batch) at a time.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from tinker_mcp.errors import InvalidInputError, NotFoundError
from tinker_mcp.training.problems import Problem

FileFormat = Literal["jsonl", "json", "csv", "parquet", "txt"]
Row = tuple[str, Any]
"""The place as errors name it, and what was there: any JSON value, or the Problem with it."""

_MAX_LINE_BYTES = 64 * 2**20
_BLOCK_CHARACTERS = 2**16
_PARQUET_BATCH = 64


def rows(path: Path, name: str) -> Iterator[Row]:
    """The rows of a file.

    Args:
        path: The file.
        name: As it was given, for errors.

    Raises:
        NotFoundError: There is no such file.
        InvalidInputError: It is a folder or a device, empty, or cannot be read.
    """
    found = False
    with _readable(path, name):
        for row in _READERS[file_format(path, name)](path):
            found = True
            yield row
    if not found:
        raise InvalidInputError(
            f"{str(path)!r} is empty.", next_step='Write one {"messages": [...]} a line.'
        )


def file_format(path: Path, name: str) -> FileFormat:
    """By the name's ending, and for JSON by what the file begins with.

    Raises:
        NotFoundError, InvalidInputError: As for `rows`.
    """
    with _readable(path, name):
        _check_is_file(path, name)
        with path.open("rb") as file:
            start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    if path.suffix.lower() in (".csv", ".tsv"):
        return "csv"
    if path.suffix.lower() == ".txt":
        return "txt"
    if start.startswith(b"PAR1"):
        return "parquet"
    # In JSONL too a row may be a list, but not one that spans lines.
    is_array = start.startswith(b"[\n" if path.suffix.lower() == ".jsonl" else b"[")
    return "json" if is_array else "jsonl"


def _check_is_file(path: Path, name: str) -> None:
    if path.is_dir():
        raise InvalidInputError(f"{name!r} is a folder.", next_step="Name a file in it.")
    if not path.exists():
        raise NotFoundError(
            f"No file {str(path)!r}.",
            next_step="Give the path of a JSONL, JSON, CSV or Parquet file.",
        )
    if not path.is_file():  # a device or a pipe may never end
        raise InvalidInputError(f"{name!r} is no regular file.", next_step="Name a JSONL file.")


@contextlib.contextmanager
def _readable(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # no permission, too long a name
        raise InvalidInputError(
            f"{name[:200]!r} cannot be read: {error.strerror or str(error)[:200]}.",
            next_step="Name a file that can be read.",
        ) from error


def _jsonl(path: Path) -> Iterator[Row]:
    return _of_lines(path, _parsed)


def _txt(path: Path) -> Iterator[Row]:
    """A text a line, as the Hugging Face `text` loader has it; empty lines are none."""
    # A byte that is no UTF-8 becomes what `messages.text_problem` tells the place of.
    return _of_lines(path, lambda _, line: {"text": line.decode("utf-8", "surrogateescape")})


def _of_lines(path: Path, parsed: Callable[[str, bytes], Any]) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file), start=1):
            place = f"line {number}"
            if line is None:
                yield place, Problem(place, f"longer than {_MAX_LINE_BYTES >> 20} MiB")
                continue
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if text.strip():
                # Without its end, after which a parser would count columns from 1 again.
                yield place, parsed(place, text.rstrip(b"\r\n"))


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Lines; None for one that is too long to be held."""
    while line := file.readline(_MAX_LINE_BYTES):
        if len(line) < _MAX_LINE_BYTES or line.endswith(b"\n"):
            yield line
            continue
        while (rest := file.readline(_MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
            pass
        yield None


def _parsed(place: str, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        bad = line[error.start]
        return Problem(place, f"not UTF-8 text: byte 0x{bad:02x} at position {error.start + 1}")
    except json.JSONDecodeError as error:
        return Problem(place, f"broken JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a thousand brackets
        return Problem(place, f"JSON that cannot be read: {str(error)[:80]}")


def _json_array(path: Path) -> Iterator[Row]:
    """Elements of an array, which is never held whole; what follows a broken one is lost."""
    decoder = json.JSONDecoder()
    number = 0
    # A byte that is no UTF-8 becomes half a surrogate, which the row's own check names.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        text = file.read(_BLOCK_CHARACTERS).lstrip()[1:]  # past the bracket
        while True:
            text = text.lstrip(" \t\r\n,")
            if text.startswith("]"):
                return
            place = f"row {number + 1}"
            try:
                value, end = decoder.raw_decode(text)
            except (ValueError, RecursionError) as error:
                # As much again, so that a long element is not parsed from its start too often.
                more = file.read(max(_BLOCK_CHARACTERS, len(text)))
                if more and len(text) < _MAX_LINE_BYTES:
                    text += more
                    continue
                what = f"broken JSON: {str(error)[:80]}; the rest of the array is not read"
                yield place, Problem(place, what)
                return
            number += 1
            yield place, value
            text = text[end:]


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(_MAX_LINE_BYTES)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        first_line = 2  # after the header
        while True:
            place = f"line {first_line}"
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield place, Problem(place, f"broken CSV: {error}; the rest is not read")
                return
            yield place, _csv_row(place, row)
            first_line = reader.line_num + 1


def _csv_row(place: str, row: dict[Any, Any]) -> Any:
    if None in row:
        return Problem(place, f"{len(row[None])} more fields than the header has")
    if None in row.values():
        missing = [name for name, value in row.items() if value is None]
        return Problem(place, f"fewer fields than the header: {missing[:3]} missing")
    return {name: _cell(value) for name, value in row.items()}


def _cell(value: str) -> Any:
    """Lists and objects stand in a cell as JSON."""
    if value.startswith(("[", "{")):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except pa.ArrowException as error:
        place = f"row {number + 1}"
        yield place, Problem(place, f"broken Parquet: {str(error)[:100]}; the rest is not read")


_READERS: dict[FileFormat, Callable[[Path], Iterator[Row]]] = {
    "jsonl": _jsonl,
    "json": _json_array,
    "csv": _csv,
    "parquet": _parquet,
    "txt": _txt,
}
