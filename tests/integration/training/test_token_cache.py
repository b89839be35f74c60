"""A split is tokenised once on a node for the same rows, tokenizer, template and length; what is damaged is made anew."""

from __future__ import annotations

import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agents.training.data import tokenise
from agents.training.tokens import cache
from agents.training.tokens import tokenise as tokenising
from agents.training.tokens.cache import TokenSpec, open_tokens
from agents.training.tokens.tokenise import tokenised
from common.errors import FailedPrecondition, InvalidArgument
from common.rows import Row, read_split, write_split
from tests.support.micro_model import TEMPLATE, build_micro, colour_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_micro(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


@pytest.fixture
def spec(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenSpec:
    monkeypatch.setenv("LUTHIER_NODE_HOME", str(tmp_path / "node"))
    write_split(colour_rows(20), tmp_path / "train.parquet")
    return TokenSpec(tmp_path / "train.parquet", base, 100)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The splits that were tokenised."""
    paths: list[Path] = []

    def counted(path: Path, *arguments: Any, **more: Any) -> Any:
        paths.append(path)
        return tokenised(path, *arguments, **more)

    monkeypatch.setattr(cache, "tokenised", counted)
    return paths


def test_the_rows_are_those_of_the_tokenizer(spec: TokenSpec, tokenizer: Any) -> None:
    tokens = open_tokens(spec, tokenizer)
    expected = [tokenise(tokenizer, row, 100) for row in read_split(spec.path)]
    assert tokens.examples["input_ids"][:] == [example.input_ids for example in expected]
    assert tokens.examples["labels"][:] == [example.labels for example in expected]
    assert tokens.lengths.tolist() == [len(example.input_ids) for example in expected]
    # Mapped, not read: what holds the rows is a file of the node.
    assert [Path(file["filename"]).parent.parent for file in tokens.dataset.cache_files] == [spec.path.parent / "node" / "tokens"]


def test_the_same_split_is_tokenised_once(spec: TokenSpec, tokenizer: Any, made: list[Path], tmp_path: Path) -> None:
    first = open_tokens(spec, tokenizer)
    copy = tmp_path / "elsewhere" / "train.parquet"
    copy.parent.mkdir()
    shutil.copy(spec.path, copy)
    second = open_tokens(replace(spec, path=copy, processes=4), tokenizer)
    assert made == [spec.path]
    assert second.examples[:] == first.examples[:]


def test_whatever_changes_the_tokens_changes_the_key(spec: TokenSpec, base: Path, tmp_path: Path) -> None:
    other_rows, other_base = tmp_path / "other" / "train.parquet", tmp_path / "base"
    other_rows.parent.mkdir()
    write_split(colour_rows(20, seed=5), other_rows)
    shutil.copytree(base, other_base)
    tokenizer_file = other_base / "tokenizer.json"
    tokenizer_file.write_text(tokenizer_file.read_text().replace("green", "great"))
    keys = {
        spec.key(TEMPLATE),
        spec.key(TEMPLATE + " "),
        spec.key(None),
        replace(spec, path=other_rows).key(TEMPLATE),
        replace(spec, base_dir=other_base).key(TEMPLATE),
        replace(spec, max_length=99).key(TEMPLATE),
        replace(spec, loss_on_all=True).key(TEMPLATE),
        replace(spec, max_rows=3).key(TEMPLATE),
    }
    assert len(keys) == 8
    assert replace(spec, processes=9).key(TEMPLATE) == spec.key(TEMPLATE)


def test_other_code_makes_other_tokens(spec: TokenSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = spec.key(TEMPLATE)
    (tmp_path / "data.py").write_text("# changed")
    monkeypatch.setattr(cache, "_CODE", (str(tmp_path / "data.py"), cache._CODE[1]))
    assert spec.key(TEMPLATE) != before


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_what_is_damaged_is_found_by_its_sum_and_made_anew(
    spec: TokenSpec, tokenizer: Any, made: list[Path], damage: str
) -> None:
    whole = open_tokens(spec, tokenizer).examples[:]
    (file,) = (spec.path.parent / "node" / "tokens").glob("*/rows.arrow")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    if damage != "remove":
        file.write_bytes(content if damage == "flip" else content[:-40])
    assert open_tokens(spec, tokenizer).examples[:] == whole
    assert len(made) == 2


def test_one_makes_it_while_the_others_wait(
    spec: TokenSpec, tokenizer: Any, made: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, counts = cache._make, []

    def slowly(*arguments: Any) -> None:
        time.sleep(0.2)
        make(*arguments)

    monkeypatch.setattr(cache, "_make", slowly)
    ranks = [threading.Thread(target=lambda: counts.append(len(open_tokens(spec, tokenizer).dataset))) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert counts == [20] * 4
    assert len(made) == 1


def test_rows_with_nothing_to_learn_are_left_out_and_told_by_line(spec: TokenSpec, tokenizer: Any, made: list[Path]) -> None:
    rows = [*colour_rows(3), Row(prompt="red " * 200, completion="red", line=77)]
    write_split(rows, spec.path)
    for _ in range(2):  # made, and found
        tokens = open_tokens(spec, tokenizer)
        assert len(tokens.dataset) == 3
        assert tokens.report.cut_away.first == [77]
    assert len(made) == 1


def test_a_split_of_which_nothing_is_left_is_refused_each_time(spec: TokenSpec, tokenizer: Any) -> None:
    write_split([Row(prompt="red " * 200, completion="red", line=77)], spec.path)
    for _ in range(2):
        with pytest.raises(InvalidArgument, match=r"line 77") as caught:
            open_tokens(spec, tokenizer)
        assert caught.value.reason == "BAD_DATA"


def test_only_the_first_rows_are_taken_where_that_is_asked(spec: TokenSpec, tokenizer: Any) -> None:
    assert len(open_tokens(replace(spec, max_rows=7), tokenizer).dataset) == 7


def test_a_damaged_split_is_said_to_be_one(spec: TokenSpec, tokenizer: Any) -> None:
    spec.path.write_bytes(b"no rows")
    with pytest.raises(FailedPrecondition, match=r"train\.parquet cannot be read"):
        open_tokens(spec, tokenizer)
    assert not list((spec.path.parent / "node" / "tokens").iterdir()), "half of a cache is left"


def test_what_nobody_opened_for_a_month_goes(spec: TokenSpec, tokenizer: Any) -> None:
    open_tokens(spec, tokenizer)
    home = spec.path.parent / "node" / "tokens"
    (old,) = home.iterdir()
    long_ago = time.time() - 31 * 86_400
    os.utime(old, (long_ago, long_ago))
    open_tokens(replace(spec, max_length=50), tokenizer)
    assert [folder.name for folder in home.iterdir()] == [replace(spec, max_length=50).key(tokenizer.chat_template)]


@pytest.mark.slow
def test_several_processes_give_the_same_rows_in_the_same_order(
    spec: TokenSpec, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenising, "PARALLEL_ROWS", 10)
    monkeypatch.setattr(tokenising, "CHUNK", 3)
    rows = list(tokenised(spec.path, spec.base_dir, tokenizer, 100, loss_on_all=False, processes=2))
    assert [row.line for row, _ in rows] == list(range(1, 21))
    assert [example for _, example in rows] == [tokenise(tokenizer, row, 100) for row, _ in rows]
