"""Rows of a data set in their one form, the hash of their content, and their files (Parquet, one a split)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import FailedPrecondition

SCHEMA = pa.schema(
    [
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("label", pa.string()),
        ("line", pa.int64()),
    ]
)
# As pairs are kept; other splits have the form that they always had, so that equal rows make equal files.
PAIRS = SCHEMA.insert(3, pa.field("rejected", pa.string()))
BATCH = 2048


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat: `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """One example. A chat has `messages`, the last by the assistant; any other row has a prompt and a completion.

    A row of text and label has the text as its prompt and the label as its completion. `label` is empty where rows carry none.
    A pair has the chosen answer as its completion, or as its last message, and `rejected`, which took its place in the other one.
    A prompt alone has no completion, and a text alone no prompt.
    `line` is where the row stood in its source, for messages; it is no part of the content.
    """

    messages: tuple[Message, ...] | None = None
    prompt: str = ""
    completion: str = ""
    label: str = ""
    line: int = 0
    rejected: str = ""

    def canonical(self) -> bytes:
        """Return the row as one line of canonical JSON: equal content, equal bytes."""
        content: dict[str, Any] = {"label": self.label} if self.label else {}
        content |= {"rejected": self.rejected} if self.rejected else {}
        if self.messages is not None:
            content["messages"] = [{"role": message.role, "content": message.content} for message in self.messages]
        else:
            content |= {"prompt": self.prompt, "completion": self.completion}
        return json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"

    def characters(self) -> int:
        """Return the length of all texts of the row."""
        if self.messages is not None:
            return sum(len(message.content) for message in self.messages) + len(self.rejected)
        return len(self.prompt) + len(self.completion) + len(self.rejected)


def content_hash(rows: Iterable[Row]) -> str:
    """Return the SHA-256 over the rows in canonical form and order: the hash of a split."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.canonical())
    return digest.hexdigest()


def version_hash(splits: Mapping[str, str]) -> str:
    """Return the content hash of a version from those of its splits by name."""
    return hashlib.sha256(json.dumps(dict(splits), sort_keys=True).encode()).hexdigest()


class SplitWriter:
    """Writes the rows of one split to a Parquet file, a batch at a time, and counts and hashes them on the way."""

    def __init__(self, path: Path) -> None:
        self.count = 0
        self._digest = hashlib.sha256()
        self._batch: list[Row] = []
        self._path = path
        self._writer: pq.ParquetWriter | None = None

    @property
    def content_hash(self) -> str:
        """Content hash of the rows so far."""
        return self._digest.hexdigest()

    def add(self, row: Row) -> None:
        """Append a row."""
        self.count += 1
        self._digest.update(row.canonical())
        self._batch.append(row)
        if len(self._batch) == BATCH:
            self._write()

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._batch or self._writer is None:
            self._write()
        if self._writer is not None:
            self._writer.close()

    def _write(self) -> None:
        if self._writer is None:
            # Rows are pairs all of them or none.
            self._schema = PAIRS if self._batch and self._batch[0].rejected else SCHEMA
            self._writer = pq.ParquetWriter(self._path, self._schema, compression="zstd")
        self._writer.write_table(_table(self._batch, self._schema))
        self._batch = []


def write_split(rows: Iterable[Row], path: Path) -> int:
    """Write rows to a Parquet file and return how many they were."""
    with SplitWriter(path) as writer:
        for row in rows:
            writer.add(row)
    return writer.count


def iter_split(path: Path) -> Iterator[Row]:
    """Yield the rows of a split in order, a batch in memory at a time. Raises FailedPrecondition where the file is not one."""
    try:
        with pq.ParquetFile(path) as file:
            if not any(file.schema_arrow.equals(schema) for schema in (SCHEMA, PAIRS)):
                raise FailedPrecondition(f"{path} does not hold rows of this version's form", "ARTIFACT_DAMAGED")
            for batch in file.iter_batches(BATCH):
                yield from map(_row, batch.to_pylist())
    except (OSError, pa.ArrowException) as error:
        raise FailedPrecondition(f"the rows in {path} cannot be read: {error}", "ARTIFACT_DAMAGED") from error


def count_split(path: Path) -> int:
    """Return how many rows a split has. Raises FailedPrecondition where the file is not one."""
    try:
        with pq.ParquetFile(path) as file:
            return int(file.metadata.num_rows)
    except (OSError, pa.ArrowException) as error:
        raise FailedPrecondition(f"the rows in {path} cannot be read: {error}", "ARTIFACT_DAMAGED") from error


def read_split(path: Path) -> list[Row]:
    """Return all rows of a split in order."""
    return list(iter_split(path))


def _table(rows: list[Row], schema: Any) -> Any:
    chats = [None if r.messages is None else [{"role": m.role, "content": m.content} for m in r.messages] for r in rows]
    columns = [chats, *([getattr(row, name) for row in rows] for name in schema.names[1:])]
    return pa.table([pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)], schema)


def _row(values: dict[str, Any]) -> Row:
    chat = values.pop("messages")
    return Row(None if chat is None else tuple(Message(**message) for message in chat), **values)
