"""EndpointService."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from google.protobuf.message import Message
from sqlmodel import Session, col, select

from common.errors import FailedPrecondition, InvalidArgument, NotFound, Violation
from common.names import check_id, parse_version_ref
from coordinator import messages, registry
from coordinator.cluster.ray_cluster import Capacity
from coordinator.endpoints import progress
from coordinator.endpoints.progress import DELETING, DEPLOYING
from coordinator.endpoints.reconcile import GATEWAY, Deployer, topic
from coordinator.endpoints.rollout import Counts
from coordinator.endpoints.rollout import check as check_rollout
from coordinator.jobs.admission import check_limit
from coordinator.jobs.reconcile import Reconciler
from coordinator.jobs.resolve import no_reward_model, registered
from coordinator.notify import Notifier
from coordinator.services import paging
from coordinator.services.principal import Context, Principal, principal
from coordinator.store import tables
from coordinator.store.database import Store
from coordinator.store.tables import now
from luthier.v1 import endpoint_pb2, endpoint_pb2_grpc

MAX_REPLICAS = 1000

CHANGEABLE = ("routes", "autoscaling", "resources", "rollout")
"""Fields that UpdateEndpoint changes."""

WATCH_SECONDS = 5.0
"""A watch looks as often as this by itself, for what another coordinator changed."""


class EndpointService(endpoint_pb2_grpc.EndpointServiceServicer):
    """Translates calls about endpoints."""

    def __init__(self, store: Store, notifier: Notifier, reconciler: Reconciler, deployer: Deployer) -> None:
        self._store = store
        self._notifier = notifier
        self._reconciler = reconciler
        self._deployer = deployer

    async def DeployEndpoint(
        self, request: endpoint_pb2.DeployEndpointRequest, context: Context
    ) -> endpoint_pb2.DeployEndpointResponse:
        """See endpoint.proto."""
        who = principal()
        who.own(request.parent, field="parent")
        check_id(request.endpoint_id, "endpoint_id")
        capacity = await self._reconciler.capacity()
        desired = check(request.endpoint, capacity is not None and capacity.total.gpus > 0)

        def work(session: Session) -> tables.Endpoint:
            return self._record(session, who, request, desired, capacity)

        if request.validate_only:
            row = await self._store.read(work)
        else:
            row = await self._store.write(work)
            self._notifier.notify("endpoints", "scheduler", topic(who.project, request.endpoint_id))
        return endpoint_pb2.DeployEndpointResponse(endpoint=self._message(row))

    def _record(
        self,
        session: Session,
        who: Principal,
        request: endpoint_pb2.DeployEndpointRequest,
        sent: endpoint_pb2.Endpoint,
        capacity: Capacity | None,
    ) -> tables.Endpoint:
        desired = endpoint_pb2.Endpoint()
        desired.CopyFrom(sent)  # a write may be tried more than once
        artifacts = {}
        for number, route in enumerate(desired.routes):
            ref = parse_version_ref(route.model_version, f"endpoint.routes[{number}].model_version", "models", who.project)
            version = registry.find_model(session, who.project, ref)
            artifact = registered(version)
            no_reward_model(artifact, f"endpoint.routes[{number}].model_version", "deployed")
            route.model_version = artifact.name
            artifacts[artifact.name] = messages.document(artifact)
        if len(artifacts) < len(desired.routes):
            raise InvalidArgument.of([Violation("endpoint.routes", "two routes lead to the same model version")])
        document = {"endpoint": messages.document(desired), "artifacts": artifacts}
        needs = progress.claim(document)
        # A cluster that has no node yet says nothing about what it will have.
        if capacity is not None and capacity.nodes and not (needs + GATEWAY).fits(capacity.total):
            why = f"the least replicas and the gateway need {needs + GATEWAY}, the cluster has {capacity.total}"
            raise InvalidArgument.of([Violation("endpoint.autoscaling.min_replicas", why)], "CLUSTER_TOO_SMALL")
        check_limit(session, who.project, needs, "the endpoint")
        row = session.get(tables.Endpoint, (who.project, request.endpoint_id))
        if request.etag and (row is None or request.etag != f'"{row.version}"'):
            raise FailedPrecondition("the endpoint was changed since it was read; read it again", "ETAG_MISMATCH")
        if row is not None and row.state == DELETING:
            raise FailedPrecondition(
                f"endpoint {row.id!r} is being taken down; deploy again once it is gone", "ENDPOINT_DELETING"
            )
        moment = now()
        if row is None:
            row = tables.Endpoint(
                project_id=who.project,
                id=request.endpoint_id,
                generation=0,
                version=0,
                state=DEPLOYING,
                create_time=moment,
                update_time=moment,
            )
        if row.desired != document:
            self._change(row, document, desired.HasField("rollout"), moment)
        row.version, row.update_time = row.version + 1, moment
        needs = progress.claim(row.desired, row.serving)
        row.cpus, row.gpus = needs.cpus, needs.gpus
        session.add(row)
        return row

    def _change(self, row: tables.Endpoint, document: dict[str, Any], canary: bool, moment: datetime) -> None:
        """Want something else. What answers goes on until that is ready, or until a canary has shown itself."""
        old = {route["model_version"] for route in row.serving.get("endpoint", {}).get("routes", ())}
        both = old & {route["model_version"] for route in document["endpoint"]["routes"]}
        if canary and not old:
            why = "nothing answers yet that a canary could be held against; deploy without a rollout"
            raise FailedPrecondition(why, "NO_STABLE")
        if canary and both:
            why = f"{', '.join(sorted(both))} answers already; a rollout is of versions that do not"
            raise InvalidArgument.of([Violation("endpoint.routes", why)], "ALREADY_SERVING")
        if progress.rolling(row):
            progress.say(row, moment, "the rollout is given up: something else was deployed")
        row.desired, row.generation, row.rollout, row.error = document, row.generation + 1, {}, ""
        if canary:
            progress.begin(row, moment)
        else:
            row.state = DEPLOYING

    async def UpdateEndpoint(
        self, request: endpoint_pb2.UpdateEndpointRequest, context: Context
    ) -> endpoint_pb2.UpdateEndpointResponse:
        """See endpoint.proto."""
        who = principal()
        name = request.endpoint.name
        (endpoint_id,) = who.own(name, "endpoints", field="endpoint.name")
        paths = list(request.update_mask.paths)
        if bad := [path for path in paths if path not in CHANGEABLE]:
            why = f"{', '.join(bad)} cannot be changed; {', '.join(CHANGEABLE)} can"
            raise InvalidArgument.of([Violation("update_mask", why)])
        if bool(paths) == bool(request.rollout_action):
            why = "name what is to be changed, or give a rollout_action, but not both"
            raise InvalidArgument.of([Violation("update_mask", why)])
        if request.rollout_action:
            row = await self._store.write(lambda session: self._end_rollout(session, who, request))
            self._notifier.notify("endpoints", "scheduler", topic(who.project, endpoint_id))
            return endpoint_pb2.UpdateEndpointResponse(endpoint=self._message(row))
        row = await self._store.read(lambda session: find_endpoint(session, who, name))
        desired = messages.parse(row.desired["endpoint"], endpoint_pb2.Endpoint())
        if "rollout" not in paths:
            desired.ClearField("rollout")
        for path in paths:
            desired.ClearField(path)  # type: ignore[arg-type]
            value = endpoint_pb2.Endpoint()
            value.CopyFrom(request.endpoint)
            for field, _ in request.endpoint.ListFields():
                if field.name != path:
                    value.ClearField(field.name)  # type: ignore[arg-type]
            desired.MergeFrom(value)
        changed = endpoint_pb2.DeployEndpointRequest(
            parent=f"projects/{who.project}",
            endpoint_id=endpoint_id,
            endpoint=desired,
            # Nobody may have changed it in between.
            etag=request.etag or f'"{row.version}"',
        )
        answer = await self.DeployEndpoint(changed, context)
        return endpoint_pb2.UpdateEndpointResponse(endpoint=answer.endpoint)

    def _end_rollout(self, session: Session, who: Principal, request: endpoint_pb2.UpdateEndpointRequest) -> tables.Endpoint:
        row = find_endpoint(session, who, request.endpoint.name)
        if request.etag and request.etag != f'"{row.version}"':
            raise FailedPrecondition("the endpoint was changed since it was read; read it again", "ETAG_MISMATCH")
        if not progress.rolling(row):
            raise FailedPrecondition("no rollout of the endpoint is on its way", "NO_ROLLOUT")
        moment = now()
        if request.rollout_action == endpoint_pb2.ROLLOUT_ACTION_ROLL_BACK:
            progress.roll_back(row, moment, f"by {who.creator}")
        elif row.rollout["step"] < 0:
            raise FailedPrecondition("the new routes are not ready yet", "ROLLOUT_NOT_READY")
        else:
            progress.promote(row, moment, f"by {who.creator}")
        row.version, row.update_time = row.version + 1, moment
        session.add(row)
        return row

    async def WatchEndpoint(
        self, request: endpoint_pb2.WatchEndpointRequest, context: Context
    ) -> AsyncIterator[endpoint_pb2.WatchEndpointResponse]:
        """See endpoint.proto."""
        who = principal()
        (endpoint_id,) = who.own(request.name, "endpoints")
        sent = 0
        row: tables.Endpoint | None = await self._store.read(lambda session: find_endpoint(session, who, request.name))
        while row is not None and not self._notifier.closing.is_set():
            if row.version != sent:
                sent = row.version
                yield endpoint_pb2.WatchEndpointResponse(endpoint=self._message(row))
            await self._notifier.wait(topic(who.project, endpoint_id), WATCH_SECONDS)
            row = await self._store.read(lambda session: session.get(tables.Endpoint, (who.project, endpoint_id)))

    async def GetEndpoint(self, request: endpoint_pb2.GetEndpointRequest, context: Context) -> endpoint_pb2.GetEndpointResponse:
        """See endpoint.proto."""
        who = principal()
        row = await self._store.read(lambda session: find_endpoint(session, who, request.name))
        return endpoint_pb2.GetEndpointResponse(endpoint=self._message(row))

    async def ListEndpoints(
        self, request: endpoint_pb2.ListEndpointsRequest, context: Context
    ) -> endpoint_pb2.ListEndpointsResponse:
        """See endpoint.proto."""
        who = principal()
        who.own(request.parent, field="parent")
        size = paging.page_size(request.page_size)
        after = paging.decode(request.page_token, 1)

        def work(session: Session) -> Sequence[tables.Endpoint]:
            query = select(tables.Endpoint).where(tables.Endpoint.project_id == who.project)
            if after is not None:
                query = query.where(tables.Endpoint.id > after[0])
            return session.exec(query.order_by(col(tables.Endpoint.id)).limit(size + 1)).all()

        rows = await self._store.read(work)
        response = endpoint_pb2.ListEndpointsResponse(endpoints=[self._message(row) for row in rows[:size]])
        if len(rows) > size:
            response.next_page_token = paging.encode(rows[size - 1].id)
        return response

    async def DeleteEndpoint(
        self, request: endpoint_pb2.DeleteEndpointRequest, context: Context
    ) -> endpoint_pb2.DeleteEndpointResponse:
        """See endpoint.proto."""
        who = principal()

        def work(session: Session) -> tables.Endpoint:
            row = find_endpoint(session, who, request.name)
            if row.state != DELETING:
                row.state, row.version, row.update_time = DELETING, row.version + 1, now()
                session.add(row)
            return row

        row = await self._store.write(work)
        self._notifier.notify("endpoints")
        return endpoint_pb2.DeleteEndpointResponse(endpoint=self._message(row))

    def _message(self, row: tables.Endpoint) -> endpoint_pb2.Endpoint:
        message = messages.parse(row.desired["endpoint"], endpoint_pb2.Endpoint())
        message.name = f"projects/{row.project_id}/endpoints/{row.id}"
        message.state = endpoint_pb2.EndpointState.Value(row.state)
        message.url = self._deployer.url
        message.error, message.generation, message.etag = row.error, row.generation, f'"{row.version}"'
        message.create_time.FromDatetime(row.create_time)
        message.update_time.FromDatetime(row.update_time)
        for route in message.routes:
            route.ready_replicas = row.ready_replicas.get(route.model_version, 0)
        if row.serving:
            message.serving.extend(messages.parse(row.serving["endpoint"], endpoint_pb2.Endpoint()).routes)
        for event in row.events:
            message.events.add(message=event["message"]).time.FromDatetime(datetime.fromisoformat(event["time"]))
        if row.rollout:
            message.rollout_status.CopyFrom(_rollout_status(row.rollout))
        return message


def find_endpoint(session: Session, who: Principal, name: str) -> tables.Endpoint:
    """The endpoint of that name in the caller's project; NotFound otherwise."""
    (endpoint_id,) = who.own(name, "endpoints")
    row = session.get(tables.Endpoint, (who.project, endpoint_id))
    if row is None:
        raise NotFound(
            f"there is no endpoint {endpoint_id!r}; `luthier endpoint list` shows those there are", "ENDPOINT_NOT_FOUND"
        )
    return row


