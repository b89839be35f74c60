"""From a file to records: JSONL, CSV and Parquet, a line at a time, in bounded memory.

What cannot be read comes out as `Broken`, in its place, so that one pass names every bad line.
"""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import InvalidArgument

FORMATS = ("jsonl", "csv", "parquet")
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".pq": "parquet"}
MAX_LINE_BYTES = 16 * 2**20
MAX_DEPTH = 32
MAX_COLUMNS = 1000
PEEK_ROWS = 100
PARQUET_BATCH = 256
# Types that would be rebuilt by running code, or that hold no text. Everything else is read as its plain storage.
PLAIN_EXTENSIONS = ("arrow.json", "arrow.uuid", "arrow.bool8", "arrow.opaque")


@dataclass(frozen=True, slots=True)
class Record:
    """One row as it stands in the file. `place` is how a person finds it: `line 17`, `row 5`."""

    place: str
    line: int
    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Broken:
    """A row that cannot be read, and why."""

    place: str
    description: str


class Source(Protocol):
    """An open file: its columns, and its rows (only the named columns are sure to be read)."""

    columns: list[str]

    def rows(self, columns: Sequence[str]) -> Iterator[Record | Broken]:
        """Yield the rows in order."""
        ...


def open_source(path: Path, filename: str, file_format: str = "") -> Source:
    """Open a file as `file_format`, or what its name or beginning says. Raises InvalidArgument where it cannot be read at all."""
    if path.stat().st_size == 0:
        raise _bad("EMPTY_FILE", f"{filename or path.name} is empty")
    name = file_format or guess_format(path, filename)
    if name == "jsonl":
        return JsonLines(path)
    if name == "csv":
        return Csv(path)
    if name == "parquet":
        return Parquet(path)
    raise _bad("UNKNOWN_FORMAT", f"{file_format!r} is not a format; use one of {', '.join(FORMATS)}")


def guess_format(path: Path, filename: str) -> str:
    """Return the format by the file's name, else by its first bytes."""
    known = SUFFIXES.get(Path(filename).suffix.lower())
    with path.open("rb") as file:
        head = file.read(4096)
    if head.startswith(b"\x1f\x8b") or head.startswith((b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"BZh")):
        raise _bad("UNKNOWN_FORMAT", f"{filename or path.name} is compressed; unpack it first")
    if known:
        return known
    if head.startswith(b"PAR1"):
        return "parquet"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        raise _bad("UNKNOWN_FORMAT", f"{filename or path.name} is a JSON array; write JSONL instead: one JSON object a line")
    return "jsonl" if start.startswith(b"{") else "csv"


def iter_lines(file: BinaryIO) -> Iterator[tuple[int, str | Broken, bool]]:
    """Yield number, text and whether a newline ends it, for each physical line; a bad line is yielded as Broken."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        place = f"line {number}"
        if number == 1:
            if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise _bad("BAD_ENCODING", "the file is UTF-16; save it as UTF-8")
            line = line.removeprefix(b"\xef\xbb\xbf")
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
            yield number, Broken(place, f"is longer than {MAX_LINE_BYTES // 2**20} MiB"), True
            continue
        try:
            yield number, line.decode(), line.endswith(b"\n")
        except UnicodeDecodeError as error:
            yield number, Broken(place, f"is not UTF-8 (byte {error.object[error.start]:#04x} at position {error.start})"), True


class JsonLines:
    """One JSON object a line; blank lines are left out."""

    def __init__(self, path: Path) -> None:
        self._path = path
        seen: dict[str, None] = {}
        for count, item in enumerate(self.rows(())):
            if isinstance(item, Record):
                seen |= dict.fromkeys(item.values)
            if count >= PEEK_ROWS:
                break
        self.columns = list(seen)[:MAX_COLUMNS]

    def rows(self, columns: Sequence[str]) -> Iterator[Record | Broken]:
        """Yield the lines as records; all keys are read."""
        with self._path.open("rb") as file:
            for number, line, ended in iter_lines(file):
                if isinstance(line, Broken):
                    yield line
                elif line.strip():
                    yield self._record(number, line, ended)

    def _record(self, number: int, line: str, ended: bool) -> Record | Broken:
        place = f"line {number}"
        try:
            values = parse_json(line)
        except ValueError as error:
            cut = "" if ended else " (the last line; is the file cut off?)"
            return Broken(place, f"is not JSON: {error}{cut}")
        if not isinstance(values, dict):
            return Broken(place, f"is {kind_of(values)}, not a JSON object with the row's columns")
        return Record(place, number, values)


def parse_json(text: str) -> Any:
    """Parse JSON strictly: no NaN, and nothing nested deeper than 32. Raises ValueError with one line of reason."""
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH}")
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at character {error.pos + 1}") from error


def _depth(text: str) -> int:
    depth = deepest = 0
    in_string = escaped = False
    for character in text:
        if in_string:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                in_string = False
        elif character == '"':
            in_string = True
        elif character in "[{":
            depth += 1
            deepest = max(deepest, depth)
            if deepest > MAX_DEPTH:
                break
        elif character in "]}":
            depth -= 1
    return deepest


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def kind_of(value: Any) -> str:
    """Return what a value is in words, for messages."""
    if value is None:
        return "missing"
    kinds = (
        (bool, "true or false"),
        (int, "a number"),
        (float, "a number"),
        (str, "text"),
        (list, "a list"),
        (dict, "an object"),
    )
    return next((words for kind, words in kinds if isinstance(value, kind)), f"a {type(value).__name__}")


class Csv:
    """A header and rows, split by commas, or by semicolons or tabs where the header has more of them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # A column may hold as much as a line of JSONL; the limit is the process's.
        csv.field_size_limit(MAX_LINE_BYTES)
        with path.open("rb") as file:
            first = next((line for _, line, _ in iter_lines(file) if isinstance(line, Broken) or line.strip()), "")
        if isinstance(first, Broken):
            raise _bad("BAD_HEADER", f"{first.place}, the header, {first.description}")
        self._delimiter = max(",;\t", key=first.count)
        header = next((cells for _, cells in self._records() if not isinstance(cells, Broken)), None)
        if header is None:
            raise _bad("BAD_HEADER", "the file has no header line that can be read")
        self._header = [name.strip() for name in header]
        self.columns = [name for name in self._header if name]
        twice = sorted({name for name in self.columns if self.columns.count(name) > 1})
        if len(header) > MAX_COLUMNS:
            raise _bad("BAD_HEADER", f"the header names {len(header):,} columns; at most {MAX_COLUMNS:,} are read")
        if twice:
            raise _bad("BAD_HEADER", f"the header names the column {twice[0]!r} twice")

    def rows(self, columns: Sequence[str]) -> Iterator[Record | Broken]:
        """Yield the rows below the header; all columns are read. A row's line is the one it begins on."""
        records = self._records()
        next(records)
        width = len(self._header)
        for line, cells in records:
            place = f"line {line}"
            if isinstance(cells, Broken):
                yield cells
            elif len(cells) != width:
                hint = " (put text that holds the separator in quotes)" if len(cells) > width else ""
                yield Broken(place, f"has {_cells(len(cells))} where the header has {width}{hint}")
            else:
                yield Record(place, line, dict(zip(self._header, cells, strict=True)))

    def _records(self) -> Iterator[tuple[int, list[str] | Broken]]:
        with self._path.open("rb") as file:
            lines = _CsvLines(file)
            reader = csv.reader(lines, delimiter=self._delimiter, strict=True)
            while True:
                start = lines.number + 1
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except _BadLine as error:
                    yield start, error.broken
                except csv.Error as error:
                    yield start, Broken(f"line {start}", _csv_problem(error, lines.number))
                else:
                    if cells:
                        yield start, cells


