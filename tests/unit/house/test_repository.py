"""The files that a newcomer and the continuous integration start from."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[3]


def test_the_license_is_apache_2_in_full():
    text = (ROOT / "LICENSE").read_text()
    assert text.lstrip().startswith("Apache License")
    for part in ("9. Accepting Warranty or Additional Liability.", "END OF TERMS AND CONDITIONS", "APPENDIX"):
        assert part in text
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"] == "Apache-2.0"


def test_ci_runs_check_then_test_and_stops_at_the_first_failure(tmp_path):
    run = ROOT / ".ci" / "run"
    assert os.access(run, os.X_OK)
    called = tmp_path / "called"
    make = tmp_path / "make"
    make.write_text(f'#!/bin/sh\necho "$1" >> {called}\n[ "$1" != "${{FAIL:-}}" ]\n')
    make.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert subprocess.run([run], env=environment, check=False, cwd=tmp_path).returncode == 0
    assert called.read_text().split() == ["check", "test"]
    called.unlink()
    assert subprocess.run([run], env={**environment, "FAIL": "check"}, check=False).returncode != 0
    assert called.read_text().split() == ["check"]


def test_hooks_use_the_environment_of_the_checkout():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    assert {"ruff-format", "ruff", "mypy", "imports", "stubs"} <= {hook["id"] for hook in hooks}
    for hook in hooks:
        assert ".venv/bin/" in hook["entry"]
        if "files" in hook:
            re.compile(hook["files"])


def test_the_targets_that_contributing_names_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z][a-z-]*)", (ROOT / "CONTRIBUTING.md").read_text()))
    assert named
    assert named <= targets
