"""Many adapters on one base: in one batch each row is answered as PEFT does with its adapter alone, and none applies by half."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from serving.engines import Completion, Request, SamplingParams, load_engine
from serving.engines.adapters import AdapterBank, read_adapter
from serving.engines.lanes import ContinuousLanes
from serving.engines.static import StaticLanes
from serving.engines.transformers_engine import TransformersEngine
from tests.integration.serving.test_lanes import generate, lanes_of, prompts

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "attention only": {"r": 2, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]},
    "rank stabilised": {"r": 8, "lora_alpha": 4, "target_modules": "all-linear", "use_rslora": True},
    "decomposed": {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "use_dora": True},
    "by pattern": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 6},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 16},
    },
}


def build_adapter(base: Path, folder: Path, shape: dict[str, Any], seed: int = 0) -> Path:
    """Write an adapter with random weights that are no zeros."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **shape))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.copy_(
                    parameter.abs() + torch.rand_like(parameter) if "magnitude" in name else torch.randn_like(parameter) * 0.3
                )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(micro_llama: Path) -> TransformersEngine:
    engine = load_engine(micro_llama, device="cpu")
    assert isinstance(engine, TransformersEngine)
    return engine


@pytest.fixture(scope="module")
def adapters(micro_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: build_adapter(micro_llama, folder / name.replace(" ", "-"), shape, seed)
        for seed, (name, shape) in enumerate(SHAPES.items())
    }


def with_adapters(engine: TransformersEngine, adapters: dict[str, Path]) -> ContinuousLanes:
    # A model has one running batch: the hooks of another would add to it.
    engine._model = AutoModelForCausalLM.from_pretrained(engine._model.config._name_or_path).eval()
    lanes = lanes_of(engine)
    for name, folder in adapters.items():
        lanes.add_adapter(name, folder)()
    return lanes


def test_in_one_batch_each_row_is_answered_with_its_own(
    engine: TransformersEngine, adapters: dict[str, Path], micro_llama: Path
) -> None:
    names = ["", *adapters]
    asked = prompts(18)
    requests = [Request(p, SamplingParams(max_tokens=8), adapter=names[n % len(names)]) for n, p in enumerate(asked)]
    answers = generate(with_adapters(engine, adapters), requests, every=1)
    different = set()
    for name in names:
        base = AutoModelForCausalLM.from_pretrained(micro_llama).eval()
        alone = PeftModel.from_pretrained(base, adapters[name]).eval() if name else base
        for request, answer in zip(requests, answers, strict=True):
            ids = torch.tensor([engine._codec.encode(request.prompt)])
            output = alone.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
            expected = engine._tokenizer.decode(output, skip_special_tokens=True)
            if request.adapter == name:
                assert answer.text == expected, name
            elif answer.text != expected:
                different.add((request.adapter, name))
    # The adapters do make a difference, or this would show nothing.
    assert len(different) > len(names) * (len(names) - 1) * 0.8


def test_logits_of_a_mixed_pass_are_those_of_peft(
    engine: TransformersEngine, adapters: dict[str, Path], micro_llama: Path
) -> None:
    lanes = with_adapters(engine, adapters)
    ids = torch.tensor([engine._codec.encode("my invoice is wrong")] * (len(adapters) + 1))
    with torch.inference_mode():
        lanes._adapters.aim(["", *adapters], ids.device)
        mixed = engine._model(ids).logits
        for row, name in enumerate(["", *adapters]):
            base = AutoModelForCausalLM.from_pretrained(micro_llama).eval()
            alone = PeftModel.from_pretrained(base, adapters[name]).eval() if name else base
            torch.testing.assert_close(mixed[row], alone(ids[:1]).logits[0], atol=2e-5, rtol=1e-4)


def test_one_that_is_not_loaded_is_refused_and_the_others_go_on(engine: TransformersEngine, adapters: dict[str, Path]) -> None:
    lanes = with_adapters(engine, adapters)
    found: list[Completion | BaseException] = []
    lanes.join(Request("my", SamplingParams(max_tokens=2), adapter="nobody"), found.append)
    assert "not loaded" in str(found.pop())
    assert len(generate(lanes, [Request("my", SamplingParams(max_tokens=2), adapter="plain")])) == 1


