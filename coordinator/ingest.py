"""Turning an uploaded file into a data set version, in a process of its own: hostile input cannot hurt the control plane."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import psutil

from common.errors import Internal, InvalidArgument, Unavailable, Violation
from coordinator.messages import parse
from luthier.v1 import dataset_pb2

MEMORY_LIMIT = 8 * 2**30
"""Bytes of address space that reading a file may take."""

TIME_LIMIT = 1800.0
"""Seconds that reading a file may take."""

BAD_INPUT = 2
"""Exit status of the reader where the file is to blame; with any other it is storage or machine."""

ADDED = {"MALLOC_ARENA_MAX": "2", "ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1"}
"""Keeps the address space of a process with many threads within the limit."""


async def ingest(staged: Path, header: dataset_pb2.UploadDatasetHeader, out_uri: str) -> dataset_pb2.DatasetVersion:
    """Read a staged file and publish its rows below `out_uri`; return what the version is, without a name.

    Raises InvalidArgument with a violation for every broken line. Nothing is published then.
    """
    request = {
        "staged_path": str(staged),
        "filename": header.filename,
        "format": header.format,
        "columns": dict(header.columns),
        "test_fraction": header.test_fraction if header.HasField("test_fraction") else 0.1,
        "split_seed": header.split_seed if header.HasField("split_seed") else 42,
        "out_uri": out_uri,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "agents.data.ingest",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | ADDED,
    )
    try:
        _limit_memory(process.pid)
        out, err = await asyncio.wait_for(process.communicate(json.dumps(request).encode()), TIME_LIMIT)
    except TimeoutError:
        raise InvalidArgument.of([Violation("file", f"reading it took longer than {TIME_LIMIT:.0f} s")]) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    try:
        answer = json.loads(out)
    except ValueError:
        last = err.decode(errors="replace").strip().splitlines()[-1:]
        if any("MemoryError" in line or "bad_alloc" in line for line in last):
            raise InvalidArgument.of(
                [Violation("file", f"reading it takes more than {MEMORY_LIMIT >> 30} GiB of memory")]
            ) from None
        raise Internal(f"the reader ended with status {process.returncode} ({' '.join(last)[:300]})", "INGEST_FAILED") from None
    if "error" in answer:
        error = answer["error"]
        violations = [Violation(each["field"], each["description"]) for each in error.get("violations", [])]
        if process.returncode != BAD_INPUT:
            raise Unavailable(error["message"], error.get("reason", "INGEST_FAILED"), violations)
        raise InvalidArgument(error["message"], error.get("reason", "BAD_DATA"), violations)
    return parse(answer, dataset_pb2.DatasetVersion())


def _limit_memory(pid: int) -> None:
    """Bound the address space of a process, where the system can (Linux). It has not been given anything to read yet."""
    if hasattr(psutil, "RLIMIT_AS"):
        psutil.Process(pid).rlimit(psutil.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
