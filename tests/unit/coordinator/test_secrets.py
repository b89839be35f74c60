"""Secrets: encrypted in the store under a key that is not there, bound to their names, and given to claimed runs alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sqlmodel import Session

from common.errors import FailedPrecondition, NotFound, ResourceExhausted
from coordinator import secret_store, vault
from coordinator.jobs import create
from coordinator.jobs import secrets as job_secrets
from coordinator.jobs.reconcile import Reconciler
from coordinator.jobs.resolve import Resolved
from coordinator.jobs.resources import fill_in
from coordinator.jobs.submit import Submission, record
from coordinator.jobs.tokens import claim_token
from coordinator.notify import Notifier
from coordinator.secret_store import delete_secret, encrypt_anew, set_secret
from coordinator.services.agent import AgentService
from coordinator.store import tables
from coordinator.store.database import Store
from coordinator.vault import Vault
from luthier.agent.v1 import agent_pb2
from luthier.v1 import job_pb2, training_pb2
from tests.support.job_runs import SECRET, Agent, now_of, run_of, secret_of, set_columns

VALUE = "hf_plain-and-secret"
OLD, NEW = b"o" * 32, b"n" * 32


@pytest.fixture
def safe() -> Vault:
    return Vault([NEW], "secrets.key")


def keep(store: Store, safe: Vault, name: str = "hub", value: str = VALUE, project: str = "default") -> None:
    sealed = safe.seal(project, name, value)
    store.write_now(lambda session: set_secret(session, safe, project, name, sealed))


def plain(store: Store, safe: Vault, name: str = "hub", project: str = "default") -> str:
    return store.read_now(lambda session: secret_store.values(session, safe, project, {"X": name})["X"])


def row_of(store: Store, name: str = "hub", project: str = "default") -> tables.Secret:
    return store.read_now(lambda session: session.get_one(tables.Secret, (project, name)))


def add_project(store: Store, name: str) -> None:
    store.write_now(lambda session: session.add(tables.Project(id=name, create_time=tables.now())))


def test_a_value_is_replaced_and_nothing_of_it_is_in_the_store(store: Store, safe: Vault, tmp_path: Path) -> None:
    keep(store, safe)
    made = row_of(store)
    keep(store, safe, value="another-value")
    row = row_of(store)
    assert plain(store, safe) == "another-value"
    assert (row.create_time, row.ciphertext != made.ciphertext) == (made.create_time, True)
    assert VALUE not in repr(made)
    assert "another-value" not in repr(row)
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or (VALUE.encode() not in file.read_bytes() and b"another-value" not in file.read_bytes())


def test_a_row_that_was_copied_elsewhere_does_not_decrypt(store: Store, safe: Vault) -> None:
    add_project(store, "theirs")
    keep(store, safe)
    row = row_of(store)

    def copy(session: Session) -> None:
        for project, name in (("theirs", "hub"), ("default", "other")):
            values = row.model_dump() | {"project_id": project, "id": name}
            session.add(tables.Secret(**values))

    store.write_now(copy)
    for project, name in (("theirs", "hub"), ("default", "other")):
        with pytest.raises(FailedPrecondition, match="written for another name or project") as caught:
            plain(store, safe, name, project)
        assert caught.value.reason == "SECRET_DAMAGED"
    assert plain(store, safe) == VALUE


def test_a_changed_byte_is_noticed(store: Store, safe: Vault) -> None:
    sealed = safe.seal("default", "hub", VALUE)
    flipped = ("B" if sealed.ciphertext[30] == "A" else "A").join((sealed.ciphertext[:30], sealed.ciphertext[31:]))
    with pytest.raises(FailedPrecondition, match="damaged"):
        safe.open("default", "hub", vault.Sealed(sealed.key_id, flipped))


def test_keys_are_changed_by_putting_the_new_one_on_top(store: Store, safe: Vault) -> None:
    old = Vault([OLD], "secrets.key")
    keep(store, old)
    both = Vault([NEW, OLD], "secrets.key")
    assert plain(store, both) == VALUE
    assert store.write_now(lambda session: encrypt_anew(session, both)) == 1
    assert store.write_now(lambda session: encrypt_anew(session, both)) == 0
    assert plain(store, safe) == VALUE
    with pytest.raises(FailedPrecondition):
        plain(store, old)


def test_a_coordinator_with_another_key_says_which_setting_is_wrong(store: Store, safe: Vault) -> None:
    other = Vault([OLD], "/home/b/secrets.key")
    store.write_now(lambda session: encrypt_anew(session, other))  # nothing to read: whoever is first decides
    keep(store, safe)
    for work in (
        lambda session: encrypt_anew(session, other),
        lambda session: set_secret(session, other, "default", "mine", other.seal("default", "mine", VALUE)),
    ):
        with pytest.raises(FailedPrecondition, match=r"^secrets_key_path: /home/b/secrets\.key does not hold the key") as caught:
            store.write_now(work)
        assert caught.value.reason == "SECRETS_KEY"
    assert row_of(store).key_id == safe.key_id


def test_a_project_has_only_so_many(store: Store, safe: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret_store, "MOST", 1)
    keep(store, safe)
    keep(store, safe, value="replaced-value")
    with pytest.raises(ResourceExhausted):
        keep(store, safe, "second")


def test_the_homes_key_file_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    made = Vault.of(None, tmp_path)
    file = tmp_path / vault.KEY_FILE
    assert file.stat().st_mode & 0o777 == 0o600
    assert Vault.of(None, tmp_path).key_id == made.key_id == Vault.of(file, tmp_path / "elsewhere").key_id
    assert [path.name for path in tmp_path.iterdir()] == [vault.KEY_FILE]
    assert file.read_text().strip() not in repr(vars(made))


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        (None, 0o600, "cannot be read: No such file"),
        ("", 0o600, "holds no key"),
        ("# " + "A" * 44 + "\n", 0o600, "holds no key"),
        ("A" * 43 + "=\nshort\n", 0o600, "line 2 of"),
        ("A" * 43 + "=\n", 0o644, "everybody on this machine"),
    ],
)
def test_a_key_file_that_cannot_be_used_is_told(tmp_path: Path, content: str | None, mode: int, said: str) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
        file.chmod(mode)
    with pytest.raises(FailedPrecondition, match=said) as caught:
        Vault.of(file, tmp_path)
    assert caught.value.message.startswith("secrets_key_path: ")
    assert "A" * 43 not in caught.value.message


@pytest.mark.parametrize(
    ("variable", "name", "said"),
    [
        ("1ST", "hub", "no environment variable"),
        ("A-B", "hub", "no environment variable"),
        ("LUTHIER_CLAIM_TOKEN", "hub", "steers the processes"),
        ("ray_address", "hub", "steers the processes"),
        ("PATH", "hub", "steers the processes"),
        ("PYTHONPATH", "hub", "steers the processes"),
        ("LD_PRELOAD", "hub", "steers the processes"),
        ("TOKEN", "Not A Name", "not the name of a secret"),
    ],
)
def test_what_a_job_cannot_refer_to_is_named(variable: str, name: str, said: str) -> None:
    (bad,) = job_secrets.violations({variable: name})
    assert bad.field == f"job.secrets.{variable}"
    assert said in bad.description
    assert not job_secrets.violations({"HF_TOKEN": "hub", "_x": "a-1"})


def test_a_job_refers_to_secrets_that_are_there(store: Store, safe: Vault, new_job: Callable[..., tables.Job]) -> None:
    with pytest.raises(NotFound, match=r"job\.secrets\.TOKEN: there is no secret 'hub'"):
        new_job(secrets={"TOKEN": "hub"})
    keep(store, safe)
    assert now_of(store, new_job(secrets={"TOKEN": "hub"})).secrets == {"TOKEN": "hub"}


def test_jobs_that_are_recorded_together_are_checked_one_by_one(store: Store, safe: Vault) -> None:
    keep(store, safe)

    def submission(number: int, **secrets: str) -> Submission:
        job = job_pb2.Job(finetune=training_pb2.FinetuneSpec(base="builtin:tiny", method="full", workers=1), secrets=secrets)
        fill_in(job, cluster_has_gpus=False)
        call = job_pb2.CreateJobRequest(job=job, request_id=str(number))
        return Submission.of(create.request_of("default", "x", call), job, Resolved())

    together = [submission(0, A="hub"), submission(1, A="none"), submission(2)]
    first, second, third = store.write_now(lambda session: record(session, together))
    assert (first.secrets, third.secrets) == ({"A": "hub"}, {})
    assert isinstance(second, NotFound)


def started(store: Store, loop: Reconciler, job: tables.Job) -> None:
    set_columns(store, job, state="STARTING", run=1)
    store.write_now(
        lambda session: session.add(
            tables.JobRun(job_uid=job.uid, run=1, submission_id=f"luthier-{job.uid}-r1", create_time=tables.now(), workers=1)
        )
    )


def handed(store: Store, safe: Vault, job: tables.Job) -> dict[str, str] | Exception:
    return store.write_now(lambda session: job_secrets.hand_over(session, safe, session.get_one(tables.Job, job.uid)))


def test_a_claimed_run_gets_the_values_as_they_are_now(
    store: Store, safe: Vault, loop: Reconciler, new_job: Callable[..., tables.Job]
) -> None:
    keep(store, safe)
    job = new_job(secrets={"HF_TOKEN": "hub"})
    keep(store, safe, value="set-again-meanwhile")
    started(store, loop, job)
    Agent(store, job)
    assert handed(store, safe, job) == {"HF_TOKEN": "set-again-meanwhile"}
    assert now_of(store, job).state == "RUNNING"


def test_a_run_whose_secret_cannot_be_had_fails_and_says_why(
    store: Store, safe: Vault, loop: Reconciler, new_job: Callable[..., tables.Job]
) -> None:
    keep(store, safe)
    job = new_job(secrets={"HF_TOKEN": "hub"})
    started(store, loop, job)
    store.write_now(lambda session: session.delete(session.get_one(tables.Secret, ("default", "hub"))))
    Agent(store, job)
    error = handed(store, safe, job)
    assert isinstance(error, NotFound)
    row = now_of(store, job)
    assert (row.state, row.end_reason, row.error["code"]) == ("FAILED", "ERROR", "SECRET_NOT_FOUND")
    assert run_of(store, job).end_time is not None


async def test_the_answer_to_a_claim_has_the_values_and_a_repeated_claim_gets_them_again(
    store: Store, safe: Vault, loop: Reconciler, new_job: Callable[..., tables.Job]
) -> None:
    keep(store, safe)
    job = new_job(secrets={"HF_TOKEN": "hub"})
    started(store, loop, job)
    service = AgentService(store, Notifier(), secret_of(store), "file:///storage", safe)
    token = claim_token(secret_of(store), job.uid, 1)
    request = agent_pb2.ClaimRunRequest(job_uid=job.uid, run=1, claim_token=token, session_secret=SECRET)
    for _ in range(2):
        response = await service.ClaimRun(request, None)  # type: ignore[arg-type]
        assert dict(response.secrets) == {"HF_TOKEN": VALUE}
        assert VALUE not in str(response.job)
    store.write_now(lambda session: session.delete(session.get_one(tables.Secret, ("default", "hub"))))
    with pytest.raises(NotFound, match="no secret 'hub'"):
        await service.ClaimRun(request, None)  # type: ignore[arg-type]
    assert now_of(store, job).state == "FAILED"
    with pytest.raises(FailedPrecondition, match="no longer counts"):
        await service.ClaimRun(request, None)  # type: ignore[arg-type]


def test_a_secret_is_not_deleted_while_a_job_may_need_it(store: Store, safe: Vault, new_job: Callable[..., tables.Job]) -> None:
    keep(store, safe)
    keep(store, safe, "other")
    new_job()
    job = new_job(secrets={"HF_TOKEN": "hub"})
    with pytest.raises(FailedPrecondition, match=f"in use by {job.job_id}"):
        store.write_now(lambda session: delete_secret(session, "default", "hub"))
    store.write_now(lambda session: delete_secret(session, "default", "other"))
    set_columns(store, job, state="CANCELLED", end_time=tables.now())
    store.write_now(lambda session: delete_secret(session, "default", "hub"))
    with pytest.raises(NotFound):
        store.write_now(lambda session: delete_secret(session, "default", "hub"))
