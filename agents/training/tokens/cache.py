"""The node's cache of tokenised splits.

Each is a folder under the hash of all that decides on the tokens: the rows, the tokenizer's files and version, the chat template,
the length, which part is learned, and the code. It holds one Arrow file, which every rank and trial of the node maps into its
memory, and a manifest with its sum. One process makes it while the others wait; what is damaged is made anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from agents.training import data
from agents.training.tokens.report import SplitReport
from agents.training.tokens.tokenise import tokenised
from common import chat, manifest
from common.errors import FailedPrecondition, LuthierError, NotFound
from common.node import node_home

logger = logging.getLogger(__name__)

FORMAT = 1
ROWS, REPORT = "rows.arrow", "report.json"
SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32())), ("length", pa.int32())])
BATCH = 2048
UNUSED_DAYS = 30
# Beside a tokenizer's files, of which every model may have others.
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_CODE = (data.__file__, chat.__file__)


@dataclass(frozen=True)
class TokenSpec:
    """What is to be tokenised, and how. `max_rows` is 0 for all of them; `processes` is how many may work on it."""

    path: Path
    base_dir: Path
    max_length: int
    loss_on_all: bool = False
    max_rows: int = 0
    processes: int = 1
    # Texts without prompts, in pieces of max_length tokens.
    raw: bool = False

    def key(self, chat_template: object) -> str:
        """SHA-256 of everything that the tokens depend on."""
        content = {
            "format": FORMAT,
            "code": [manifest.file_sha256(Path(file)) for file in _CODE],
            "versions": {name: version(name) for name in ("tokenizers", "transformers")},
            "rows": _sums(self.path.parent, [self.path.name]),
            "split": self.path.stem,
            "tokenizer": _sums(self.base_dir, _tokenizer_files(self.base_dir)),
            "chat_template": chat.template_sha256(chat.default_template(chat_template)),
            "max_length": self.max_length,
            "loss_on_all": self.loss_on_all,
            "max_rows": self.max_rows,
            "raw": self.raw,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Tokens:
    """A tokenised split. The rows lie in a file that is mapped into memory; those with nothing to learn are not among them."""

    dataset: Dataset
    report: SplitReport

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each row."""
        return np.asarray(self.dataset.data.column("length"), dtype=np.int64)

    @property
    def examples(self) -> Dataset:
        """The rows as a trainer takes them."""
        return self.dataset.select_columns(["input_ids", "labels"])


def open_tokens(spec: TokenSpec, tokenizer: Any) -> Tokens:
    """Return a tokenised split, made on this node unless it has it. Waits while another process makes it.

    Raises InvalidArgument (BAD_DATA) where no row has anything to learn, and FailedPrecondition where the rows cannot be read.
    """
    key = spec.key(tokenizer.chat_template)
    home = node_home() / "tokens"
    home.mkdir(mode=0o700, exist_ok=True)
    folder = home / key
    if not _whole(folder):
        with manifest.node_lock(f"tokens-{key}"):
            if not _whole(folder):
                _make(spec, tokenizer, folder)
                _remove_unused(home)
    with suppress(OSError):
        os.utime(folder)  # in use
    report = SplitReport.of(json.loads((folder / REPORT).read_bytes()))
    report.check()
    return Tokens(Dataset.from_file(str(folder / ROWS)), report)


def _whole(folder: Path) -> bool:
    try:
        manifest.verify(folder)
    except NotFound:
        return False
    except LuthierError as error:
        logger.warning("the tokenised rows on this node are damaged and are made anew: %s", error.message)
        return False
    return True


def _make(spec: TokenSpec, tokenizer: Any, folder: Path) -> None:
    part = folder.parent / f".{uuid.uuid4().hex}.part"
    part.mkdir(mode=0o700)
    try:
        report = SplitReport(spec.path.stem, spec.max_length)
        rows = tokenised(
            spec.path,
            spec.base_dir,
            tokenizer,
            spec.max_length,
            loss_on_all=spec.loss_on_all,
            max_rows=spec.max_rows,
            processes=spec.processes,
            raw=spec.raw,
        )
        with pa.OSFile(str(part / ROWS), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
            batch: list[data.Example] = []
            for row, example in rows:
                if report.add(example, row.line):
                    batch.append(example)
                if len(batch) == BATCH:
                    writer.write_batch(_record(batch))
                    batch = []
            writer.write_batch(_record(batch))
        (part / REPORT).write_text(json.dumps(report.values()))
        (part / manifest.NAME).write_bytes(manifest.build(part).data)
        shutil.rmtree(folder, ignore_errors=True)
        part.replace(folder)
    except OSError as error:
        raise FailedPrecondition(f"the tokenised rows cannot be written to {folder.parent}: {error}", "NODE_HOME") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _record(examples: list[data.Example]) -> pa.RecordBatch:
    columns = (
        [example.input_ids for example in examples],
        [example.labels for example in examples],
        [len(example.input_ids) for example in examples],
    )
    return pa.record_batch([pa.array(values, field.type) for values, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)


def _remove_unused(home: Path) -> None:
    """Remove what nobody has opened for a month. Who still has a file mapped keeps it until the end."""
    for folder in home.iterdir():
        with suppress(OSError):
            if folder.stat().st_mtime < time.time() - UNUSED_DAYS * 86_400:
                shutil.rmtree(folder)


def _tokenizer_files(base_dir: Path) -> list[str]:
    names = sorted(path.name for path in base_dir.iterdir() if path.is_file() and not path.name.startswith("."))
    return [name for name in names if not name.endswith(_WEIGHTS) and name != manifest.NAME]


def _sums(folder: Path, names: list[str]) -> dict[str, str]:
    """SHA-256 of files: from the artifact's manifest, by which they were checked when they were fetched, else computed."""
    known = manifest.parse((folder / manifest.NAME).read_bytes(), str(folder)).files if (folder / manifest.NAME).exists() else {}
    return {name: known[name].sha256 if name in known else manifest.file_sha256(folder / name) for name in names}
