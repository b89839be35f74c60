"""Whether a project is entitled to what is asked for at all: what it can never hold is refused, not left waiting."""

from __future__ import annotations

import math

from sqlmodel import Session

from common.errors import FailedPrecondition, NotFound, Violation
from coordinator.jobs.usage import budget_left, limit_of, standings
from coordinator.scheduling.model import Demand
from coordinator.store.tables import Project, now

UNITS = {"cpus": "CPUs", "gpus": "GPUs"}


def check_entitlement(session: Session, project_id: str, demand: Demand) -> None:
    """Refuse a job that holds at least `demand` at a time where its project may never hold so much, or has spent its budget.

    Raises FailedPrecondition with the project's fields and the figures.
    """
    check_limit(session, project_id, demand, "the job")
    project = _project(session, project_id)
    left = budget_left(project, standings(session, [project], now())[project_id].spent)
    if left is None:
        return
    bad = []
    for name, unit in UNITS.items():
        if getattr(demand, name) and not getattr(left, name):
            budget = f"{name[:-1]}_seconds"
            why = f"all {project.budget[budget] / 3600:g} {unit[:-1]}-hours are spent; an operator may raise the budget"
            bad.append(Violation(f"project.budget.{budget}", why))
    _refuse(bad, project_id, "BUDGET_SPENT")


def check_limit(session: Session, project_id: str, demand: Demand, what: str) -> None:
    """Refuse what holds at least `demand` where its project may never hold so much. Raises FailedPrecondition."""
    limit = limit_of(_project(session, project_id)) or Demand(math.inf, math.inf)
    bad = []
    for name, unit in UNITS.items():
        needs, most = getattr(demand, name), getattr(limit, name)
        if not Demand(needs).fits(Demand(most)):
            why = f"{what} needs at least {needs:g} {unit} and the project may hold {most:g} at a time; ask for less"
            bad.append(Violation(f"project.limit.{name}", f"{why}, or an operator for a higher limit"))
    _refuse(bad, project_id, "OVER_LIMIT")


def _project(session: Session, project_id: str) -> Project:
    project = session.get(Project, project_id)
    if project is None:
        raise NotFound(f"there is no project {project_id!r}", "PROJECT_NOT_FOUND")
    return project


def _refuse(bad: list[Violation], project_id: str, reason: str) -> None:
    if bad:
        said = "; ".join(f"{violation.field}: {violation.description}" for violation in bad)
        raise FailedPrecondition(f"project {project_id!r}: {said}", reason, bad)
