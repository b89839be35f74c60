"""The secrets of projects in the store: set, listed, deleted, and given to those who may have them. Encrypted by vault.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sqlalchemy import Text, cast
from sqlmodel import Session, col, func, select

from common.errors import FailedPrecondition, NotFound, ResourceExhausted
from coordinator.jobs.states import TERMINAL
from coordinator.store.tables import Job, Secret, now
from coordinator.vault import Sealed, Vault

MOST = 1000
"""Secrets of one project."""


def set_secret(session: Session, vault: Vault, project: str, name: str, sealed: Sealed) -> Secret:
    """Make a secret, or replace the value of the one that is there.

    Raises FailedPrecondition where others in the store are encrypted under a key that this coordinator does not have: of two
    coordinators with different keys, each would otherwise write what the other cannot read.
    """
    check_keys(session, vault)
    row = session.get(Secret, (project, name))
    if row is None:
        count = session.exec(select(func.count()).select_from(Secret).where(Secret.project_id == project)).one()
        if count >= MOST:
            raise ResourceExhausted(f"the project has {MOST} secrets already; delete some first", "TOO_MANY_SECRETS")
        row = Secret(project_id=project, id=name, key_id="", ciphertext="", create_time=now(), update_time=now())
    row.key_id, row.ciphertext, row.update_time = sealed.key_id, sealed.ciphertext, now()
    session.add(row)
    session.flush()
    return row


def delete_secret(session: Session, project: str, name: str) -> None:
    """Remove a secret. Raises NotFound, and FailedPrecondition naming the jobs that have not ended and refer to it."""
    row = session.get(Secret, (project, name))
    if row is None:
        raise not_found(name)
    # Compared as text, because PostgreSQL does not compare JSON: most jobs have none, and need not be read.
    referring = select(Job.job_id, Job.secrets).where(
        Job.project_id == project,
        col(Job.state).not_in([state.value for state in TERMINAL]),
        col(Job.delete_time).is_(None),
        cast(Job.secrets, Text) != "{}",
    )
    users = sorted(job_id for job_id, used in session.exec(referring).all() if name in used.values())
    if users:
        more = f" and {len(users) - 5} more" if len(users) > 5 else ""
        why = f"secret {name!r} is in use by {', '.join(users[:5])}{more}, so it cannot be deleted yet"
        raise FailedPrecondition(why, "IN_USE")
    session.delete(row)


def not_found(name: str) -> NotFound:
    """The error for a name that the project has no secret of."""
    return NotFound(f"there is no secret {name!r}; `luthier secret list` shows those there are", "SECRET_NOT_FOUND")


def absent(session: Session, project: str, names: Iterable[str]) -> set[str]:
    """Those of some names that the project has no secret of."""
    wanted = set(names)
    if not wanted:
        return wanted
    there = session.exec(select(Secret.id).where(Secret.project_id == project, col(Secret.id).in_(wanted))).all()
    return wanted - set(there)


def values(session: Session, vault: Vault, project: str, wanted: Mapping[str, str]) -> dict[str, str]:
    """Decrypted values by the names that they are wanted under. Raises NotFound for an absent secret, and what `open` raises."""
    found = {}
    for variable, name in wanted.items():
        row = session.get(Secret, (project, name))
        if row is None:
            raise not_found(name)
        found[variable] = vault.open(project, name, Sealed(row.key_id, row.ciphertext))
    return found


def check_keys(session: Session, vault: Vault) -> None:
    """Raise FailedPrecondition, naming the setting, where the store holds secrets that this coordinator cannot read."""
    foreign = session.exec(select(Secret.key_id).where(col(Secret.key_id).not_in(vault.key_ids)).limit(1)).first()
    if foreign is not None:
        raise vault.unknown_key(foreign)


def encrypt_anew(session: Session, vault: Vault) -> int:
    """Bring every secret under the vault's first key, so that older ones can go; returns how many were not.

    Raises FailedPrecondition where one is under a key that is not there at all.
    """
    check_keys(session, vault)
    rows = session.exec(select(Secret).where(Secret.key_id != vault.key_id)).all()
    for row in rows:
        sealed = Sealed(row.key_id, row.ciphertext)
        sealed = vault.seal(row.project_id, row.id, vault.open(row.project_id, row.id, sealed))
        row.key_id, row.ciphertext = sealed.key_id, sealed.ciphertext
        session.add(row)
    session.flush()
    return len(rows)
