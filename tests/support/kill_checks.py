"""What must hold after all the kills: read from the records, from Ray, and from what the agents' processes wrote down."""

from __future__ import annotations

import itertools
import json
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, text

from cli.stack.state import RayState
from coordinator.cluster.ray_cluster import ENDED
from luthier.v1 import job_pb2
from tests.support.kill_crowd import Acknowledged
from tests.support.kill_plans import ENDS, SUCCEEDED, Plan
from tests.support.tenants import SPARES


@dataclass(frozen=True)
class RayJob:
    """A submission as Ray sees it; times in milliseconds."""

    status: str
    start_time: int
    end_time: int | None


def ray_jobs(ray: RayState) -> dict[str, RayJob]:
    """Ray's own word on every submission, by its id."""
    return {
        job["submission_id"]: RayJob(job["status"], job["start_time"], job["end_time"])
        for job in _answer(ray, "/api/jobs/")
        if job["submission_id"]
    }


def all_ended(submitted: Mapping[str, RayJob]) -> bool:
    """Whether Ray runs nothing any more."""
    return all(job.status in ENDED for job in submitted.values())


def wrong_while_dead(store_url: str, submitted: Mapping[str, RayJob]) -> list[str]:
    """What must hold at any instant: Ray has been given no run that is not recorded."""
    engine = create_engine(store_url)
    with engine.connect() as connection:
        uids = connection.execute(text("select uid from job")).scalars().all()
        recorded = set(connection.execute(text("select submission_id from job_run")).scalars())
    engine.dispose()
    ours = {id_ for id_ in submitted if any(uid in id_ for uid in uids)}
    return [f"{id_} was submitted before it was recorded" for id_ in ours - recorded]


def wrong_in_answers(jobs: Sequence[Acknowledged], listed: Sequence[job_pb2.Job]) -> list[str]:
    """What the API says of the jobs against what was acknowledged and planned."""
    wrong = []
    found = {job.name: job for job in listed}
    staying = [each for each in jobs if not each.plan.deleted]
    wrong += [
        f"{each.plan.name}: {each.name} was deleted and is listed" for each in jobs if each.plan.deleted and each.name in found
    ]
    if len(found) != len(listed) or len(found) != len(staying):
        wrong.append(f"{len(staying)} jobs were acknowledged and not deleted, {len(found)} are listed")
    for each in staying:
        job = found.get(each.name)
        if job is None:
            wrong.append(f"{each.plan.name}: {each.name} was acknowledged and is lost")
            continue
        state = job_pb2.JobState.Name(job.state)
        reason = job_pb2.EndReason.Name(job.end_reason).removeprefix("END_REASON_")
        is_now = (state, reason, job.run, job.attempt)
        planned = (each.plan.ends, each.plan.reason, each.plan.runs, each.plan.attempt)
        if is_now != planned:
            wrong.append(f"{each.plan.name} ({each.uid}): state, reason, runs and retries are {is_now}, not {planned}")
    return wrong


def wrong_in_records(store_url: str, jobs: Sequence[Acknowledged]) -> list[str]:
    """The records themselves: events without gaps, one end, one model, one run a submission."""
    wrong = []
    engine = create_engine(store_url)
    with engine.connect() as connection:
        for each in jobs:
            of_job = {"uid": each.uid}

            def complain(said: str, plan: Plan = each.plan, uid: str = each.uid) -> None:
                wrong.append(f"{plan.name} ({uid}): {said}")

            if each.plan.deleted:
                left = connection.execute(text("select delete_time from job where uid = :uid"), of_job).first()
                if left is not None and left.delete_time is None:
                    complain("it was deleted and is there")
                continue
            asked = {"request": each.request.request_id}
            made = connection.execute(text("select count(*) from job where request_id = :request"), asked).scalar_one()
            if made != 1:
                complain(f"its request made {made} jobs")
            query = text("select sequence, state, run from job_event where job_uid = :uid order by sequence")
            events = connection.execute(query, of_job).all()
            numbers = [event.sequence for event in events]
            if numbers != list(range(1, len(numbers) + 1)):
                complain(f"its events are numbered {numbers}")
            ends = [event.state for event in events if f"JOB_STATE_{event.state}" in ENDS]
            if len(ends) != (each.plan.ends in ENDS):
                complain(f"it ended {len(ends)} times: {ends}")
            told = [(event.sequence, job_pb2.JobState.Name(event.state), event.run) for event in each.seen]
            recorded = [(event.sequence, f"JOB_STATE_{event.state}", event.run) for event in events]
            if told != recorded:
                complain(f"its watcher saw {told}, recorded are {recorded}")
            models = connection.execute(text("select count(*) from model_version where job_uid = :uid"), of_job).scalar_one()
            if models != (each.plan.ends == SUCCEEDED):
                complain(f"it has {models} models")
            runs = connection.execute(text("select * from job_run where job_uid = :uid order by run"), of_job).all()
            if [run.run for run in runs] != list(range(1, each.plan.runs + 1)):
                complain(f"its runs are {[run.run for run in runs]}")
            if any(run.end_time is None for run in runs):
                complain("a run of it has no end")
    engine.dispose()
    return wrong


