"""The process in which a reward function runs: `python -I -S jail.py`, with nothing but the standard library.

It reads lines of JSON: first the source and the limits, then questions, each answered by one line. Before it runs anything of the
user's it limits its memory and takes a seccomp filter that leaves it computing, its memory, the clock, and the pipes it has: no
files, whether to read or to write, no sockets, no processes, no signals to others. That works without privileges and cannot be
taken back. What it may import has therefore to be in memory by then (`MODULES`).
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
from importlib import import_module
from typing import Any

# What a function may import.
MODULES = (
    "ast", "base64", "bisect", "collections", "collections.abc", "copy", "csv", "dataclasses", "datetime", "decimal", "difflib",
    "enum", "fractions", "functools", "hashlib", "heapq", "html", "itertools", "json", "keyword", "math", "numbers", "operator",
    "random", "re", "statistics", "string", "textwrap", "time", "tokenize", "typing", "unicodedata", "urllib.parse",
    "xml.etree.ElementTree", "zlib",
    # Imported late by those above.
    "_strptime", "encodings.ascii", "encodings.latin_1", "encodings.utf_16", "encodings.unicode_escape",
)  # fmt: skip
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000  # refused with EPERM, which Python raises as PermissionError
LOAD, EQUAL, LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
X32 = 0x40000000
# By architecture: its name in a filter, and the numbers of the calls that are left (read, write, close, fstat, poll,
# lseek, mmap, mprotect, munmap, brk, mremap, madvise, rt_sig*, sigaltstack, select, sched_yield, sched_getaffinity, nanosleep,
# get*id, uname, getcwd, times and clocks, getrusage, sysinfo, futex, restart_syscall, getrandom, rseq, exit).
CALLS = {
    "x86_64": (
        0xC000003E,
        (0, 1, 3, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 23, 24, 25, 28, 35, 39, 60, 63, 79, 96, 98, 99, 100, 102, 104, 107, 108,
         110, 131, 186, 201, 202, 204, 219, 228, 229, 230, 231, 270, 271, 318, 334),
    ),
    "aarch64": (
        0xC00000B7,
        (17, 57, 62, 63, 64, 72, 73, 80, 93, 94, 98, 101, 113, 114, 115, 123, 124, 128, 132, 134, 135, 139, 153, 160, 165, 169,
         172, 173, 174, 175, 176, 177, 178, 179, 214, 215, 216, 222, 226, 233, 278, 293),
    ),
}  # fmt: skip


def lock_down(memory_mib: int, parent: int) -> None:
    """Give up what a reward function does not need. Raises OSError where this machine does not grant that."""
    machine = platform.machine()
    if machine not in CALLS:
        raise OSError(f"reward functions are not run on {machine}: its system calls are not known here")
    libc = ctypes.CDLL(None, use_errno=True)
    for name in MODULES:
        import_module(name)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # the parent went away before it could be told
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    nothing = (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_NPROC)
    for what, value in {resource.RLIMIT_AS: memory_mib * 2**20, **dict.fromkeys(nothing, 0)}.items():
        resource.setrlimit(what, (value, value))
    _filter(libc, *CALLS[machine])


def _filter(libc: Any, architecture: int, calls: tuple[int, ...]) -> None:
    # Offsets in the kernel's seccomp_data: 0 is the number of the call, 4 the architecture.
    program = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    # Numbers of the x32 ABI would be a way around on x86.
    program += [(LEAST, 0, 1, X32), (RETURN, 0, 0, REFUSE)]
    for number in calls:
        program += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    program.append((RETURN, 0, 0, REFUSE))
    held = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    whole = struct.pack("HxxxxxxP", len(program), ctypes.addressof(held))
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, whole, 0, 0):
        raise OSError(ctypes.get_errno(), "this kernel takes no seccomp filter, so reward functions are not run here")


def main() -> None:
    """Answer until the input ends."""
    questions, answers = os.fdopen(os.dup(0), "rb"), os.dup(1)
    # What the function reads and prints goes nowhere.
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)

    def answer(value: dict[str, Any]) -> None:
        os.write(answers, json.dumps(value).encode() + b"\n")

    first = json.loads(questions.readline())
    scope: dict[str, Any] = {"__name__": "reward"}
    try:
        lock_down(first["memory_mib"], first["parent"])
        exec(compile(first["source"], "<reward>", "exec"), scope)  # noqa: S102 - what this process is for
        function = scope["reward"]
        answer({})
    except BaseException as error:
        answer({"error": described(error)})
        return
    for line in questions:
        question = json.loads(line)
        try:
            answer({"value": plain(function(question["prompt"], question["completion"], question["answer"]))})
        except BaseException as error:
            answer({"error": described(error)})


def plain(value: Any) -> Any:
    """A number as JSON has it; anything else by its name."""
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, int | float):
        return float(value)
    return f"{type(value).__name__} {value!r:.60}"


def described(error: BaseException) -> str:
    """What was raised, and on which line of the source."""
    trace, line = error.__traceback__, 0
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<reward>":
            line = trace.tb_lineno
        trace = trace.tb_next
    where = f" (line {line} of its source)" if line else ""
    try:
        text = str(error)[:500]
    except BaseException:
        text = "an error that cannot be shown"
    return f"it raised {type(error).__name__}: {text}{where}"


if __name__ == "__main__":
    sys.setrecursionlimit(2000)
    main()
