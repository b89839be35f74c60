"""Projects as tables: what they may hold, what they hold, and what they have spent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from google.protobuf.message import Message
from rich.table import Table
from rich.text import Text

from cli.render.text import ago, facts, number, plain_table
from luthier.client import short_name
from luthier.v1.admin_pb2 import Project, Resources

KINDS = {"cpus": "CPU", "gpus": "GPU"}
STATES = ("RUNNING", "STARTING", "PAUSING", "QUEUED", "BLOCKED", "PAUSED", "SUCCEEDED", "FAILED", "CANCELLED")
ENDED = frozenset(STATES[-3:])
ABSENT = "-"
NEARLY = 0.1
"""Part of a budget that is left when it is shown in yellow."""


def projects_table(projects: Iterable[Project]) -> Table:
    """Projects, one a line."""
    table = plain_table("project", "share")
    for kind in KINDS.values():
        for column in (f"{kind}s held", "quota", "limit"):
            table.add_column(column, justify="right")
    table.add_column("jobs")
    table.add_column("name")
    for project in projects:
        cells = [
            cell
            for field in KINDS
            for cell in (
                number(getattr(project.held, field)),
                _bound(project.quota, field),
                _bound(project.limit, field),
            )
        ]
        going_on = {state: count for state, count in project.jobs.items() if state not in ENDED}
        table.add_row(
            short_name(project.name), number(project.share), *cells, jobs_text(going_on) or ABSENT, project.display_name
        )
    return table


def usage_table(projects: Iterable[Project]) -> Table:
    """What was spent, one project a line."""
    table = plain_table("project")
    for kind in KINDS.values():
        for column in (f"{kind}-hours", "budget", "left"):
            table.add_column(column, justify="right")
    table.add_column("tokens trained", justify="right")
    for project in projects:
        cells: list[str | Text] = []
        for kind in KINDS.values():
            field = f"{kind.lower()}_seconds"
            budget = _bound(project.budget, field, hours)
            cells += [hours(getattr(project.usage, field)), budget, _left(project, field)]
        table.add_row(short_name(project.name), *cells, f"{project.usage.trained_tokens:,}")
    return table


def project_view(project: Project) -> Table:
    """Everything about a project."""
    rows: list[tuple[str, object]] = [
        ("project", short_name(project.name)),
        ("name", project.display_name),
        ("share", number(project.share)),
        ("holds", _resources(project.held)),
        ("quota", _resources(project.quota) or "none: it has what is free, by its share"),
        ("limit", _resources(project.limit) or "none: it may hold the whole cluster"),
    ]
    for kind in KINDS.values():
        field = f"{kind.lower()}_seconds"
        said = Text(f"{hours(getattr(project.usage, field))} {kind}-hours")
        if project.budget.HasField(field):  # type: ignore[arg-type]
            said.append(f" of {hours(getattr(project.budget, field))}, ").append(_left(project, field)).append(" left")
        rows.append(("spent" if kind == "CPU" else "", said))
    rows.append(("trained", f"{project.usage.trained_tokens:,} tokens"))
    return facts([*rows, ("jobs", jobs_text(project.jobs)), ("made", ago(project.create_time))])


def jobs_text(jobs: Mapping[str, int]) -> str:
    """`2 running, 1 queued`."""
    return ", ".join(f"{jobs[state]} {state.lower()}" for state in STATES if jobs.get(state))


def hours(seconds: float) -> str:
    """Seconds as hours, with about three digits."""
    value = seconds / 3600
    if value.is_integer() or value >= 1000:
        return f"{value:,.0f}"
    return "<0.01" if value < 0.005 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _bound(message: Message, field: str, say: Callable[[float], str] = number) -> str:
    return say(getattr(message, field)) if message.HasField(field) else ABSENT


def _left(project: Project, field: str) -> Text:
    if not project.budget.HasField(field):  # type: ignore[arg-type]
        return Text(ABSENT)
    budget = getattr(project.budget, field)
    left = max(budget - getattr(project.usage, field), 0.0)
    return Text(hours(left), "red" if not left else "yellow" if left < NEARLY * budget else "")


def _resources(amounts: Resources) -> str:
    parts = [
        f"{number(getattr(amounts, field))} {kind}{'' if getattr(amounts, field) == 1 else 's'}"
        for field, kind in KINDS.items()
        if amounts.HasField(field)  # type: ignore[arg-type]
    ]
    return ", ".join(parts)
