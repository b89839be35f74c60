"""Of ranks that all stand still: which one the others wait for. Each rank finds out about itself (agents/training/watch.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.causes import HANG

Standings = Mapping[str, Mapping[str, Any]]
"""StandingReports as JSON, by source."""


def told(standings: Standings, source: str, standing: Mapping[str, Any]) -> dict[str, Any]:
    """The standings after a report: one that tells of no standing takes back what the source told before."""
    others = {name: each for name, each in standings.items() if name != source}
    return others | {source: dict(standing)} if standing.get("seconds") else others


def hang(standings: Standings, workers: int) -> dict[str, Any] | None:
    """The error (JobError as JSON) of a run that a rank has given up; None where none has.

    Ranks that work together move alike, so that the others wait for those that have moved least; a rank that tells nothing while
    the others stand is behind too: its process is frozen or out of reach. Trials of a sweep (`trial-00001/rank-0`) do not count:
    they fail by themselves.
    """
    ranks = {int(name[5:]): each for name, each in standings.items() if name.startswith("rank-") and name[5:].isdecimal()}
    if not any(each.get("gives_up") for each in ranks.values()):
        return None
    count = max(workers, max(ranks) + 1)
    silent = [rank for rank in range(count) if rank not in ranks]
    least = min(int(each.get("moves", 0)) for each in ranks.values())
    behind = silent or [rank for rank, each in sorted(ranks.items()) if int(each.get("moves", 0)) == least]
    others = [each for rank, each in sorted(ranks.items()) if rank not in behind]
    longest = max(float(each["seconds"]) for each in ranks.values())
    if silent:
        said = f"{_names(silent, count)} told nothing for {_words(longest)}: the process is frozen or cannot be reached"
    else:
        where = ranks[behind[0]]
        said = f"{_names(behind, count)} stood after step {where.get('step', 0)} for {_words(longest)}: {where.get('doing', '')}"
    if others:
        said += f"; the others stood after step {others[0].get('step', 0)}: {others[0].get('doing', '')}"
    error = {"code": HANG, "message": said, "source": f"rank-{behind[0]}"}
    stack = ranks.get(behind[0], {}).get("traceback", "")
    return error | {"traceback": stack} if stack else error


def _names(ranks: list[int], count: int) -> str:
    if len(ranks) == count:
        return f"all {count} ranks" if count > 1 else "the only rank"
    listed = ", ".join(str(rank) for rank in ranks[:5]) + (f" and {len(ranks) - 5} more" if len(ranks) > 5 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {listed} of {count}"


def _words(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    return " ".join(f"{number} {unit}" for number, unit in parts if number) or "0 s"
