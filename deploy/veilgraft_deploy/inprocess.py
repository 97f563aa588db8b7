"""A carrier without a network, or messages of Flower's: questions go straight to who answers them.

The same server code and the same headers and payloads as everywhere; only the transport differs. A
round with ten sites costs milliseconds, where Flower's Ray engine polls for a tenth of a second.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import TypeAlias

from veilgraft_server.carrier import Answer, Letter

AT_ONCE = 1000
"""Questions answered together: so many answers are in memory, and in one of a ledger's writes."""

Answers: TypeAlias = Callable[[Sequence[Letter]], Sequence[Answer]]
"""Answers questions, each for its node, in their order; what it returns may leave."""


class InProcess:
    """Has nodes 0 to `nodes` - 1 answered for, when their answers are fetched."""

    def __init__(self, answers: Answers, nodes: int) -> None:
        self._answers = answers
        self._nodes = range(nodes)
        self._numbers = map(str, count())
        self._sent: dict[str, Letter] = {}

    def there(self) -> Mapping[int, float]:
        """Return all nodes."""
        return dict.fromkeys(self._nodes, 0.0)

    def send(self, letters: Sequence[Letter]) -> Sequence[str]:
        """Keep letters until their answers are fetched."""
        ids = [next(self._numbers) for _ in letters]
        self._sent |= zip(ids, letters, strict=True)
        return ids

    def fetch(self, ids: Sequence[str]) -> Iterator[tuple[str, Answer]]:
        """Yield the answers, so many at a time."""
        for at in range(0, len(ids), AT_ONCE):
            some = ids[at : at + AT_ONCE]
            letters = [self._sent.pop(id_) for id_ in some]
            yield from zip(some, self._answers(letters), strict=True)
