"""The whole way on real text: the standard library's docstrings, from a CSV with its own column names to an answer."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import openai
import pytest

from luthier.client import Client
from luthier.v1 import job_pb2, model_pb2
from tests.support.docstrings import write_csv
from tests.support.otlp import Collector, Told
from tests.support.stack import Stack, wait_for, wait_for_endpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROWS = 2000
TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE}-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def trained(stack: Stack, client: Client, tmp_path_factory: pytest.TempPathFactory) -> job_pb2.Job:
    """Import by the command line, fine-tune with two workers."""
    path = tmp_path_factory.mktemp("docstrings") / "docstrings.csv"
    assert write_csv(path) >= ROWS
    version = stack.json("dataset", "import", str(path), "--name", "docstrings", "--map", "text=docstring,label=group")
    assert int(version["row_count"]) >= ROWS
    shown = stack.cli(
        "train", "--base", "builtin:tiny", "--dataset", "docstrings", "--method", "full", "--workers", "2", "--zero", "2",
        "--max-steps", "70", "--batch-size", "16", "--lr", "2e-3", "--output-model", "groups",
        "--eval-before", "--generate", "--eval-rows", "120", "--output", "json", TRACEPARENT=TRACEPARENT,
    )  # fmt: skip
    job = wait_for(client, json.loads(shown.stdout)["name"], seconds=600)
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job.error
    return job


def test_it_learns_something_about_held_out_text(trained: job_pb2.Job) -> None:
    before, after = trained.result.before, trained.result.after
    assert after.loss < before.loss / 2
    majority = max(sum(row.counts) for row in after.generated.confusion) / after.rows
    assert after.generated.accuracy > majority + 0.1
    assert after.generated.accuracy == pytest.approx(
        sum(row.counts[index] for index, row in enumerate(after.generated.confusion)) / after.rows
    )


def test_deepspeed_was_really_the_engine(trained: job_pb2.Job) -> None:
    engine = trained.result.engine
    assert engine.engine_class == "deepspeed.runtime.engine.DeepSpeedEngine"
    assert "DeepSpeedZeroOptimizer" in engine.optimizer_class
    assert (engine.zero_stage, engine.world_size, engine.backend) == (2, 2, "gloo")
    # Stage 2 shares out the optimiser's state: master weights and two moments of four bytes each.
    whole = 3 * 4 * engine.trainable_parameters
    for rank in engine.ranks:
        assert whole / 2 <= rank.optimizer_bytes < whole * 0.55


def test_the_model_knows_where_it_came_from(client: Client, trained: job_pb2.Job) -> None:
    model = trained.result.model_version
    assert model == "groups@1"
    name = "projects/default/models/groups/versions/1"
    version = client.models.GetModelVersion(model_pb2.GetModelVersionRequest(name=name)).model_version
    assert version.lineage.job == trained.name
    assert version.lineage.dataset_version == "docstrings@1"
    assert version.lineage.base == "builtin:tiny"
    assert len(version.lineage.base_content_hash) == len(version.content_hash) == 64
    assert version.metrics["eval_loss"] == pytest.approx(trained.result.after.loss)
    nodes = client.models.GetLineage(model_pb2.GetLineageRequest(name=name)).nodes
    assert {node.kind for node in nodes} == {"model", "job", "dataset", "base"}


def test_progress_and_metrics_were_streamed(client: Client, trained: job_pb2.Job) -> None:
    points = client.jobs.ListJobMetrics(job_pb2.ListJobMetricsRequest(parent=trained.name)).points
    losses = [point.values["loss"] for point in points if "loss" in point.values]
    assert len(losses) >= 10
    assert sum(losses[-3:]) < sum(losses[:3])
    assert all(point.values["tokens_per_second"] > 0 for point in points if "tokens_per_second" in point.values)


def test_the_trace_of_the_command_leads_to_the_ranks(traces: Collector, trained: job_pb2.Job) -> None:
    def enough(_: object) -> bool:
        return {"luthier-coordinator", "luthier-agent", "luthier-rank"} <= {span.service for span in traces.of(TRACE)}

    traces.wait(enough)
    spans = {(span.service, span.name): span for span in traces.of(TRACE)}
    create = spans["luthier-coordinator", "luthier.v1.JobService/CreateJob"]
    launch, run = spans["luthier-coordinator", "launch"], spans["luthier-agent", "run finetune"]
    ranks = [spans["luthier-rank", f"rank-{number}"] for number in range(2)]
    assert create.parent_id == TRACEPARENT.split("-")[2]
    assert (launch.parent_id, run.parent_id) == (create.span_id, create.span_id)
    assert {rank.parent_id for rank in ranks} == {run.span_id}
    of_driver = {name for service, name in spans if service == "luthier-agent"}
    assert of_driver >= {"loading", "evaluating_before", "starting", "evaluating_after"}
    assert spans["luthier-rank", "training"].parent_id == ranks[0].span_id
    reports = [span for span in traces.of(TRACE) if span.name.endswith("/Report")]
    parents = {span.parent_id for span in reports}
    assert run.span_id in parents
    assert parents <= {run.span_id, *(rank.span_id for rank in ranks)}
    assert len(reports) < 60


def test_an_evaluation_of_its_own_says_the_same(stack: Stack, client: Client, trained: job_pb2.Job) -> None:
    shown = stack.cli("evaluate", "--model", "groups@1", "--dataset", "docstrings", "--max-rows", "120", "--output", "json")
    job = wait_for(client, json.loads(shown.stdout)["name"])
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job.error
    assert job.result.after.loss == pytest.approx(trained.result.after.loss, rel=1e-4)
    assert job.result.after.generated.accuracy == pytest.approx(trained.result.after.generated.accuracy, abs=0.01)


def test_the_endpoint_answers_everybody_with_a_key(
    stack: Stack, client: Client, trained: job_pb2.Job, traces: Collector, request: pytest.FixtureRequest
) -> None:
    # Whatever happens here, the stack that others share gets its CPUs back.
    request.addfinalizer(lambda: stack.cli("endpoint", "delete", "groups", "--wait", check=False))
    stack.cli("endpoint", "deploy", "groups", "--model", "groups@1")
    endpoint = wait_for_endpoint(client, "projects/default/endpoints/groups")
    assert endpoint.routes[0].ready_replicas == 1
    example = min(trained.result.after.examples, key=lambda example: len(example.prompt))
    question = example.prompt
    url = endpoint.url
    assert url == stack.gateway_url

    def curl(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            ["curl", "-s", "-w", "\n%{http_code}", *arguments], capture_output=True, text=True, timeout=60, check=True
        )
        body, _, code = done.stdout.rpartition("\n")
        return int(code), body

    body = json.dumps({"model": "groups", "temperature": 0, "messages": [{"role": "user", "content": question}]})
    headers = ["-H", "Content-Type: application/json", "-d", body]
    traced = ["-H", f"traceparent: {TRACEPARENT}"]
    code, text = curl(f"{url}/chat/completions", "-H", f"Authorization: Bearer {stack.token}", *traced, *headers)
    assert code == 200
    answer = json.loads(text)["choices"][0]["message"]["content"]
    # Serving says what evaluating the same weights said.
    assert answer == example.generated
    code, text = curl(f"{url}/chat/completions", "-H", "Authorization: Bearer lut_wrong", *headers)
    assert code == 401
    assert json.loads(text)["error"]["code"] == "invalid_api_key"
    code, _ = curl(f"{url}/chat/completions", *headers)
    assert code == 401

    with openai.OpenAI(base_url=url, api_key=stack.token) as api:
        assert [model.id for model in api.models.list()] == ["groups"]
        messages = [{"role": "user", "content": question}]
        whole = api.chat.completions.create(model="groups", messages=messages, temperature=0)  # type: ignore[call-overload]
        assert whole.choices[0].message.content == answer
        parts = list(api.chat.completions.create(model="groups", messages=messages, temperature=0, stream=True))  # type: ignore[call-overload]
        assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == answer
        assert parts[-1].choices[0].finish_reason == "stop"
    with openai.OpenAI(base_url=url, api_key="lut_wrong", max_retries=0) as api, pytest.raises(openai.AuthenticationError):
        api.models.list()
    queried = stack.cli("endpoint", "query", "groups", question)
    assert answer in queried.stdout

    def of_query(_: object = None) -> dict[str, Told]:
        return {span.name: span for span in traces.of(TRACE) if span.service in ("luthier-gateway", "luthier-replica")}

    traces.wait(lambda spans: len(of_query(spans)) >= 3)
    gateway, replica, engine = (of_query()[name] for name in ("POST /v1/chat/completions", "replica", "engine"))
    assert (gateway.parent_id, replica.parent_id, engine.parent_id) == (
        TRACEPARENT.split("-")[2],
        gateway.span_id,
        replica.span_id,
    )

    stack.cli("endpoint", "delete", "groups", "--wait")
    assert not stack.json("endpoint", "list").get("endpoints")
    assert Path(stack.home).exists()
