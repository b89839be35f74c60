"""The running batch: who joins and leaves when changes no answer, a long prompt holds up nobody, and nothing is lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from serving.engines import Completion, Request, SamplingParams, load_engine, prefixes, slots
from serving.engines.lanes import ContinuousLanes, fits
from serving.engines.static import StaticLanes
from serving.engines.transformers_engine import TransformersEngine

WORDS = [
    "the",
    "printer",
    "on",
    "the",
    "second",
    "floor",
    "does",
    "not",
    "print",
    "and",
    "my",
    "invoice",
    "is",
    "wrong",
    "please",
    "refund",
    "it",
]


@pytest.fixture(scope="module")
def engine(micro_llama: Path) -> TransformersEngine:
    engine = load_engine(micro_llama, device="cpu")
    assert isinstance(engine, TransformersEngine)
    return engine


def prompts(count: int) -> list[str]:
    """Prompts of 2 to some 60 tokens."""
    return [" ".join(WORDS[number % 7 :] * (1 + number % 3))[: 8 + 23 * (number % 9)] for number in range(count)]


def generate(lanes: Any, requests: Sequence[Request], every: int = 0) -> list[Completion]:
    """Let requests join all at once, or one each so many steps."""
    found: dict[int, Completion | BaseException] = {}
    waiting = list(enumerate(requests))
    steps = 0
    while waiting or lanes.busy:
        while waiting and (not every or steps >= every * waiting[0][0]):
            number, request = waiting.pop(0)
            lanes.join(request, lambda result, number=number: found.__setitem__(number, result))
        if lanes.busy:
            lanes.step()
        steps += 1
    assert len(found) == len(requests)
    assert all(isinstance(each, Completion) for each in found.values()), found
    return [found[number] for number in range(len(requests))]  # type: ignore[misc]


def lanes_of(engine: TransformersEngine, budget: int = 2**30, rows: int = 32) -> ContinuousLanes:
    return ContinuousLanes(engine._model, engine._row, engine._end_tokens, engine._pad, budget, rows)


@pytest.mark.parametrize("every", [0, 1, 3])
@pytest.mark.parametrize("rows", [32, 4])
def test_whenever_one_joins_and_others_leave_each_gets_its_own_answer(engine: TransformersEngine, every: int, rows: int) -> None:
    requests = [
        Request(prompt, SamplingParams(max_tokens=3 + 5 * (number % 6), temperature=0.8 * (number % 2), seed=number))
        for number, prompt in enumerate(prompts(20))
    ]
    alone = [generate(lanes_of(engine), [request])[0] for request in requests]
    assert len({each.completion_tokens for each in alone}) > 3
    assert generate(lanes_of(engine, rows=rows), requests, every) == alone


def test_greedy_answers_are_the_models_own(engine: TransformersEngine, micro_llama: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(micro_llama), AutoModelForCausalLM.from_pretrained(micro_llama).eval()
    asked = prompts(9)
    for prompt, answer in zip(
        asked, generate(lanes_of(engine), [Request(p, SamplingParams(max_tokens=12)) for p in asked]), strict=True
    ):
        ids = torch.tensor([engine._codec.encode(prompt)])
        output = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert answer.text == tokenizer.decode(output, skip_special_tokens=True)


def test_a_long_prompt_is_read_in_pieces_while_others_are_answered(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes = lanes_of(engine)
    monkeypatch.setattr(lanes, "_chunk", 8)
    long = Request("print " * 60, SamplingParams(max_tokens=4))
    alone = generate(lanes_of(engine), [long])
    found: list[Completion | BaseException] = []
    lanes.join(Request("my", SamplingParams(max_tokens=100, temperature=1.5, seed=3)), found.append)
    lanes.step()
    lanes.join(long, found.append)
    (short,) = lanes._answered
    pieces = -(-engine.check(long.prompt) // 8)
    assert pieces > 6
    for number in range(1, pieces):
        before = len(short.row.ids)
        lanes.step()
        # A piece of the one, a token of the other.
        assert (lanes._reading[0].computed, len(short.row.ids)) == (8 * number, before + 1)
    while lanes.busy:
        lanes.step()
    assert found[0] == alone[0]


def test_where_memory_runs_out_the_latest_begin_anew_and_nothing_changes(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(slots, "GROWTH", 16)
    caplog.set_level("INFO")
    requests = [Request(prompt, SamplingParams(max_tokens=150, temperature=0.7, seed=n)) for n, prompt in enumerate(prompts(6))]
    alone = [generate(lanes_of(engine), [request])[0] for request in requests]
    roomy = lanes_of(engine)
    generate(roomy, requests)
    whole = roomy._cache.nbytes
    tight = lanes_of(engine, budget=whole // 2)
    assert generate(tight, requests) == alone
    assert "begins anew later" in caplog.text
    assert 0 < tight._cache.nbytes <= whole // 2


def test_one_bad_prompt_fails_alone_and_a_failing_model_fails_all_and_recovers(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes = lanes_of(engine)
    found: list[Completion | BaseException] = []
    lanes.join(Request("print " * 400, SamplingParams()), found.append)
    assert isinstance(found.pop(), Exception)
    assert not lanes.busy
    lanes.join(Request("my invoice", SamplingParams(max_tokens=5)), found.append)
    lanes.join(Request("the printer", SamplingParams(max_tokens=5)), found.append)
    lanes.step()
    with monkeypatch.context() as patched:
        patched.setattr(engine._model, "forward", lambda **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lanes.step()
    assert [type(each) for each in found] == [ZeroDivisionError] * 2
    assert generate(lanes, [Request("my invoice", SamplingParams(max_tokens=5))]) == generate(
        lanes_of(engine), [Request("my invoice", SamplingParams(max_tokens=5))]
    )


def test_who_leaves_makes_room_at_the_next_token(engine: TransformersEngine) -> None:
    lanes = lanes_of(engine, rows=1)
    found: dict[str, Completion | BaseException] = {}
    first, second = Request("my invoice", SamplingParams(max_tokens=200)), Request("the printer", SamplingParams(max_tokens=2))
    lanes.join(first, lambda result: found.__setitem__("first", result))
    lanes.join(second, lambda result: found.__setitem__("second", result))
    lanes.step()
    first.cancel.set()
    lanes.step()
    assert found["first"].finish_reason == "cancelled"  # type: ignore[union-attr]
    while lanes.busy:
        lanes.step()
    assert found["second"].completion_tokens in (1, 2)  # type: ignore[union-attr]


SYSTEM = "please refund the invoice of the printer on the second floor " * 4


def counted(lanes: ContinuousLanes, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each pass over prompts."""
    seen: list[int] = []
    forward = lanes._forward

    def count(first: int, who: Any, tokens: list[list[int]], *rest: Any) -> torch.Tensor:
        if len(tokens[0]) > 1 or not who[0].row.generated:
            seen.append(sum(place >= 0 for places in rest[1] for place in places))
        return forward(first, who, tokens, *rest)

    monkeypatch.setattr(lanes, "_forward", count)
    return seen


