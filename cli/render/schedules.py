"""Schedules as tables."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp
from rich.table import Table
from rich.text import Text

from cli.render.text import duration, enum_text, facts, plain_table, span, when
from luthier.client import short_name
from luthier.v1.schedule_pb2 import Firing, Overlap, Schedule


def schedules_table(schedules: Iterable[Schedule]) -> Table:
    """Schedules, one a line."""
    table = plain_table("schedule", "when", "job", "next", "last time", "what came of it")
    for each in schedules:
        last = each.firings[0] if each.firings else Firing()
        table.add_row(
            short_name(each.name),
            _when(each),
            each.job.display_name or (each.job.WhichOneof("spec") or ""),
            _next(each),
            when(last.time),
            _outcome(last),
        )
    return table


def schedule_view(schedule: Schedule) -> Table:
    """Everything about a schedule."""
    firings = plain_table("time", "what came of it")
    for each in schedule.firings:
        firings.add_row(when(each.time), _outcome(each))
    return facts(
        [
            ("schedule", short_name(schedule.name)),
            ("when", _when(schedule)),
            ("next", _next(schedule)),
            ("job", schedule.job.display_name or schedule.job.WhichOneof("spec") or ""),
            ("if the last has not ended", enum_text(Overlap.Name(schedule.overlap), "OVERLAP_")),
            ("catches up", f"up to {duration(schedule.catch_up)} late"),
            ("made by", schedule.creator),
            ("made", when(schedule.create_time)),
            ("last times", firings if schedule.firings else ""),
        ]
    )


def _when(schedule: Schedule) -> str:
    return f"{schedule.cron} {schedule.time_zone}"


def _next(schedule: Schedule) -> Text | str:
    if schedule.paused:
        return Text("paused", "magenta")
    return f"{when(schedule.next_time)}, in {_until(schedule.next_time)}"


def _until(time: Timestamp) -> str:
    return span(max(0.0, (time.ToDatetime(UTC) - datetime.now(UTC)).total_seconds()))


def _outcome(firing: Firing) -> Text:
    return Text(firing.error, "yellow") if firing.error else Text(short_name(firing.job))
