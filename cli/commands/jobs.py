"""`luthier job ...`."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

import typer

from cli.command import command
from cli.commands.train import finish
from cli.context import Cli
from cli.follow import event_line, figures_text, follow, follower, steps_text, succeeded
from cli.jobfile import read_job
from cli.render.jobs import job_view, jobs_table
from cli.render.text import when
from luthier.client import is_terminal, short_name
from luthier.v1.job_pb2 import ListJobsResponse, LogLine

app = typer.Typer(name="job", help="Jobs: anything that takes long.", no_args_is_help=True, rich_markup_mode=None)

JobArgument = Annotated[str, typer.Argument(help="The job's id, as `luthier job list` shows it.", metavar="JOB")]


@command(app)
def submit(
    cli: Cli,
    file: Annotated[str, typer.Option("--file", "-f", help="Job file, YAML or JSON; - for stdin.")],
    request_id: Annotated[str, typer.Option(help="Makes the command safe to repeat: the same id gives the same job.")] = "",
    validate_only: Annotated[bool, typer.Option("--validate-only", help="Check everything and start nothing.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Follow the job and print it as it ended.")] = False,
) -> None:
    """Create the job that a file describes."""
    job = cli.client.create_job(read_job(file), request_id or None, validate_only)
    if validate_only:
        cli.out.say("the job is fine; nothing was started")
    elif watch:
        cli.out.say(f"job {short_name(job.name)}")
        job = follow(cli, job)
    finish(cli, job, watched=watch and not validate_only)


@command(app, "list")
def list_jobs(
    cli: Cli,
    filter: Annotated[str, typer.Option(help="Terms joined by AND: state=RUNNING, kind=sweep, label.team=search.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="Most jobs to show.")] = 50,
) -> None:
    """List jobs, newest first."""
    jobs = list(islice(cli.client.list_jobs(filter, page_size=min(limit, 1000)), limit))
    cli.out.answer(ListJobsResponse(jobs=jobs), jobs_table(jobs))


@command(app)
def show(
    cli: Cli,
    job: JobArgument,
    confusion: Annotated[bool, typer.Option("--confusion", help="Show the confusion matrices too.")] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show the stack trace of a failure.")] = False,
) -> None:
    """Show everything about a job."""
    found = cli.client.get_job(job)
    cli.out.answer(found, job_view(found, confusion, traceback))


@command(app)
def watch(
    cli: Cli,
    job: JobArgument,
    after_sequence: Annotated[int, typer.Option(min=0, help="Number of the last event already seen.")] = 0,
) -> None:
    """Follow a job until it ends; with --output json one event or progress a line. Exit status 1 where it did not succeed."""
    found = cli.client.get_job(job)
    if cli.json or not cli.out.live:
        for item in cli.client.watch(found.name, after_sequence):
            if item.HasField("event"):
                cli.out.line(item, event_line(item.event))
            else:
                progress = item.progress
                cli.out.line(item, "  ".join((progress.phase, steps_text(progress), figures_text(progress))).strip())
            found = item.job if item.HasField("job") else found
    else:
        with follower(cli.out) as shown:
            for item in cli.client.watch(found.name, after_sequence):
                shown.take(item)
                found = item.job if item.HasField("job") else found
        cli.out.answer(found, job_view(found))
    # A watch that starts after the last event says nothing; the job itself does.
    if not is_terminal(found.state):
        found = cli.client.get_job(job)
    if not succeeded(found):
        raise typer.Exit(1)


@command(app)
def logs(
    cli: Cli,
    job: JobArgument,
    follow: Annotated[bool, typer.Option("--follow", "-F", help="Go on until the job ends.")] = False,
    source: Annotated[str, typer.Option(help="Only lines of this process: driver, rank-0, ...")] = "",
) -> None:
    """Print a job's log, oldest line first."""
    for line in cli.client.logs(job, follow=follow, source=source):
        cli.out.line(line, log_text(line))


def log_text(line: LogLine) -> str:
    """A log line for people."""
    return f"{when(line.time)[11:]}  {line.source:<8} {line.level:<7} {line.message}"


@command(app)
def cancel(cli: Cli, job: JobArgument) -> None:
    """Ask for a job to end."""
    found = cli.client.cancel_job(job)
    if not is_terminal(found.state) and not cli.json:
        cli.out.say("asked for; it ends once its processes have stopped")
    cli.out.answer(found, job_view(found))