def wrong_on_the_cluster(folder: Path, jobs: Sequence[Acknowledged], submitted: Mapping[str, RayJob]) -> list[str]:
    """What Ray and the agents' processes wrote down: each run was begun once, and no two of a job were there at a time."""
    wrong = []
    for each in jobs:
        runs_of_ray = sorted((job.start_time, id_, job.end_time) for id_, job in submitted.items() if each.uid in id_)
        for (_, first, ended), (started, second, _) in itertools.pairwise(runs_of_ray):
            if ended is None or started < ended:
                wrong.append(f"{each.plan.name}: {second} was submitted at {started}, {first} ended at {ended}")
        path = folder / f"{each.uid}.seen"
        lines = [line.split(" ", 3) for line in path.read_text().splitlines()] if path.exists() else []
        seen = [(int(run), word) for _, _, run, word in lines]
        story = f"{each.plan.name} ({each.uid}): {[(when, pid, run, word) for when, pid, run, word in lines]}"
        for word in ("starts", "begins"):
            runs = [run for run, said in seen if said == word]
            if len(set(runs)) != len(runs) or runs != sorted(runs):
                wrong.append(f"runs were begun twice or out of turn: {story}")
        if any(word == "overlaps" for _, word in seen):
            wrong.append(f"two runs at a time: {story}")
        if any(word == "was refused" for _, word in seen) and each.plan.ends == SUCCEEDED:
            wrong.append(f"a run that counted was refused: {story}")
    return wrong


def wrong_in_versions(store_url: str, deleted: Mapping[str, Sequence[int]]) -> list[str]:
    """Of the spare versions, those are gone that were deleted, and no others."""
    wrong = []
    engine = create_engine(store_url)
    with engine.connect() as connection:
        for kind, query in (
            ("datasets", "select version from dataset_version where dataset_id = 'spare'"),
            ("models", "select version from model_version where model_id = 'spare'"),
        ):
            left = set(connection.execute(text(query)).scalars())
            if left != set(range(1, SPARES + 1)) - set(deleted[kind]):
                wrong.append(
                    f"of the spare {kind} {sorted(set(range(1, SPARES + 1)) - left)} are gone, {deleted[kind]} were deleted"
                )
    engine.dispose()
    return wrong


def serve_apps(
    ray: RayState, until: Callable[[Mapping[str, str]], bool] = lambda _: True, seconds: float = 120.0
) -> dict[str, list[str]]:
    """The ids of the replicas of each application that Serve has, by its name; once their statuses are as wished."""
    deadline = time.monotonic() + seconds
    while True:
        apps = _answer(ray, "/api/serve/applications/").get("applications") or {}
        if until({name: app["status"] for name, app in apps.items()}):
            break
        assert time.monotonic() < deadline, apps
        time.sleep(0.5)
    return {
        name: sorted(replica["replica_id"] for deployment in app["deployments"].values() for replica in deployment["replicas"])
        for name, app in apps.items()
    }


def _answer(ray: RayState, path: str) -> Any:
    token = Path(ray.token_path).read_text().strip()
    request = urllib.request.Request(f"{ray.address}{path}", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
        return json.load(answer)
