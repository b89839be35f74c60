"""Run as a script in place of `python -m agents`: the very agent, with a run of a second or so that does what the test planned.

What each of its processes did is written down beside the coordinator, in `<folder>/<uid>.seen`, a line each: when, which process,
which run, and a word. A process holds a lock on the job from its first moment to its last, whichever way it ends, so that two
runs at a time cannot go unnoticed. `<folder>/<uid>.plan` says what its runs are to do, and appears when the test wants them to
begin; `<folder>/<uid>.go` appears when one that waits for it may go on.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from agents import __main__ as agent
from agents.failures import RunPaused, check_wish
from agents.link import Link
from common.errors import InvalidArgument, LuthierError, Unavailable
from luthier.agent.v1 import agent_pb2
from luthier.v1 import job_pb2

PATIENCE = 180.0
"""Seconds after which whatever waits gives up, so that a broken test leaves nothing behind."""

STEPS, STEP_SECONDS, SAVE_EVERY = 8, 0.08, 4


class Job:
    """What this process knows of its job, and what it writes down."""

    def __init__(self, folder: Path) -> None:
        self.uid, self.run = os.environ["LUTHIER_JOB_UID"], int(os.environ["LUTHIER_RUN"])
        self._folder = folder
        self._lock = os.open(folder / f"{self.uid}.lock", os.O_RDWR | os.O_CREAT)

    def see(self, word: str) -> None:
        """Write a line that no other process can tear apart."""
        line = f"{time.time():.6f} {os.getpid()} {self.run} {word}\n".encode()
        file = os.open(self._folder / f"{self.uid}.seen", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, line)
        os.close(file)

    def lock(self) -> bool:
        """Take the job for as long as this process lives. False where another process has it."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def act(self) -> tuple[str, float]:
        """What this run is to do, and how long the first run's process stays on after its end; waits until that is told."""
        self._wait_for("plan")
        plan = json.loads((self._folder / f"{self.uid}.plan").read_text())
        return plan["acts"][min(self.run, len(plan["acts"])) - 1], plan["lingers"] if self.run == 1 else 0.2

    def wait_for_go(self, link: Link) -> None:
        """Wait until the test lets it go on. Raises RunCancelled where the run is cancelled before."""
        for _ in self._until("go"):
            if link.wished.is_set():
                check_wish(link)

    def _wait_for(self, what: str) -> None:
        for _ in self._until(what):
            pass

    def _until(self, what: str) -> Iterator[None]:
        deadline = time.monotonic() + PATIENCE
        while not (self._folder / f"{self.uid}.{what}").exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"nobody wrote {what}")
            yield
            time.sleep(0.05)


def work(link: Link, response: agent_pb2.ClaimRunResponse, heed: bool = True) -> None:
    """Train, so to say: a phase, steps with figures, a checkpoint now and then."""
    link.phase("training", "pretends to train")
    first = max((point.step for point in response.resume_from), default=0)
    for step in range(first + 1, first + STEPS + 1):
        if heed:
            check_wish(link)
        link.progress(job_pb2.Progress(phase="training", step=step, total_steps=first + STEPS))
        link.metrics(step, {"loss": 1.0 / step})
        if step % SAVE_EVERY == 0:
            save(link, response, step)
        elif step % SAVE_EVERY == 2:
            # So that there are reports without an event too.
            link.flush(1.0)
        time.sleep(STEP_SECONDS)


def save(link: Link, response: agent_pb2.ClaimRunResponse, step: int) -> None:
    """Report a checkpoint; nobody looks for its files."""
    link.checkpoint(
        job_pb2.Checkpoint(step=step, uri=f"{response.run_uri}/checkpoint-{step}", manifest_sha256="0" * 64, size_bytes=1)
    )


def succeed(response: agent_pb2.ClaimRunResponse) -> agent_pb2.OutcomeReport:
    """The outcome of a run that made a model."""
    model = agent_pb2.ProducedModel(uri=f"{response.run_uri}/model", content_hash="0" * 64, model_kind="full", size_bytes=1)
    return agent_pb2.OutcomeReport(state=job_pb2.JOB_STATE_SUCCEEDED, end_reason=job_pb2.END_REASON_COMPLETED, model=model)


def until_wished(link: Link, wish: agent_pb2.Wish.ValueType) -> None:
    """Go on until the coordinator wants something."""
    deadline = time.monotonic() + PATIENCE
    while link.wish != wish and not link.wished.is_set() and time.monotonic() < deadline:
        time.sleep(0.05)


def play(act: str, job: Job, link: Link, response: agent_pb2.ClaimRunResponse) -> agent_pb2.OutcomeReport:
    """Carry a run out as planned."""
    pause = agent_pb2.WISH_PAUSE
    if act == "succeed":
        work(link, response)
    elif act == "fail":
        work(link, response)
        raise InvalidArgument("the rows are no rows", "BAD_DATA")
    elif act == "die":
        work(link, response)
        die(job)
    elif act == "lose a worker":
        work(link, response)
        raise Unavailable("a worker died", "WORKER_LOST")
    elif act == "pause":
        work(link, response, heed=False)
        until_wished(link, pause)
        check_wish(link)
    elif act == "pause when let":
        until_wished(link, pause)
        job.wait_for_go(link)
        raise RunPaused
    elif act == "succeed at a pause":
        until_wished(link, pause)
    elif act == "fail at a pause":
        until_wished(link, pause)
        raise InvalidArgument("the rows are no rows", "BAD_DATA")
    elif act == "go on until cancelled":
        until_wished(link, agent_pb2.WISH_CANCEL)
        check_wish(link)
    elif act == "be deaf":
        link.phase("training", "hears nothing")
        time.sleep(PATIENCE)
    else:
        raise InvalidArgument(f"{act!r} is not an act", "BAD_ACT")
    return succeed(response)


def die(job: Job) -> None:
    """End as the kernel ends a process that took too much memory."""
    job.see("dies")
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path) -> int:
    """Be the agent of the run that the environment names."""
    job = Job(folder)
    if not job.lock():
        job.see("overlaps")
        return 1
    job.see("starts")
    act, lingers = job.act()
    if act == "die unclaimed":
        die(job)

    def run(link: Link, response: agent_pb2.ClaimRunResponse) -> agent_pb2.OutcomeReport:
        job.see("begins")
        return play(act, job, link, response)

    runner: Callable[[str | None], agent.Runner] = lambda _kind: run  # noqa: E731
    agent.find_runner = runner
    try:
        status = agent.main()
    except LuthierError as error:
        print(error.message, file=sys.stderr)
        status = 1
    job.see("reported" if status == 0 else "was refused")
    time.sleep(lingers)
    job.see("ends")
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
