"""When a schedule's times are, also where clocks are changed, and what is wrong with bad ones."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.schedules.times import following, last_until, violations

BERLIN = ZoneInfo("Europe/Berlin")


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("cron", "zone", "moment", "expected"),
    [
        ("0 3 * * *", "UTC", "2026-11-26T03:00:00", "2026-11-27T03:00:00"),
        ("0 3 * * *", "Europe/Berlin", "2026-07-01T00:00:00", "2026-07-01T01:00:00"),
        ("0 3 * * *", "Europe/Berlin", "2026-12-01T00:00:00", "2026-12-01T02:00:00"),
        ("@hourly", "Asia/Kolkata", "2026-01-01T00:00:00", "2026-01-01T00:30:00"),
        ("*/20 9-10 * * MON", "UTC", "2026-11-26T00:00:00", "2026-11-30T09:00:00"),
        ("0 0 L * *", "UTC", "2026-02-01T00:00:00", "2026-02-28T00:00:00"),
        # 02:30 is left out on that night, so it comes right after the gap, at 03:00 summer time.
        ("30 2 * * *", "Europe/Berlin", "2026-03-29T00:00:00", "2026-03-29T01:00:00"),
        # 02:15 for the second time: 02:30 has been.
        ("30 2 * * *", "Europe/Berlin", "2026-10-25T01:15:00", "2026-10-26T01:30:00"),
    ],
)
def test_the_next_time(cron: str, zone: str, moment: str, expected: str) -> None:
    assert following(cron, zone, utc(moment)) == utc(expected)


def test_an_hour_that_the_clocks_repeat_brings_a_fixed_time_once() -> None:
    times, moment = [], utc("2026-10-24T12:00:00")
    while moment < utc("2026-10-26T12:00:00"):
        moment = following("30 2 * * *", "Europe/Berlin", moment)
        times.append(moment.astimezone(BERLIN).strftime("%d %H:%M"))
    assert times == ["25 02:30", "26 02:30", "27 02:30"]


@given(
    minute=st.integers(0, 59),
    hour=st.sampled_from(["*", "1", "2", "3", "*/2"]),
    start=st.datetimes(datetime(2026, 10, 24), datetime(2026, 10, 26)).map(lambda each: each.replace(tzinfo=UTC)),
)
def test_the_next_time_is_always_later(minute: int, hour: str, start: datetime) -> None:
    assert following(f"{minute} {hour} * * *", "Europe/Berlin", start) > start


def test_of_times_that_were_missed_the_last_one_is_found() -> None:
    begin = utc("2026-01-01T00:00:00")
    assert last_until("@hourly", "UTC", begin, begin + timedelta(hours=5, minutes=30)) == utc("2026-01-01T05:00:00")
    assert last_until("@hourly", "UTC", begin, begin + timedelta(minutes=59)) is None


@pytest.mark.parametrize(
    ("cron", "zone", "fields"),
    [
        ("0 3 * *", "UTC", ["schedule.cron"]),
        ("0 0 3 * * *", "UTC", ["schedule.cron"]),
        ("61 3 * * *", "UTC", ["schedule.cron"]),
        ("0 0 30 2 *", "UTC", ["schedule.cron"]),
        ("@never", "Mars/Olympus", ["schedule.time_zone", "schedule.cron"]),
        ("0 3 * * *", "../../etc/passwd", ["schedule.time_zone"]),
        ("", "", ["schedule.time_zone", "schedule.cron"]),
        ("0 3 * * FRI", "America/New_York", []),
    ],
)
def test_what_is_wrong_is_said_by_field(cron: str, zone: str, fields: list[str]) -> None:
    assert [bad.field for bad in violations(cron, zone, "schedule")] == fields
