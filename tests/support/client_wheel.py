"""The light client as other people's services install it: a wheel, in a virtual environment with nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

PROTOS = Path(__file__).resolve().parents[2] / "protos"


def build_wheel(folder: Path) -> Path:
    """Build the wheel of protos/ in `folder`, from a copy, so that nothing is left in the tree."""
    source = folder / "protos"
    shutil.copytree(PROTOS, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source))
    (wheel,) = folder.glob("*.whl")
    return wheel


def empty_environment(folder: Path, wheel: Path) -> Path:
    """Make a virtual environment with the wheel and what it needs, and return its Python."""
    _run(sys.executable, "-m", "venv", str(folder / "venv"))
    python = folder / "venv" / "bin" / "python"
    _run(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(wheel))
    return python


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
