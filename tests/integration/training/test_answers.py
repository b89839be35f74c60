"""Pairs, judged answers and raw texts as tokens: rendered as in supervised training, cut at the end, named where none is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agents.training.answers import open_judged, open_pairs
from agents.training.data import IGNORED, pieces, tokenise
from common.errors import InvalidArgument
from common.rows import Message, Row, write_split
from tests.support.micro_model import build_micro

PAIR = Row(prompt="one two", completion="red", rejected="blue cat", line=3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(build_micro(tmp_path_factory.mktemp("micro")))


def _file(folder: Path, *rows: Row) -> Path:
    write_split(rows, folder / "train.parquet")
    return folder / "train.parquet"


def test_both_answers_of_a_pair_are_what_supervised_training_would_learn(tokenizer: Any, tmp_path: Path) -> None:
    chat = Row(messages=(Message("user", "one two"), Message("assistant", "red")), rejected="blue cat", line=4)
    found = open_pairs(_file(tmp_path, PAIR, chat), tokenizer, 64)
    for row in found.dataset:
        for name, answer in (("chosen_ids", "red"), ("rejected_ids", "blue cat")):
            learned = tokenise(tokenizer, Row(prompt="one two", completion=answer), 64)
            assert row["prompt_ids"] + row[name] == learned.input_ids
            assert row[name] == [label for label in learned.labels if label != IGNORED]
    assert (
        found.lengths.tolist()
        == [sum(len(found.dataset[0][name]) for name in ("chosen_ids", "rejected_ids")) + 2 * len(found.dataset[0]["prompt_ids"])]
        * 2
    )


def test_only_the_last_answer_of_a_chat_is_compared(tokenizer: Any, tmp_path: Path) -> None:
    turns = (Message("user", "one"), Message("assistant", "two"), Message("user", "three"), Message("assistant", "red"))
    (row,) = open_pairs(_file(tmp_path, Row(messages=turns, rejected="blue")), tokenizer, 64).dataset
    assert tokenizer.decode(row["chosen_ids"]).startswith("red")
    assert "two" in tokenizer.decode(row["prompt_ids"])


def test_a_pair_whose_answers_do_not_fit_is_left_out_and_named(tokenizer: Any, tmp_path: Path) -> None:
    long = Row(prompt="cat " * 40, completion="red", rejected="blue", line=9)
    found = open_pairs(_file(tmp_path, PAIR, long), tokenizer, 24)
    assert len(found.dataset) == 1
    assert "line 9 has the answer beyond max_length=24" in found.report.warnings()[0]
    with pytest.raises(InvalidArgument, match="all 1 rows of the split 'train' have nothing left to learn") as caught:
        open_pairs(_file(tmp_path, long), tokenizer, 24)
    assert caught.value.violations[0].field == "train line 9"


def test_judged_answers_keep_their_judgement(tokenizer: Any, tmp_path: Path) -> None:
    rows = (Row(prompt="one", completion="red", label="true"), Row(prompt="one", completion="blue", label="false"))
    found = open_judged(_file(tmp_path, *rows), tokenizer, 64)
    assert [row["label"] for row in found.dataset] == [True, False]
    assert [tokenizer.decode(row["completion_ids"]) for row in found.dataset] == ["red<|end|>", "blue<|end|>"]


@pytest.mark.parametrize("length", [2, 5, 16, 1000])
def test_every_token_of_a_text_but_the_first_is_learned_once(tokenizer: Any, length: int) -> None:
    text = "one two three cat dog bird " * 5
    whole = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    cut = pieces(tokenizer, Row(completion=text), length)
    assert all(len(piece.input_ids) <= length for piece in cut)
    assert [token for piece in cut for token in piece.labels[1:]] == whole[1:]
    assert sum(piece.targets for piece in cut) == len(whole) - 1
