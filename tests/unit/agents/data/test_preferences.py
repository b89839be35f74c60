"""Pairs, prompts and texts are told by their columns, and a bad pair is named by its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agents.data.ingest import Request, ingest
from common.errors import InvalidArgument
from common.rows import PAIRS, SCHEMA, Message, read_split
from luthier.v1 import dataset_pb2

USER, BAD, GOOD = ({"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "no"), ("assistant", "yes")))


def _ingest(tmp_path: Path, rows: list[dict[str, Any]], **more: Any) -> tuple[dataset_pb2.DatasetVersion, Path]:
    staged = tmp_path / "rows.jsonl"
    staged.write_text("\n".join(map(json.dumps, rows)))
    version = ingest(Request(staged, "rows.jsonl", (tmp_path / "out").as_uri(), test_fraction=0.0, **more))
    return version, Path(version.uri.removeprefix("file://")) / "train.parquet"


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_NODE_HOME", str(tmp_path / "node"))


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "q", "chosen": "yes", "rejected": "no"}, None),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, ["q", "yes"]),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, ["q", "yes"]),
        ({"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]}, ["q", "yes"]),
        ({"prompt": "q", "chosen": [GOOD], "rejected": [BAD]}, ["q", "yes"]),
    ],
)
def test_every_form_of_a_pair_is_one_row(tmp_path: Path, row: dict[str, Any], messages: list[str] | None) -> None:
    version, file = _ingest(tmp_path, [row])
    assert version.schema.shape == dataset_pb2.ROW_SHAPE_PREFERENCE
    (kept,) = read_split(file)
    assert kept.rejected == "no"
    if messages is None:
        assert (kept.prompt, kept.completion, kept.messages) == ("q", "yes", None)
    else:
        assert kept.messages == (Message("user", "q"), Message("assistant", "yes"))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "q", "chosen": "yes"}, "is missing"),
        ({"prompt": "q", "chosen": "yes", "rejected": ""}, "is empty"),
        ({"prompt": "q", "chosen": "yes", "rejected": "yes"}, "nothing to prefer"),
        ({"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "nothing to prefer"),
        ({"prompt": "q", "chosen": "yes", "rejected": [USER, BAD]}, "is a text where chosen is a chat"),
        (
            {"prompt": "q", "chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "other"}, BAD]},
            "two answers to one prompt",
        ),
        ({"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER]}, "has to be answered"),
    ],
)
def test_a_bad_pair_is_refused_by_its_line(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    good = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    with pytest.raises(InvalidArgument) as caught:
        _ingest(tmp_path, [good, row])
    (violation,) = caught.value.violations
    assert violation.field == "line 2 column rejected"
    assert says in violation.description


def test_pairs_of_texts_need_a_prompt(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="--map prompt=COLUMN"):
        _ingest(tmp_path, [{"chosen": "yes", "rejected": "no"}])


@pytest.mark.parametrize(
    ("row", "shape", "kept"),
    [
        ({"prompt": "q"}, dataset_pb2.ROW_SHAPE_PROMPT, ("q", "")),
        ({"text": "long"}, dataset_pb2.ROW_SHAPE_TEXT, ("", "long")),
    ],
)
def test_prompts_and_texts_stand_alone(tmp_path: Path, row: dict[str, str], shape: int, kept: tuple[str, str]) -> None:
    version, file = _ingest(tmp_path, [row])
    assert version.schema.shape == shape
    assert [(each.prompt, each.completion) for each in read_split(file)] == [kept]


def test_only_pairs_have_a_column_more(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    _, pairs = _ingest(tmp_path, [{"prompt": "q", "chosen": "yes", "rejected": "no"}])
    _, answers = _ingest(tmp_path, [{"prompt": "q", "completion": "yes"}])
    assert pq.read_schema(pairs).names == PAIRS.names
    assert pq.read_schema(answers).names == SCHEMA.names


def test_which_of_two_answers_was_chosen_is_part_of_the_content(tmp_path: Path) -> None:
    one, _ = _ingest(tmp_path, [{"prompt": "q", "chosen": "yes", "rejected": "no"}])
    other, _ = _ingest(tmp_path, [{"prompt": "q", "chosen": "yes", "rejected": "never"}])
    assert one.content_hash != other.content_hash
