"""The configuration that Serve gets, and the status that it gives back."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

from coordinator.cluster.serve_config import (
    AppStatus,
    EndpointEntry,
    GatewaySpec,
    KeyEntry,
    ModelApp,
    RouteEntry,
    Snapshot,
    read_status,
    render,
)

APP = ModelApp("file:///s/models/a", "aa", cpus=1, min_replicas=1, max_replicas=3, target_ongoing_requests=2.5)
OTHER = ModelApp("file:///s/models/b", "bb", "file:///s/bases/c", "cc", gpus=1, chat_template_sha256="dd")
SNAPSHOT = Snapshot(
    keys=[
        KeyEntry("FF" * 32, "acme", "k1", "ROLE_QUERY", 12.5),
        KeyEntry("00" * 32, "acme", "k2", "admin", scopes=["endpoints/tickets"]),
    ],
    endpoints=[
        EndpointEntry("acme", "tickets", 7, (RouteEntry(APP.name, 9, "tickets@1"), RouteEntry(OTHER.name, 1, "tickets@2"))),
        EndpointEntry("acme", "drafts", 8),
    ],
)


def test_every_deployment_names_its_cpus() -> None:
    for app in render(GatewaySpec(), [APP, OTHER], SNAPSHOT)["applications"]:
        assert all(deployment["ray_actor_options"]["num_cpus"] > 0 for deployment in app["deployments"])


def test_the_same_wish_gives_the_same_bytes_in_any_order() -> None:
    expected = json.dumps(render(GatewaySpec(), [APP, OTHER], SNAPSHOT))
    for seed in range(5):
        shuffle = random.Random(seed)
        apps, keys, endpoints = [APP, OTHER, APP], list(SNAPSHOT.keys), list(SNAPSHOT.endpoints)
        for items in (apps, keys, endpoints):
            shuffle.shuffle(items)  # type: ignore[arg-type]
        assert json.dumps(render(GatewaySpec(), apps, Snapshot(keys, endpoints))) == expected


def test_a_name_is_stable_and_differs_with_what_replicas_cannot_change() -> None:
    assert APP.name == replace(APP, cpus=1.0).name == "m-" + APP.name[2:]
    assert len(APP.name) == 18
    changed: list[dict[str, Any]] = [
        {"artifact_sha256": "x"},
        {"cpus": 2},
        {"gpus": 1},
        {"base_uri": "y"},
        {"min_replicas": 2},
        {"max_replicas": 9},
        {"chat_template_sha256": "z"},
    ]
    assert len({APP.name, *(replace(APP, **change).name for change in changed)}) == len(changed) + 1


def test_a_model_without_a_template_on_record_keeps_its_name() -> None:
    assert APP.name == "m-b125698bd92e3098"


def test_keys_and_routes_change_nothing_but_the_gateways_user_config() -> None:
    before = render(GatewaySpec(), [APP], SNAPSHOT)
    after = render(GatewaySpec(), [APP], Snapshot())
    assert before["applications"][1:] == after["applications"][1:]
    gateways = [config["applications"][0] for config in (before, after)]
    assert gateways[0] != gateways[1]
    for gateway in gateways:
        gateway["deployments"][0].pop("user_config")
    assert gateways[0] == gateways[1]


def test_the_gateway_reads_the_snapshot_that_is_rendered() -> None:
    from serving.gateway.snapshot import Key, Route
    from serving.gateway.snapshot import Snapshot as Read

    gateway = json.loads(json.dumps(render(GatewaySpec(), [APP], SNAPSHOT)))["applications"][0]
    read = Read.of(gateway["deployments"][0]["user_config"])
    assert read.keys["ff" * 32] == Key("acme", "k1", "query", 12.5)
    assert read.keys["00" * 32] == Key("acme", "k2", "admin", None, frozenset({"endpoints/tickets"}))
    assert read.endpoints["acme", "tickets"].routes == (Route(APP.name, 9, "tickets@1"), Route(OTHER.name, 1, "tickets@2"))
    assert read.endpoints["acme", "drafts"].routes == ()
    assert read.allowed_hosts == {"localhost", "127.0.0.1", "::1"}


def test_the_applications_read_the_arguments_that_are_rendered() -> None:
    from serving.wire import GatewayArgs, ModelArgs

    gateway, *models = render(GatewaySpec(max_body_bytes=5), [APP, OTHER], SNAPSHOT)["applications"]
    assert GatewayArgs.of(gateway["args"]).max_body_bytes == 5
    args = {app["name"]: ModelArgs(**app["args"]) for app in models}
    assert args[APP.name] == ModelArgs("file:///s/models/a", "aa", device="cpu", threads=1)
    assert args[OTHER.name] == ModelArgs("file:///s/models/b", "bb", "file:///s/bases/c", "cc", "cuda", 1, "dd")


def test_status_is_read_for_each_application() -> None:
    def app(status: str, replicas: list[str], message: str = "", inner: str = "") -> dict:
        deployment = {"status": "X", "message": inner, "replicas": [{"state": state} for state in replicas]}
        return {"status": status, "message": message, "deployments": {"Model": deployment}}

    details = {
        "applications": {
            "up": app("RUNNING", ["RUNNING", "STARTING", "RUNNING"]),
            "broken": app("DEPLOY_FAILED", [], inner="no such artifact"),
            "limping": app("UNHEALTHY", ["RUNNING", "STOPPING"]),
            "leaving": app("DELETING", ["RUNNING"]),
            "new": {"status": "DEPLOYING", "message": None, "deployments": {}},
        }
    }
    status = read_status(details)
    assert status["up"] == AppStatus("RUNNING", "", 2)
    assert status["broken"] == AppStatus("DEPLOY_FAILED", "no such artifact", 0)
    assert [name for name in status if status[name].ready] == ["up", "limping"]
    assert [name for name in status if status[name].failed] == ["broken"]
    assert read_status({}) == {}
