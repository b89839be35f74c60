"""`luthier job ...`."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

import typer

from cli.command import command
from cli.commands.train import finish, say_what_it_needs, with_full_names
from cli.confirm import confirm
from cli.context import Cli
from cli.flags import set_path
from cli.follow import event_line, figures_text, follow, follower, steps_text, succeeded
from cli.jobfile import read_job
from cli.render.estimates import estimate_view
from cli.render.jobs import job_view, jobs_table
from cli.render.text import when
from cli.values import duration, pairs
from luthier.client import is_terminal, short_name
from luthier.v1.job_pb2 import JOB_STATE_PAUSING, Job, ListJobsResponse, LogLine

app = typer.Typer(name="job", help="Jobs: anything that takes long.", no_args_is_help=True, rich_markup_mode=None)

FIRST_OUTPUT = 40
"""Fields of a Job with this number or a higher one are output only (see job.proto)."""

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
    wanted = with_full_names(cli, read_job(file))
    job = cli.client.create_job(wanted, request_id or None, validate_only)
    if validate_only:
        say_what_it_needs(cli, wanted)
    elif watch:
        cli.out.say(f"job {short_name(job.name)}")
        job = follow(cli, job)
    finish(cli, job, watched=watch and not validate_only)


@command(app)
def estimate(
    cli: Cli,
    file: Annotated[str, typer.Option("--file", "-f", help="Job file, YAML or JSON; - for stdin.")],
) -> None:
    """Tell what the job of a file would need: memory, duration, and its place in the queue. Nothing is recorded."""
    answer = cli.client.estimate_job(with_full_names(cli, read_job(file)))
    cli.out.answer(answer, estimate_view(answer.estimate))


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
    job: Annotated[str, typer.Argument(help="Id of the job; without one, all jobs of the project are followed.")] = "",
    after_sequence: Annotated[
        int | None, typer.Option(min=0, help="Number of the last event already seen. All of a job; of a project those to come.")
    ] = None,
) -> None:
    """Follow a job until it ends, or all jobs until Ctrl-C; with --output json one event or progress a line.

    Exit status 1 where the job did not succeed.
    """
    if not job:
        for news in cli.client.watch_jobs(-1 if after_sequence is None else after_sequence):
            cli.out.line(news, f"{short_name(news.job)}  {event_line(news.event)}")
        return
    after_sequence = after_sequence or 0
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
    level: Annotated[str, typer.Option(help="Only lines of at least this level: info, warning, error, ...")] = "",
    grep: Annotated[str, typer.Option("--grep", "-e", help="Only lines in which this regular expression is found.")] = "",
    run: Annotated[int, typer.Option(min=0, help="Only lines of this run; all of them if absent.")] = 0,
) -> None:
    """Print a job's log, oldest line first, over all its runs."""
    for line in cli.client.logs(job, follow=follow, source=source, level=level, pattern=grep, run=run):
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


@command(app)
def pause(cli: Cli, job: JobArgument) -> None:
    """Ask for a job to save a checkpoint and give its place up; one that waits stays where it is until it is resumed."""
    found = cli.client.pause_job(job)
    if found.state == JOB_STATE_PAUSING and not cli.json:
        cli.out.say(f"it saves and stops; `luthier job resume {short_name(found.name)}` goes on from there")
    cli.out.answer(found, job_view(found))


@command(app)
def resume(cli: Cli, job: JobArgument) -> None:
    """Queue a paused job again; it goes on from its last checkpoint."""
    found = cli.client.resume_job(job)
    cli.out.answer(found, job_view(found))


@command(app)
def update(
    cli: Cli,
    job: JobArgument,
    name: Annotated[str | None, typer.Option(help="A person's name for the job.")] = None,
    priority: Annotated[int | None, typer.Option(help="-100 to 100; more starts sooner.")] = None,
    time_limit: Annotated[str | None, typer.Option(help="Stop and fail it after this long; an empty text for no limit.")] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="Free pair key=value instead of those it has; may be repeated.", metavar="KEY=VALUE")
    ] = None,
    max_retries: Annotated[int | None, typer.Option(help="Retries after faults of the machines.")] = None,
) -> None:
    """Change a job that has not ended."""
    changes, fields = Job(), []
    if name is not None:
        changes.display_name = name
        fields.append("display_name")
    if priority is not None:
        changes.priority = priority
        fields.append("priority")
    if time_limit is not None:
        if time_limit:
            changes.time_limit.FromMicroseconds(round(duration(time_limit, "--time-limit") * 1e6))
        fields.append("time_limit")
    if label is not None:
        changes.labels.update(pairs(label, "--label", separator=""))
        fields.append("labels")
    if max_retries is not None:
        changes.retry.max_retries = max_retries
        fields.append("retry")
    found = cli.client.update_job(job, changes, *fields)
    cli.out.answer(found, job_view(found))


@command(app)
def delete(
    cli: Cli,
    jobs: Annotated[list[str], typer.Argument(help="Ids of jobs that have ended.", metavar="JOB...")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove jobs that have ended, with their logs, figures, checkpoints and files. The models that they made stay."""
    confirm(cli, f"deleting {', '.join(short_name(job) for job in jobs)}", yes)
    for job in jobs:
        cli.client.delete_job(job)
        cli.out.line({"deleted": short_name(job)}, f"deleted {short_name(job)}")


@command(app)
def rerun(
    cli: Cli,
    job: JobArgument,
    set: Annotated[
        list[str] | None,
        typer.Option(help="A field that is to differ, by its path: hyperparameters.seed=7.", metavar="PATH=VALUE"),
    ] = None,
    request_id: Annotated[str, typer.Option(help="Makes the command safe to repeat: the same id gives the same job.")] = "",
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Follow the job and print it as it ended.")] = False,
) -> None:
    """Create a job like another one, from the beginning, with what it read pinned to the versions that one read."""
    copy = asked_for(cli.client.get_job(job))
    for path, value in pairs(set or (), "--set", separator="").items():
        set_path(copy, path, value)
    created = cli.client.create_job(copy, request_id or None)
    if watch:
        cli.out.say(f"job {short_name(created.name)}")
        created = follow(cli, created)
    finish(cli, created, watched=watch)


def asked_for(job: Job) -> Job:
    """A job without what was observed of it: the part that a user writes."""
    copy = Job()
    copy.CopyFrom(job)
    for field in Job.DESCRIPTOR.fields:
        if field.number >= FIRST_OUTPUT or field.name in ("name", "uid"):
            copy.ClearField(field.name)  # type: ignore[arg-type]
    return copy
