"""What is learned of a row is what is scored: training and the serving engine cut it into the same tokens at the same place."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from agents.training.data import IGNORED, tokenise
from common.chat import messages_of
from common.rows import Message, Row
from serving.engines.prompts import PromptCodec
from tests.support.micro_model import build_micro

ROWS = [
    Row(prompt="red cat dog", completion="red"),
    Row(prompt="what\n\n", completion='\n{"category": "x", "urgency": "low"}'),
    Row(prompt="  spaces  ", completion="  and tabs\t "),
    Row(prompt="Grüße, 東京 🙂", completion="日本語"),
    Row(prompt="same same", completion="same same"),
    Row(messages=(Message("system", "kind"), Message("user", "one"), Message("assistant", "two"))),
]


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_micro(tmp_path_factory.mktemp("micro"))


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("number", range(len(ROWS)))
def test_training_and_scoring_see_the_same_tokens(micro: Path, number: int, template: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(micro)
    if not template:
        tokenizer.chat_template = None
    row, codec = ROWS[number], PromptCodec(tokenizer)
    chat = messages_of(row)
    prompt = codec.render(chat[:-1]) if template else "".join(message["content"] for message in chat[:-1])
    ids, start = codec.encode_pair(prompt, chat[-1]["content"])
    example = tokenise(tokenizer, row, 10_000)
    assert example.input_ids == ids
    learned = [index for index, label in enumerate(example.labels) if label != IGNORED]
    assert learned == list(range(start, len(ids)))
    assert ids[-1] == tokenizer.eos_token_id
