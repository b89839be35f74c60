"""From an uploaded file to a published data set version: `python -m agents.data.ingest`.

Reads a request as JSON on standard input and writes one JSON document to standard output: the DatasetVersion (exit status 0), or
`{"error": {"reason", "message", "violations": [{"field", "description"}]}}` (exit status 2 for bad input, 1 for anything else).
Nothing is published unless every row is good.
"""

from __future__ import annotations

import json
import sys
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from agents.data.convert import RowProblem, to_row
from agents.data.readers import FORMATS, Broken, Source, open_source
from agents.data.recognise import Mapped, recognise
from agents.data.report import Tally
from agents.data.splits import TEST, TRAIN, split_key
from common import manifest, storage
from common.errors import InvalidArgument, LuthierError, Violation
from common.node import node_home
from common.rows import Row, SplitWriter, iter_split, version_hash
from luthier.v1 import dataset_pb2

MAX_VIOLATIONS = 20
MAX_LABELS = 1000
MAX_SPLITS = 32
DEFAULT_TEST_FRACTION = 0.1
DEFAULT_SEED = 42


@dataclass(frozen=True)
class Request:
    """What to ingest. `columns` maps parts of a row to columns; `out_uri` is the folder that holds all versions."""

    staged_path: Path
    filename: str
    out_uri: str
    format: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    test_fraction: float = DEFAULT_TEST_FRACTION
    split_seed: int = DEFAULT_SEED

    @classmethod
    def from_json(cls, text: str) -> Request:
        """Read a request. Raises InvalidArgument that names the field."""
        body = json.loads(text)
        values = {name: body[name] for name in cls.__dataclass_fields__ if body.get(name) is not None}
        request = cls(**{**values, "staged_path": Path(values["staged_path"])})
        violations = []
        if request.format and request.format not in FORMATS:
            violations.append(Violation("format", f"{request.format!r} is not a format; use one of {', '.join(FORMATS)}"))
        if not 0 <= request.test_fraction <= 0.5:
            violations.append(Violation("test_fraction", f"{request.test_fraction} is not between 0 and 0.5"))
        if violations:
            raise InvalidArgument.of(violations)
        return request


def ingest(request: Request) -> dataset_pb2.DatasetVersion:
    """Read, check and publish. Raises InvalidArgument with one violation a bad row, at most 20, and then publishes nothing."""
    source = open_source(request.staged_path, request.filename, request.format)
    mapped = recognise(source.columns, request.columns) if source.columns else None
    scratch = node_home() / "scratch"
    scratch.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        return _Ingest(request, source, mapped, Path(folder)).run()


