"""A vault's figures for the site's own people, in Prometheus' text format.

They are rendered for the desk, on the local socket, whose peers are the site's own. Nothing of
them leaves by the courier's socket: no count, ε, batch size, loss or duration stands in any
answer, no question asks for one, and `watch` passes answers on as the bytes they were.

Nor do they hold what depends on records: they count answers, and quote the ledger.
"""

import threading
from collections.abc import Callable, Iterable, Iterator

import prometheus_client
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from veilgraft import messages
from veilgraft.errors import Refusal
from veilgraft.messages import Envelope, Refused
from veilgraft_client.ledger import Ledger
from veilgraft_client.policy import Site

_KINDS = ("here", "wanted", "release")


class Metrics:
    """One vault's figures. Threads may share it; counts begin anew with the process."""

    def __init__(self, site: Site, ledger: Ledger) -> None:
        self._registry = CollectorRegistry()
        self._answered = self._counter("answered", "Requests answered.", "kind")
        self._refused = self._counter("refused", "Requests refused.", "code")
        for kind in _KINDS:
            self._answered.labels(kind)
        for code in Refusal:
            self._refused.labels(code.value)
        self._registry.register(_Budget(site, ledger))

    def watch(self, handle: Callable[[Envelope], Envelope]) -> Callable[[Envelope], Envelope]:
        """Return `handle`, its answers counted and otherwise untouched."""

        def watched(envelope: Envelope) -> Envelope:
            answer = handle(envelope)
            self._count(answer)
            return answer

        return watched

    def render(self) -> str:
        """Return all figures as text, for the desk alone.

        Raises:
            ChainError: the ledger can't be read.
        """
        text: bytes = prometheus_client.generate_latest(self._registry)
        return text.decode()

    def _count(self, answer: Envelope) -> None:
        reply = messages.decode_answer(answer.header)
        if isinstance(reply, Refused):
            self._refused.labels(reply.code.value).inc()
        else:
            self._answered.labels(reply.kind).inc()

    def _counter(self, name: str, text: str, label: str) -> prometheus_client.Counter:
        name = f"veilgraft_requests_{name}"
        return prometheus_client.Counter(name, text, [label], registry=self._registry)


class _Budget(Collector):
    """What the ledger says, computed again only when it has grown."""

    def __init__(self, site: Site, ledger: Ledger) -> None:
        self._site = site
        self._ledger = ledger
        self._lock = threading.Lock()
        self._known: tuple[str, float, float] | None = None

    def describe(self) -> Iterable[Metric]:
        """Name nothing beforehand, so that nothing is computed when this is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield ε, infinite where there is no bound."""
        spent, granted = self._epsilons()
        limits = self._site.limits
        yield _gauge("epsilon_spent", "ε of all reserved, as if settings were fixed.", spent)
        yield _gauge("epsilon_granted", "ε of all granted, for life; the cap is on it.", granted)
        yield _gauge("epsilon_cap", "limits.max_epsilon.", limits.max_epsilon)
        yield _gauge("delta", "limits.delta, at which ε is given.", limits.delta)

    def _epsilons(self) -> tuple[float, float]:
        with self._lock:
            head = self._ledger.head()
            if self._known is None or self._known[0] != head:
                self._known = (head, *self._computed())
            return self._known[1:]

    def _computed(self) -> tuple[float, float]:
        name = self._site.site
        if name not in self._ledger.sites():
            return 0.0, 0.0
        spent = self._ledger.epsilon(name, self._site.limits.delta)
        return spent, self._ledger.life_epsilon(name)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"veilgraft_{name}", text, value)
