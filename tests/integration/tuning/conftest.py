"""A private Ray, and sweeps of a micro model on it, driven as the agent drives them and told to a fake coordinator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from agents import __main__ as agent
from agents.link import claim
from common import manifest
from luthier.agent.v1 import agent_pb2
from tests.support.fake_coordinator import TOKEN, FakeCoordinator
from tests.support.micro_model import COLOURS, build_data, build_micro


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, agent_pb2.Artifact]:
    folder = tmp_path_factory.mktemp("inputs")
    base = manifest.publish(build_micro(folder / "micro"), (folder / "base").as_uri())
    data = manifest.publish(build_data(folder / "rows"), (folder / "data").as_uri())
    return {
        "base": agent_pb2.Artifact(
            name="micro@1", kind="registry", uri=(folder / "base").as_uri(), content_hash=base.sha256, model_kind="full"
        ),
        "dataset": agent_pb2.Artifact(name="colours@1", kind="dataset", uri=(folder / "data").as_uri(), content_hash=data.sha256),
    }


Sweep = Callable[..., tuple[agent_pb2.OutcomeReport, FakeCoordinator, Path]]


@pytest.fixture
def sweep(private_ray: None, inputs: dict[str, agent_pb2.Artifact], tmp_path: Path) -> Iterator[Sweep]:
    """Run a sweep to its end; `during` is called with the coordinator before it starts."""
    coordinator = FakeCoordinator()

    def run(spec: dict[str, Any], during: Callable[[FakeCoordinator], None] | None = None) -> Any:
        claimed = agent_pb2.ClaimRunResponse(
            run_uri=(tmp_path / "run").as_uri(), storage_uri=tmp_path.as_uri(), report_interval=0.1, labels=COLOURS
        )
        json_format.ParseDict(spec, claimed.job.sweep)
        for role, artifact in inputs.items():
            claimed.inputs[role].CopyFrom(artifact)
        coordinator.claim = claimed
        coordinator.start()
        link, response = claim(coordinator.address, coordinator.job_uid, coordinator.run, TOKEN)
        with link:
            if during is not None:
                during(coordinator)
            outcome = agent.carry_out(link, response)
        return outcome, coordinator, tmp_path / "run"

    yield run
    coordinator.stop()
