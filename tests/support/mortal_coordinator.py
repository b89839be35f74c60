"""The test's side of `stopping_coordinator.py`: starts a coordinator, hears where it stopped, and kills it there."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from tests.support.coordinator_process import CoordinatorProcess


class MortalCoordinator(CoordinatorProcess):
    """One coordinator at a time on one home and port, each killed by SIGKILL from this process."""

    def __init__(self, home: Path, **settings: str) -> None:
        super().__init__(home, **settings)
        self.pid = 0
        self._pipe, theirs = os.pipe()
        # pyarrow's allocator would start a thread on being imported, which a fork does not take along.
        environment = self.environment() | {"ARROW_DEFAULT_MEMORY_POOL": "system", "OPENBLAS_NUM_THREADS": "1"}
        # Ray reads these once, when it is imported; a coordinator sets them before that.
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": settings["ray_token_path"]}
        with (home / "coordinator.log").open("ab") as log:
            self._forker = subprocess.Popen(
                [sys.executable, "-m", "tests.support.stopping_coordinator", str(theirs)],
                env=environment,
                pass_fds=[theirs],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        os.close(theirs)

    def begin(self, points: Mapping[str, int]) -> None:
        """Start a coordinator that stops at the first of `points` (with how often each may be passed before)."""
        assert not self.pid
        self.pid = self._order({"start": dict(points)})["pid"]

    def stopped_at(self, seconds: float) -> str:
        """Wait for it to stop at a point, and return which; empty where it did not within the time."""
        if not select.select([self._pipe], [], [], seconds)[0]:
            return ""
        # Two of its threads may come by at once; it stops for both, and dies but once.
        told = json.loads(os.read(self._pipe, 4096).splitlines()[0])
        assert told["pid"] == self.pid
        while psutil.Process(self.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)
        return str(told["point"])

    def serves(self) -> bool:
        """Whether it answers already."""
        try:
            self.wait_until_serving(0.2)
        except TimeoutError:
            return False
        return True

    def kill(self) -> None:
        """SIGKILL, wherever it is."""
        if not self.pid:
            return
        os.kill(self.pid, signal.SIGKILL)
        status = self._order({"reap": self.pid})["status"]
        self.pid = 0
        assert status == -signal.SIGKILL, f"it had ended by itself, with status {status}:\n{self.log()[-4000:]}"

    def close(self) -> None:
        """Kill it and the process that starts it."""
        try:
            self.kill()
        finally:
            self._forker.kill()
            self._forker.wait()
            os.close(self._pipe)

    def _order(self, order: Mapping[str, object]) -> dict[str, int]:
        assert self._forker.stdin is not None
        assert self._forker.stdout is not None
        self._forker.stdin.write(json.dumps(order) + "\n")
        self._forker.stdin.flush()
        answer = self._forker.stdout.readline()
        assert answer, self.log()[-4000:]
        return dict(json.loads(answer))
