"""The instants at which a coordinator may be killed that matter, by name; and the hooks that stop a process there.

Whatever lies between two of these instants is memory of the process alone: the world only changes with a commit, a call to Ray,
or an answer. The hooks are put around SQLAlchemy, `RayCluster` and gRPC from outside; production code knows nothing of them.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import grpc
from sqlalchemy import Connection, Engine, event, text
from sqlalchemy.engine.default import DefaultDialect

from coordinator.cluster.ray_cluster import RayCluster
from coordinator.jobs.states import MOVES
from luthier.v1 import job_pb2

MOVES_OF_A_JOB = tuple(f"{source}>{to}" for source in MOVES for to in sorted(MOVES[source]))
"""Every transition of the table, also those that nobody has thought of a test for yet."""

OTHER_EVENTS = ("CREATED", "PHASE", "CHECKPOINT", "CANCEL_REQUESTED", "WAITING", "WISH", "UPDATED")
"""Events that change no state."""

COMMITS = (*MOVES_OF_A_JOB, *OTHER_EVENTS, "report")
"""Kinds of commit: by the events that it makes known, or a report of an agent that makes none."""

ANY_COMMIT = "commit"
"""Also the commits that are about no job, such as those that make the schema."""

RAY_CALLS = ("submit", "submissions", "stop", "capacity", "log_tail", "serve_details", "request_resources")
"""Calls to Ray that jobs lead to."""

RAY_CALLS_FOR_ENDPOINTS = ("deploy",)
"""Calls that need an endpoint: Serve is told the whole of what it should run, so that saying it again changes nothing."""

ANSWERS = (
    *("CreateJob", "UpdateJob", "CancelJob", "PauseJob", "ResumeJob", "DeleteJob", "ClaimRun", "Report"),
    *("DeleteDatasetVersion", "DeleteModelVersion"),
)
"""Calls that change something about jobs and what they read: their work is done, and the caller has not heard of it."""

POINTS_FOR_ENDPOINTS = tuple(f"ray.{call}:{side}" for call in RAY_CALLS_FOR_ENDPOINTS for side in ("before", "after"))

POINTS = (
    *(f"commit.{kind}:{side}" for kind in COMMITS for side in ("before", "after")),
    *(f"ray.{call}:{side}" for call in RAY_CALLS for side in ("before", "after")),
    *(f"answer.{call}:before" for call in ANSWERS),
)

_KIND = "crash_points.kinds"
_EVENTS = "crash_points.events"


class Stopper:
    """Stops this whole process the first time that it comes by an armed point, and tells the other end of a pipe."""

    def __init__(self) -> None:
        self._armed: dict[str, int] = {}
        self._pipe = -1
        self._lock = threading.Lock()

    def arm(self, points: dict[str, int], pipe: int) -> None:
        """Stop at any of `points`, which maps names to how often each may be passed before."""
        self._armed, self._pipe = dict(points), pipe

    def reach(self, names: Iterable[str]) -> None:
        """Come by an instant that has these names."""
        if not self._armed:
            return
        with self._lock:
            for name in names:
                left = self._armed.get(name)
                if left == 0:
                    self._stop(name)
                elif left is not None:
                    self._armed[name] = left - 1

    def _stop(self, name: str) -> None:
        os.write(self._pipe, json.dumps({"pid": os.getpid(), "point": name}).encode() + b"\n")
        # All threads stand still, as they do when SIGKILL arrives: nothing more happens until it does.
        os.kill(os.getpid(), signal.SIGSTOP)
        while True:
            time.sleep(60)


def install(stopper: Stopper) -> None:
    """Put the hooks around everything that has a name here."""
    _hook_commits(stopper)
    for call in (*RAY_CALLS, *RAY_CALLS_FOR_ENDPOINTS):
        setattr(RayCluster, call, _around(stopper, f"ray.{call}", getattr(RayCluster, call)))
    make_server = grpc.aio.server

    def server(*arguments: Any, interceptors: Any = (), **options: Any) -> grpc.aio.Server:
        return make_server(*arguments, interceptors=[_Answers(stopper), *interceptors], **options)

    grpc.aio.server = server


def _around(stopper: Stopper, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def hooked(*arguments: Any, **options: Any) -> Any:
        stopper.reach([f"{name}:before"])
        result = call(*arguments, **options)
        stopper.reach([f"{name}:after"])
        return result

    return hooked


class _Answers(grpc.aio.ServerInterceptor):
    """Sits outside of all others, so that an answer passes it last."""

    def __init__(self, stopper: Stopper) -> None:
        self._stopper = stopper

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(details)
        call = details.method.rpartition("/")[2]
        if handler is None or call not in ANSWERS:
            return handler
        inner = handler.unary_unary

        async def hooked(request: Any, context: Any) -> Any:
            answer = await inner(request, context)
            self._stopper.reach([f"answer.{call}:before"])
            return answer

        return grpc.unary_unary_rpc_method_handler(hooked, handler.request_deserializer, handler.response_serializer)


def _hook_commits(stopper: Stopper) -> None:
    """Name each commit by what it makes known, below everything that the store may do about sessions and batches."""
    commit = DefaultDialect.do_commit

    def do_commit(dialect: DefaultDialect, connection: Any) -> None:
        names = [ANY_COMMIT, *(f"commit.{kind}" for kind in connection.info.pop(_KIND, ()))]
        stopper.reach(f"{name}:before" for name in names)
        commit(dialect, connection)
        stopper.reach(f"{name}:after" for name in names)

    DefaultDialect.do_commit = do_commit  # type: ignore[method-assign]

    @event.listens_for(Engine, "begin")
    def forget(connection: Connection) -> None:
        connection.info.pop(_EVENTS, None)

    @event.listens_for(Engine, "before_cursor_execute")
    def look(connection: Connection, _cursor: Any, _statement: str, _parameters: Any, context: Any, _many: bool) -> None:
        table = getattr(getattr(getattr(context, "compiled", None), "statement", None), "table", None)
        name = getattr(table, "name", "")
        if name == "report_cursor":
            connection.info.setdefault(_EVENTS, set())
        elif name == "job_event":
            found = {(row["job_uid"], row["sequence"]) for row in context.compiled_parameters if "sequence" in row}
            connection.info.setdefault(_EVENTS, set()).update(found)

    @event.listens_for(Engine, "commit")
    def name_it(connection: Connection) -> None:
        events = connection.info.pop(_EVENTS, None)
        if events is not None:
            connection.info[_KIND] = sorted({_kind(connection, *each) for each in events} - {""}) or ["report"]


_EVENT = text("select type, state from job_event where job_uid = :uid and sequence = :sequence")


def _kind(connection: Connection, uid: str, sequence: int) -> str:
    """What an event that is about to be committed tells; nothing where a savepoint took it back."""
    told = connection.execute(_EVENT, {"uid": uid, "sequence": sequence}).first()
    if told is None:
        return ""
    if told.type != job_pb2.JOB_EVENT_TYPE_STATE_CHANGED:
        return job_pb2.JobEventType.Name(told.type).removeprefix("JOB_EVENT_TYPE_")
    before = connection.execute(_EVENT, {"uid": uid, "sequence": sequence - 1}).one()
    return f"{before.state}>{told.state}"
