"""The event log: what was done at a site or a coordinator, by whom it was asked, in what order.

An append-only, hash-chained file of its own, apart from the ledger: entries are never needed to
run, and never hold a record, a feature, a count of them, a key or a token. Nothing is ever
removed, so the file grows with what happens; what an outsider can make happen, refusals, the gate
and the edge limit in rate. An entry takes about 300 bytes, and 4 KiB at most beside them.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from veilgraft.chain import Chain, ChainError, Schema

Kind: TypeAlias = Literal[
    # At a site.
    "joined",
    "approved",
    "withdrawn",
    "rejected",
    "started",
    "stopped",
    "answered",
    "refused",
    "purged",
    "rotated",
    # At a coordinator, which also starts, stops and rotates.
    "initialised",
    "invited",
    "enrolled",
    "revoked",
    "replaced",
    "round",
    "finished",
    "refused-request",
]
MAX_FACTS = 4096
"""Bytes that the facts of one entry may take as JSON."""

# Kinds are not fixed in the file: a later version notes more, and goes on with the same log.
_SCHEMA = Schema(noun="log", format=1)


@dataclass(frozen=True)
class Note:
    """One entry: `time` is UTC as ISO 8601 text, `facts` what was noted with it."""

    seq: int
    time: str
    kind: str
    facts: dict[str, Any]


class EventLog:
    """One open log. Threads and processes may share it; whole entries reach the disk, in order.

    Args:
        exists: refuse to make a new one.

    Raises:
        ChainError: no log can be opened or made there; from any method, it can't be read,
            written or trusted. Who calls decides what must then not happen.
    """

    def __init__(self, path: Path, *, exists: bool = False) -> None:
        self.path = path
        self._chain = Chain(path, schema=_SCHEMA, exists=exists)

    def close(self) -> None:
        """End the connection; the file is complete without it."""
        self._chain.close()

    def note(self, kind: Kind, /, **facts: object) -> None:
        """Add an entry, with the time; it is on the disk when this returns.

        Args:
            facts: plain JSON of at most `MAX_FACTS` bytes: names, digests, codes, numbers.

        Raises:
            ValueError: facts of another form; nothing was noted.
        """
        _check(facts)
        with self._chain.transaction():
            self._chain.append("", "", kind, facts)

    def entries(self) -> Iterator[Note]:
        """Yield what was noted, oldest first; that it is genuine, `verify` says."""
        for entry in self._chain.entries():
            time = entry.body.get("time")
            if not isinstance(time, str):
                raise ChainError(f"{self.path}: entry {entry.seq} has no time")
            facts = {name: fact for name, fact in entry.body.items() if name != "time"}
            yield Note(entry.seq, time, entry.kind, facts)

    def head(self) -> str:
        """Return the chain's head; kept elsewhere, it shows that a log was rolled back."""
        return self._chain.head()

    def verify(self, anchor: str | None = None) -> int:
        """Check the whole chain and return the number of entries; see `Chain.verify`."""
        return self._chain.verify(anchor)


def _check(facts: dict[str, object]) -> None:
    if "time" in facts:
        raise ValueError("facts: expected no time, which the log gives")
    try:
        text = json.dumps(facts, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise ValueError("facts: expected plain JSON") from None
    if len(text) > MAX_FACTS:
        raise ValueError(f"facts: expected at most {MAX_FACTS} bytes of JSON, got {len(text)}")
