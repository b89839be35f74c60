"""`luthier train`, `sweep` and `evaluate`: job files written as flags."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

import typer

from cli import machine
from cli.command import command
from cli.context import Cli
from cli.failures import Failure
from cli.flags import FinetuneFlags, JobFlags, SweepFlags, dress, finetune_spec, sweep_spec
from cli.follow import follow, succeeded, upload_bar
from cli.render.estimates import estimate_view
from cli.render.jobs import job_view
from cli.values import id_from
from luthier.client import is_terminal, short_name
from luthier.client.uploads import model_files, sha256_of
from luthier.v1.evaluation_pb2 import EvaluateSpec
from luthier.v1.job_pb2 import Job


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    command(app)(train)
    command(app)(sweep)
    command(app)(evaluate)


def train(cli: Cli, finetune: FinetuneFlags, flags: JobFlags) -> None:
    """Fine-tune a base model on a data set."""
    spec = finetune_spec(finetune)
    check_machine(cli)
    spec.base = brought_up(cli, spec.base, flags.validate_only)
    send(cli, dress(Job(finetune=spec), flags), flags)


def sweep(cli: Cli, finetune: FinetuneFlags, search: SweepFlags, flags: JobFlags) -> None:
    """Search hyperparameters: many fine-tunes, the best of which is registered."""
    spec = sweep_spec(finetune_spec(finetune), search)
    check_machine(cli)
    spec.finetune.base = brought_up(cli, spec.finetune.base, flags.validate_only)
    send(cli, dress(Job(sweep=spec), flags), flags)


def evaluate(
    cli: Cli,
    model: Annotated[str, typer.Option(help="Registered version (name@3), builtin:tiny, a hub id, or a local folder.")],
    dataset: Annotated[str, typer.Option(help="Data set version, name@2, or name for the latest.")],
    flags: JobFlags,
    split: Annotated[str, typer.Option(help="Split to score; test where absent.")] = "",
    max_rows: Annotated[int, typer.Option(help="Most rows to score; 0 for all.")] = 0,
    label_key: Annotated[str, typer.Option(help="Key of the JSON answer that holds the label.")] = "",
    skip_generation: Annotated[bool, typer.Option("--skip-generation", help="Score by likelihood only.")] = False,
) -> None:
    """Score a model on rows that it has not seen."""
    spec = EvaluateSpec(
        model=brought_up(cli, model, flags.validate_only),
        dataset=dataset,
        split=split,
        max_rows=max_rows,
        label_key=label_key,
        skip_generation=skip_generation,
    )
    send(cli, dress(Job(evaluate=spec), flags), flags)


def send(cli: Cli, job: Job, flags: JobFlags) -> None:
    """Create a job, follow it where asked to, and print it."""
    wanted = with_full_names(cli, job)
    created = cli.client.create_job(wanted, flags.request_id or None, flags.validate_only)
    if flags.validate_only:
        say_what_it_needs(cli, wanted)
    elif flags.watch:
        cli.out.say(f"job {short_name(created.name)}")
        created = follow(cli, created)
    finish(cli, created, watched=flags.watch and not flags.validate_only)


def say_what_it_needs(cli: Cli, job: Job) -> None:
    """Tell people what a job that is fine would need."""
    cli.out.say("the job is fine; nothing was started")
    if not cli.json:
        cli.out.table(estimate_view(cli.client.estimate_job(job).estimate))


def with_full_names(cli: Cli, job: Job) -> Job:
    """A job whose references to other jobs are resource names, also where their ids were given."""
    job.after[:] = [cli.client.job_name(name) for name in job.after]
    return job


def finish(cli: Cli, job: Job, watched: bool) -> None:
    """Print a job; where it was followed and did not succeed, with exit status 1."""
    cli.out.answer(job, job_view(job))
    if not watched and job.name and not is_terminal(job.state) and not cli.json:
        cli.out.say(f"follow it with `luthier job watch {short_name(job.name)}`")
    if watched and not succeeded(job):
        raise typer.Exit(1)


def check_machine(cli: Cli) -> None:
    """Say before a job starts that this machine's own Ray could not carry it out."""
    if cli.stack is None or not cli.stack.ray.local or cli.stack.server != cli.server:
        return
    for check in (machine.compiler(), machine.headers()):
        if not check.ok:
            raise Failure(f"{check.detail}; {check.advice}")


def brought_up(cli: Cli, base: str, validate_only: bool) -> str:
    """Upload a base that is a folder on this machine, and return what to call it; other bases stay as they are."""
    folder = Path(base).expanduser()
    if not folder.is_dir():
        if base.startswith((".", "~")):
            raise Failure(
                f"there is no folder {base}; a base is a local folder, a hub id, name@version or builtin:tiny", status=2
            )
        return base
    if validate_only:
        raise Failure(
            f"{base} would have to be uploaded to be validated; run `luthier model import {base} --name ...` first", status=2
        )
    name = id_from(folder.resolve().name)
    # The same content is the same version, however often it is trained from.
    digest = hashlib.sha256("\n".join(f"{path.relative_to(folder)} {sha256_of(path)}" for path in model_files(folder)).encode())
    with upload_bar(cli.out, f"uploading {base}") as progress:
        version = cli.client.upload_model(folder, name, request_id=f"base-{name}-{digest.hexdigest()}"[:128], progress=progress)
    cli.out.say(f"uploaded {base} as model {short_name(version.name)}")
    return short_name(version.name)
