"""A PostgreSQL of the tests' own: Debian's binaries on a free port of loopback, in a temporary folder, gone afterwards."""

from __future__ import annotations

import ctypes
import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from tests.support.coordinator_process import free_port

REQUIRED = "LUTHIER_REQUIRE_POSTGRES"
"""Environment variable: with `1`, tests fail rather than skip where PostgreSQL is not installed."""

MISSING = "PostgreSQL is not installed: `apt-get install postgresql` brings what these tests start themselves"
ROLE = "luthier"
"""Owns the tests' databases. No superuser, because a superuser is exempt from limits on connections."""


def binaries() -> Path | None:
    """Folder of the newest PostgreSQL on this machine."""
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    on_path = shutil.which("initdb")
    if on_path is not None:
        found.append(Path(on_path).resolve().parent)
    return max(found, key=lambda path: int(re.sub(r"\D", "", path.parent.name) or 0), default=None)


class Postgres:
    """One server. `database()` gives a fresh database; `stop()` leaves nothing behind.

    Without `durable` nothing is synchronised to disk, which makes tests quick and is as good against everything but a power cut.
    """

    def __init__(self, durable: bool = False) -> None:
        folder = binaries()
        if folder is None:
            raise FileNotFoundError(MISSING)
        self._bin = folder
        self._durable = durable
        self._password = secrets.token_hex(16)
        # Not below pytest's own folders: another user has to reach it.
        self.home = Path(tempfile.mkdtemp(prefix="lt-pg-"))
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None
        self._made = 0
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:
            # PostgreSQL refuses to run as root.
            user = _unprivileged()
            self._as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(self.home, user.pw_uid, user.pw_gid)
        try:
            self._initialise()
            self.start()
            with self.connect() as connection:
                connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(ROLE), self._password))
        except BaseException:
            self.stop()
            raise

    def _initialise(self) -> None:
        secret = self.home / "password"
        secret.write_text(self._password)
        if self._as:
            os.chown(secret, self._as["user"], self._as["group"])
        options = [
            "--username=postgres",
            f"--pwfile={secret}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
        ]
        done = subprocess.run(
            [self._bin / "initdb", "-D", self.home / "data", *options],
            cwd=self.home, env=self._environment(), capture_output=True, text=True, check=False, timeout=120, **self._as,
        )  # fmt: skip
        secret.unlink()
        if done.returncode:
            raise RuntimeError(f"initdb failed: {done.stdout[-500:]}{done.stderr[-1500:]}")

    def start(self) -> None:
        """Start the server, on the port it had before if it had one, and wait until it answers."""
        self.port = self.port or free_port()
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "max_connections": 60,
            "shared_buffers": "64MB",
            "logging_collector": "off",
        }
        if not self._durable:
            settings |= {"fsync": "off", "full_page_writes": "off"}
        arguments = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        for last in (False, False, True):
            with (self.home / "server.log").open("ab") as log:
                self.process = subprocess.Popen(
                    [self._bin / "postgres", "-D", self.home / "data", *arguments],
                    cwd=self.home, env=self._environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    preexec_fn=_end_with_parent, start_new_session=True, **self._as,
                )  # fmt: skip
            # After a crash, what is left of the old server, or somebody on its port, may be in the way for a moment.
            if self._answers():
                return
            self.halt(signal.SIGQUIT)
            if not last:
                time.sleep(1.0)
        raise RuntimeError(f"PostgreSQL does not answer: {self.log()[-2000:]}")

    def _answers(self, seconds: float = 60.0) -> bool:
        """Wait until the server answers; False where it ended, or does not within the time."""
        assert self.process is not None
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                self.connect().close()
            except psycopg.OperationalError:
                time.sleep(0.05)
            else:
                return True
        return False

    def halt(self, how: signal.Signals = signal.SIGINT) -> None:
        """End the server: SIGINT disconnects everyone and writes everything out, SIGQUIT is a crash."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(how)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.send_signal(signal.SIGQUIT)
                self.process.wait(30)
        self.process = None

    def stop(self) -> None:
        """End the server for good and remove its folder."""
        self.halt(signal.SIGINT if self._durable else signal.SIGQUIT)
        shutil.rmtree(self.home, ignore_errors=True)

    def connect(self, database: str = "postgres") -> psycopg.Connection[Any]:
        """A connection as superuser that commits each statement."""
        return psycopg.connect(
            host="127.0.0.1", port=self.port, user="postgres", password=self._password, dbname=database,
            autocommit=True, connect_timeout=5,
        )  # fmt: skip

    def database(self, template: str = "template1") -> str:
        """Make a database and return its name."""
        self._made += 1
        name = f"test_{self._made}"
        with self.connect() as connection:
            connection.execute(
                sql.SQL("CREATE DATABASE {} OWNER {} TEMPLATE {}").format(
                    sql.Identifier(name), sql.Identifier(ROLE), sql.Identifier(template)
                )
            )
        return name

    def drop(self, name: str) -> None:
        """Remove a database, whoever is connected to it."""
        with self.connect() as connection:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

    def url(self, name: str) -> str:
        """A database's URL for a store."""
        return f"postgresql+psycopg://{ROLE}:{self._password}@127.0.0.1:{self.port}/{name}"

    def terminate_backends(self, name: str) -> int:
        """Kill every connection to a database; how many there were."""
        with self.connect() as connection:
            rows = connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()", (name,)
            ).fetchall()
        return len(rows)

    def log(self) -> str:
        """What the server said."""
        return (self.home / "server.log").read_text(errors="replace")

    def _environment(self) -> dict[str, str]:
        return {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C", "TZ": "UTC", "HOME": str(self.home)}


def _unprivileged() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise RuntimeError("there is neither a user `postgres` nor `nobody` to run PostgreSQL as")


def _end_with_parent() -> None:
    # A test run that is killed must not leave a server: the kernel then sends it SIGQUIT.
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGQUIT))
