"""The program `luthier`: one file a noun, each command one or two calls of the stubs."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import typer

from cli.command import Shared, take_shared
from cli.commands import (
    backup,
    datasets,
    demo,
    doctor,
    endpoints,
    jobs,
    keys,
    members,
    models,
    projects,
    schedules,
    secrets,
    stack,
    train,
)
from cli.failures import FAILED, USAGE, explain, one_line

INTERRUPTED = 130

app = typer.Typer(
    name="luthier",
    help="Fine-tune, deploy and watch over language models on your own machines.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@take_shared(app)
def root(context: typer.Context, shared: Shared) -> None:
    """Keep the options given before the command for the command."""
    context.obj = shared


stack.register(app)
doctor.register(app)
demo.register(app)
backup.register(app)
train.register(app)
for noun in (datasets, jobs, schedules, models, endpoints, secrets, projects, members, keys):
    app.add_typer(noun.app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status; errors are one line on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = app(args=given, prog_name="luthier", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has seen enough; a second complaint at exit would help nobody.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        return complain(error, debug="--debug" in given or bool(os.environ.get("LUTHIER_DEBUG")))
    return status if isinstance(status, int) else 0


def complain(error: Exception, debug: bool) -> int:
    """Say what is wrong in one line (after the stack trace, where asked for), and return the exit status."""
    if debug:
        traceback.print_exception(error)
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error, file=sys.stderr)
        return USAGE
    if hasattr(error, "format_message"):  # the command line itself is wrong
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "luthier"
        message, status = f"{one_line(error.format_message())}; see `{path} --help`", USAGE
    elif isinstance(error, typer.Abort):
        message, status = "given up", FAILED
    else:
        message, status = explain(error)
    print(f"error: {message}", file=sys.stderr)
    return status


def run() -> None:
    """Entry point of the installed program."""
    sys.exit(main())