class _BadLine(Exception):
    def __init__(self, broken: Broken) -> None:
        super().__init__(broken.description)
        self.broken = broken


class _CsvLines:
    """Lines for csv.reader, which goes on after an exception where a generator could not."""

    def __init__(self, file: BinaryIO) -> None:
        self.number = 0
        self._lines = iter_lines(file)

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        self.number, line, _ = next(self._lines)
        if isinstance(line, Broken):
            raise _BadLine(line)
        return line


def _csv_problem(error: csv.Error, end: int) -> str:
    if "unexpected end of data" in str(error) or "field larger" in str(error):
        return f"opens a quote that is not closed by line {end}"
    return f"is not CSV: {error}"


def _cells(count: int) -> str:
    return f"{count} cell" if count == 1 else f"{count} cells"


class Parquet:
    """A Parquet file, read in small batches, without any type that is rebuilt by code."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with pq.ParquetFile(path) as file:
                # The raw bytes before the schema: reading that rebuilds whatever types were registered in this process.
                declared = (file.metadata.metadata or {}).get(b"ARROW:schema", b"")
                if b"arrow_tensor" in base64.b64decode(declared) or b"py_extension_type" in base64.b64decode(declared):
                    raise _bad(
                        "UNSAFE_PARQUET",
                        "the file's schema names a type that is rebuilt by running code; such files are not taken",
                    )
                schema = file.schema_arrow
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _bad("BAD_PARQUET", f"the file is not Parquet, or damaged: {_first_line(error)}") from error
        for field in schema:
            _refuse_extensions(field, field.name)
        self.columns = list(schema.names)[:MAX_COLUMNS]

    def rows(self, columns: Sequence[str]) -> Iterator[Record | Broken]:
        """Yield the rows, with the named columns only."""
        number = 0
        try:
            with pq.ParquetFile(self._path) as file:
                for batch in file.iter_batches(PARQUET_BATCH, columns=list(columns)):
                    for values in batch.to_pylist():
                        number += 1
                        yield Record(f"row {number}", number, values)
        except (pa.ArrowException, OSError, ValueError) as error:
            yield Broken(f"row {number + 1}", f"and what follows cannot be read: {_first_line(error)}")


def _refuse_extensions(field: pa.Field, column: str) -> None:
    name = (field.metadata or {}).get(b"ARROW:extension:name", b"").decode(errors="replace")
    if not name and isinstance(field.type, pa.BaseExtensionType):
        name = getattr(field.type, "extension_name", type(field.type).__name__)
    if name and name not in PLAIN_EXTENSIONS:
        raise _bad("UNSAFE_PARQUET", f"column {column!r} has the extension type {name[:80]!r}; write it as plain text or lists")
    for child in range(field.type.num_fields):
        _refuse_extensions(field.type.field(child), column)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _bad(reason: str, message: str) -> InvalidArgument:
    return InvalidArgument(message, reason)
