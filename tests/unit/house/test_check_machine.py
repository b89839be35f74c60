"""What the first command says on a machine that lacks something."""

from __future__ import annotations

import ast
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "scripts" / "check_machine.py"


@pytest.fixture(scope="module")
def check():
    return runpy.run_path(str(SCRIPT))


def test_an_old_python_can_read_it():
    ast.parse(SCRIPT.read_text(), feature_version=(3, 8))


def test_it_needs_nothing_but_the_standard_library():
    tree = ast.parse(SCRIPT.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


@pytest.mark.parametrize(
    ("version", "said"), [((3, 10, 4), "3.10.4 is too old"), ((2, 7, 18), "too old"), ((3, 14, 0), "too new"), ((3, 11, 0), "")]
)
def test_python(check, version, said):
    assert said in check["check_python"](version)
    assert bool(said) == bool(check["check_python"](version))


def test_no_compiler_says_what_to_install(check, tmp_path):
    said = check["check_compiler"]({"PATH": str(tmp_path)})
    assert "no C++ compiler" in said
    assert "apt install g++" in said


def test_a_compiler_that_is_named_but_absent(check, tmp_path):
    assert "clang-99" in check["check_compiler"]({"PATH": str(tmp_path), "CXX": "clang-99 -O2"})


def test_a_compiler_that_cannot_compile_is_told_with_its_words(check, tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho cannot find crt1.o\nexit 1\n")
    broken.chmod(0o755)
    assert "cannot find crt1.o" in check["check_compiler"]({"PATH": str(tmp_path)})


def test_disk(check, tmp_path):
    assert "make room" in check["check_disk"](str(tmp_path), needed=1e9)
    assert check["check_disk"](str(tmp_path), needed=0) == ""


def test_other_machines(check):
    assert "Windows" in check["check_system"]("Windows", "AMD64")
    assert "s390x" in check["check_system"]("Linux", "s390x")
    assert check["check_system"]("Darwin", "arm64") == ""


def test_as_a_program_it_fails_with_one_line_a_problem(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={**os.environ, "PATH": str(tmp_path), "CXX": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: no C++ compiler")
    assert len(done.stderr.splitlines()) == 1
