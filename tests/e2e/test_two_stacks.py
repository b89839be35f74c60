"""Two stacks beside each other on one machine do not meet, and `down` takes its own only."""

from __future__ import annotations

import shutil
import stat
import tempfile
from pathlib import Path

import psutil
import pytest

from luthier.client import Client, Unauthenticated
from luthier.v1 import admin_pb2
from tests.support.stack import Stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def listening(stack: Stack) -> set[tuple[str, int]]:
    """Addresses and ports on which processes of the stack listen."""
    return {
        (connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port)
        for process in stack.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }


def test_a_second_stack_lives_and_dies_alone(stack: Stack) -> None:
    home = Path(tempfile.mkdtemp(prefix="lt-"))
    second = Stack(home)
    try:
        second.up()
        first_ports, second_ports = listening(stack), listening(second)
        assert first_ports
        assert second_ports
        assert not {port for _, port in first_ports} & {port for _, port in second_ports}
        assert stack.status["ray"]["address"] != second.status["ray"]["address"]

        with Client(second.server, token=stack.token) as stranger, pytest.raises(Unauthenticated):
            stranger.admin.GetStatus(admin_pb2.GetStatusRequest())
        for name in ("admin.key", "ray/token"):
            secret = home / name
            assert stat.S_IMODE(secret.stat().st_mode) == 0o600
            assert secret.read_text() != (stack.home / name).read_text()

        again = second.cli("up")
        assert "runs already" in again.stderr + again.stdout
    finally:
        second.down()
    assert second.processes() == []
    assert stack.json("status")["ray"]["connected"]
    shutil.rmtree(home)


def test_everything_of_a_stack_listens_on_loopback_only(stack: Stack) -> None:
    outside = {address for address in listening(stack) if not address[0].startswith("127.") and address[0] != "::1"}
    assert outside == set(), f"reachable from outside: {sorted(outside)}"


def test_ray_answers_nobody_without_its_token(stack: Stack) -> None:
    import httpx

    address = stack.status["ray"]["address"]
    refused = httpx.post(f"{address}/api/jobs/", json={"entrypoint": "echo pwned"})
    assert refused.status_code == 401
    foreign = httpx.delete(f"{address}/api/serve/applications/", headers={"Origin": "http://evil.example"})
    assert foreign.status_code in (401, 403)
