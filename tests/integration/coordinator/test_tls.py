"""TLS and mutual TLS between clients, agents and the coordinator, and what is said where the two sides do not agree."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import Session, select

from agents.link import claim
from cli.main import main
from common.errors import FailedPrecondition
from common.settings import Settings
from coordinator.cluster.launcher import Launcher
from coordinator.jobs.tokens import claim_token
from coordinator.store import tables
from coordinator.store.database import Store
from coordinator.tls import agent_environment, server_credentials
from luthier.client import Client, InvalidArgument, LuthierError, Unavailable
from luthier.v1 import admin_pb2
from tests.support.certificates import Authority
from tests.support.coordinator_process import TOKEN, CoordinatorProcess, free_port
from tests.support.fake_ray import FakeRay

Fresh = Callable[..., CoordinatorProcess]
PHASE = "over a line that nobody reads"


@dataclass
class Secure:
    """A coordinator with a certificate, and what others need to reach it."""

    process: CoordinatorProcess
    folder: Path
    ca: Path
    own: tuple[Path, Path]

    def refusal(self, **tls: Path | str) -> LuthierError:
        """How a client with such files is told that it cannot connect."""
        with (
            pytest.raises(LuthierError) as caught,
            Client(self.process.address, token=TOKEN, timeout=5, **{"ca": "", "cert": "", "key": "", **tls}) as client,  # type: ignore[arg-type]
        ):
            connect(client)
        return caught.value


def connect(client: Client) -> None:
    """Make a call that is not repeated by itself, so that a refusal is told at once."""
    client.admin.CreateKey(admin_pb2.CreateKeyRequest(parent=client.parent))


def start(folder: Path, mutual: bool) -> Secure:
    authority = Authority(folder / "tls")
    cert, key = authority.issue("coordinator")
    own = authority.issue("client")
    files = {"tls_cert": cert, "tls_key": key, "agent_ca": authority.ca}
    if mutual:
        files |= {"tls_client_ca": authority.ca, "agent_cert": own[0], "agent_key": own[1]}
    settings = {name: str(path) for name, path in files.items()}
    process = CoordinatorProcess(folder / "home", ray_address=f"http://127.0.0.1:{free_port()}", **settings)
    process.tls = {"ca": authority.ca} | ({"cert": own[0], "key": own[1]} if mutual else {})
    return Secure(process.start(), folder / "tls", authority.ca, own)


@pytest.fixture(scope="module", params=[False, True], ids=["tls", "mutual"])
def secure(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    secure = start(tmp_path_factory.mktemp("secure"), request.param)
    yield secure
    secure.process.kill()


@pytest.fixture(scope="module")
def mutual(secure: Secure) -> bool:
    return "cert" in secure.process.tls


def test_who_has_the_right_files_gets_in(secure: Secure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with secure.process.client() as client:
        assert client.status().coordinator.pid
    for name, path in secure.process.tls.items():
        monkeypatch.setenv(f"LUTHIER_{name.upper()}", str(path))
    with Client(secure.process.address, token=TOKEN) as client:
        assert client.status().coordinator.pid
    monkeypatch.setenv("LUTHIER_TOKEN", TOKEN)
    assert main(["status", "--server", secure.process.address, "--home", str(tmp_path)]) == 0


def test_a_client_without_tls_is_told_to_set_the_ca(
    secure: Secure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    error = secure.refusal()
    assert isinstance(error, Unavailable)
    assert "set LUTHIER_CA to the file with its CA" in error.message
    for name in ("LUTHIER_CA", "LUTHIER_CERT", "LUTHIER_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert main(["key", "create", "--server", secure.process.address, "--home", str(tmp_path)]) == 5
    assert "set LUTHIER_CA" in capsys.readouterr().err


def test_a_coordinator_of_another_ca_is_not_trusted(secure: Secure, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "stranger")
    error = secure.refusal(ca=stranger.ca)
    assert isinstance(error, Unavailable)
    assert f"not signed by the CA in {stranger.ca}" in error.message


def test_mutual_tls_wants_a_certificate_that_it_knows(secure: Secure, mutual: bool, tmp_path: Path) -> None:
    cert, key = Authority(tmp_path, "stranger").issue("client")
    if not mutual:
        with Client(secure.process.address, token=TOKEN, ca=secure.ca, cert=cert, key=key) as client:
            assert client.status().coordinator.pid
        return
    assert "set LUTHIER_CERT and LUTHIER_KEY" in secure.refusal(ca=secure.ca).message
    assert f"may not know the CA of the certificate in {cert}" in secure.refusal(ca=secure.ca, cert=cert, key=key).message


def test_a_client_with_tls_is_told_where_there_is_none(fresh: Fresh, tmp_path: Path) -> None:
    process = fresh().start()
    authority = Authority(tmp_path / "tls")
    with Client(process.address, token=TOKEN, ca=authority.ca) as client, pytest.raises(Unavailable, match="unset LUTHIER_CA"):
        connect(client)


def test_a_certificate_for_another_address_is_named_as_that(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "tls")
    cert, key = authority.issue("elsewhere", ("192.0.2.1",))
    files = {"tls_cert": str(cert), "tls_key": str(key), "agent_ca": str(authority.ca)}
    process = CoordinatorProcess(tmp_path / "home", **files)
    process.tls = {"ca": authority.ca}
    process.start(wait=False)
    try:
        with process.client() as client:
            for _ in range(60):
                with pytest.raises(Unavailable) as caught:
                    connect(client)
                if "refused" not in caught.value.message:
                    break
                time.sleep(0.2)
        assert "its certificate is not for this address" in caught.value.message
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"ca": "/none.pem"}, "ca (LUTHIER_CA): cannot read /none.pem: No such file"),
        ({"ca": "{key}"}, "ca (LUTHIER_CA): {key} holds no certificate"),
        ({"ca": "{ca}", "cert": "{cert}"}, "key (LUTHIER_KEY) is missing"),
        ({"ca": "{ca}", "key": "{key}"}, "cert (LUTHIER_CERT) is missing"),
        ({"cert": "{cert}", "key": "{key}"}, "ca (LUTHIER_CA) is missing"),
        ({"ca": "{ca}", "cert": "{ca}", "key": "{key}"}, "not a certificate and its own key"),
        ({"ca": "{ca}", "cert": "{cert}", "key": "/none.key"}, "key (LUTHIER_KEY): cannot read /none.key"),
    ],
)
def test_a_clients_bad_file_is_named(tmp_path: Path, files: dict[str, str], said: str) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("client")
    paths = {"ca": str(authority.ca), "cert": str(cert), "key": str(key)}
    given = {"ca": "", "cert": "", "key": "", **{name: path.format(**paths) for name, path in files.items()}}
    with pytest.raises(InvalidArgument) as caught:
        Client("127.0.0.1:1", token="", **given)  # type: ignore[arg-type]
    assert said.format(**paths) in caught.value.message


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"tls_cert": "/none.pem", "tls_key": "{key}"}, "LUTHIER_TLS_CERT: cannot read /none.pem: No such file"),
        ({"tls_cert": "{cert}"}, "LUTHIER_TLS_KEY is not set"),
        ({"tls_key": "{key}"}, "LUTHIER_TLS_CERT is not set"),
        ({"tls_cert": "{ca}", "tls_key": "{key}"}, "the key is not that of the certificate"),
        ({"tls_cert": "{key}", "tls_key": "{key}"}, "not both in PEM form"),
        ({"tls_client_ca": "{ca}"}, "which needs LUTHIER_TLS_CERT"),
        (
            {"tls_cert": "{cert}", "tls_key": "{key}", "tls_client_ca": "{key}"},
            "LUTHIER_TLS_CLIENT_CA: {key} holds no certificate",
        ),
        ({"tls_cert": "{cert}", "tls_key": "{key}"}, "LUTHIER_AGENT_CA is not set, so agents could not report"),
        (
            {"tls_cert": "{cert}", "tls_key": "{key}", "tls_client_ca": "{ca}", "agent_ca": "/ca.pem"},
            "LUTHIER_AGENT_CERT and LUTHIER_AGENT_KEY have to be set",
        ),
    ],
)
def test_a_coordinators_bad_setting_is_named(tmp_path: Path, files: dict[str, str], said: str) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("coordinator")
    paths = {"ca": str(authority.ca), "cert": str(cert), "key": str(key)}
    given = {name: path.format(**paths) for name, path in files.items()}
    settings = Settings(home=tmp_path, **given)  # type: ignore[arg-type]
    with pytest.raises(FailedPrecondition) as caught:
        server_credentials(settings)
    assert said.format(**paths) in caught.value.message


def test_a_coordinator_with_a_bad_setting_says_so_in_one_line(fresh: Fresh) -> None:
    process = fresh(tls_cert="/none.pem", tls_key="/none.key")
    done = subprocess.run(
        [sys.executable, "-m", "coordinator"], env=process.environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: LUTHIER_TLS_CERT: cannot read /none.pem: No such file or directory"
    assert "Traceback" not in done.stderr


def waiting_run(process: CoordinatorProcess, uid: str) -> str:
    """Record a run that has been started and not claimed, and return its token."""
    moment = tables.now()

    def work(session: Session) -> str:
        session.add(
            tables.Job(
                **{"uid": uid, "project_id": "default", "job_id": uid, "kind": "finetune", "display_name": "", "run": 1},
                **{"state": "STARTING", "spec": {"base": "builtin:tiny"}, "inputs": {"artifacts": {}}},
                create_time=moment,
                update_time=moment,
            )
        )
        session.flush()
        session.add(tables.JobRun(job_uid=uid, run=1, submission_id=uid, create_time=moment))
        return session.get_one(tables.StackFact, "secret").value

    return claim_token(in_store(process, work), uid, 1)


def in_store(process: CoordinatorProcess, work: Callable[[Session], Any]) -> Any:
    store = Store(f"sqlite:///{process.home / 'luthier.db'}")
    try:
        return store.write_now(work)
    finally:
        store.close()


def test_an_agent_reports_over_tls_with_the_files_of_its_node(
    secure: Secure, mutual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = waiting_run(secure.process, "tls-1")
    # Without the files there is no way in, and the claim is not spent.
    with pytest.raises(FailedPrecondition, match="could not be claimed"):
        claim(secure.process.address, "tls-1", 1, token, patience=0.5)
    monkeypatch.setenv("LUTHIER_AGENT_CA", str(secure.ca))
    if mutual:
        with pytest.raises(FailedPrecondition, match="could not be claimed"):
            claim(secure.process.address, "tls-1", 1, token, patience=0.5)
        monkeypatch.setenv("LUTHIER_AGENT_CERT", str(secure.own[0]))
        monkeypatch.setenv("LUTHIER_AGENT_KEY", str(secure.own[1]))
    link, _ = claim(secure.process.address, "tls-1", 1, token, patience=10)
    with link:
        link.phase("training", PHASE)
        assert link.flush(10)
    events = select(tables.JobEvent.message).where(tables.JobEvent.job_uid == "tls-1")
    assert PHASE in in_store(secure.process, lambda session: session.exec(events).all())


def test_an_agent_whose_node_lacks_the_file_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_AGENT_CA", "/nowhere/ca.pem")
    with pytest.raises(FailedPrecondition, match=r"LUTHIER_AGENT_CA: cannot read /nowhere/ca\.pem"):
        claim("127.0.0.1:1", "x", 1, "t", patience=0.1)


def test_agents_are_told_paths_and_nothing_of_what_is_in_them(tmp_path: Path) -> None:
    ray = FakeRay()
    settings = Settings(
        home=tmp_path, agent_ca="/etc/luthier/ca.pem", agent_cert="/etc/luthier/a.pem", agent_key="/etc/luthier/a.key"
    )
    launcher = Launcher(ray, "127.0.0.1:7420", "python", "secret", agent_environment(settings))  # type: ignore[arg-type]
    launcher.launch(tables.Job(uid="u", run=1))
    told = ray.environments["luthier-u-r1"]
    assert {name: value for name, value in told.items() if name.startswith("LUTHIER_AGENT_")} == {
        "LUTHIER_AGENT_CA": "/etc/luthier/ca.pem",
        "LUTHIER_AGENT_CERT": "/etc/luthier/a.pem",
        "LUTHIER_AGENT_KEY": "/etc/luthier/a.key",
    }
    assert not agent_environment(Settings(home=tmp_path))
