"""A coordinator as a process of its own, with no Ray behind it unless a test says so."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from luthier.client import Client
from luthier.client.channel import bare_channel
from luthier.client.tls import Tls

TOKEN = "lut_" + "t" * 43


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class CoordinatorProcess:
    """Starts, kills and restarts `python -m coordinator` on one home and port."""

    def __init__(self, home: Path, **settings: str) -> None:
        self.home = home
        self.port = free_port()
        self.settings = settings
        # What a client of it has to know where the settings say TLS: ca, cert and key.
        self.tls: dict[str, Path] = {}
        self.process: subprocess.Popen[bytes] | None = None
        home.mkdir(parents=True, exist_ok=True)
        (home / "admin.key").write_text(TOKEN + "\n")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("LUTHIER_", "RAY_"))}
        ours = {"LUTHIER_HOME": str(self.home), "LUTHIER_PORT": str(self.port)}
        return kept | ours | {f"LUTHIER_{name.upper()}": value for name, value in self.settings.items()}

    def start(self, wait: bool = True) -> CoordinatorProcess:
        with (self.home / "coordinator.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "coordinator"], env=self.environment(), stdout=log, stderr=log, start_new_session=True
            )
        if wait:
            self.wait_until_serving()
        return self

    def wait_until_serving(self, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        with bare_channel(self.address, [], Tls.of(**self.tls)) as channel:
            while time.monotonic() < deadline:
                try:
                    request = health_pb2.HealthCheckRequest()
                    answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=1, wait_for_ready=True)
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                except grpc.RpcError:
                    pass
                assert self.process is None or self.process.poll() is None, self.log()
                time.sleep(0.05)
        raise TimeoutError(self.log())

    def kill(self) -> None:
        """SIGKILL, as the kernel's out-of-memory killer would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        if self.process is None:
            return 0
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(20)
        finally:
            self.kill()

    def log(self) -> str:
        return (self.home / "coordinator.log").read_text()

    def client(self, token: str | None = TOKEN) -> Client:
        return Client(self.address, token=token, **self.tls)
