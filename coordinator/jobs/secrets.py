"""What jobs may do with secrets: refer to them by name, and have them in the environment of their processes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from sqlmodel import Session

from common.errors import LuthierError, NotFound, Violation
from common.names import ID, ID_RULE
from coordinator import secret_store
from coordinator.jobs.ending import Ended, end_run
from coordinator.jobs.states import EndReason, State
from coordinator.store.database import Store
from coordinator.store.tables import Job
from coordinator.vault import Vault
from luthier.v1 import job_pb2

MOST = 32
"""Secrets of one job."""

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
OURS = ("LUTHIER_", "RAY_", "LD_", "DYLD_", "PYTHON")
"""Beginnings of variables by which processes are steered, what programs they load among that."""

STEERING = frozenset(
    ("HOME", "SHELL", "USER", "ENV", "BASH_ENV", "IFS", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
)
HUB_TOKEN = "HF_TOKEN"  # noqa: S105 (a variable's name)
"""The variable that the hub's client takes its token from."""


def violations(secrets: Mapping[str, str]) -> list[Violation]:
    """What can be said of `Job.secrets` without looking anything up."""
    bad = []
    if len(secrets) > MOST:
        bad.append(Violation("job.secrets", f"{len(secrets)} secrets; {MOST} are the most"))
    for variable, name in secrets.items():
        field = f"job.secrets.{variable[:128]}"
        upper = variable.upper()
        if not VARIABLE.fullmatch(variable):
            bad.append(
                Violation(field, "is no environment variable: at most 128 letters, digits and underscores, no digit first")
            )
        elif upper.startswith(OURS) or upper.endswith("PATH") or upper in STEERING:
            bad.append(Violation(field, "steers the processes themselves and cannot be set; choose another variable"))
        if not ID.fullmatch(name):
            bad.append(Violation(field, f"{name[:80]!r} is not the name of a secret; use {ID_RULE}"))
    return bad


def missing(session: Session, project: str, secrets: Mapping[str, str]) -> NotFound | None:
    """The error where a job refers to secrets that its project does not have."""
    gone = secret_store.absent(session, project, secrets.values())
    bad = [
        Violation(f"job.secrets.{variable}", f"there is no secret {name!r}; `luthier secret set {name}` makes it")
        for variable, name in sorted(secrets.items())
        if name in gone
    ]
    said = "; ".join(f"{violation.field}: {violation.description}" for violation in bad)
    return NotFound(said, "SECRET_NOT_FOUND", bad) if bad else None


def check(session: Session, project: str, secrets: Mapping[str, str]) -> None:
    """Raise NotFound where a job refers to secrets that its project does not have."""
    error = missing(session, project, secrets)
    if error is not None:
        raise error


def hand_over(session: Session, vault: Vault, job: Job) -> dict[str, str] | LuthierError:
    """The values for a run that has just been claimed, by variable.

    Where there is one that cannot be had, the run ends as FAILED in the caller's transaction, and the reason is returned.
    """
    try:
        return secret_store.values(session, vault, job.project_id, job.secrets)
    except LuthierError as error:
        document = {"code": error.reason, "message": error.message, "source": "coordinator"}
        end_run(session, job.uid, job.run, Ended(State.FAILED, EndReason.ERROR, error.message, document))
        return error


async def hub_token(store: Store, vault: Vault, project: str, job: job_pb2.Job) -> str:
    """The token that a job's own processes will ask a hub with. Raises NotFound where a secret of the job is missing."""
    if not job.secrets:
        return ""
    await store.read(lambda session: check(session, project, job.secrets))
    wanted = {name: job.secrets[name] for name in (HUB_TOKEN,) if name in job.secrets}
    found = await store.read(lambda session: secret_store.values(session, vault, project, wanted))
    return found.get(HUB_TOKEN, "")
