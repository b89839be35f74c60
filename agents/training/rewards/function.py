"""Reward `function`: what a Python function of the user's returns, called in a process of its own that can do little else.

The process (`jail.py`) has no environment, no files, no network, no child processes and a limit on its memory. A call that takes
too long is ended with the process, and whatever goes wrong names the row.
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from agents.training.rewards import jail
from agents.training.rewards.base import Answer
from common.errors import InvalidArgument, Violation
from luthier.v1 import training_pb2

REASON = "REWARD_FAILED"
START_SECONDS = 30.0
TIMEOUT_SECONDS = 5.0
MEMORY_MIB = 512
MAX_REPLY = 65_536


class Function:
    """The function of one job on one rank."""

    needs_reference = False

    def __init__(self, settings: training_pb2.FunctionReward, name: str) -> None:
        self._name = name
        self._timeout = settings.timeout_seconds if settings.HasField("timeout_seconds") else TIMEOUT_SECONDS
        self._folder = tempfile.TemporaryDirectory(prefix="luthier-reward-")
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(Path(jail.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self._folder.name,
            env={},
            start_new_session=True,
        )
        memory = settings.memory_mib if settings.HasField("memory_mib") else MEMORY_MIB
        try:
            self._ask({"source": settings.source, "memory_mib": memory, "parent": os.getpid()}, START_SECONDS, "")
        except BaseException:
            self.close()
            raise

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """What the function returns for each answer. Raises InvalidArgument naming the row, and what went wrong."""
        return [self._score(answer) for answer in answers]

    def close(self) -> None:
        """End the process and all that it may have left."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        self._folder.cleanup()

    def _score(self, answer: Answer) -> float:
        where = f"the row at line {answer.line}"
        question = {"prompt": answer.prompt, "completion": answer.text, "answer": answer.reference}
        value = self._ask(question, self._timeout, where).get("value")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._failed(where, f"it returned {str(value)[:80]!r} instead of a finite number")
        return float(value)

    def _ask(self, question: dict[str, Any], seconds: float, where: str) -> dict[str, Any]:
        line = json.dumps(question).encode() + b"\n"
        deadline = time.monotonic() + seconds
        try:
            reply = self._exchange(line, deadline)
        except TimeoutError:
            self.close()
            raise self._failed(where, f"it took longer than {seconds:g} s, and its process was ended") from None
        except EOFError:
            status = self._process.wait()
            how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
            self.close()
            raise self._failed(where, f"its process {how}") from None
        try:
            answer = json.loads(reply)
            assert isinstance(answer, dict)
        except (ValueError, AssertionError, RecursionError):
            self.close()
            raise self._failed(where, "it wrote to the channel that its results come by") from None
        if "error" in answer:
            raise self._failed(where, str(answer["error"])[:1000])
        return answer

    def _exchange(self, line: bytes, deadline: float) -> bytes:
        """Send a line and return the one that comes back. Neither may take for ever."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        out, back = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(out, False)
        reply = bytearray()
        while not reply.endswith(b"\n"):
            left = deadline - time.monotonic()
            readable, writable, _ = select.select([back], [out] if line else [], [], max(0.0, left))
            if not readable and not writable:
                raise TimeoutError
            if writable:
                try:
                    line = line[os.write(out, line[:MAX_REPLY]) :]
                except BrokenPipeError:
                    raise EOFError from None
            if readable:
                piece = os.read(back, MAX_REPLY)
                if not piece or len(reply) > MAX_REPLY:
                    raise EOFError
                reply += piece
        return bytes(reply)

    def _failed(self, where: str, what: str) -> InvalidArgument:
        at = f" on {where}" if where else " when it was loaded"
        message = f"the reward function {self._name!r} failed{at}: {what}"
        return InvalidArgument(message, REASON, [Violation("reinforcement.rewards.function", message)])