def test_a_beginning_that_prompts_share_is_computed_twice_and_then_no_more(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [Request(SYSTEM + prompt, SamplingParams(max_tokens=6)) for prompt in prompts(8)]
    alone = [generate(lanes_of(engine), [request])[0] for request in asked]
    lanes = lanes_of(engine)
    seen = counted(lanes, monkeypatch)
    assert [generate(lanes, [request])[0] for request in asked] == alone
    whole = [len(engine._codec.encode(request.prompt)) for request in asked]
    shared = len(engine._codec.encode(SYSTEM)) // prefixes.BLOCK * prefixes.BLOCK
    assert shared >= prefixes.BLOCK
    assert seen[:2] == whole[:2]
    assert all(read <= length - shared for read, length in zip(seen[2:], whole[2:], strict=True))
    assert lanes._prefixes.reused_tokens >= 6 * shared
    # Together it is the same, and so it is for one that takes another's slot.
    assert generate(lanes, asked, every=1) == alone
    assert generate(lanes, asked) == alone


def test_beginnings_are_kept_up_to_so_many_bytes(engine: TransformersEngine) -> None:
    lanes = lanes_of(engine, budget=2**18)
    for number in range(12):
        text = f"{number} " + SYSTEM
        generate(lanes, [Request(text + end, SamplingParams(max_tokens=2)) for end in ("a", "b", "c")])
    kept = sum(keys.nbytes + values.nbytes for _, layers in lanes._prefixes._kept.values() for keys, values in layers)
    assert 0 < kept == lanes._prefixes._bytes <= 2**16


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "mistral"])
def test_other_kinds_of_models_answer_alike(engine: TransformersEngine, kind: str) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": len(engine._tokenizer), "bos_token_id": 0, "eos_token_id": 1}
    if kind == "gpt2":
        sizes |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    else:
        sizes |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "sliding_window": None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    assert fits(model)
    other = TransformersEngine(model, engine._tokenizer, 128, set())
    requests = [Request(prompt, SamplingParams(max_tokens=10)) for prompt in prompts(7)]
    static = StaticLanes(model, other._row, other._end_tokens, other._pad, 128)
    assert generate(other.lanes(), requests, every=2) == generate(static, requests)


def test_a_model_with_windows_of_attention_is_answered_batch_by_batch(engine: TransformersEngine) -> None:
    sizes = {"vocab_size": len(engine._tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = AutoConfig.for_model("mistral", num_attention_heads=4, num_key_value_heads=2, sliding_window=16, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert not fits(model)
    other = TransformersEngine(model, engine._tokenizer, 128, set())
    assert isinstance(other.lanes(), StaticLanes)
    assert len(generate(other.lanes(), [Request(p, SamplingParams(max_tokens=4)) for p in prompts(3)])) == 3
