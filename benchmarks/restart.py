"""How long a coordinator that was killed takes to answer again, with 100,000 jobs in its store, against one with an empty store.

Of the jobs 90,000 have ended, each with its run and five events, 9,900 wait and 100 run; no Ray answers. The coordinators are
killed by SIGKILL and started again in turn. Measured from the start of the process to three answers: a health check, the first
page of the jobs, and a waiting job that is told its place in the queue.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import insert
from sqlmodel import Session, SQLModel

from benchmarks.report import Spread, keep, machine
from coordinator.store import tables
from coordinator.store.database import Store
from coordinator.store.migrate import upgrade
from luthier.client import Client
from luthier.v1 import job_pb2
from tests.support.coordinator_process import CoordinatorProcess, free_port

COMMAND = "python -m benchmarks.restart"
ROUNDS = 9
JOBS, WAITING, RUNNING = 100_000, 9_900, 100
EVENTS = 5
CHUNK = 5_000
ANSWERS = ("health", "first page of jobs", "place in the queue")


def main() -> None:
    """Measure and keep the result."""
    before = machine()
    with tempfile.TemporaryDirectory(prefix="lt-") as folder:
        nowhere = f"http://127.0.0.1:{free_port()}"
        full, empty = (CoordinatorProcess(Path(folder) / name, ray_address=nowhere) for name in ("full", "empty"))
        fill(f"sqlite:///{full.home / 'luthier.db'}")
        size = (full.home / "luthier.db").stat().st_size
        found: dict[str, list[list[float]]] = {"full": [], "empty": []}
        for _ in range(ROUNDS):
            found["full"].append(restart(full, f"ft-{JOBS - 1:06d}"))
            found["empty"].append(restart(empty, None))
    result: dict[str, Any] = {
        "what": f"seconds from the start of the process to its answers, {JOBS} jobs in the store (SQLite) against none",
        "rounds": ROUNDS,
        "store_bytes": size,
        "machine": before | {"load_after": os.getloadavg()[0]},
    }
    for name, rounds in found.items():
        result[name] = {
            answer: vars(Spread.of([each[number] for each in rounds]))
            for number, answer in enumerate(ANSWERS)
            if len(rounds[0]) > number
        }
    path = keep("restart", COMMAND, result)
    for name in found:
        print(name, {answer: f"{spread['median']:.2f} ({spread['p95']:.2f})" for answer, spread in result[name].items()})
    print(path)


def restart(process: CoordinatorProcess, waiting: str | None) -> list[float]:
    """Start it, ask, kill it. Seconds to each of the answers; without a job that waits, to the first two."""
    started = time.monotonic()
    process.start()
    taken = [time.monotonic() - started]
    with process.client() as client:
        client.jobs.ListJobs(job_pb2.ListJobsRequest(parent="projects/default", page_size=50))
        taken.append(time.monotonic() - started)
        if waiting is not None:
            until(lambda: placed(client, f"projects/default/jobs/{waiting}"))
            taken.append(time.monotonic() - started)
    process.kill()
    return taken


def placed(client: Client, name: str) -> bool:
    """Whether a job is told its place in the queue."""
    return client.get_job(name).queue.position > 0


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Ask twenty times a second."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.05)


def fill(url: str) -> None:
    """Write the jobs, their runs and events, as a coordinator would have left them."""
    store = Store(url)
    upgrade(store.engine)
    moment = tables.now() - timedelta(days=1)
    project = tables.Project(id="default", create_time=moment, event_sequence=JOBS * EVENTS)
    store.write_now(lambda session: session.add(project))
    for first in range(0, JOBS, CHUNK):
        rows = [job(number, moment + timedelta(milliseconds=number)) for number in range(first, first + CHUNK)]
        store.write_now(lambda session, rows=rows: write(session, rows))  # type: ignore[misc]
    store.close()


def write(session: Session, jobs: list[dict[str, Any]]) -> None:
    """Record some jobs with what belongs to them."""
    ran = [each for each in jobs if each["run"]]
    events = [event(each, number) for each in jobs for number in range(1, each["sequence"] + 1)]
    many: list[tuple[type[SQLModel], list[dict[str, Any]]]] = [
        (tables.Job, jobs),
        (tables.JobRun, [run(each) for each in ran]),
        (tables.JobEvent, events),
    ]
    for table, rows in many:
        if rows:
            # The other columns are as in the first row.
            defaults = table(**rows[0]).model_dump()
            session.execute(insert(table), [defaults | row for row in rows])


def job(number: int, moment: Any) -> dict[str, Any]:
    """The columns of a job; the last ones wait, those before them run, all others have ended."""
    state = "QUEUED" if number >= JOBS - WAITING else "RUNNING" if number >= JOBS - WAITING - RUNNING else "SUCCEEDED"
    started = state != "QUEUED"
    ended = moment + timedelta(hours=1) if state == "SUCCEEDED" else None
    return {
        "uid": f"ft{number:06d}",
        "project_id": "default",
        "job_id": f"ft-{number:06d}",
        "kind": "finetune",
        "display_name": f"job {number}",
        "spec": {"base": "builtin:tiny", "dataset": "tickets@1", "method": "full", "workers": 2},
        "cpus": 2.25,
        "shape": {"driver": [0.25, 0.0], "worker": [1.0, 0.0], "least": 2, "most": 2},
        "creator": "bench",
        "state": state,
        "end_reason": "COMPLETED" if ended else "UNSPECIFIED",
        "run": int(started),
        "sequence": EVENTS if started else 1,
        "create_time": moment,
        "start_time": moment if started else None,
        "end_time": ended,
        "update_time": ended or moment,
    }


def run(row: dict[str, Any]) -> dict[str, Any]:
    """The only run of a job."""
    return {
        "job_uid": row["uid"],
        "run": 1,
        "submission_id": f"luthier-{row['uid']}-r1",
        "create_time": row["create_time"],
        "claim_time": row["create_time"],
        "end_time": row["end_time"],
        "cpus": row["cpus"],
        "workers": 2,
    }


def event(row: dict[str, Any], number: int) -> dict[str, Any]:
    """An event of a job."""
    return {
        "job_uid": row["uid"],
        "sequence": number,
        "time": row["create_time"],
        "type": job_pb2.JOB_EVENT_TYPE_STATE_CHANGED,
        "state": row["state"],
        "message": "as it went",
        "project_id": row["project_id"],
        "project_sequence": int(row["uid"].removeprefix("ft")) * EVENTS + number,
    }


if __name__ == "__main__":
    main()
