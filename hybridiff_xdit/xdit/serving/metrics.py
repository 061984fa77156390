"""What a server counts."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ...schedule.plan import StepKind


class Metrics:
    """Counts, in the text format of Prometheus.

    Attributes:
        requests: for pictures, by status of the answer.
    """

    def __init__(self) -> None:
        self.requests: Counter[int] = Counter()
        self._steps: Counter[str] = Counter()
        self._made, self._seconds = 0, 0.0

    def count(self, plan: str | None, seconds: float) -> None:
        """Count a picture that was made, its steps and the seconds that it took."""
        self._made += 1
        self._seconds += seconds
        self._steps.update(plan or "")

    def text(self, waiting: int) -> str:
        """All of it.

        Args:
            waiting: requests in the queue.
        """
        statuses = {f'{{status="{status}"}}': count for status, count in sorted(self.requests.items())}
        kinds = {f'{{kind="{kind.name}"}}': self._steps[kind.value] for kind in StepKind}
        seconds = {"_sum": f"{self._seconds:.6f}", "_count": self._made}
        families: list[tuple[str, str, str, dict[str, Any]]] = [
            ("requests_total", "counter", "Requests for a picture, by status of the answer.", statuses),
            ("queue_length", "gauge", "Requests that wait for the ranks.", {"": waiting}),
            ("seconds", "summary", "Seconds that the ranks took for a picture.", seconds),
            ("steps_total", "counter", "Steps of the pictures that were made, by kind.", kinds),
        ]
        lines = []
        for name, kind, text, samples in families:
            lines += [f"# HELP hybridiff_{name} {text}", f"# TYPE hybridiff_{name} {kind}"]
            lines += [f"hybridiff_{name}{labels} {value}" for labels, value in samples.items()]
        return "\n".join([*lines, ""])
