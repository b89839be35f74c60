"""Following a job: a progress bar with the time remaining for people, a line per event elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.progress import (
    BarColumn,
    DownloadColumn,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

from cli.context import Cli
from cli.output import Output
from cli.render.text import duration, number, when
from luthier.client import is_terminal, short_name
from luthier.client.uploads import Progress as UploadProgress
from luthier.v1.job_pb2 import JOB_STATE_SUCCEEDED, Job, JobEvent, JobState, Progress, WatchJobResponse

REFRESH_PER_SECOND = 4
PARTS_SAID = 10


def job_columns() -> list[ProgressColumn]:
    """The columns of a job's progress bar."""
    return [
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        TextColumn("{task.fields[steps]}"),
        TextColumn("{task.fields[figures]}", style="dim"),
    ]


class Follower(Protocol):
    """Takes the items of a watch and shows them."""

    def take(self, item: WatchJobResponse) -> None:
        """Show one item."""


class LiveFollower:
    """One moving line, with the events above it."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._task: TaskID = bar.add_task("waiting", total=None, steps="", figures="")

    def take(self, item: WatchJobResponse) -> None:
        """Show one item."""
        if item.HasField("event"):
            self._bar.console.print(event_line(item.event), markup=False, highlight=False)
            if is_terminal(item.event.state):
                self._bar.update(self._task, visible=False)
            else:
                self._bar.update(self._task, description=JobState.Name(item.event.state).removeprefix("JOB_STATE_").lower())
        elif item.HasField("progress"):
            progress = item.progress
            self._bar.update(
                self._task,
                description=progress.phase.replace("_", " ") or "running",
                total=progress.total_steps or None,
                completed=progress.step,
                steps=steps_text(progress),
                figures=figures_text(progress),
            )


class PlainFollower:
    """A line for each event, each new phase, and each tenth of the way."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._said = ("", -1)

    def take(self, item: WatchJobResponse) -> None:
        """Show one item."""
        if item.HasField("event"):
            self._out.say(event_line(item.event))
        elif item.HasField("progress"):
            progress = item.progress
            part = PARTS_SAID * progress.step // progress.total_steps if progress.total_steps else -1
            if progress.phase and (progress.phase, part) != self._said:
                self._said = (progress.phase, part)
                parts = (progress.phase.replace("_", " "), steps_text(progress), figures_text(progress))
                self._out.say("  ".join(text for text in parts if text))


def event_line(event: JobEvent) -> str:
    """An event as a line of text."""
    state = JobState.Name(event.state).removeprefix("JOB_STATE_")
    return f"{when(event.time)[11:]}  {state:<10} {event.message}".rstrip()


def steps_text(progress: Progress) -> str:
    """How far, in steps."""
    return f"{progress.step}/{progress.total_steps}" if progress.total_steps else ""


def figures_text(progress: Progress) -> str:
    """Loss, speed and time remaining, where known."""
    parts = []
    if progress.loss:
        parts.append(f"loss {progress.loss:.3f}")
    if progress.tokens_per_second:
        parts.append(f"{number(round(progress.tokens_per_second))} tokens/s")
    if progress.HasField("remaining"):
        parts.append(f"{duration(progress.remaining)} left")
    return ", ".join(parts)


@contextmanager
def follower(out: Output) -> Iterator[Follower]:
    """The follower that suits where stderr goes."""
    if not out.live:
        yield PlainFollower(out)
        return
    with Bar(*job_columns(), console=out.stderr, transient=True, refresh_per_second=REFRESH_PER_SECOND) as bar:
        yield LiveFollower(bar)


def follow(cli: Cli, job: Job, outlives_us: bool = True) -> Job:
    """Show a job on stderr until it has ended, and return it as it ended. Ctrl-C stops the showing, not the job."""
    ended = None
    try:
        with follower(cli.out) as shown:
            for item in cli.client.watch(job.name):
                shown.take(item)
                if item.HasField("job"):
                    ended = item.job
    except KeyboardInterrupt:
        if outlives_us:
            name = short_name(job.name)
            cli.out.say(f"\nthe job goes on; `luthier job watch {name}` follows it, `luthier job cancel {name}` ends it")
        raise
    return ended or cli.client.get_job(job.name)


def succeeded(job: Job) -> bool:
    """Whether a job ended well."""
    return job.state == JOB_STATE_SUCCEEDED


@contextmanager
def upload_bar(out: Output, what: str) -> Iterator[UploadProgress]:
    """A bar for an upload; elsewhere than on a terminal it says nothing."""
    if not out.live:
        yield lambda _done, _total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=out.stderr, transient=True) as bar:
        task = bar.add_task(what, total=None)
        lock = threading.Lock()  # gRPC asks for chunks from a thread of its own

        def show(done: int, total: int) -> None:
            with lock:
                bar.update(task, completed=done, total=total)

        yield show
