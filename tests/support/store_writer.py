"""Writers that are killed: `python -m tests.support.store_writer URL ROUNDS` prints what was acknowledged before each SIGKILL.

Each round forks a process in which many write at once and name each record as soon as the store says that it is durable. The
parent kills it right after some acknowledgement, and prints every one that came.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import sys

from sqlmodel import Session

from coordinator.store import tables
from coordinator.store.database import Store

WRITERS = 32


def put(key: str) -> object:
    def work(session: Session) -> None:
        session.add(tables.StackFact(key=key, value="x" * 50))

    return work


async def write_until_killed(url: str, number: int, out: int) -> None:
    store = Store(url)

    async def one(writer: int) -> None:
        for count in itertools.count():
            key = f"{number}-{writer}-{count}"
            await store.write(put(key))  # type: ignore[arg-type]
            os.write(out, f"{key}\n".encode())

    await asyncio.gather(*(one(writer) for writer in range(WRITERS)))


def main() -> None:
    url, rounds = sys.argv[1], int(sys.argv[2])
    for number in range(rounds):
        out, into = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(out)
            asyncio.run(write_until_killed(url, number, into))
            os._exit(1)
        os.close(into)
        with os.fdopen(out) as lines:
            enough = random.randint(1, 4 * WRITERS)
            for acknowledged, line in enumerate(lines, start=1):
                print(line, end="")
                if acknowledged == enough:
                    os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
