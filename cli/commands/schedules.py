"""`luthier schedule ...`."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.command import command
from cli.commands.train import with_full_names
from cli.confirm import confirm
from cli.context import Cli
from cli.failures import USAGE, Failure
from cli.jobfile import read_job
from cli.render.jobs import job_view
from cli.render.schedules import schedule_view, schedules_table
from cli.values import duration
from luthier.client import short_name
from luthier.v1.schedule_pb2 import ListSchedulesResponse, Overlap, Schedule

app = typer.Typer(name="schedule", help="Schedules: jobs by the clock.", no_args_is_help=True, rich_markup_mode=None)

OVERLAPS = {"skip": Overlap.OVERLAP_SKIP, "allow": Overlap.OVERLAP_ALLOW, "replace": Overlap.OVERLAP_REPLACE}

NameArgument = Annotated[str, typer.Argument(help="The schedule's id.", metavar="SCHEDULE")]
CronOption = Annotated[str, typer.Option(help="'0 3 * * *' (minute, hour, day, month, day of the week), @hourly, @daily, ...")]
ZoneOption = Annotated[str, typer.Option("--tz", help="IANA time zone of --cron, for example Europe/Berlin; UTC where absent.")]
FileOption = Annotated[str, typer.Option("--file", "-f", help="Job file, YAML or JSON; - for stdin.")]
OverlapOption = Annotated[str, typer.Option(help="While the last job has not ended: skip (where absent), allow or replace.")]
CatchUpOption = Annotated[str, typer.Option(help="How late a job may be created, for example 2h; 1h where absent.")]


@command(app)
def create(
    cli: Cli,
    name: NameArgument,
    cron: CronOption,
    file: FileOption,
    tz: ZoneOption = "",
    overlap: OverlapOption = "",
    catch_up: CatchUpOption = "",
    paused: Annotated[bool, typer.Option("--paused", help="Record it and create nothing yet.")] = False,
) -> None:
    """Create the job that a file describes again and again, by the clock."""
    wanted = Schedule(cron=cron, paused=paused)
    _dress(cli, wanted, tz=tz, overlap=overlap, catch_up=catch_up, file=file)
    made = cli.client.create_schedule(name, wanted)
    cli.out.answer(made, schedule_view(made))


@command(app, "list")
def list_schedules(cli: Cli) -> None:
    """List schedules, when each comes next, and what became of the last time."""
    found = list(cli.client.list_schedules())
    cli.out.answer(ListSchedulesResponse(schedules=found), schedules_table(found))


@command(app)
def show(cli: Cli, name: NameArgument) -> None:
    """Show everything about a schedule, with its last times."""
    found = cli.client.get_schedule(name)
    cli.out.answer(found, schedule_view(found))


@command(app)
def update(
    cli: Cli,
    name: NameArgument,
    cron: CronOption = "",
    file: FileOption = "",
    tz: ZoneOption = "",
    overlap: OverlapOption = "",
    catch_up: CatchUpOption = "",
) -> None:
    """Change what is given and leave the rest."""
    wanted = Schedule(cron=cron)
    touched = [*(["cron"] if cron else []), *_dress(cli, wanted, tz=tz, overlap=overlap, catch_up=catch_up, file=file)]
    if not touched:
        raise Failure("nothing to change is given; `luthier schedule update --help` lists what can be", USAGE)
    changed = cli.client.update_schedule(name, wanted, *touched)
    cli.out.answer(changed, schedule_view(changed))


@command(app)
def pause(cli: Cli, name: NameArgument) -> None:
    """Create nothing more until `luthier schedule resume`."""
    changed = cli.client.update_schedule(name, Schedule(paused=True), "paused")
    cli.out.answer(changed, schedule_view(changed))


@command(app)
def resume(cli: Cli, name: NameArgument) -> None:
    """Go on with a paused schedule, from its next time."""
    changed = cli.client.update_schedule(name, Schedule(paused=False), "paused")
    cli.out.answer(changed, schedule_view(changed))


@command(app)
def run(cli: Cli, name: NameArgument) -> None:
    """Create the schedule's job now, besides its times."""
    job = cli.client.run_schedule(name)
    cli.out.say(f"job {short_name(job.name)}")
    cli.out.answer(job, job_view(job))


@command(app)
def delete(
    cli: Cli,
    name: NameArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """End a schedule for good; the jobs that it made stay."""
    confirm(cli, f"deleting {short_name(name)}", yes)
    cli.client.delete_schedule(name)
    cli.out.line({"deleted": short_name(name)}, f"deleted {short_name(name)}")


def _dress(cli: Cli, schedule: Schedule, *, tz: str, overlap: str, catch_up: str, file: str) -> list[str]:
    """Write what was given into the schedule; the names of the fields that were."""
    touched = []
    if tz:
        schedule.time_zone = tz
        touched.append("time_zone")
    if overlap:
        if overlap not in OVERLAPS:
            raise Failure(f"--overlap {overlap!r} is none of {', '.join(OVERLAPS)}", USAGE)
        schedule.overlap = OVERLAPS[overlap]
        touched.append("overlap")
    if catch_up:
        schedule.catch_up.FromMilliseconds(round(duration(catch_up, "--catch-up") * 1000))
        touched.append("catch_up")
    if file:
        schedule.job.CopyFrom(with_full_names(cli, read_job(file)))
        touched.append("job")
    return touched
