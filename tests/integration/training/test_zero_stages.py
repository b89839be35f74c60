"""Two ranks over gloo: every ZeRO stage learns the same, spreads what it should, and leaves a model that loads."""

from __future__ import annotations

import importlib.util
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from common import manifest, storage
from common.model_files import check_model_folder

pytestmark = pytest.mark.slow

STEPS = 8
NUMBERS = 4  # bytes of a number in fp32


def _support(name: str) -> Any:
    path = Path(__file__).parents[2] / "support" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _spec(method: str, stage: int, **more: Any) -> dict[str, Any]:
    hyper = {"learning_rate": 3e-3 if method == "full" else 2e-2, "max_steps": STEPS, "batch_size": 8, "weight_decay": 0.01}
    return {"base": "micro", "method": method, "hyperparameters": hyper, "sharding": {"zero_stage": stage}, "workers": 2} | more


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    micro = _support("micro_model")
    micro.build_micro(folder / "base")
    micro.build_data(folder / "data")
    (folder / "out").mkdir()
    return folder


@pytest.fixture(scope="module")
def runs(work: Path) -> dict[str, dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kept = {"checkpoints": {"every_steps": 3, "keep": 1}}
    halves = {"checkpoints": {"every_steps": 4, "keep": 2}}

    def whole_and_resumed(name: str, method: str, stage: int) -> list[dict[str, Any]]:
        storage = {part: (work / "storage" / f"{part}-{name}").as_uri() for part in ("whole", "resumed", "paused")}
        spec = _spec(method, stage, **halves)
        return [
            {"name": f"whole-{name}", "spec": spec, "storage": storage["whole"]},
            {"name": f"resumed-{name}", "spec": spec, "resume": f"{storage['whole']}/checkpoints/step-4"},
        ]

    plan = {
        "port": port,
        "world_size": 2,
        "base": str(work / "base"),
        "data": str(work / "data"),
        "out": str(work / "out"),
        "runs": [
            # Stage 3 comes first: it needs what the other stages would have set up by then.
            {"name": "zero3", "spec": _spec("full", 3, **kept), "storage": (work / "storage" / "zero3").as_uri()},
            *({"name": f"zero{stage}", "spec": _spec("full", stage)} for stage in range(3)),
            {"name": "lora2", "spec": _spec("lora", 2)},
            {"name": "lora3", "spec": _spec("lora", 3)},
            {"name": "bf16", "spec": _spec("full", 2, precision="PRECISION_BF16")},
            *whole_and_resumed("zero2", "full", 2),
            *whole_and_resumed("zero3", "full", 3),
            *whole_and_resumed("lora2", "lora", 2),
            {"name": "paused", "spec": _spec("full", 2), "storage": (work / "storage" / "paused").as_uri(), "pause_at": 3},
            {"name": "again", "spec": _spec("full", 2), "resume": (work / "storage" / "paused").as_uri() + "/checkpoints/step-4"},
            {"name": "finished", "spec": _spec("full", 2), "finish_at": 3},
            {"name": "apart", "spec": _spec("full", 2, **kept), "storage": (work / "storage" / "apart").as_uri(), "nodes": True},
        ],
    }
    return _support("training_ranks").run_plan(plan, work)


def test_every_stage_learns_and_all_agree(runs: dict[str, dict[str, Any]]) -> None:
    reference = runs["zero0"]["losses"]
    assert len(reference) == STEPS
    assert reference[-1] < reference[0] - 0.5
    for stage in (1, 2, 3):
        assert runs[f"zero{stage}"]["losses"] == pytest.approx(reference, abs=1e-4)


@pytest.mark.parametrize("stage", range(4))
def test_the_engine_report_tells_what_each_rank_holds(runs: dict[str, dict[str, Any]], stage: int) -> None:
    engine = runs[f"zero{stage}"]["engine"]
    assert engine["engine_class"] == "deepspeed.runtime.engine.DeepSpeedEngine"
    assert "AdamW" in engine["optimizer_class"]
    assert engine.get("zero_stage", 0) == stage
    assert (engine["world_size"], engine["backend"]) == (2, "gloo")
    whole = int(engine["parameters"]) * NUMBERS
    assert engine["parameters"] == engine["trainable_parameters"]
    assert [rank.get("rank", 0) for rank in engine["ranks"]] == [0, 1]
    for rank in engine["ranks"]:
        held, state = int(rank["parameter_bytes"]), int(rank["optimizer_bytes"])
        # Partitions are padded to even lengths, hence a little more than a half.
        assert held == pytest.approx(whole / 2, rel=0.02) if stage == 3 else held == whole
        # Two moments; ZeRO keeps its own copy of the parameters that it updates.
        expected = 2 * whole if stage == 0 else 3 * whole / 2
        assert state == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("name", ["zero0", "zero2", "zero3", "bf16"])
def test_the_saved_model_loads_and_has_learned(runs: dict[str, dict[str, Any]], work: Path, name: str) -> None:
    from serving.engines import load_engine

    folder = work / "out" / name
    assert check_model_folder(folder).kind == "full"
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {
        file.name for file in folder.iterdir()
    }
    rows = _support("micro_model").colour_rows(16, seed=1)
    losses = []
    for model in (work / "base", folder):
        engine = load_engine(model)
        scores = engine.score([(engine.render([{"role": "user", "content": row.prompt}]), row.completion) for row in rows])
        losses.append(-sum(score.logprob for score in scores) / sum(score.tokens for score in scores))
    assert losses[1] < losses[0] - 0.5
    assert losses[1] == pytest.approx(runs[name]["losses"][-1], abs=0.5)


def test_stages_save_the_same_weights(runs: dict[str, dict[str, Any]], work: Path) -> None:
    import torch
    from safetensors.torch import load_file

    reference = load_file(work / "out" / "zero0" / "model.safetensors")
    for stage in (1, 2, 3):
        saved = load_file(work / "out" / f"zero{stage}" / "model.safetensors")
        assert saved.keys() == reference.keys()
        for name, tensor in reference.items():
            torch.testing.assert_close(saved[name], tensor, atol=2e-4, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", ["lora2", "lora3"])
def test_a_lora_saves_an_adapter_that_loads_and_points_nowhere(runs: dict[str, dict[str, Any]], work: Path, name: str) -> None:
    from serving.engines import load_engine

    losses, engine = runs[name]["losses"], runs[name]["engine"]
    assert losses[-1] < losses[0] - 0.2
    assert losses == pytest.approx(runs["lora2"]["losses"], abs=1e-4)
    assert int(engine["trainable_parameters"]) < int(engine["parameters"]) / 2
    folder = work / "out" / name
    assert check_model_folder(folder).kind == "adapter"
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "micro"
    for file in folder.iterdir():
        assert str(work).encode() not in file.read_bytes(), f"{file.name} names a local path"
    base, tuned = load_engine(work / "base"), load_engine(folder, work / "base")
    rows = _support("micro_model").colour_rows(16, seed=1)
    pairs = [(base.render([{"role": "user", "content": row.prompt}]), row.completion) for row in rows]
    assert sum(score.logprob for score in tuned.score(pairs)) > sum(score.logprob for score in base.score(pairs)) + 5


@pytest.mark.parametrize("name", ["zero3", "apart"])
def test_checkpoints_are_whole_and_only_the_latest_are_kept(
    runs: dict[str, dict[str, Any]], work: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = runs[name]["checkpoints"]
    assert [uri.rpartition("/")[2] for uri in told] == ["step-3", "step-6", f"step-{STEPS}"]
    there = [uri for uri in told if storage.exists(storage.join(uri, manifest.NAME))]
    assert there == told[-1:]
    monkeypatch.setenv("LUTHIER_NODE_HOME", str(work / "elsewhere"))
    files = manifest.verify(manifest.fetch(there[0])).files
    assert sum(file.endswith("optim_states.pt") for file in files) == 2, sorted(files)
    assert {"rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"} <= files.keys()
    assert not list((work / "out").rglob(".luthier-*")), "scratch folders are left"


def test_ranks_without_a_common_disk_learn_the_same(runs: dict[str, dict[str, Any]]) -> None:
    assert runs["apart"]["losses"] == pytest.approx(runs["zero2"]["losses"], abs=1e-6)


@pytest.mark.parametrize("name", ["zero2", "zero3", "lora2"])
def test_a_run_that_goes_on_from_a_checkpoint_ends_as_one_that_was_never_interrupted(
    runs: dict[str, dict[str, Any]], work: Path, name: str
) -> None:
    import torch
    from safetensors.torch import load_file

    whole, resumed = runs[f"whole-{name}"], runs[f"resumed-{name}"]
    assert len(whole["losses"]) == STEPS
    assert resumed["losses"] == pytest.approx(whole["losses"][4:], abs=1e-6)
    file = "adapter_model.safetensors" if name == "lora2" else "model.safetensors"
    reference, saved = (load_file(work / "out" / f"{part}-{name}" / file) for part in ("whole", "resumed"))
    assert saved.keys() == reference.keys()
    for weight, tensor in reference.items():
        torch.testing.assert_close(saved[weight], tensor, atol=1e-6, rtol=0, msg=lambda text, weight=weight: f"{weight}: {text}")


def test_a_pause_saves_at_the_next_step_and_nothing_is_lost(runs: dict[str, dict[str, Any]], work: Path) -> None:
    paused, again = runs["paused"], runs["again"]
    assert len(paused["losses"]) == 4
    assert [uri.rpartition("/")[2] for uri in paused["checkpoints"]] == ["step-4"]
    assert not (work / "out" / "paused").exists()
    assert paused["losses"] + again["losses"] == pytest.approx(runs["zero2"]["losses"], abs=1e-6)


def test_a_run_that_is_to_finish_early_leaves_what_it_has_learned(runs: dict[str, dict[str, Any]], work: Path) -> None:
    finished = runs["finished"]
    assert finished["losses"] == pytest.approx(runs["zero2"]["losses"][:4], abs=1e-6)
    assert finished["steps"] == 4
    assert check_model_folder(work / "out" / "finished").kind == "full"
