"""From what answers to what is wanted: nobody is left without an answer, and canaries go their way."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlmodel import Session

from coordinator import messages
from coordinator.endpoints import progress
from coordinator.endpoints.reconcile import Deployer
from coordinator.endpoints.rollout import check
from coordinator.store import tables
from coordinator.store.database import Store
from coordinator.store.leader import Leadership
from luthier.v1 import endpoint_pb2
from tests.support.fake_ray import FakeRay
from tests.support.fake_serving import FakeServing, deployer_of

BASE = {"uri": "file:///s/base", "content_hash": "base"}


def artifact(version: str) -> dict[str, Any]:
    """`name@1` is a full model, `name+base@1` an adapter."""
    own = {"uri": f"file:///s/{version}", "content_hash": version, "chat_template_sha256": "t"}
    return own | ({"base": BASE} if "+base" in version else {})


def want(row: tables.Endpoint, versions: dict[str, int], rollout: endpoint_pb2.Rollout | None = None) -> None:
    desired = endpoint_pb2.Endpoint(routes=[endpoint_pb2.Route(model_version=v, weight=w) for v, w in versions.items()])
    desired.resources.cpus, desired.resources.gpus = 0.5, 0.0
    desired.autoscaling.MergeFrom(endpoint_pb2.Autoscaling(min_replicas=1, max_replicas=1, target_ongoing_requests=4))
    if rollout is not None:
        assert check(rollout) == []
        desired.rollout.CopyFrom(rollout)
    row.desired = {"endpoint": messages.document(desired), "artifacts": {v: artifact(v) for v in versions}}
    row.generation, row.version, row.rollout = row.generation + 1, row.version + 1, {}
    if rollout is not None:
        progress.begin(row, tables.now())
    else:
        row.state = progress.DEPLOYING


@pytest.fixture
def serving(ray: FakeRay) -> FakeServing:
    return FakeServing(ray)


@pytest.fixture
def deployer(store: Store, serving: FakeServing, leadership: Leadership) -> Deployer:
    return deployer_of(store, serving, leadership)


Deploy = Callable[..., None]


@pytest.fixture
def deploy(store: Store) -> Deploy:
    def make(versions: dict[str, int], rollout: endpoint_pb2.Rollout | None = None, endpoint: str = "desk") -> None:
        def work(session: Session) -> None:
            moment = tables.now()
            row = session.get(tables.Endpoint, ("default", endpoint)) or tables.Endpoint(
                project_id="default", id=endpoint, state=progress.DEPLOYING, create_time=moment, update_time=moment
            )
            want(row, versions, rollout)
            session.add(row)

        store.write_now(work)

    return make


def row_of(store: Store, endpoint: str = "desk") -> tables.Endpoint:
    return store.read_now(lambda session: session.get_one(tables.Endpoint, ("default", endpoint)))


async def settled(deployer: Deployer, serving: FakeServing, rounds: int = 4) -> None:
    for _ in range(rounds):
        await deployer.round()
        serving.settle()


def earlier(store: Store, seconds: float) -> None:
    """Let a step have begun so many seconds ago."""

    def work(session: Session) -> None:
        row = session.get_one(tables.Endpoint, ("default", "desk"))
        row.rollout = {**row.rollout, "since": (tables.now() - timedelta(seconds=seconds)).isoformat()}
        session.add(row)

    store.write_now(work)


def spec(**more: Any) -> endpoint_pb2.Rollout:
    return endpoint_pb2.Rollout(steps=[10, 50, 100], min_requests=20, **more)


async def test_it_is_ready_once_the_gateway_leads_to_it(
    deployer: Deployer, serving: FakeServing, deploy: Deploy, store: Store
) -> None:
    deploy({"a@1": 1})
    await deployer.round()
    serving.settle()
    assert serving.routes() == {}
    await deployer.round()  # the replicas are there; the gateway is told
    assert row_of(store).state == progress.DEPLOYING
    await deployer.round()  # it has not taken it in yet
    assert row_of(store).state == progress.DEPLOYING
    serving.settle()
    assert not await deployer.round()
    assert (row_of(store).state, serving.routes()) == (progress.READY, {"a@1": 1})


async def test_the_old_answers_until_the_new_is_ready_and_stays_until_it_has_answered(
    deployer: Deployer, serving: FakeServing, deploy: Deploy, store: Store
) -> None:
    deploy({"a@1": 1})
    await settled(deployer, serving)
    (old,) = serving.apps
    deploy({"a@2": 1})
    await deployer.round()
    serving.settle(models=False)
    assert (serving.routes(), len(serving.apps)) == ({"a@1": 1}, 2)
    await deployer.round()
    assert serving.routes() == {"a@1": 1}
    serving.settle()
    await deployer.round()
    serving.in_flight = {old: 1}
    serving.settle(gateway=False)
    await deployer.round()
    assert old in serving.apps  # the gateway still leads there
    serving.settle()
    assert serving.routes() == {"a@2": 1}
    await deployer.round()
    assert old in serving.apps  # it has something to answer yet
    serving.in_flight = {}
    await deployer.round()
    assert (old in serving.apps, row_of(store).state) == (False, progress.READY)
    told = [event["message"] for event in row_of(store).events]
    assert told == ["leads to a@1", "leads to a@2 instead of a@1"]


async def test_what_cannot_be_started_changes_nothing_for_those_who_ask(
    deployer: Deployer, serving: FakeServing, deploy: Deploy, store: Store
) -> None:
    deploy({"a@1": 1})
    await settled(deployer, serving)
    before = serving.apps
    deploy({"a@2": 1})
    await deployer.round()
    (new,) = serving.apps - before
    serving.broken[new] = "the weights are not whole"
    await settled(deployer, serving)
    row = row_of(store)
    assert (row.state, row.error, serving.routes()) == (progress.FAILED, "the weights are not whole", {"a@1": 1})
    deploy({"a@1": 1})
    await settled(deployer, serving)
    assert (row_of(store).state, serving.apps) == (progress.READY, before)


async def test_new_weights_start_nothing(deployer: Deployer, serving: FakeServing, deploy: Deploy) -> None:
    deploy({"a@1": 1, "a@2": 1})
    await settled(deployer, serving)
    before = serving.apps
    deploy({"a@1": 9, "a@2": 1})
    await deployer.round()
    serving.settle(models=False)
    assert (serving.routes(), serving.apps) == ({"a@1": 9, "a@2": 1}, before)


async def test_adapters_of_one_base_share_its_replicas_and_are_tried_first(
    deployer: Deployer, serving: FakeServing, deploy: Deploy, store: Store
) -> None:
    deploy({"x+base@1": 1})
    deploy({"y+base@1": 1, "x+base@1": 1}, endpoint="other")
    await settled(deployer, serving)
    assert len(serving.apps) == 1
    assert (row_of(store).cpus, row_of(store, "other").cpus) == (0.5, 0.5)
    assert row_of(store, "other").state == progress.READY
    (app,) = [each for each in serving.config["applications"] if each["name"] in serving.apps]
    assert app["args"]["artifact_uri"] == BASE["uri"]
    serving.unfit["x+base@2"] = "lora_A of layer 7 is missing"
    deploy({"x+base@2": 1})
    await settled(deployer, serving)
    row = row_of(store)
    assert (row.state, row.error) == (progress.FAILED, "lora_A of layer 7 is missing")
    assert serving.routes() == {"x+base@1": 1}


async def test_a_gateway_that_says_nothing_makes_nobody_unready(
    deployer: Deployer, serving: FakeServing, deploy: Deploy, store: Store
) -> None:
    deploy({"x+base@1": 1})
    await settled(deployer, serving)
    serving.knows = {}
    await deployer.round()
    assert row_of(store).state == progress.READY


async def test_a_good_canary_is_promoted_step_by_step(
    deployer: Deployer, serving: FakeServing, deploy: Deploy, store: Store
) -> None:
    deploy({"a@1": 1})
    await settled(deployer, serving)
    serving.serve("a@1", 10_000, 9_000)  # long ago, and no part of it
    deploy({"a@2": 1}, spec())
    await settled(deployer, serving)
    assert serving.routes() == {"a@1": 90, "a@2": 10}
    assert row_of(store).state == progress.READY
    for old, new in ((50, 50), (0, 100)):
        serving.serve("a@1", 100)
        serving.serve("a@2", 19)
        earlier(store, 600)
        await settled(deployer, serving)
        assert row_of(store).rollout["message"] == "waits for 20 answers of the canary, has 19"
        serving.serve("a@2", 1)
        await settled(deployer, serving)
        assert serving.routes() == {"a@1": old, "a@2": new}
    serving.serve("a@2", 30)
    await settled(deployer, serving)
    assert serving.routes()["a@2"] == 100  # not before its time is over
    earlier(store, 61)
    await settled(deployer, serving)
    row = row_of(store)
    assert (serving.routes(), len(serving.apps)) == ({"a@2": 1}, 1)
    assert (row.state, row.rollout["state"], row.serving) == (progress.READY, progress.PROMOTED, row.desired)
    assert row.events[-1]["message"].startswith("promoted: a@2 answers now instead of a@1: 30 answers")


async def test_a_bad_canary_goes_back_at_once(deployer: Deployer, serving: FakeServing, deploy: Deploy, store: Store) -> None:
    deploy({"a@1": 1})
    await settled(deployer, serving)
    deploy({"a@2": 1}, spec())
    await settled(deployer, serving)
    serving.serve("a@1", 90)
    serving.serve("a@2", 4, 4)
    await settled(deployer, serving)
    row = row_of(store)
    assert (row.rollout["state"], row.state) == (progress.ROLLED_BACK, progress.READY)
    assert (serving.routes(), len(serving.apps)) == ({"a@1": 1}, 1)
    assert row.desired == row.serving
    assert "4 of 4 answers failed" in row.events[-1]["message"]


async def test_a_canary_that_does_not_start_goes_back(
    deployer: Deployer, serving: FakeServing, deploy: Deploy, store: Store
) -> None:
    deploy({"a@1": 1})
    await settled(deployer, serving)
    before = serving.apps
    deploy({"a@2": 1}, spec())
    await deployer.round()
    (new,) = serving.apps - before
    serving.broken[new] = "no room"
    await settled(deployer, serving)
    row = row_of(store)
    assert (row.rollout["state"], row.state, serving.apps) == (progress.ROLLED_BACK, progress.READY, before)
    assert "no room" in row.rollout["message"]


async def test_a_rollout_goes_on_over_restarts_of_coordinator_and_gateway(
    deployer: Deployer, serving: FakeServing, deploy: Deploy, store: Store, leadership: Leadership
) -> None:
    deploy({"a@1": 1})
    await settled(deployer, serving)
    deploy({"a@2": 1}, spec())
    await settled(deployer, serving)
    earlier(store, 600)
    serving.serve("a@2", 8)
    await settled(deployer, serving, 1)
    again = deployer_of(store, serving, leadership)
    serving.serve("a@2", 4)
    await settled(again, serving, 1)
    assert row_of(store).rollout["canary"]["requests"] == 12
    serving.restart_gateway()
    serving.serve("a@2", 7)
    await settled(again, serving, 1)
    assert row_of(store).rollout["canary"]["requests"] == 19
    serving.serve("a@2", 1)
    await settled(again, serving)
    assert serving.routes() == {"a@1": 50, "a@2": 50}


async def test_aliases_are_told_where_they_stand_for_something_that_answers(
    deployer: Deployer, serving: FakeServing, deploy: Deploy, store: Store
) -> None:
    def name(session: Session) -> None:
        for alias, version in (("champion", 2), ("gone", 7)):
            session.merge(tables.ModelAlias(project_id="default", model_id="a", alias=alias, version=version))

    store.write_now(name)
    deploy({"a@1": 1, "a@2": 1})
    await settled(deployer, serving)
    (entry,) = serving.knows["endpoints"]
    assert entry["aliases"] == {"champion": ["a@2"]}


async def test_one_that_sleeps_is_ready_once_it_has_shown_that_it_starts(
    deployer: Deployer, serving: FakeServing, store: Store
) -> None:
    def deployed(session: Session) -> None:
        moment = tables.now()
        row = tables.Endpoint(project_id="default", id="desk", state="", create_time=moment, update_time=moment)
        want(row, {"a@1": 1})
        row.desired["endpoint"]["autoscaling"] |= {"scale_to_zero": True, "min_replicas": 1}
        session.add(row)

    store.write_now(deployed)
    await deployer.round()
    (app,) = serving.apps
    scaling = next(each for each in serving.config["applications"] if each["name"] == app)["deployments"][0]["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["initial_replicas"]) == (0, 1)
    await settled(deployer, serving)
    assert row_of(store).state == progress.DEPLOYING  # it has not started yet
    serving.ready[app] = 1
    await settled_awake(deployer, serving, app)
    assert (row_of(store).state, serving.routes()) == (progress.READY, {"a@1": 1})
    await settled(deployer, serving)
    row = row_of(store)
    assert (row.state, row.ready_replicas, row.cpus, serving.routes()) == (progress.READY, {"a@1": 0}, 0.0, {"a@1": 1})


async def settled_awake(deployer: Deployer, serving: FakeServing, app: str) -> None:
    for _ in range(3):
        serving.settle()
        serving.ready[app] = 1
        serving.ray.details["applications"][app] = serving._app(app)
        await deployer.round()
