"""GET /metrics: shows counts and times in Prometheus's text format."""

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.responses import Response

from seechat_lite.chat import Stats

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counts of one server, in a registry of its own: a process may have several servers."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "seechat_requests", "Requests by status", ["method", "status"], registry=registry
        )
        self._tokens = Counter("seechat_tokens", "Tokens by kind", ["kind"], registry=registry)
        self._answers = Counter(
            "seechat_answers", "Answers by how they ended", ["finish_reason"], registry=registry
        )
        self._first = Histogram(
            "seechat_first_token_seconds",
            "From an answer's turn to its first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self._speed = Gauge("seechat_tokens_per_second", "Of the latest answer", registry=registry)
        self._waiting = Gauge("seechat_waiting", "Requests in the queue", registry=registry)
        self._loaded = Gauge("seechat_model_loaded", "1 if in memory", registry=registry)
        self._memory = Gauge(
            "seechat_memory_bytes", "Resident memory of the process", registry=registry
        )

    def answered(self, stats: Stats) -> None:
        """Count an answer.

        stats: what it took.
        """
        self._tokens.labels("prompt").inc(stats.prompt_tokens)
        self._tokens.labels("completion").inc(stats.new_tokens)
        self._answers.labels(stats.finish_reason).inc()
        self._first.observe(stats.first_token_seconds)
        self._speed.set(stats.tokens_per_second)

    def requested(self, method: str, status: int) -> None:
        """Count a request.

        method: its HTTP method.
        status: the HTTP status of its answer.
        """
        # clients could make up names, which would grow the registry without end
        known = method if method in ("GET", "HEAD", "POST", "OPTIONS") else "other"
        self._requests.labels(known, str(status)).inc()

    def response(self, *, waiting: int, loaded: bool) -> Response:
        """The counts in Prometheus's text format.

        waiting: requests that wait.
        loaded: whether the model is loaded.
        """
        self._waiting.set(waiting)
        self._loaded.set(loaded)
        self._memory.set(memory())
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)


def memory() -> int:
    """Resident bytes of this process."""
    return psutil.Process().memory_info().rss
