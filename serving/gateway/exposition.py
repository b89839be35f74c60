"""The gateway's counts as Prometheus reads them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from serving.gateway.cache import AnswerCache
from serving.gateway.limits import Limits
from serving.gateway.traffic import BUCKETS, Traffic

LABELS = ("project", "endpoint", "version")


class _Families:
    """What there is to tell, of one project or of all."""

    def __init__(self, traffic: Traffic, cache: AnswerCache, limits: Limits, project: str) -> None:
        self._traffic = traffic
        self._cache = cache
        self._limits = limits
        self._project = project

    def collect(self) -> list[Metric]:
        """The families, as prometheus_client asks for them."""
        requests = CounterMetricFamily("luthier_gateway_requests", "Answers, by how they ended.", labels=[*LABELS, "outcome"])
        seconds = HistogramMetricFamily("luthier_gateway_answer_seconds", "Time that whole answers took.", labels=LABELS)
        tokens = CounterMetricFamily("luthier_gateway_tokens", "Tokens of answers.", labels=LABELS)
        feedback = CounterMetricFamily("luthier_gateway_feedback", "Scores given.", labels=LABELS)
        scores = CounterMetricFamily("luthier_gateway_feedback_score", "Sum of the scores.", labels=LABELS)
        for name, counts in self._traffic.routes():
            labels = name.split("/", 2)
            if self._project and labels[0] != self._project:
                continue
            requests.add_metric([*labels, "error"], counts.errors)
            requests.add_metric([*labels, "ok"], counts.requests - counts.errors)
            total, buckets = 0, []
            for bound, count in zip((*map(str, BUCKETS), "+Inf"), counts.buckets, strict=True):
                total += count
                buckets.append((bound, total))
            seconds.add_metric(labels, buckets, counts.seconds)
            tokens.add_metric(labels, counts.tokens)
            feedback.add_metric(labels, counts.feedback)
            scores.add_metric(labels, counts.feedback_sum)
        found: list[Metric] = [requests, seconds, tokens, feedback, scores]
        if not self._project:
            flying = GaugeMetricFamily("luthier_gateway_in_flight", "Requests under way.", sum(self._traffic.in_flight.values()))
            hits = CounterMetricFamily("luthier_gateway_cache_hits", "Answers out of the cache.", self._cache.hits)
            misses = CounterMetricFamily("luthier_gateway_cache_misses", "Answers that it did not have.", self._cache.misses)
            refused = CounterMetricFamily("luthier_gateway_limited", "Requests over a key's limit.", self._limits.refused)
            found += [flying, hits, misses, refused]
        return found


def exposition(traffic: Traffic, cache: AnswerCache, limits: Limits, project: str) -> bytes:
    """The text for Prometheus: of a project, or of everything where that is empty."""
    registry = CollectorRegistry()
    registry.register(_Families(traffic, cache, limits, project))  # type: ignore[arg-type]
    return generate_latest(registry)
