"""How much a key may ask in a minute: requests, and tokens of prompts and answers. Token buckets (Turner, 1986), one a key.

There is one gateway, so that a limit holds for all replicas together. It counts since it was started, in memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from serving.gateway.errors import ApiError
from serving.gateway.snapshot import Key

MINUTE = 60.0


@dataclass
class _Bucket:
    """Fills up to a minute's worth, evenly. May be overdrawn, because what an answer costs is known at its end."""

    most: float
    level: float
    at: float

    def fill(self, most: float, moment: float) -> None:
        self.level = min(most, self.level + (moment - self.at) * most / MINUTE)
        self.most, self.at = most, moment

    def seconds_until(self, wanted: float) -> float:
        """When it holds so much again."""
        return max(0.0, (min(wanted, self.most) - self.level) * MINUTE / self.most)


class Limits:
    """The buckets of all keys that have a limit."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._requests: dict[str, _Bucket] = {}
        self._tokens: dict[str, _Bucket] = {}
        self.refused = 0

    def enter(self, key: Key) -> dict[str, str]:
        """Count a request of a key; returns what its answer says of the limits. Raises a 429 where one is spent."""
        headers: dict[str, str] = {}
        for kind, buckets, most, cost in (
            ("requests", self._requests, key.requests_per_minute, 1.0),
            ("tokens", self._tokens, key.tokens_per_minute, 0.0),
        ):
            if not most:
                continue
            bucket = self._bucket(buckets, key, most)
            # Of tokens there have to be some: how many it takes is known later.
            needed = cost or 1.0
            if bucket.level < needed:
                self.refused += 1
                wait = max(1, math.ceil(bucket.seconds_until(needed)))
                raise ApiError(
                    429,
                    f"Rate limit reached for this API key: {most:,} {kind} per minute. Try again in {wait} s.",
                    "rate_limit_exceeded",
                    kind="rate_limit_error",
                    headers={"retry-after": str(wait), **_told(kind, most, bucket)},
                )
            bucket.level -= cost
            headers |= _told(kind, most, bucket)
        return headers

    def spend(self, key: Key, tokens: int) -> None:
        """Count the tokens of an answer and its prompt."""
        if key.tokens_per_minute:
            self._bucket(self._tokens, key, key.tokens_per_minute).level -= tokens

    def _bucket(self, buckets: dict[str, _Bucket], key: Key, most: int) -> _Bucket:
        name, moment = f"{key.project}/{key.key}", self._clock()
        bucket = buckets.setdefault(name, _Bucket(most, most, moment))
        bucket.fill(most, moment)
        return bucket


def _told(kind: str, most: int, bucket: _Bucket) -> dict[str, str]:
    """The headers that OpenAI's API has for it."""
    return {
        f"x-ratelimit-limit-{kind}": str(most),
        f"x-ratelimit-remaining-{kind}": str(max(0, int(bucket.level))),
        f"x-ratelimit-reset-{kind}": f"{bucket.seconds_until(bucket.most):.1f}s",
    }
