"""When a schedule's times are: a cron expression in a time zone, as Debian's cron reads it (cronsim)."""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from common.errors import Violation

SHORT = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}


def following(cron: str, time_zone: str, moment: datetime) -> datetime:
    """The first time of a valid expression after a moment, in UTC."""
    times = (time.astimezone(UTC) for time in CronSim(SHORT.get(cron, cron), moment.astimezone(ZoneInfo(time_zone))))
    # In an hour that the clocks repeat, cronsim does not know whether it is the first or the second.
    return next(time for time in times if time > moment)


def last_until(cron: str, time_zone: str, begin: datetime, end: datetime) -> datetime | None:
    """The last time after `begin` and not after `end`; None where there is none."""
    found, time = None, following(cron, time_zone, begin)
    while time <= end:
        found, time = time, following(cron, time_zone, time)
    return found


def violations(cron: str, time_zone: str, field: str) -> list[Violation]:
    """What is wrong with an expression or a time zone, by field below `field`."""
    bad = []
    try:
        ZoneInfo(time_zone)
    except (ValueError, OSError, KeyError):
        bad.append(Violation(f"{field}.time_zone", f"{time_zone[:60]!r} is no IANA time zone; write for example Europe/Berlin"))
    if len(SHORT.get(cron, cron).split()) != 5:
        why = (
            f"{cron[:60]!r} has not five fields: minute, hour, day of the month, month, day of the week ('0 3 * * *'), or @daily"
        )
        return [*bad, Violation(f"{field}.cron", why)]
    try:
        next(CronSim(SHORT.get(cron, cron), datetime(2024, 1, 1, tzinfo=UTC)))
    except CronSimError as error:
        bad.append(Violation(f"{field}.cron", f"{cron[:60]!r}: {str(error)[0].lower()}{str(error)[1:]}"))
    except StopIteration:
        bad.append(Violation(f"{field}.cron", f"{cron[:60]!r} never comes"))
    return bad
