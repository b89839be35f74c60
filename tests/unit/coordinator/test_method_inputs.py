"""What a method reads is checked when its job is created: the shape of rows, reward models, GPUs for 4-bit weights."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from google.protobuf import json_format

from common.errors import InvalidArgument, LuthierError
from coordinator import registry
from coordinator.jobs.resolve import Resolved, no_reward_model, registered, resolve
from coordinator.jobs.resources import fill_in
from coordinator.jobs.validate import validate
from coordinator.store import tables
from coordinator.store.database import Store
from luthier.v1 import dataset_pb2, job_pb2, model_pb2

SHAPES = {"pairs": dataset_pb2.ROW_SHAPE_PREFERENCE, "answers": dataset_pb2.ROW_SHAPE_PROMPT_COMPLETION}
KINDS = {"judge": model_pb2.MODEL_KIND_REWARD, "writer": model_pb2.MODEL_KIND_FULL}


@pytest.fixture
def filled(store: Store) -> Store:
    def fill(session: Any) -> None:
        for name, shape in SHAPES.items():
            version = dataset_pb2.DatasetVersion(content_hash=name, uri=f"mem://{name}")
            version.schema.shape = shape
            for split in ("train", "test"):
                version.splits.add(name=split, row_count=8)
            registry.add_dataset_version(session, "default", name, version, "m", "", "")
        for name, kind in KINDS.items():
            made = model_pb2.ModelVersion(content_hash=name, artifact_uri=f"mem://{name}", kind=kind)
            registry.add_model_version(session, "default", name, made)

    store.write_now(fill)
    return store


def _job(**fields: Any) -> job_pb2.Job:
    spec = {"base": "builtin:tiny", "dataset": "pairs", "method": "dpo"} | fields
    return json_format.ParseDict({"finetune": spec}, job_pb2.Job())


def _resolved(store: Store, job: job_pb2.Job) -> Resolved:
    return asyncio.run(resolve(store, "default", job, False))


def _refused(store: Store, job: job_pb2.Job) -> tuple[str, str]:
    with pytest.raises(LuthierError) as caught:
        _resolved(store, job)
    (violation,) = caught.value.violations
    return violation.field, violation.description


def test_rows_that_a_method_cannot_learn_from_are_refused_at_submission(filled: Store) -> None:
    _resolved(filled, _job())
    assert _refused(filled, _job(dataset="answers"))[0] == "job.finetune.dataset"
    field, why = _refused(filled, _job(method="full"))
    assert field == "job.finetune.dataset"
    assert "method full learns from chats" in why
    assert "needs rows of both labels" in _refused(filled, _job(method="kto", dataset="answers"))[1]


def _grpo(model: str) -> job_pb2.Job:
    rewards = [{"name": "style", "reward_model": {"model": model}}]
    return _job(method="grpo", dataset="answers", reinforcement={"rewards": rewards})


def test_a_reward_model_is_read_by_the_version_that_its_name_stood_for(filled: Store) -> None:
    job = _grpo("judge")
    resolved = _resolved(filled, job)
    assert resolved.inputs["reward:style"].uri == "mem://judge"
    assert resolved.inputs["reward:style"].model_kind == "reward"
    assert job.finetune.reinforcement.rewards[0].reward_model.model == "judge@1"


@pytest.mark.parametrize(("model", "says"), [("writer@1", "is no reward model"), ("nobody@1", "nobody")])
def test_what_is_no_reward_model_is_refused(filled: Store, model: str, says: str) -> None:
    field, why = _refused(filled, _grpo(model))
    assert field == "job.finetune.reinforcement.rewards[0].reward_model.model"
    assert says in why


def test_a_reward_model_is_neither_trained_on_nor_evaluated(filled: Store) -> None:
    assert _refused(filled, _job(base="judge@1"))[0] == "job.finetune.base"
    evaluate = json_format.ParseDict({"evaluate": {"model": "judge@1", "dataset": "answers"}}, job_pb2.Job())
    assert _refused(filled, evaluate)[0] == "job.evaluate.model"


def test_a_reward_model_is_not_deployed(filled: Store) -> None:
    judge = filled.read_now(lambda session: registered(session.get_one(tables.ModelVersion, ("default", "judge", 1))))
    with pytest.raises(InvalidArgument, match="gives scores and no text, and cannot be deployed"):
        no_reward_model(judge, "endpoint.routes[0].model_version", "deployed")


def test_weights_in_four_bits_without_gpus_are_refused_at_submission() -> None:
    fill_in(_job(method="qlora", dataset="answers"), cluster_has_gpus=True)
    with pytest.raises(InvalidArgument, match="4-bit weights take GPUs") as caught:
        fill_in(_job(method="qlora", dataset="answers"), cluster_has_gpus=False)
    assert caught.value.violations[0].field == "job.finetune.method"


def test_a_sweep_cannot_judge_preferences() -> None:
    space = {"hyperparameters.learning_rate": {"uniform": {"min": 1e-5, "max": 1e-3}}}
    finetune = {"base": "builtin:tiny", "dataset": "pairs", "method": "dpo"}
    job = json_format.ParseDict({"sweep": {"finetune": finetune, "space": space, "trials": 2}}, job_pb2.Job())
    with pytest.raises(InvalidArgument, match="a sweep cannot judge what dpo trains"):
        validate(job)


def test_an_adapter_for_a_method_that_trains_none_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="method 'reward' trains no adapter"):
        validate(_job(method="reward", lora={}))
