"""What /metrics shows, in Prometheus' form. No question, no answer, no client's name."""

from dataclasses import dataclass, field
from typing import Any

from serve.supervisor import Supervisor

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


def _registry() -> Any:
    from prometheus_client import CollectorRegistry

    return CollectorRegistry()


@dataclass
class Metrics:
    """Counters of one gateway; an expert's name, `base`, or `-` where none was chosen."""

    registry: Any = field(default_factory=_registry)

    def __post_init__(self) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        told = {"registry": self.registry}
        self.requests = Counter("dmoe_requests", "Answered requests.", ["expert", "status"], **told)
        self.seconds = Histogram(
            "dmoe_request_seconds", "From the request to its last byte.", ["expert"], buckets=SECONDS, **told
        )
        self.waited = Histogram("dmoe_wait_seconds", "Until the engine took it.", buckets=SECONDS, **told)
        self.tokens = Counter("dmoe_tokens", "Tokens by kind: evaluated, reused, said.", ["expert", "kind"], **told)
        self.running = Gauge("dmoe_running", "Requests in the engine.", **told)
        self.waiting = Gauge("dmoe_waiting", "Requests in the queue.", **told)
        self.up = Gauge("dmoe_engine_up", "1 while the engine answers.", **told)
        self.restarts = Gauge("dmoe_engine_restarts", "Times it was started again after it died.", **told)
        self.applied = Gauge("dmoe_expert_applied", "1 if its last probe showed the adapter.", ["expert"], **told)

    def text(self, supervisor: Supervisor) -> bytes:
        """The exposition, with the gauges as they stand."""
        from prometheus_client import generate_latest

        serving = supervisor.serving
        turns = serving.engine.turns if serving else None
        self.running.set(turns.running.total() if turns else 0)
        self.waiting.set(turns.length if turns else 0)
        self.up.set(serving is not None)
        self.restarts.set(supervisor.restarts)
        self.applied.clear()
        for expert, applied in supervisor.applied.items():
            if serving and expert in serving.experts:
                self.applied.labels(expert).set(applied)
        return bytes(generate_latest(self.registry))

    def said(self) -> int:
        """Tokens of all replies that have ended."""
        samples = [sample for metric in self.tokens.collect() for sample in metric.samples]
        return int(sum(s.value for s in samples if s.name.endswith("_total") and s.labels["kind"] == "said"))

    def tokens_of(self, expert: str, timings: dict[str, Any], usage: dict[str, Any]) -> None:
        """Counts one reply's tokens: llama.cpp's timings tell them apart, others' usage knows less."""
        said = timings.get("predicted_n", usage.get("completion_tokens", 0))
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        evaluated = timings.get("prompt_n", usage.get("prompt_tokens", 0) - cached)
        for kind, count in (("evaluated", evaluated), ("reused", timings.get("cache_n", cached)), ("said", said)):
            self.tokens.labels(expert, kind).inc(max(count, 0))
