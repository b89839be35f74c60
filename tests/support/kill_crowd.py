"""Those who use a coordinator that dies all the time: one who submits and has wishes, and watchers who want every event once."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.field_mask_pb2 import FieldMask

from luthier.client import Client
from luthier.client.errors import Cancelled, DeadlineExceeded, FailedPrecondition, LuthierError, NotFound, Unavailable
from luthier.client.streams import broke
from luthier.v1 import dataset_pb2, job_pb2, model_pb2
from tests.support.kill_plans import ENDS, WAITING, Plan

CALL_SECONDS = 10.0
LOOK_SECONDS = 0.1


@dataclass
class Acknowledged:
    """A job that the coordinator has acknowledged, and what its watcher has seen of it."""

    plan: Plan
    name: str
    uid: str
    request: job_pb2.CreateJobRequest
    steps: deque[tuple[str, str]]
    seen: list[job_pb2.JobEvent] = field(default_factory=list)
    state: str = ""

    @property
    def as_planned(self) -> bool:
        """Whether nothing more is to happen."""
        if self.plan.deleted:
            return self.state in ENDS and not self.steps
        return self.state in ENDS or (not self.steps and self.state == self.plan.ends)

    @property
    def waits(self) -> bool:
        """Whether it was told why it waits."""
        return any(event.type == job_pb2.JOB_EVENT_TYPE_WAITING for event in list(self.seen))

    @property
    def watched(self) -> bool:
        """Whether its watcher has seen all there is to see."""
        ends = self.plan.ends if self.plan.ends not in ENDS else self.state
        return bool(self.seen) and job_pb2.JobState.Name(self.seen[-1].state) == ends


class Crowd:
    """Threads that call one coordinator. What they find wrong is in `wrong`."""

    def __init__(self, client: Callable[[], Client], folder: Path, most_at_once: int) -> None:
        self._client = client
        self._folder = folder
        self._most_at_once = most_at_once
        self.jobs: list[Acknowledged] = []
        self.wrong: list[str] = []
        # Numbers of versions of `spare` that were deleted, by kind.
        self.deleted: dict[str, list[int]] = {"datasets": [], "models": []}
        self._waiting: deque[Plan] = deque()
        self._stop = threading.Event()
        self._watchers: list[threading.Thread] = []

    @contextmanager
    def at_work(self, plans: Sequence[Plan]) -> Iterator[None]:
        """Submit the plans and see to them until the context ends."""
        self._waiting.extend(plans)
        driver = threading.Thread(target=self._guarded, args=(self._drive,), name="driver")
        driver.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in (driver, *self._watchers):
                thread.join(CALL_SECONDS * 2)

    def add(self, plans: Sequence[Plan]) -> None:
        """Have more to submit."""
        self._waiting.extend(plans)

    @property
    def quiet(self) -> bool:
        """Whether every plan was submitted and has come to its end, and every watcher knows."""
        return not self._waiting and all(job.as_planned and job.watched for job in list(self.jobs))

    @property
    def open(self) -> list[str]:
        """What has not come to its end yet, for people."""
        return [f"{job.plan.name} ({job.name}): {job.state}, then {list(job.steps)}" for job in self.jobs if not job.as_planned]

    def _guarded(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except Exception as error:
            self.wrong.append(f"{work.__name__} gave up: {type(error).__name__}: {error}")

    def _drive(self) -> None:
        with self._client() as client:
            while not self._stop.is_set():
                under_way = sum(not job.as_planned for job in self.jobs)
                if self._waiting and under_way < self._most_at_once:
                    self._submit(client, self._waiting.popleft())
                listed = self._until_answered(lambda: client.jobs.ListJobs(_list(client), timeout=CALL_SECONDS))
                states = {job.name: job_pb2.JobState.Name(job.state) for job in listed.jobs} if listed else {}
                for job in self.jobs:
                    job.state = states.get(job.name, job.state)
                    if job.steps and job.steps[0][0] in ("", job.state, WAITING if job.waits else ""):
                        if job.steps[0][1] == "delete" and not job.watched:
                            continue  # nobody could watch it any more
                        self._step(client, job, job.steps[0][1])
                        job.steps.popleft()
                self._stop.wait(LOOK_SECONDS)

    def _submit(self, client: Client, plan: Plan, after: str = "") -> Acknowledged | None:
        job = plan.job()
        job.after.extend([after] if after else [])
        request = job_pb2.CreateJobRequest(parent=client.parent, job=job, request_id=str(uuid.uuid4()))
        answers = [self._until_answered(lambda: client.jobs.CreateJob(request, timeout=CALL_SECONDS)) for _ in range(2)]
        first, second = (answer.job if answer else None for answer in answers)
        if first is None or second is None:
            return None
        if first.name != second.name:
            self.wrong.append(f"one request made {first.name} and {second.name}")
        made = Acknowledged(plan, first.name, first.uid, request, deque(plan.steps))
        self.jobs.append(made)
        watcher = threading.Thread(target=self._guarded, args=(self._watch, made), name=f"watches {plan.name}")
        self._watchers.append(watcher)
        watcher.start()
        if plan.follower is not None:
            self._submit(client, plan.follower, first.name)
        if "tell" not in (call for _, call in plan.steps):
            self._tell(made)
        return made

    def _step(self, client: Client, job: Acknowledged, call: str) -> None:
        if call == "tell":
            self._tell(job)
        elif call == "go":
            (self._folder / f"{job.uid}.go").touch()
        elif call == "cancel":
            cancel = job_pb2.CancelJobRequest(name=job.name)
            self._until_answered(lambda: client.jobs.CancelJob(cancel, timeout=CALL_SECONDS))
        elif call == "pause":
            pause = job_pb2.PauseJobRequest(name=job.name)
            self._until_answered(lambda: client.jobs.PauseJob(pause, timeout=CALL_SECONDS))
        elif call == "resume":
            resume = job_pb2.ResumeJobRequest(name=job.name)
            self._until_answered(lambda: client.jobs.ResumeJob(resume, timeout=CALL_SECONDS))
        elif call == "update":
            changed = job_pb2.Job(name=job.name, priority=job.plan.priority + 1)
            update = job_pb2.UpdateJobRequest(job=changed, update_mask=FieldMask(paths=["priority"]))
            self._until_answered(lambda: client.jobs.UpdateJob(update, timeout=CALL_SECONDS))
        elif call == "delete":
            self._until_answered(lambda: client.jobs.DeleteJob(job_pb2.DeleteJobRequest(name=job.name), timeout=CALL_SECONDS))
        elif call == "delete data":
            data = dataset_pb2.DeleteDatasetVersionRequest(name=self._spare(client, "datasets"))
            self._until_answered(lambda: client.datasets.DeleteDatasetVersion(data, timeout=CALL_SECONDS))
        elif call == "delete model":
            model = model_pb2.DeleteModelVersionRequest(name=self._spare(client, "models"))
            self._until_answered(lambda: client.models.DeleteModelVersion(model, timeout=CALL_SECONDS))
        else:
            raise ValueError(call)

    def _spare(self, client: Client, kind: str) -> str:
        """The name of a version that nobody needs, the next one of its kind."""
        self.deleted[kind].append(len(self.deleted[kind]) + 1)
        return f"{client.parent}/{kind}/spare/versions/{self.deleted[kind][-1]}"

    def _tell(self, job: Acknowledged) -> None:
        plan = self._folder / f"{job.uid}.plan"
        unfinished = plan.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({"acts": job.plan.acts, "lingers": job.plan.lingers}))
        unfinished.rename(plan)

    def _until_answered(self, call: Callable[[], Any]) -> Any:
        """Repeat a call until it is answered. None where the test ends first."""
        repeated = False
        while not self._stop.is_set():
            try:
                return call()
            except (Unavailable, Cancelled, DeadlineExceeded):
                repeated = True
                time.sleep(LOOK_SECONDS)
            except (FailedPrecondition, NotFound):
                # The call before was not answered, but had its effect, and the job has gone on since, or what it named is gone.
                if not repeated:
                    raise
                return None
            except LuthierError as error:
                if not broke(error):
                    raise
                repeated = True
        return None

    def _watch(self, job: Acknowledged) -> None:
        """Open the watch again after the last number seen; the coordinator alone sees to it that each number comes once."""
        with self._client() as client:
            while not self._stop.is_set() and not (job.seen and job_pb2.JobState.Name(job.seen[-1].state) in ENDS):
                request = job_pb2.WatchJobRequest(name=job.name, after_sequence=len(job.seen))
                try:
                    for item in client.jobs.WatchJob(request, timeout=5.0):
                        if item.WhichOneof("item") != "event":
                            continue
                        if item.event.sequence != len(job.seen) + 1:
                            self.wrong.append(f"{job.plan.name}: event {item.event.sequence} came after {len(job.seen)}")
                            return
                        job.seen.append(item.event)
                except LuthierError as error:
                    if not broke(error):
                        raise
                    time.sleep(LOOK_SECONDS)


def _list(client: Client) -> job_pb2.ListJobsRequest:
    """The newest jobs: those before have long ended."""
    return job_pb2.ListJobsRequest(parent=client.parent, page_size=60)