def test_the_one_that_was_not_used_for_longest_makes_room(engine: TransformersEngine, adapters: dict[str, Path]) -> None:
    model = engine._model
    sizes = {name: read_adapter(folder, model).nbytes for name, folder in adapters.items()}
    bank = AdapterBank(model, sizes["plain"] + sizes["rank stabilised"] + sizes["decomposed"])
    for name in ("plain", "rank stabilised", "decomposed"):
        bank.add(name, bank.load(adapters[name]), pinned=name == "plain")
    bank.hold("rank stabilised")
    bank.release("rank stabilised")
    bank.add("attention only", bank.load(adapters["attention only"]))
    assert bank.names == ["plain", "rank stabilised", "attention only"]
    for name in bank.names:
        bank.hold(name)
    with pytest.raises(ResourceExhausted, match="in use"):
        bank.add("decomposed", bank.load(adapters["decomposed"]))
    for name in bank.names:
        bank.release(name)
    bank.add("decomposed", bank.load(adapters["decomposed"]))
    assert "plain" in bank.names


def test_what_took_anothers_place_is_nothing_but_itself(engine: TransformersEngine, adapters: dict[str, Path]) -> None:
    request = Request("the printer on the", SamplingParams(max_tokens=8), adapter="attention only")
    (alone,) = generate(with_adapters(engine, {"attention only": adapters["attention only"]}), [request])
    lanes = with_adapters(engine, {"decomposed": adapters["decomposed"]})
    lanes._adapters.remove("decomposed")
    lanes.add_adapter("attention only", adapters["attention only"])()
    assert lanes._adapters._places == {"attention only": 1}
    assert generate(lanes, [request]) == [alone]


def test_a_beginning_is_its_adapters_own(engine: TransformersEngine, adapters: dict[str, Path]) -> None:
    system = "please refund the invoice of the printer on the second floor " * 4
    requests = [
        Request(system + end, SamplingParams(max_tokens=6), adapter=name)
        for end in "abcd"
        for name in ("", "plain", "decomposed")
    ]
    alone = [generate(with_adapters(engine, adapters), [request])[0] for request in requests]
    lanes = with_adapters(engine, adapters)
    assert [generate(lanes, [request])[0] for request in requests] == alone
    assert lanes._prefixes.reused_tokens > 0


def change(folder: Path, target: Path, tensors: Any = None, **config: Any) -> Path:
    """A copy of an adapter with something else in it."""
    target.mkdir()
    settings = json.loads((folder / "adapter_config.json").read_text()) | config
    (target / "adapter_config.json").write_text(json.dumps(settings))
    found = load_file(folder / "adapter_model.safetensors")
    save_file(tensors(found) if tensors else found, target / "adapter_model.safetensors")
    return target


def without_first(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(sorted(found.items())[2:])


def other_rank(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: (value[:3] if "lora_A" in key else value[:, :3]).contiguous() for key, value in found.items()}


def one_too_many(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return found | {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}


def no_number(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value * torch.nan for key, value in found.items()}


@pytest.mark.parametrize(
    ("says", "tensors", "config"),
    [
        ("are missing from the adapter", without_first, {}),
        ("are missing from the adapter", None, {"target_modules": ["q_proj", "v_proj", "k_proj", "up_proj", "lm_head"]}),
        ("rank 4 on a layer of", other_rank, {}),
        ("rank 6 on a layer", None, {"r": 6}),
        ("have no place in the base", one_too_many, {}),
        ("numbers that are none", no_number, {}),
        ("is not whole", None, {"use_dora": True}),
        ("uses modules_to_save", None, {"modules_to_save": ["embed_tokens"]}),
        ("trains biases", None, {"bias": "all"}),
        ("only LORA", None, {"peft_type": "IA3"}),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_apply_in_full_is_refused(
    engine: TransformersEngine, adapters: dict[str, Path], tmp_path: Path, says: str, tensors: Any, config: dict[str, Any]
) -> None:
    folder = change(adapters["plain"], tmp_path / "changed", tensors, **config)
    with pytest.raises(InvalidArgument, match=says):
        read_adapter(folder, engine._model)


def test_a_model_that_is_answered_batch_by_batch_takes_none(engine: TransformersEngine, adapters: dict[str, Path]) -> None:
    lanes = StaticLanes(engine._model, engine._row, engine._end_tokens, engine._pad, 128)
    with pytest.raises(FailedPrecondition, match="takes no adapters"):
        lanes.add_adapter("plain", adapters["plain"])
