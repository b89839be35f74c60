"""`luthier demo`."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from cli.command import command
from cli.context import Cli
from cli.demo.run import Outcome, check, run, where_next
from cli.failures import Failure
from cli.signals import stoppable, undisturbed
from cli.stack import lifecycle
from cli.stack.processes import members

README = "README.md shows the same with your own data; `luthier --help` lists the commands"


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    command(app)(demo)


def demo(
    cli: Cli,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the stack running.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write what came out to this JSON file.")] = None,
) -> None:
    """Run the main job from end to end in a home of its own: import, fine-tune, evaluate, deploy, ask."""
    started = time.monotonic()
    own = cli.home_given is None
    home = Path(tempfile.mkdtemp(prefix="luthier-demo-")).resolve() if own else cli.home
    inner = Cli(home=home, json=cli.json, debug=cli.debug, own_key=True)
    if not own and (inner.stack is not None and members(home)):
        raise Failure(f"a stack runs in {home} already; the demo starts one of its own: `luthier down`, or choose another --home")
    fine = False
    try:
        with stoppable():
            cli.out.say(f"1/6  starting a stack in {home}")
            lifecycle.up(home, lifecycle.Wishes(), lambda text: cli.out.say(f"     {text}"))
            inner.__dict__.pop("stack", None)  # it was read before the stack was there
            outcome = run(inner, home, cli.out.say)
            content = outcome.report() | {"seconds": round(time.monotonic() - started, 1)}
            if report is not None:
                report.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            check(outcome)
            fine = True
    finally:
        inner.close()
        if not (keep and fine):
            clean_up(cli, home, remove=own and fine)
    finish(cli, home, outcome, content, keep, report)


def finish(cli: Cli, home: Path, outcome: Outcome, content: dict[str, object], keep: bool, report: Path | None) -> None:
    """Say what came out, and where to look next."""
    cli.out.say(where_next(home, outcome) if keep else README)
    if report is not None:
        cli.out.say(f"report: {report}")
    summary = (
        f"accuracy {content['accuracy_before']:.3f} before, {content['accuracy_after']:.3f} after; "
        f"model {content['model_version']}; {content['seconds']} s"
    )
    cli.out.answer(content, summary)


def clean_up(cli: Cli, home: Path, remove: bool) -> None:
    """Stop everything, see to it that nothing is left, and remove the home where it has done its duty."""
    with undisturbed():
        stopped = lifecycle.down(home, lambda _: None)
        left = members(home)
        if left:
            raise Failure(f"these processes of the demo are left: {', '.join(str(process.pid) for process in left)}")
        cli.out.say(f"stopped {len(stopped)} processes" if stopped else "nothing was running")
        if remove:
            shutil.rmtree(home, ignore_errors=True)
        else:
            cli.out.say(f"logs are in {home / 'logs'}")
