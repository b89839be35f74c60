"""ScheduleService."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from sqlmodel import Session, col, select

from common.errors import Aborted, AlreadyExists, InvalidArgument, NotFound, Violation
from common.names import check_id
from coordinator import messages
from coordinator.jobs.reconcile import Reconciler
from coordinator.notify import Notifier
from coordinator.schedules import fire
from coordinator.schedules.runner import TOPIC
from coordinator.schedules.times import following, violations
from coordinator.services import paging
from coordinator.services.principal import Context, Principal, principal
from coordinator.store.database import Store
from coordinator.store.tables import Schedule, now
from coordinator.vault import Vault
from luthier.v1 import schedule_pb2, schedule_pb2_grpc

CHANGEABLE = ("cron", "time_zone", "job", "overlap", "catch_up", "paused")
"""Fields that UpdateSchedule takes."""

MOST_CATCH_UP = timedelta(days=7)


class ScheduleService(schedule_pb2_grpc.ScheduleServiceServicer):
    """Translates calls about schedules."""

    def __init__(self, store: Store, notifier: Notifier, reconciler: Reconciler, vault: Vault) -> None:
        self._store = store
        self._notifier = notifier
        self._reconciler = reconciler
        self._vault = vault

    async def CreateSchedule(
        self, request: schedule_pb2.CreateScheduleRequest, context: Context
    ) -> schedule_pb2.CreateScheduleResponse:
        """See schedule.proto."""
        who = principal()
        who.own(request.parent, field="parent")
        check_id(request.schedule_id, "schedule_id")
        values = columns(request.schedule)
        made = Schedule(
            project_id=who.project,
            id=request.schedule_id,
            uid=secrets.token_hex(8),
            creator=who.creator,
            create_time=now(),
            update_time=now(),
            **values,
        )
        await self._draft(made, "check")

        def work(session: Session) -> Schedule:
            row = session.get(Schedule, (who.project, request.schedule_id))
            if row is not None:
                differing = [name for name in values if getattr(row, name) != values[name]]
                if differing:
                    why = f"there is a schedule {row.id!r} already; it differs in {', '.join(differing)}"
                    raise AlreadyExists(why, "SCHEDULE_EXISTS")
                return row
            _plan(made)
            session.add(made)
            return made

        row = await self._store.write(work)
        self._notifier.notify(TOPIC)
        return schedule_pb2.CreateScheduleResponse(schedule=message(row))

    async def GetSchedule(self, request: schedule_pb2.GetScheduleRequest, context: Context) -> schedule_pb2.GetScheduleResponse:
        """See schedule.proto."""
        who = principal()
        row = await self._store.read(lambda session: find(session, who, request.name))
        return schedule_pb2.GetScheduleResponse(schedule=message(row))

    async def ListSchedules(
        self, request: schedule_pb2.ListSchedulesRequest, context: Context
    ) -> schedule_pb2.ListSchedulesResponse:
        """See schedule.proto."""
        who = principal()
        who.own(request.parent, field="parent")
        size = paging.page_size(request.page_size)
        after = paging.decode(request.page_token, 1)

        def work(session: Session) -> Sequence[Schedule]:
            query = select(Schedule).where(Schedule.project_id == who.project)
            if after is not None:
                query = query.where(col(Schedule.id) > after[0])
            return session.exec(query.order_by(col(Schedule.id)).limit(size + 1)).all()

        rows = await self._store.read(work)
        response = schedule_pb2.ListSchedulesResponse(schedules=[message(row) for row in rows[:size]])
        if len(rows) > size:
            response.next_page_token = paging.encode(rows[size - 1].id)
        return response

    async def UpdateSchedule(
        self, request: schedule_pb2.UpdateScheduleRequest, context: Context
    ) -> schedule_pb2.UpdateScheduleResponse:
        """See schedule.proto."""
        who = principal()
        who.own(request.schedule.name, "schedules", field="schedule.name")
        wanted = list(request.update_mask.paths)
        bad = [
            Violation("update_mask", f"{path!r} cannot be changed; {', '.join(CHANGEABLE)} can")
            for path in wanted
            if path not in CHANGEABLE
        ]
        if not wanted:
            bad.append(Violation("update_mask", f"missing: name the fields to change, of {', '.join(CHANGEABLE)}"))
        if bad:
            raise InvalidArgument.of(bad)
        before = await self._store.read(lambda session: find(session, who, request.schedule.name, "schedule.name"))
        changed = message(before)
        for path in wanted:
            changed.ClearField(path)  # type: ignore[arg-type]
            if path in ("job", "catch_up"):
                if request.schedule.HasField(path):  # type: ignore[arg-type]
                    getattr(changed, path).CopyFrom(getattr(request.schedule, path))
            else:
                setattr(changed, path, getattr(request.schedule, path))
        values = columns(changed)
        await self._draft(before.model_copy(update=values), "check")

        def work(session: Session) -> Schedule:
            row = find(session, who, request.schedule.name, "schedule.name")
            if row.version != before.version or (request.etag and request.etag != f'"{row.version}"'):
                raise Aborted("the schedule was changed since it was read; read it again", "ETAG_MISMATCH")
            for name, value in values.items():
                setattr(row, name, value)
            row.version, row.update_time = row.version + 1, now()
            _plan(row)
            session.add(row)
            return row

        row = await self._store.write(work)
        self._notifier.notify(TOPIC)
        return schedule_pb2.UpdateScheduleResponse(schedule=message(row))

    async def DeleteSchedule(
        self, request: schedule_pb2.DeleteScheduleRequest, context: Context
    ) -> schedule_pb2.DeleteScheduleResponse:
        """See schedule.proto."""
        who = principal()
        await self._store.write(lambda session: session.delete(find(session, who, request.name)))
        return schedule_pb2.DeleteScheduleResponse()

    async def RunSchedule(self, request: schedule_pb2.RunScheduleRequest, context: Context) -> schedule_pb2.RunScheduleResponse:
        """See schedule.proto."""
        who = principal()
        if not 1 <= len(request.request_id) <= 64:
            raise InvalidArgument.of([Violation("request_id", "missing, or longer than 64 characters")])
        schedule = await self._store.read(lambda session: find(session, who, request.name))
        made = await self._draft(schedule, f"run/{request.request_id}")
        job = await self._store.write(lambda session: fire.run(session, schedule, made, now()))
        self._notifier.notify("scheduler")
        return schedule_pb2.RunScheduleResponse(job=messages.job(job))

    async def _draft(self, schedule: Schedule, key: str) -> fire.Draft:
        capacity = await self._reconciler.capacity()
        try:
            gpus = capacity is not None and capacity.total.gpus > 0
            return await fire.draft(self._store, self._vault, schedule, key, gpus)
        except InvalidArgument as error:
            error.violations = tuple(Violation(f"schedule.{each.field}", each.description) for each in error.violations)
            raise


def columns(schedule: schedule_pb2.Schedule) -> dict[str, Any]:
    """What of a schedule somebody chooses, as columns. Raises InvalidArgument naming every bad field."""
    zone = schedule.time_zone or "UTC"
    cron = " ".join(schedule.cron.split())
    bad = violations(cron, zone, "schedule")
    overlap = schedule.overlap or schedule_pb2.OVERLAP_SKIP
    if overlap not in schedule_pb2.Overlap.values():
        bad.append(Violation("schedule.overlap", f"{overlap} is not a value of the enum"))
    seconds = schedule.catch_up.ToMilliseconds() / 1000 if schedule.HasField("catch_up") else fire.CATCH_UP.total_seconds()
    if not 0 <= seconds <= MOST_CATCH_UP.total_seconds():
        bad.append(Violation("schedule.catch_up", f"{seconds:g} s is not between 0 s and {MOST_CATCH_UP.days} days"))
    if not schedule.job.WhichOneof("spec"):
        bad.append(Violation("schedule.job", "missing: say what to do, as in a job file"))
    if schedule.job.after:
        bad.append(Violation("schedule.job.after", "a scheduled job follows no other: leave it out"))
    if bad:
        raise InvalidArgument.of(bad)
    job = type(schedule.job)()
    job.CopyFrom(schedule.job)
    for name in messages.OUTPUT_ONLY:
        job.ClearField(name)
    return {
        "cron": cron,
        "time_zone": zone,
        "job": messages.document(job),
        "overlap": overlap,
        "catch_up_seconds": seconds,
        "paused": schedule.paused,
    }


def find(session: Session, who: Principal, name: str, field: str = "name") -> Schedule:
    """The schedule of that name in the caller's project; NotFound otherwise."""
    (schedule_id,) = who.own(name, "schedules", field=field)
    row = session.get(Schedule, (who.project, schedule_id))
    if row is None:
        why = f"there is no schedule {schedule_id!r}; `luthier schedule list` shows those there are"
        raise NotFound(why, "SCHEDULE_NOT_FOUND")
    return row


def message(row: Schedule) -> schedule_pb2.Schedule:
    """A schedule's row as the contract's message."""
    found = schedule_pb2.Schedule(
        name=f"projects/{row.project_id}/schedules/{row.id}",
        cron=row.cron,
        time_zone=row.time_zone,
        overlap=schedule_pb2.Overlap.ValueType(row.overlap),
        paused=row.paused,
        next_time=messages.stamp(row.next_time),
        firings=[messages.parse(each, schedule_pb2.Firing()) for each in row.firings],
        creator=row.creator,
        create_time=messages.stamp(row.create_time),
        update_time=messages.stamp(row.update_time),
        etag=f'"{row.version}"',
    )
    messages.parse(row.job, found.job)
    found.catch_up.FromMilliseconds(int(row.catch_up_seconds * 1000))
    return found


def _plan(row: Schedule) -> None:
    """Set when the next job is created."""
    row.next_time = None if row.paused else following(row.cron, row.time_zone, now())
