"""Many clients at once: what is measured and what calls it are processes of their own, peer and Luthier in turn."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil

from benchmarks.report import Spread

CLIENTS = 64
ROUNDS = 12
SECONDS = 3.0
"""Length of a round."""


class Load:
    """Clients in a process of their own, and the process of ours that serves them, if there is one."""

    def __init__(self, module: str, *arguments: str, server: int | None = None) -> None:
        command = [sys.executable, "-m", module, *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._server = psutil.Process(server) if server else None

    def round(self, seconds: float = SECONDS) -> dict[str, float]:
        """Let every client call for so long; rates, latencies and the processor time of each side."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        before = self._server_seconds()
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        found: dict[str, float] = json.loads(self._process.stdout.readline())
        found["server_cpu_us_per_call"] = (self._server_seconds() - before) / found["calls"] * 1e6
        return found

    def _server_seconds(self) -> float:
        return sum(self._server.cpu_times()[:2]) if self._server else 0.0

    def close(self) -> None:
        """End the clients."""
        self._process.kill()
        self._process.wait()


@contextmanager
def loads(*made: Load) -> Iterator[tuple[Load, ...]]:
    """End all of them at the end."""
    try:
        yield made
    finally:
        for load in made:
            load.close()


def in_turn(ours: Load, peer: Load) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Rounds of both, one after the other, each first every other time. One round before is not counted."""
    found: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
    for number in range(ROUNDS + 1):
        pair = [(found[0], ours), (found[1], peer)]
        for sample, load in pair if number % 2 else reversed(pair):
            result = load.round()
            if number:
                sample.append(result)
    return found


def spreads(sample: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """The spread of every figure over the rounds."""
    return {name: vars(Spread.of([result[name] for result in sample])) for name in sample[0]}


def ratios(ours: Sequence[dict[str, float]], peer: Sequence[dict[str, float]], name: str = "per_second") -> Spread:
    """Ours divided by the peer's of the same round."""
    return Spread.of([our[name] / other[name] for our, other in zip(ours, peer, strict=True)])


def told(spread: Spread, digits: int = 0) -> str:
    """Median and quartiles, for people."""
    return f"{spread.median:,.{digits}f} ({spread.lower:,.{digits}f} to {spread.upper:,.{digits}f})"
