"""Alternatives scored on a shared beginning are scored as they would be alone."""

from __future__ import annotations

import pytest
import torch

from serving.engines import choices as choices_module
from serving.engines import load_engine
from tests.integration.serving.conftest import build_micro_llama

LABELS = ["billing", "it", "printer on", "größer"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    torch.set_num_threads(1)
    return load_engine(build_micro_llama(tmp_path_factory.mktemp("micro")))


def wanted(engine):
    """Prompts of many lengths, labels of many lengths, and one that counts up to its end of turn."""
    asked = []
    for number in range(9):
        prompt = engine.render([{"role": "user", "content": "the printer on " * number + "x"}])
        start = '{"category": "'
        asked.append((prompt, [(f'{start}{label}", "urgency": "low"}}', len(f'{start}{label}"')) for label in LABELS]))
    asked.append((engine.render([{"role": "user", "content": "hi"}]), [("yes", 3), ("yes it is", 9), ("no", 2)]))
    return asked


def alone(engine, prompt: str, text: str, end: int) -> tuple[float, int]:
    """The plain way: one forward pass, token by token."""
    model, tokenizer = engine._model, engine._tokenizer
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    if end < len(text):
        own = own[: next(n for n in range(1, len(own) + 1) if len(tokenizer.decode(own[:n])) >= end)]
    else:
        own += tokenizer("<|end|>\n", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        likely = model(torch.tensor([before + own])).logits[0].log_softmax(-1)
    return sum(float(likely[len(before) + at - 1, token]) for at, token in enumerate(own)), len(own)


@pytest.mark.parametrize("cached_tokens", [100_000, 300, 1])
@pytest.mark.parametrize("shared", [True, False])
def test_each_alternative_scores_as_if_it_were_alone(engine, monkeypatch, shared, cached_tokens):
    monkeypatch.setattr(engine, "_shares_beginnings", shared)
    monkeypatch.setattr(choices_module, "CACHED_TOKENS", cached_tokens)
    asked = wanted(engine)
    found = engine.score_choices(asked)
    assert [len(scores) for scores in found] == [len(alternatives) for _, alternatives in asked]
    for (prompt, alternatives), scores in zip(asked, found, strict=True):
        for (text, end), score in zip(alternatives, scores, strict=True):
            logprob, tokens = alone(engine, prompt, text, end)
            assert score.logprob == pytest.approx(logprob, abs=1e-3)
            assert score.tokens == tokens


def test_a_whole_alternative_scores_like_score(engine):
    prompt = engine.render([{"role": "user", "content": "hi"}])
    [scores] = engine.score_choices([(prompt, [("yes it is", 9), ("no", 2)])])
    for score, plain in zip(scores, engine.score([(prompt, "yes it is"), (prompt, "no")]), strict=True):
        assert score.logprob == pytest.approx(plain.logprob, abs=1e-3)
        assert score.tokens == plain.tokens


def test_one_alternative(engine):
    prompt = engine.render([{"role": "user", "content": "hi"}])
    assert engine.score_choices([(prompt, [("yes", 3)])])[0][0].logprob == pytest.approx(
        engine.score([(prompt, "yes")])[0].logprob, abs=1e-3
    )
    assert engine.score_choices([]) == []
