"""Durable submits a second on PostgreSQL from 64 clients at once, against Procrastinate's defer on the same server.

One PostgreSQL with synchronised commits, a database for each. Procrastinate has no server of its own: 64 tasks of one process
defer straight into the database, through the pool, of those tried, with which it was fastest. Luthier's clients are one process
as well, and the coordinator another. Needs `pip install '.[benchmarks]'` and Debian's `postgresql`.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path

import procrastinate

from benchmarks.concurrent import CLIENTS, ROUNDS, SECONDS, Load, in_turn, loads, ratios, spreads, told
from benchmarks.report import Spread, keep, machine
from tests.support.coordinator_process import TOKEN, CoordinatorProcess
from tests.support.postgres import Postgres

COMMAND = "python -m benchmarks.submits_postgres"
POOLS = (4, 16, 48)


def main() -> None:
    """Measure and keep the result."""
    before = machine()
    postgres = Postgres(durable=True)
    try:
        with postgres.connect() as connection:
            server_version = connection.info.server_version // 10000
        conninfo = postgres.url(postgres.database()).replace("+psycopg", "")
        with procrastinate.App(connector=procrastinate.SyncPsycopgConnector(conninfo=conninfo)).open() as app:
            app.schema_manager.apply_schema()
        pool, tried = fastest_pool(conninfo)
        with tempfile.TemporaryDirectory(prefix="lt-") as home:
            coordinator = CoordinatorProcess(Path(home), store_url=postgres.url(postgres.database())).start()
            try:
                assert coordinator.process is not None
                with loads(
                    Load("benchmarks.clients", coordinator.address, TOKEN, str(CLIENTS), server=coordinator.process.pid),
                    Load("benchmarks.defer", conninfo, str(CLIENTS), str(pool)),
                ) as (ours, peer):
                    found, deferred = in_turn(ours, peer)
            finally:
                coordinator.kill()
    finally:
        postgres.stop()
    result = {
        "what": f"durable CreateJob a second from {CLIENTS} clients against Procrastinate's defer on the same PostgreSQL",
        "rounds": ROUNDS,
        "seconds_a_round": SECONDS,
        "procrastinate": version("procrastinate"),
        "postgresql": server_version,
        "pool_of_procrastinate": pool,
        "defers_a_second_by_pool": tried,
        "luthier": spreads(found),
        "defer": spreads(deferred),
        "ratio_luthier_to_defer": vars(ratios(found, deferred)),
        "machine": before,
    }
    path = keep("submits_postgres", COMMAND, result)
    rates = [told(Spread.of([each["per_second"] for each in sample])) for sample in (found, deferred)]
    print(f"CreateJob {rates[0]}/s, defer {rates[1]}/s, ratio {told(ratios(found, deferred), 2)}", path)


def fastest_pool(conninfo: str) -> tuple[int, dict[int, float]]:
    """The peer's best number of connections, and what each gave."""
    tried = {}
    for pool in POOLS:
        with loads(Load("benchmarks.defer", conninfo, str(CLIENTS), str(pool))) as (load,):
            load.round(1.0)
            tried[pool] = load.round()["per_second"]
    return max(tried, key=lambda pool: tried[pool]), tried


if __name__ == "__main__":
    main()
