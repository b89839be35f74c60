"""What every command knows: where the coordinator is, who asks, and how to answer."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cli.output import Output
from cli.stack.state import StackState, read_state
from common.settings import default_home
from luthier.client import Client
from luthier.client.client import DEFAULT_SERVER


@dataclass
class Cli:
    """The options that all commands share, resolved: flags, then the environment, then the home's stack, then defaults."""

    home: Path
    given_server: str = ""
    project: str = "default"
    json: bool = False
    debug: bool = False
    patience: float = 300.0
    home_given: Path | None = None
    own_key: bool = False
    out: Output = field(init=False)

    def __post_init__(self) -> None:
        self.out = Output(self.json)

    @cached_property
    def stack(self) -> StackState | None:
        """The stack that the home describes, running or not."""
        return read_state(self.home)

    @property
    def server(self) -> str:
        """host:port of the coordinator."""
        return self.given_server or (self.stack.server if self.stack else DEFAULT_SERVER)

    @property
    def token(self) -> str:
        """The key to show: LUTHIER_TOKEN, else the home's admin key, which only the home's own coordinator gets to see."""
        if (token := os.environ.get("LUTHIER_TOKEN")) and not self.own_key:
            return token
        key = self.home / "admin.key"
        if self.stack is not None and self.stack.server == self.server and key.is_file():
            return key.read_text(encoding="utf-8").strip()
        return ""

    @cached_property
    def client(self) -> Client:
        """The connection, made when it is first needed."""
        return Client(self.server, self.token, self.project, patience=self.patience)

    def close(self) -> None:
        """Close what was opened."""
        if "client" in self.__dict__:
            self.client.close()


def resolve(home: Path | None, server: str | None, project: str | None, output: str | None, debug: bool) -> Cli:
    """Fill what was not given as a flag from the environment and defaults."""
    given_home = home or (Path(os.environ["LUTHIER_HOME"]) if os.environ.get("LUTHIER_HOME") else default_home())
    return Cli(
        home=given_home.expanduser().resolve(),
        given_server=server or os.environ.get("LUTHIER_SERVER", ""),
        project=project or os.environ.get("LUTHIER_PROJECT") or "default",
        json=(output or os.environ.get("LUTHIER_OUTPUT")) == "json",
        debug=debug,
        home_given=home,
    )
