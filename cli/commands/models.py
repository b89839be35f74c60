"""`luthier model ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.command import command
from cli.confirm import confirm
from cli.context import Cli
from cli.failures import Failure
from cli.flags import SecretOption
from cli.follow import follow, succeeded, upload_bar
from cli.render.registry import lineage_tree, model_versions_table, model_view, models_table
from cli.values import id_from, pairs
from luthier.client import short_name
from luthier.client.names import full_version
from luthier.v1 import model_pb2
from luthier.v1.job_pb2 import Job
from luthier.v1.training_pb2 import ImportModelSpec

app = typer.Typer(name="model", help="Models: what was trained or brought in.", no_args_is_help=True, rich_markup_mode=None)

VersionArgument = Annotated[str, typer.Argument(help="name@3, name@alias, or name for the latest.", metavar="MODEL")]


@command(app, "import")
def import_model(
    cli: Cli,
    source: Annotated[str, typer.Argument(help="A local folder, builtin:tiny, or a hub id (org/name or hf:name).")],
    name: Annotated[str, typer.Option(help="Name of the model; by the source's name where absent.")] = "",
    request_id: Annotated[str, typer.Option(help="Makes the command safe to repeat: the same id gives the same version.")] = "",
    secret: SecretOption = None,
) -> None:
    """Bring a model in, and print its version. A local folder is uploaded; other sources are fetched by a job."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        with upload_bar(cli.out, f"uploading {source}") as progress:
            version = cli.client.upload_model(
                folder, name or id_from(folder.resolve().name), source, request_id or None, progress=progress
            )
    elif folder.is_file() or source.startswith((".", "~")):
        what = "is a file" if folder.is_file() else "does not exist"
        raise Failure(f"{source} {what}; a model is a folder with config.json, safetensors weights and tokenizer files", status=2)
    else:
        spec = ImportModelSpec(source=source, output_model=name or id_from(source.rpartition("/")[2].rpartition(":")[2]))
        job = cli.client.create_job(
            Job(import_model=spec, secrets=pairs(secret or (), "--secret", separator="")), request_id or None
        )
        cli.out.say(f"job {short_name(job.name)} fetches {source}")
        job = follow(cli, job)
        if not succeeded(job):
            raise Failure(
                f"{source} was not imported: {job.error.message or 'the job was cancelled'} (job {short_name(job.name)})"
            )
        version = cli.client.get_model_version(job.result.model_version)
    cli.out.answer(version, model_view(version))


@command(app, "list")
def list_models(
    cli: Cli, name: Annotated[str, typer.Argument(help="List the versions of this model.", show_default=False)] = ""
) -> None:
    """List models, or the versions of one."""
    if name:
        versions = list(cli.client.list_model_versions(name))
        cli.out.answer(model_pb2.ListModelVersionsResponse(model_versions=versions), model_versions_table(versions))
    else:
        models = list(cli.client.list_models())
        cli.out.answer(model_pb2.ListModelsResponse(models=models), models_table(models))


@command(app)
def show(cli: Cli, model: VersionArgument) -> None:
    """Show everything about a version."""
    version = cli.client.get_model_version(model)
    cli.out.answer(version, model_view(version))


@command(app)
def lineage(cli: Cli, model: VersionArgument) -> None:
    """Show what a version came from: job, data, base, and theirs."""
    name = full_version(cli.project, "models", model)
    answer = cli.client.models.GetLineage(model_pb2.GetLineageRequest(name=name))
    cli.out.answer(answer, lineage_tree(list(answer.nodes)) if answer.nodes else "nothing is known of where it came from")


@command(app)
def promote(
    cli: Cli,
    model: VersionArgument,
    alias: Annotated[str, typer.Option("--as", help="The alias that is to point at it.")] = "champion",
) -> None:
    """Point an alias at a version, and away from the one it pointed at."""
    name = full_version(cli.project, "models", model)
    version = cli.client.models.SetAlias(model_pb2.SetAliasRequest(name=name, alias=alias)).model_version
    cli.out.answer(version, model_view(version))


@command(app)
def delete(
    cli: Cli,
    versions: Annotated[list[str], typer.Argument(help="name@2: versions by their numbers.", metavar="VERSION...")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove versions of models with the aliases that point at them, and their files once nothing else needs them."""
    confirm(cli, f"deleting {', '.join(versions)}", yes)
    for version in versions:
        cli.client.delete_model_version(version)
        cli.out.line({"deleted": version}, f"deleted {version}")
