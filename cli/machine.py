"""What this machine has and lacks: the checks of `luthier doctor`, some of which `luthier up` makes too."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from cli.stack.ports import is_free

OURS = ("coordinator", "agents", "serving", "cli", "common")
PACKAGES = ("luthier", "luthier-client", "ray", "torch", "transformers", "deepspeed", "trl", "peft", "grpcio", "protobuf")
GIB = 2**30
DISK_WANTED, MEMORY_WANTED = 5 * GIB, 4 * GIB


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `needed` says whether nothing works without it."""

    name: str
    ok: bool
    detail: str
    advice: str = ""
    needed: bool = True

    def as_dict(self) -> dict[str, Any]:
        """The check as JSON has it."""
        return asdict(self)


def python() -> Check:
    """Python's version."""
    version = ".".join(str(part) for part in sys.version_info[:3])
    fine = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Check("python", fine, f"Python {version} at {sys.executable}", "" if fine else "use Python 3.11 to 3.13")


def compiler() -> Check:
    """The C++ compiler with which DeepSpeed builds its ops on first use."""
    wanted = os.environ.get("CXX") or "c++"
    found = shutil.which(wanted)
    if found:
        return Check("compiler", True, f"C++ compiler {found}")
    other = next((name for name in ("g++", "clang++") if shutil.which(name)), None)
    advice = f"set CXX={other}" if other else "install one: `apt install g++`, `dnf install gcc-c++` or `xcode-select --install`"
    return Check("compiler", False, f"no C++ compiler: {wanted} is not on the PATH, and DeepSpeed builds its ops with it", advice)


def headers() -> Check:
    """Python's header files, which those ops include."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    advice = "" if header.is_file() else "install them: `apt install python3-dev` or `dnf install python3-devel`"
    detail = (
        f"Python headers {header}"
        if header.is_file()
        else f"Python's header files are missing ({header}), and DeepSpeed's ops need them"
    )
    return Check("headers", header.is_file(), detail, advice)


def ninja() -> Check:
    """The build tool that torch calls for those ops."""
    beside = Path(sys.executable).parent / "ninja"
    found = str(beside) if beside.is_file() else shutil.which("ninja")
    return Check("ninja", bool(found), f"ninja {found}" if found else "ninja is missing", "" if found else "pip install ninja")


def packages() -> list[Check]:
    """The packages that everything stands on."""
    checks = []
    for name in PACKAGES:
        try:
            checks.append(Check(name, True, f"{name} {metadata.version(name)}"))
        except metadata.PackageNotFoundError:
            checks.append(Check(name, False, f"{name} is not installed", "install Luthier again: `make install`"))
    return checks


def shadowed() -> list[Check]:
    """Whether `import common` and the like find ours, and not another package of that name."""
    root = Path(__file__).resolve().parent.parent
    checks = []
    for name in OURS:
        spec = importlib.util.find_spec(name)
        places = [Path(place).resolve() for place in (spec.submodule_search_locations or ())] if spec else []
        ours = root / name in places
        if not ours:
            where = f"another package of that name lies at {places[0]}" if places else "it cannot be imported"
            checks.append(
                Check(
                    f"package {name}", False, f"`import {name}` does not find Luthier's: {where}", "use an environment of its own"
                )
            )
    return checks or [Check("names", True, f"{', '.join(OURS)} are Luthier's own")]


def disk(home: Path) -> Check:
    """Room in the home."""
    place = next(folder for folder in (home, *home.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    advice = "" if free >= DISK_WANTED else "free some, or choose another --home"
    return Check("disk", free >= DISK_WANTED, f"{free / GIB:.1f} GiB free at {place}", advice, needed=False)


def memory() -> Check:
    """Memory and cores."""
    free = psutil.virtual_memory().available
    advice = "" if free >= MEMORY_WANTED else f"close something; {MEMORY_WANTED / GIB:.0f} GiB are comfortable"
    detail = f"{free / GIB:.1f} GiB of memory free, {os.cpu_count()} cores"
    return Check("memory", free >= MEMORY_WANTED, detail, advice, needed=False)


def ports(own: tuple[int, ...]) -> list[Check]:
    """The usual ports, which `luthier up` replaces where they are taken. `own` are those of the home's running stack."""
    checks = []
    for what, port in (("coordinator", 7420), ("gateway", 8000)):
        if port in own:
            checks.append(Check(f"port {port}", True, f"port {port} is the {what}'s of this home", needed=False))
        else:
            free = is_free(port)
            advice = "" if free else "nothing to do: `luthier up` takes another port and says which"
            checks.append(
                Check(f"port {port}", free, f"port {port} ({what}) is {'free' if free else 'in use'}", advice, needed=False)
            )
    return checks


def gpu() -> Check:
    """GPUs, by the driver's own device files; the training code runs without any."""
    cards = [path.name for path in Path("/dev").glob("nvidia[0-9]*")]
    return Check("gpu", True, f"{len(cards)} NVIDIA GPUs" if cards else "no NVIDIA GPU; everything runs on the CPU", needed=False)


def examine(home: Path, own_ports: tuple[int, ...]) -> list[Check]:
    """Every check of the machine."""
    return [
        *(python(), compiler(), headers(), ninja()),
        *packages(),
        *shadowed(),
        *(disk(home), memory()),
        *ports(own_ports),
        gpu(),
    ]
