"""Rows keep their content through files, and equal content has equal hashes."""

import pytest

from common import rows
from common.chat import messages_of, template_sha256
from common.errors import FailedPrecondition
from common.rows import Message, Row

CHAT = Row(messages=(Message("system", "Be brief."), Message("user", "Größe?\n"), Message("assistant", "42")), line=1)
PAIR = Row(prompt="a\u2028b", completion='{"x": "☃"}', label="x", line=2)


def test_rows_survive_their_file(tmp_path):
    many = [Row(prompt=f"p{i}", completion="c", line=i) for i in range(5000)]
    for written in ([CHAT, PAIR], many, []):
        assert rows.write_split(iter(written), tmp_path / "train.parquet") == len(written)
        assert rows.read_split(tmp_path / "train.parquet") == written


def test_the_hash_is_of_the_content_and_its_order():
    assert rows.content_hash([CHAT, PAIR]) != rows.content_hash([PAIR, CHAT])
    assert rows.content_hash([PAIR]) == rows.content_hash(
        [Row(prompt=PAIR.prompt, completion=PAIR.completion, label="x", line=99)]
    )
    assert rows.content_hash([PAIR]) != rows.content_hash([Row(prompt=PAIR.prompt, completion=PAIR.completion, label="y")])
    assert rows.content_hash([Row(prompt="a", completion="bc")]) != rows.content_hash([Row(prompt="ab", completion="c")])


def test_the_hash_of_a_version_knows_its_splits():
    assert rows.version_hash({"a": "1", "b": "2"}) == rows.version_hash({"b": "2", "a": "1"})
    assert rows.version_hash({"a": "1", "b": "2"}) != rows.version_hash({"a": "2", "b": "1"})


def test_the_canonical_form_is_pinned():
    assert PAIR.canonical() == '{"completion":"{\\"x\\": \\"☃\\"}","label":"x","prompt":"a\u2028b"}\n'.encode()
    assert rows.content_hash([PAIR, CHAT]) == "3baf2a1c9e31a0c3bb0c2695489a8aee7acf859bdac0358a0d1d0db69f318f8e"


def test_a_file_that_holds_no_rows_is_refused(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(FailedPrecondition, match=r"x\.parquet"):
        rows.read_split(tmp_path / "x.parquet")


def test_a_row_as_a_chat_ends_with_its_target():
    assert messages_of(PAIR) == [{"role": "user", "content": "a\u2028b"}, {"role": "assistant", "content": '{"x": "☃"}'}]
    assert messages_of(CHAT)[0] == {"role": "system", "content": "Be brief."}
    assert messages_of(CHAT)[-1] == {"role": "assistant", "content": "42"}


def test_the_hash_of_a_template_is_that_of_its_text():
    assert template_sha256("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
