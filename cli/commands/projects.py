"""`luthier project ...`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from cli.command import command
from cli.context import Cli
from cli.failures import USAGE, Failure
from cli.render.projects import project_view, projects_table, usage_table
from cli.values import amount
from luthier.v1 import admin_pb2
from luthier.v1.admin_pb2 import ListProjectsResponse, Project

app = typer.Typer(
    name="project", help="Projects: tenants, and their shares of the cluster.", no_args_is_help=True, rich_markup_mode=None
)

IdArgument = Annotated[str, typer.Argument(help="The project's id.", metavar="PROJECT")]
IdOrOwn = Annotated[str, typer.Argument(help="The project's id; that of --project where absent.", metavar="[PROJECT]")]

# From options to fields of the project: message, field, and how many of the field's units one of the option's is.
AMOUNTS = {
    "quota_cpus": ("quota", "cpus", 1),
    "quota_gpus": ("quota", "gpus", 1),
    "limit_cpus": ("limit", "cpus", 1),
    "limit_gpus": ("limit", "gpus", 1),
    "budget_cpu_hours": ("budget", "cpu_seconds", 3600),
    "budget_gpu_hours": ("budget", "gpu_seconds", 3600),
}


@dataclass
class ProjectFlags:
    """What of a project can be chosen."""

    name: Annotated[str | None, typer.Option(help="A person's name for it.")] = None
    share: Annotated[float | None, typer.Option(help="Its share of what is free, relative to others; 1 where absent.")] = None
    quota_cpus: Annotated[str, typer.Option(help="Logical CPUs that it can always have; none for no such right.")] = ""
    quota_gpus: Annotated[str, typer.Option(help="GPUs that it can always have; none for no such right.")] = ""
    limit_cpus: Annotated[str, typer.Option(help="Most logical CPUs that it may hold at a time; none for no limit.")] = ""
    limit_gpus: Annotated[str, typer.Option(help="Most GPUs that it may hold at a time; none for no limit.")] = ""
    budget_cpu_hours: Annotated[str, typer.Option(help="Most CPU-hours that its jobs may spend in all; none for any.")] = ""
    budget_gpu_hours: Annotated[str, typer.Option(help="Most GPU-hours that its jobs may spend in all; none for any.")] = ""


def dress(project: Project, flags: ProjectFlags) -> list[str]:
    """Write what was chosen into the project; the names of its fields that were touched."""
    touched = []
    if flags.name is not None:
        project.display_name = flags.name
        touched.append("display_name")
    if flags.share is not None:
        project.share = flags.share
        touched.append("share")
    for option, (message, field, unit) in AMOUNTS.items():
        if text := getattr(flags, option):
            value = amount(text, f"--{option.replace('_', '-')}")
            if value is None:
                getattr(project, message).ClearField(field)
            else:
                setattr(getattr(project, message), field, value * unit)
            touched.append(message)
    return list(dict.fromkeys(touched))


@command(app)
def create(cli: Cli, project_id: IdArgument, flags: ProjectFlags) -> None:
    """Make a project. For operators; `luthier key create --project PROJECT` then makes its first key."""
    wanted = Project()
    dress(wanted, flags)
    made = cli.client.admin.CreateProject(admin_pb2.CreateProjectRequest(project_id=project_id, project=wanted)).project
    cli.out.answer(made, project_view(made))


@command(app, "list")
def list_projects(cli: Cli) -> None:
    """List the projects that the key may see, and what they hold."""
    projects = list(cli.client.list_projects())
    cli.out.answer(ListProjectsResponse(projects=projects), projects_table(projects))


@command(app)
def show(cli: Cli, project_id: IdOrOwn = "") -> None:
    """Show everything about a project."""
    found = cli.client.get_project(project_id)
    cli.out.answer(found, project_view(found))


@command(app)
def update(cli: Cli, project_id: IdArgument, flags: ProjectFlags) -> None:
    """Change what is given and leave the rest. For operators."""
    changed = cli.client.get_project(project_id)
    touched = dress(changed, flags)
    if not touched:
        raise Failure("nothing to change is given; `luthier project update --help` lists what can be", USAGE)
    # The etag, because amounts that were not given are sent back as they were read.
    request = admin_pb2.UpdateProjectRequest(project=changed, etag=changed.etag)
    request.update_mask.paths.extend(touched)
    changed = cli.client.admin.UpdateProject(request).project
    cli.out.answer(changed, project_view(changed))


@command(app)
def usage(
    cli: Cli,
    project_id: Annotated[str, typer.Argument(help="One project only, by its id.", metavar="[PROJECT]")] = "",
) -> None:
    """Report what jobs have spent of the budgets: of one project, or of all that the key may see."""
    projects = [cli.client.get_project(project_id)] if project_id else list(cli.client.list_projects())
    cli.out.answer(ListProjectsResponse(projects=projects), usage_table(projects))
