"""`luthier dataset ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.command import command
from cli.confirm import confirm
from cli.context import Cli
from cli.follow import upload_bar
from cli.render.registry import dataset_versions_table, dataset_view, datasets_table
from cli.values import pairs
from luthier.v1 import dataset_pb2

app = typer.Typer(name="dataset", help="Data sets: immutable, content-hashed rows.", no_args_is_help=True, rich_markup_mode=None)


@command(app, "import")
def import_dataset(
    cli: Cli,
    file: Annotated[Path, typer.Argument(help="JSONL, CSV or Parquet.")],
    name: Annotated[str, typer.Option(help="Name of the data set; a name that exists gets its next version.")],
    map: Annotated[
        list[str] | None,
        typer.Option(
            help="Parts of a row (prompt, completion, chosen, rejected, text, label, messages, split) from columns: "
            "text=Body,label=Queue.",
            metavar="PART=COLUMN",
        ),
    ] = None,
    format: Annotated[str, typer.Option(help="jsonl, csv or parquet; by the file's name where absent.")] = "",
    test_fraction: Annotated[
        float | None, typer.Option(help="Part of the rows held out as test, 0 to 0.5; 0.1 where absent.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the split; 42 where absent.")] = None,
    request_id: Annotated[str, typer.Option(help="Makes the command safe to repeat: the same id gives the same version.")] = "",
) -> None:
    """Send a file up as the next version of a data set, and print the version."""
    with upload_bar(cli.out, f"uploading {file.name}") as progress:
        version = cli.client.upload_dataset(
            file,
            name,
            columns=pairs(map or (), "--map"),
            format=format,
            test_fraction=test_fraction,
            split_seed=seed,
            request_id=request_id or None,
            progress=progress,
        )
    cli.out.answer(version, dataset_view(version))


@command(app, "list")
def list_datasets(
    cli: Cli, name: Annotated[str, typer.Argument(help="List the versions of this data set.", show_default=False)] = ""
) -> None:
    """List data sets, or the versions of one."""
    if name:
        versions = list(cli.client.list_dataset_versions(name))
        cli.out.answer(dataset_pb2.ListDatasetVersionsResponse(dataset_versions=versions), dataset_versions_table(versions))
    else:
        datasets = list(cli.client.list_datasets())
        cli.out.answer(dataset_pb2.ListDatasetsResponse(datasets=datasets), datasets_table(datasets))


@command(app)
def show(cli: Cli, version: Annotated[str, typer.Argument(help="name@2, or name for the latest.")]) -> None:
    """Show everything about a version."""
    found = cli.client.get_dataset_version(version)
    cli.out.answer(found, dataset_view(found))


@command(app)
def delete(
    cli: Cli,
    versions: Annotated[list[str], typer.Argument(help="name@2: versions by their numbers.", metavar="VERSION...")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove versions of data sets, and their rows unless another version has the very same."""
    confirm(cli, f"deleting {', '.join(versions)}", yes)
    for version in versions:
        cli.client.delete_dataset_version(version)
        cli.out.line({"deleted": version}, f"deleted {version}")
