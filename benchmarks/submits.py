"""Durable submits a second on SQLite from 64 clients at once, against a bare grpc.aio server that echoes the same message.

The coordinator checks key and job, records job and event in one synchronised commit, and answers; the echo does none of that.
Both are processes of their own, and the clients are one more, which serialises the request once and parses no answer, so that it
needs less processor time a call than either server. What each side used is in the result.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.concurrent import CLIENTS, ROUNDS, SECONDS, Load, in_turn, loads, ratios, spreads, told
from benchmarks.report import Spread, keep, machine
from tests.support.coordinator_process import TOKEN, CoordinatorProcess

COMMAND = "python -m benchmarks.submits"


def main() -> None:
    """Measure and keep the result."""
    before = machine()
    with tempfile.TemporaryDirectory(prefix="lt-") as home:
        coordinator = CoordinatorProcess(Path(home)).start()
        echo = subprocess.Popen([sys.executable, "-m", "benchmarks.echo"], stdout=subprocess.PIPE, text=True)
        try:
            assert echo.stdout is not None
            assert coordinator.process is not None
            port = echo.stdout.readline().strip()
            with loads(
                Load("benchmarks.clients", coordinator.address, TOKEN, str(CLIENTS), server=coordinator.process.pid),
                Load("benchmarks.clients", f"127.0.0.1:{port}", TOKEN, str(CLIENTS), server=echo.pid),
            ) as (ours, peer):
                found, echoed = in_turn(ours, peer)
        finally:
            echo.kill()
            coordinator.kill()
    result = {
        "what": f"durable CreateJob a second from {CLIENTS} clients, SQLite, against a bare grpc.aio echo of the same message",
        "rounds": ROUNDS,
        "seconds_a_round": SECONDS,
        "luthier": spreads(found),
        "echo": spreads(echoed),
        "ratio_luthier_to_echo": vars(ratios(found, echoed)),
        "ratio_of_server_cpu_luthier_to_echo": vars(ratios(found, echoed, "server_cpu_us_per_call")),
        "machine": before,
    }
    path = keep("submits", COMMAND, result)
    rates = [told(Spread.of([each["per_second"] for each in sample])) for sample in (found, echoed)]
    print(f"CreateJob {rates[0]}/s, echo {rates[1]}/s, ratio {told(ratios(found, echoed), 2)}", path)


if __name__ == "__main__":
    main()
