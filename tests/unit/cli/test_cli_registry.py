"""Data sets, models, endpoints and keys by the command line."""

import json
from pathlib import Path

import pytest

from luthier.v1.endpoint_pb2 import ENDPOINT_STATE_READY, Endpoint
from luthier.v1.job_pb2 import JOB_STATE_FAILED, JOB_STATE_SUCCEEDED, Job
from luthier.v1.model_pb2 import LineageNode, ModelVersion
from tests.support.fake_services import FakeCoordinator


def test_dataset_import_sends_the_mapping_and_prints_the_version(luthier, fake: FakeCoordinator, tmp_path: Path) -> None:
    file = tmp_path / "Tickets.CSV"
    file.write_text("Body,Queue\nhelp,a\nmore,b\n")
    ran = luthier(
        *("dataset", "import", file, "--name", "tickets", "--map", "text=Body,label=Queue"),
        *("--test-fraction", "0.25", "--seed", "0", "--request-id", "r", "-o", "json"),
    )
    assert ran.status == 0
    assert (ran.json["name"], ran.json["row_count"]) == ("projects/default/datasets/tickets/versions/1", "3")
    header = fake.called("UploadDataset")[0].request
    assert dict(header.columns) == {"text": "Body", "label": "Queue"}
    assert (header.filename, header.test_fraction, header.HasField("split_seed"), header.request_id) == (
        "Tickets.CSV",
        0.25,
        True,
        "r",
    )
    assert "tickets@2" in luthier("dataset", "import", file, "--name", "tickets").stdout
    assert "text from Body" in luthier("dataset", "show", "tickets@1").stdout
    assert luthier("dataset", "list").stdout.split()[-2:] == ["tickets", "tickets@2"]
    assert len(luthier("dataset", "list", "tickets", "-o", "json").json["dataset_versions"]) == 2


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["none.csv", "--name", "d"], 2, "no file none.csv"),
        (["empty.csv", "--name", "d"], 2, "empty.csv is empty"),
        (["full.csv", "--name", "d", "--map", "text"], 2, "--map: 'text' is not of the form name=value"),
        (["full.csv", "--name", "d", "--map", "text=a,text=b"], 2, "'text' is given twice"),
        (["full.csv"], 2, "--name"),
    ],
)
def test_a_bad_import_is_named(luthier, tmp_path: Path, monkeypatch, arguments: list[str], status: int, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.csv").touch()
    Path("full.csv").write_text("a\n1\n")
    ran = luthier("dataset", "import", *arguments)
    assert (ran.status, said in ran.stderr, ran.stderr.count("\n")) == (status, True, 1), ran.stderr


def test_a_model_folder_is_uploaded_and_other_sources_are_fetched_by_a_job(
    luthier, fake: FakeCoordinator, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert luthier("model", "import", folder, "--name", "own", "-o", "json").json["name"].endswith("/own/versions/1")

    def fetch(coordinator: FakeCoordinator, job: Job) -> None:
        assert (job.import_model.source, job.import_model.output_model) == ("builtin:tiny", "tiny")
        coordinator.models["tiny"].append(ModelVersion(name="projects/default/models/tiny/versions/1", base="builtin:tiny"))
        job.result.model_version = "tiny@1"
        coordinator.emit(job, JOB_STATE_SUCCEEDED)

    fake.on_create = fetch
    ran = luthier("model", "import", "builtin:tiny", "-o", "json")
    assert (ran.status, ran.json["base"]) == (0, "builtin:tiny")

    def fail(coordinator: FakeCoordinator, job: Job) -> None:
        job.error.message = "the hub knows no org/none"
        coordinator.emit(job, JOB_STATE_FAILED)

    fake.on_create = fail
    ran = luthier("model", "import", "org/none", "--name", "x")
    assert ran.status == 1
    assert "error: org/none was not imported: the hub knows no org/none" in ran.stderr
    assert luthier("model", "import", "./none", "--name", "x").status == 2


def test_models_are_shown_promoted_and_traced(luthier, fake: FakeCoordinator) -> None:
    version = ModelVersion(
        name="projects/default/models/tickets/versions/1", method="full", base="builtin:tiny", metrics={"accuracy": 0.875}
    )
    fake.models["tickets"].append(version)
    fake.lineage[version.name] = [
        LineageNode(name=version.name, kind="model", parents=["projects/default/jobs/j-1"]),
        LineageNode(
            name="projects/default/jobs/j-1", kind="job", parents=["projects/default/datasets/tickets/versions/1", "builtin:tiny"]
        ),
        LineageNode(name="projects/default/datasets/tickets/versions/1", kind="dataset", content_hash="abcdef0123456789"),
        LineageNode(name="builtin:tiny", kind="base"),
    ]
    assert luthier("model", "promote", "tickets@1", "--as", "champion", "-o", "json").json["aliases"] == ["champion"]
    shown = luthier("model", "show", "tickets@champion").stdout
    assert "0.875" in shown
    tree = luthier("model", "lineage", "tickets@1").stdout
    assert [line.strip("│├└─ ") for line in tree.splitlines()] == [
        "model tickets@1",
        "job j-1",
        "dataset tickets@1  abcdef012345",
        "base builtin:tiny",
    ]
    assert len(luthier("model", "lineage", "tickets", "-o", "json").json["nodes"]) == 4
    assert "accuracy 0.875" in luthier("model", "list", "tickets").stdout
    assert luthier("model", "show", "tickets@9").status == 3


def test_deploy_sends_the_desired_state_and_waits(luthier, fake: FakeCoordinator) -> None:
    ran = luthier(
        *(
            "endpoint",
            "deploy",
            "desk",
            "--model",
            "tickets@1=9",
            "--model",
            "tickets@2=1",
            "--min-replicas",
            "1",
            "--max-replicas",
            "3",
        ),
        *("--cpus", "0.5", "--wait", "-o", "json"),
    )
    assert (ran.status, ran.json["state"]) == (0, "ENDPOINT_STATE_READY")
    request = fake.called("DeployEndpoint")[0].request
    assert (request.parent, request.endpoint_id) == ("projects/default", "desk")
    assert [(route.model_version, route.weight) for route in request.endpoint.routes] == [("tickets@1", 9), ("tickets@2", 1)]
    assert (request.endpoint.autoscaling.min_replicas, request.endpoint.autoscaling.max_replicas) == (1, 3)
    assert (request.endpoint.resources.cpus, request.endpoint.resources.HasField("gpus")) == (0.5, False)
    assert "desk" in luthier("endpoint", "list").stdout
    assert "tickets@1, weight 9" in luthier("endpoint", "show", "desk").stdout
    assert luthier("endpoint", "delete", "desk", "--wait").status == 0
    assert not fake.endpoints
    assert luthier("endpoint", "deploy", "desk", "--model", "tickets@1=much").status == 2


def test_a_canary_is_asked_for_and_followed_to_its_end(luthier, fake: FakeCoordinator) -> None:
    name = "projects/default/endpoints/desk"
    ran = luthier(
        *("endpoint", "deploy", "desk", "--model", "tickets@2", "--canary", "--steps", "20,100", "--min-requests", "30"),
        *("--step-seconds", "1.5", "--min-feedback", "0.5", "--max-latency-ratio", "0", "--wait", "-o", "json"),
    )
    assert (ran.status, ran.json["rollout_status"]["state"]) == (0, "ROLLOUT_STATE_PROMOTED")
    rollout = fake.called("DeployEndpoint")[0].request.endpoint.rollout
    assert (list(rollout.steps), rollout.min_requests, rollout.min_duration.ToMilliseconds()) == ([20, 100], 30, 1500)
    assert (rollout.min_feedback_score, rollout.max_latency_ratio, rollout.HasField("max_error_rate")) == (0.5, 0, False)
    assert "100% of the traffic goes to tickets@2" in ran.stderr
    for bad in (["--steps", "5,x"], ["--min-requests", "3"]):
        canary = ["--canary"] if bad[0] == "--steps" else []
        assert luthier("endpoint", "deploy", "desk", "--model", "tickets@2", *canary, *bad).status == 2
    fake.endpoints[name] = Endpoint(name=name, state=ENDPOINT_STATE_READY)
    assert luthier("endpoint", "traffic", "desk", "--model", "tickets@1=9", "--model", "tickets@2=1").status == 0
    assert [route.weight for route in fake.endpoints[name].routes] == [9, 1]
    assert list(fake.called("UpdateEndpoint")[0].request.update_mask.paths) == ["routes"]
    assert "rolled back" in luthier("endpoint", "rollback", "desk").stdout
    assert "promoted" in luthier("endpoint", "promote", "desk").stdout
    followed = luthier("endpoint", "watch", "desk")
    assert followed.stdout.count("of the traffic goes to tickets@2") == 2
    assert luthier("endpoint", "watch", "desk").status == 3


def desk(fake: FakeCoordinator, url: str) -> None:
    name = "projects/default/endpoints/desk"
    fake.endpoints[name] = Endpoint(name=name, url=url, state=ENDPOINT_STATE_READY)


def test_query_asks_over_http_with_the_key(luthier, fake: FakeCoordinator, gateway) -> None:
    desk(fake, gateway.url)
    ran = luthier("endpoint", "query", "desk", "my card was charged twice", "--system", "sort", "--max-tokens", "9")
    assert (ran.status, ran.stdout) == (0, "billing\n")
    key, body = gateway.asked[0]
    assert key == f"Bearer {fake.token}"
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("desk", 9, 0)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert luthier("endpoint", "query", "desk", "x", "--stream").stdout == "billing\n"
    assert luthier("endpoint", "query", "desk", "x", "-o", "json").json["choices"][0]["message"]["content"] == "billing"
    lines = luthier("endpoint", "query", "desk", "x", "--stream", "-o", "json").stdout.splitlines()
    assert "".join(json.loads(line)["choices"][0]["delta"]["content"] for line in lines) == "billing"


@pytest.mark.parametrize(("http", "status"), [(400, 2), (401, 4), (404, 3), (409, 1)])
def test_a_refusal_of_the_gateway_has_its_exit_status(luthier, fake: FakeCoordinator, gateway, http: int, status: int) -> None:
    desk(fake, gateway.url)
    gateway.refusal = (http, "so it is")
    ran = luthier("endpoint", "query", "desk", "x")
    assert (ran.status, ran.stderr) == (status, "error: so it is\n")


def test_no_gateway_is_5(luthier, fake: FakeCoordinator, monkeypatch) -> None:
    desk(fake, "http://127.0.0.1:9/v1")
    ran = luthier("endpoint", "query", "desk", "x")
    assert ran.status == 5
    assert "no gateway answers at http://127.0.0.1:9/v1" in ran.stderr


def test_keys_are_made_listed_and_revoked(luthier, fake: FakeCoordinator) -> None:
    ran = luthier("key", "create", "ci", "--role", "viewer", "--expires-in", "90d")
    assert ran.stdout == "lut_" + "n" * 43 + "\n"
    assert luthier("key", "create", "-o", "json").json["token"].startswith("lut_")
    listed = luthier("key", "list", "-o", "json").json["keys"]
    assert [key["role"] for key in listed] == ["ROLE_EDITOR", "ROLE_VIEWER"]
    assert listed[1]["expire_time"]
    assert "expire_time" not in listed[0]
    assert luthier("key", "revoke", "k-1", "-o", "json").json["revoke_time"]
    assert luthier("key", "revoke", "k-9").status == 3
    assert luthier("key", "create", "--role", "king").status == 2