def _rollout_status(state: Mapping[str, Any]) -> endpoint_pb2.RolloutStatus:
    status = endpoint_pb2.RolloutStatus(
        state=endpoint_pb2.RolloutState.Value(state["state"]), percent=state.get("percent", 0), message=state.get("message", "")
    )
    status.start_time.FromDatetime(datetime.fromisoformat(state["begun"]))
    for side in ("canary", "stable"):
        if side in state:
            getattr(status, side).CopyFrom(Counts.of(state[side]).message())
    for route in state["routes"]:
        status.routes.append(messages.parse(route, endpoint_pb2.Route()))
    return status


def check(sent: endpoint_pb2.Endpoint, cluster_has_gpus: bool) -> endpoint_pb2.Endpoint:
    """The desired state with its defaults; InvalidArgument names every bad field."""
    desired = endpoint_pb2.Endpoint(routes=sent.routes, autoscaling=sent.autoscaling, resources=sent.resources)
    bad: list[Violation] = []
    if not desired.routes:
        bad.append(Violation("endpoint.routes", "missing: name at least one model version"))
    unweighted = all(route.weight == 0 for route in desired.routes)
    for number, route in enumerate(desired.routes):
        route.ready_replicas = 0
        route.weight = 1 if unweighted else route.weight
        if not route.model_version:
            bad.append(Violation(f"endpoint.routes[{number}].model_version", "missing: name@3 or name@alias"))
        if not 0 <= route.weight <= 1_000_000:
            bad.append(Violation(f"endpoint.routes[{number}].weight", f"{route.weight} is not between 0 and 1000000"))
    scaling = desired.autoscaling
    scaling.min_replicas = scaling.min_replicas or 1
    scaling.max_replicas = scaling.max_replicas or scaling.min_replicas
    scaling.target_ongoing_requests = scaling.target_ongoing_requests or 4.0
    if not 1 <= scaling.min_replicas <= MAX_REPLICAS:
        bad.append(Violation("endpoint.autoscaling.min_replicas", f"{scaling.min_replicas} is not between 1 and {MAX_REPLICAS}"))
    if not scaling.min_replicas <= scaling.max_replicas <= MAX_REPLICAS:
        why = f"{scaling.max_replicas} is not between min_replicas ({scaling.min_replicas}) and {MAX_REPLICAS}"
        bad.append(Violation("endpoint.autoscaling.max_replicas", why))
    if scaling.scale_to_zero and scaling.min_replicas > 1:
        bad.append(Violation("endpoint.autoscaling.scale_to_zero", f"cannot be with min_replicas {scaling.min_replicas}"))
    for name in ("upscale_seconds", "downscale_seconds"):
        if not 0 <= getattr(scaling, name) <= 86_400:
            bad.append(Violation(f"endpoint.autoscaling.{name}", f"{getattr(scaling, name)} is not between 0 and 86400"))
    if not 0 < scaling.target_ongoing_requests < math.inf:
        why = f"{scaling.target_ongoing_requests} is not a finite number above 0"
        bad.append(Violation("endpoint.autoscaling.target_ongoing_requests", why))
    _default(desired.resources, "cpus", 0.5)
    _default(desired.resources, "gpus", 1.0 if cluster_has_gpus else 0.0)
    if not 0 < desired.resources.cpus <= 1024:
        bad.append(Violation("endpoint.resources.cpus", f"{desired.resources.cpus} is not above 0 and at most 1024"))
    if not 0 <= desired.resources.gpus <= 16:
        bad.append(Violation("endpoint.resources.gpus", f"{desired.resources.gpus} is not between 0 and 16"))
    if sent.HasField("rollout"):
        desired.rollout.CopyFrom(sent.rollout)
        bad += check_rollout(desired.rollout)
    led = [route for route in desired.routes if not route.shadow and not route.headers and route.weight != 0]
    if desired.routes and not led:
        why = "all are shadows, for those who send certain headers, or without weight: nobody else would be answered"
        bad.append(Violation("endpoint.routes", why))
    if bad:
        raise InvalidArgument.of(bad)
    return desired


def _default(message: Message, field: str, value: float) -> None:
    if not message.HasField(field):
        setattr(message, field, value)