class _Ingest:
    """Two passes: rows are checked and counted into a scratch file, then dealt to their splits once all keys are known."""

    def __init__(self, request: Request, source: Source, mapped: Mapped | None, scratch: Path) -> None:
        self.request, self.source, self.mapped, self.scratch = request, source, mapped, scratch
        self.tally = Tally()
        self.split_names: list[str] = []
        self.split_of = array("H")

    def run(self) -> dataset_pb2.DatasetVersion:
        everything, out = self.scratch / "all.parquet", self.scratch / "version"
        out.mkdir()
        with SplitWriter(everything) as writer:
            for row in self._good_rows():
                writer.add(row)
        if not writer.count or self.mapped is None:
            raise InvalidArgument(f"{self.request.filename or 'the file'} holds no rows", "EMPTY_FILE")
        splits = self._deal(iter_split(everything), out)
        if not any(split.name == TRAIN for split in splits):
            names = ", ".join(split.name for split in splits)
            raise InvalidArgument.of(
                [Violation("columns.split", f"no row is in the split train; the splits are {names}")], "BAD_SPLIT"
            )
        version = dataset_pb2.DatasetVersion(
            row_count=writer.count,
            content_hash=version_hash({split.name: split.content_hash for split in splits}),
            schema=dataset_pb2.DatasetSchema(
                shape=self.mapped.shape, columns=self.mapped.columns, labels=sorted(self.tally.labels)
            ),
            splits=splits,
            report=self.tally.report(),
            source_filename=self.request.filename,
        )
        version.uri = storage.join(self.request.out_uri, version.content_hash)
        _publish(version, out)
        return version

    def _good_rows(self) -> Iterator[Row]:
        """Yield the rows, and raise at the end if any was bad, or as soon as there are too many bad ones to name."""
        columns = list(self.mapped.columns.values()) if self.mapped else []
        violations: list[Violation] = []
        for item in self.source.rows(columns):
            if isinstance(item, Broken):
                violations.append(Violation(item.place, item.description))
            else:
                try:
                    row, split = to_row(item, self.mapped or recognise(self.source.columns, self.request.columns))
                except RowProblem as problem:
                    violations.extend(problem.violations)
                else:
                    self._count(row, split)
                    yield row
            if len(violations) >= MAX_VIOLATIONS:
                break
        if violations:
            raise _bad_rows(violations[:MAX_VIOLATIONS], more=len(violations) >= MAX_VIOLATIONS)

    def _count(self, row: Row, split: str) -> None:
        self.tally.add(row, split_key(row, self.request.split_seed))
        if len(self.tally.labels) > MAX_LABELS:
            column = self.mapped.columns.get("label", "label") if self.mapped else "label"
            text = f"column {column!r} holds more than {MAX_LABELS:,} different labels; is it a label? Free text is a completion"
            raise InvalidArgument.of([Violation("columns.label", text)], "BAD_COLUMNS")
        if split:
            if split not in self.split_names:
                self.split_names.append(split)
                if len(self.split_names) > MAX_SPLITS:
                    text = f"the column holds more than {MAX_SPLITS} different splits; is it the split?"
                    raise InvalidArgument.of([Violation("columns.split", text)], "BAD_COLUMNS")
            self.split_of.append(self.split_names.index(split))

    def _deal(self, rows: Iterator[Row], out: Path) -> list[dataset_pb2.DatasetSplit]:
        threshold = self.tally.keys.threshold(self.request.test_fraction)
        writers: dict[str, SplitWriter] = {}
        with ExitStack() as stack:
            for number, row in enumerate(rows):
                key = self.tally.keys.values[number]
                drawn = TEST if key < threshold else TRAIN
                name = self.split_names[self.split_of[number]] if self.split_of else drawn
                if name not in writers:
                    writers[name] = stack.enter_context(SplitWriter(out / f"{name}.parquet"))
                writers[name].add(row)
                self.tally.place(row, key, name)
        return [
            dataset_pb2.DatasetSplit(name=name, row_count=writer.count, content_hash=writer.content_hash)
            for name, writer in sorted(writers.items())
        ]


def _publish(version: dataset_pb2.DatasetVersion, folder: Path) -> None:
    # Nothing in here may follow from the file's form: the same rows from another file are the same version.
    description: dict[str, Any] = {
        "format": 1,
        "content_hash": version.content_hash,
        "shape": dataset_pb2.RowShape.Name(version.schema.shape),
        "labels": list(version.schema.labels),
        "row_count": version.row_count,
        "splits": {split.name: {"rows": split.row_count, "content_hash": split.content_hash} for split in version.splits},
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=1, sort_keys=True), encoding="utf-8")
    manifest.publish(folder, version.uri, version.content_hash)


def _bad_rows(violations: list[Violation], more: bool) -> InvalidArgument:
    first = f"{violations[0].field}: {violations[0].description}"
    if len(violations) == 1:
        message = first
    else:
        count = f"at least {len(violations)}" if more else str(len(violations))
        message = f"{count} problems in the rows; the first: {first}"
    return InvalidArgument(message, "BAD_ROWS", violations)


def main() -> int:
    """Run one request from standard input."""
    try:
        version = ingest(Request.from_json(sys.stdin.read()))
    except LuthierError as error:
        _answer_error(error.reason, error.message, error.violations)
        return 2 if isinstance(error, InvalidArgument) else 1
    except MemoryError:
        _answer_error(
            "FILE_TOO_LARGE", "reading the file takes more memory than it may; split it, or store it in smaller row groups", ()
        )
        return 2
    except Exception as error:
        _answer_error("INTERNAL", f"the file could not be read: {type(error).__name__}: {error}", ())
        raise
    sys.stdout.write(json_format.MessageToJson(version, preserving_proto_field_name=True, indent=None) + "\n")
    return 0


def _answer_error(reason: str, message: str, violations: tuple[Violation, ...]) -> None:
    named = [{"field": violation.field, "description": violation.description} for violation in violations]
    sys.stdout.write(json.dumps({"error": {"reason": reason, "message": message, "violations": named}}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
