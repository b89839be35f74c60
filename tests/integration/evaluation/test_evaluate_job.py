"""A job of kind evaluate as its agent carries it out."""

from __future__ import annotations

import pytest

from agents import __main__ as agent
from agents.link import claim
from common import manifest
from luthier.agent.v1 import agent_pb2
from luthier.v1 import job_pb2
from tests.support.fake_coordinator import TOKEN, FakeCoordinator
from tests.support.micro_model import COLOURS, build_data, build_micro

pytestmark = pytest.mark.usefixtures("private_ray")


def test_scores_are_the_outcome(tmp_path):
    model = manifest.publish(build_micro(tmp_path / "micro"), (tmp_path / "model").as_uri())
    data = manifest.publish(build_data(tmp_path / "rows"), (tmp_path / "data").as_uri())
    claimed = agent_pb2.ClaimRunResponse(
        run_uri=(tmp_path / "run").as_uri(), storage_uri=tmp_path.as_uri(), report_interval=0.1, labels=COLOURS
    )
    claimed.job.evaluate.max_rows = 10
    claimed.inputs["model"].CopyFrom(
        agent_pb2.Artifact(
            name="micro@1", kind="registry", uri=(tmp_path / "model").as_uri(), content_hash=model.sha256, model_kind="full"
        )
    )
    claimed.inputs["dataset"].CopyFrom(
        agent_pb2.Artifact(name="colours@1", kind="dataset", uri=(tmp_path / "data").as_uri(), content_hash=data.sha256)
    )
    with FakeCoordinator(claimed) as coordinator:
        link, response = claim(coordinator.address, coordinator.job_uid, coordinator.run, TOKEN)
        with link:
            outcome = agent.carry_out(link, response)
            link.outcome(outcome)
        assert outcome.state == job_pb2.JOB_STATE_SUCCEEDED, outcome.error
        scores = outcome.result.after
        assert (scores.model, scores.dataset, scores.split, scores.rows) == ("micro@1", "colours@1", "test", 10)
        assert list(scores.likelihood.labels) == sorted(COLOURS)
        assert outcome.result.metrics["eval_loss"] == pytest.approx(scores.loss)
        assert {"perplexity", "accuracy", "macro_f1", "likelihood_accuracy"} <= set(outcome.result.metrics)
        assert not outcome.HasField("model")
        assert [phase.phase for phase in coordinator.of("driver", "phase")] == ["loading", "evaluating"]
        assert coordinator.outcome == outcome
