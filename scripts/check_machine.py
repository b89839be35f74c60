"""Say whether this machine can install and run Luthier, and what to do where it cannot.

Runs before anything is installed, on whatever `python3` is there, so it must stay plain Python 3.8 without dependencies.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NEEDED_PYTHON = (3, 11)
NEWEST_PYTHON = (3, 13)
NEEDED_GIB = 6.0
COMPILERS = ("c++", "g++", "clang++")
PROGRAM = "int main() { return 0; }\n"


def check_python(version):
    """Return what is wrong with the interpreter, or an empty string."""
    found = ".".join(str(part) for part in version[:3])
    if tuple(version[:2]) < NEEDED_PYTHON:
        return (
            f"Python {found} is too old; Luthier needs 3.11 or newer. Install it (Debian, Ubuntu: apt install python3.11 "
            "python3.11-venv; macOS: brew install python@3.11) and run: make PYTHON=python3.11"
        )
    if tuple(version[:2]) > NEWEST_PYTHON:
        return f"Python {found} is too new for Ray and PyTorch; use 3.11 to 3.13, for example: make PYTHON=python3.12"
    return ""


def check_venv():
    """Return what is wrong with the venv module, or an empty string: some distributions ship Python without it."""
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        return "this Python cannot make virtual environments; Debian, Ubuntu: apt install python3-venv"
    return ""


def find_compiler(environment):
    """Return the C++ compiler that is used here, or None."""
    chosen = environment.get("CXX", "").split()
    for name in [chosen[0]] if chosen else COMPILERS:
        path = shutil.which(name, path=environment.get("PATH"))
        if path:
            return path
    return None


def check_compiler(environment):
    """Return what is wrong with the C++ compiler, or an empty string. DeepSpeed builds a small library when it first runs."""
    advice = "install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install)"
    compiler = find_compiler(environment)
    if compiler is None:
        wanted = environment.get("CXX") or f"no {', '.join(COMPILERS)} on the PATH"
        return f"no C++ compiler ({wanted}), which DeepSpeed needs at run time; {advice}"
    folder = Path(tempfile.mkdtemp())
    try:
        source = folder / "probe.cpp"
        source.write_text(PROGRAM)
        command = [compiler, str(source), "-o", str(folder / "probe")]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)
        if done.returncode != 0:
            last = (done.stdout.decode("utf-8", "replace").strip().splitlines() or ["no message"])[-1]
            return f"the C++ compiler {compiler} cannot build a program ({last}); {advice}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the C++ compiler {compiler} does not run ({error}); {advice}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return ""


def check_disk(folder, needed=NEEDED_GIB):
    """Return what is wrong with the space on the disk of `folder`, or an empty string."""
    free = shutil.disk_usage(folder).free / 2.0**30
    if free < needed:
        return (
            f"only {free:.1f} GiB are free in {folder}, the install takes {needed:.0f}; make room, or check out on a larger disk"
        )
    return ""


def check_system(system, machine):
    """Return what is wrong with the operating system, or an empty string."""
    if system == "Windows":
        return (
            "Windows is not supported, because DeepSpeed and Ray's cluster features are not; use Linux, for example under WSL 2"
        )
    if machine.lower() not in ("x86_64", "amd64", "aarch64", "arm64"):
        return f"there are no builds of Ray and PyTorch for {machine}; use an x86-64 or arm64 machine"
    return ""


def main(environment):
    """Print every problem and return the exit status."""
    # An install that is there already needs no more room.
    installed = Path(environment.get("VENV", ".venv"), ".installed").exists()
    found = [
        check_system(platform.system(), platform.machine()),
        check_python(sys.version_info),
        check_venv(),
        check_compiler(environment),
        "" if installed else check_disk(Path.cwd()),
    ]
    problems = [problem for problem in found if problem]
    for problem in problems:
        sys.stderr.write(f"error: {problem}\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(os.environ))
