"""How a function becomes a command: shared options are added to every one, and groups of options are dataclasses."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from cli.context import Cli, resolve


class Format(StrEnum):
    """How to print answers."""

    table = "table"
    json = "json"


@dataclasses.dataclass
class Shared:
    """The options that work everywhere, before a command and after it."""

    server: Annotated[
        str | None, typer.Option(help="Coordinator, host:port. Else LUTHIER_SERVER, else that of the home.", metavar="HOST:PORT")
    ] = None
    home: Annotated[Path | None, typer.Option(help="Home of a local stack. Else LUTHIER_HOME, else ~/.luthier.")] = None
    project: Annotated[str | None, typer.Option(help="Project. Else LUTHIER_PROJECT, else default.")] = None
    output: Annotated[Format | None, typer.Option("--output", "-o", help="Print tables for people or JSON for programs.")] = None
    debug: Annotated[bool, typer.Option("--debug", help="Show stack traces of errors.")] = False


def _options_of(group: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(group)
    ]


def command(app: typer.Typer, name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command of `app`.

    Its first parameter is the `Cli`. A parameter whose type is a dataclass stands for one option per field. The function's
    docstring is the help.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        groups: dict[str, type[Any]] = {}
        parameters = [inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
        for parameter in list(inspect.signature(function).parameters.values())[1:]:
            kind = hints[parameter.name]
            if dataclasses.is_dataclass(kind):
                groups[parameter.name] = kind  # type: ignore[assignment]
                parameters += _options_of(kind)  # type: ignore[arg-type]
            else:
                parameters.append(parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))
        parameters += _options_of(Shared)

        def call(**values: Any) -> None:
            context: typer.Context = values.pop("ctx")
            cli = _cli(context, _take(values, Shared))
            for group_name, group in groups.items():
                values[group_name] = _take(values, group)
            try:
                function(cli, **values)
            finally:
                cli.close()

        call.__name__, call.__doc__ = function.__name__, function.__doc__
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app.command(name or function.__name__)(call)
        return function

    return register


def take_shared(app: typer.Typer) -> Callable[[Callable[[typer.Context, Shared], None]], None]:
    """Register a function that is called with the options given before any command."""

    def register(function: Callable[[typer.Context, Shared], None]) -> None:
        def call(**values: Any) -> None:
            context: typer.Context = values.pop("ctx")
            if values.pop("version"):
                print(f"luthier {metadata.version('luthier')}")
                raise typer.Exit
            function(context, _take(values, Shared))

        parameters = [
            inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
            *_options_of(Shared),
            inspect.Parameter(
                "version",
                inspect.Parameter.KEYWORD_ONLY,
                default=False,
                annotation=Annotated[bool, typer.Option("--version", help="Print the version.")],
            ),
        ]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app.callback(invoke_without_command=False)(call)

    return register


def _take(values: dict[str, Any], group: type[Any]) -> Any:
    return group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})


def _cli(context: typer.Context, given: Shared) -> Cli:
    root: Shared = context.find_root().obj or Shared()
    output = given.output or root.output
    return resolve(
        given.home or root.home,
        given.server or root.server,
        given.project or root.project,
        output.value if output else None,
        given.debug or root.debug,
    )
