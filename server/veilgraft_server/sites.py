"""Which sites take part: who they say they are, whether they may, and what they still lack.

A site takes part once a person there has approved the study and the backbone is whole. Sites that
come late are greeted between rounds, and take part from the next.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from flwr.app import MessageType

from veilgraft import messages
from veilgraft.config import canonical
from veilgraft.errors import InputError, MessageError, QuorumError
from veilgraft.messages import Hello, Here, Offer, Part, Reply, Wanted
from veilgraft.study import Study
from veilgraft_server import distribution
from veilgraft_server.post import POLL_SECONDS, Answers, Asked, Post

log = logging.getLogger(__name__)

FIRST_GREETING_SECONDS = 120.0
GREETING_SECONDS = 30.0
"""How long an answer to a greeting is waited for: before the first round, and between rounds, when
all others wait. So long passes, too, until a site is greeted again."""

PART_SECONDS = 600.0
WINDOW = 4
"""Parts that are under way to one site at a time."""

WINDOWS = 4
"""Windows sent to a late site between two rounds; the others wait for so many."""


@dataclass
class Sites:
    """The nodes of one run; see the module's docstring.

    Attributes:
        backbone: the folder that is handed to sites which lack it; None in a simulation.
        meet: is told what each site says of itself.
        ready: name of each node that takes part.
    """

    study: Study
    run: str
    post: Post
    backbone: Path | None = None
    meet: Callable[[Here], None] = lambda _: None
    ready: dict[int, str] = field(default_factory=dict)
    _greeted: dict[int, float] = field(default_factory=dict)

    def wait(self, seconds: float) -> None:
        """Return once a quorum is ready.

        Raises:
            QuorumError: it is not, after so many seconds.
        """
        quorum, deadline = self.study.aggregation.quorum, time.monotonic() + seconds
        while True:
            self.refresh(windows=None, seconds=FIRST_GREETING_SECONDS)
            if len(self.ready) >= quorum:
                return
            if time.monotonic() > deadline:
                raise QuorumError(
                    f"{len(self.ready)} sites ready after {seconds:g} s; "
                    f"aggregation.quorum is {quorum}"
                )
            time.sleep(POLL_SECONDS)

    def refresh(self, windows: int | None = WINDOWS, seconds: float = GREETING_SECONDS) -> None:
        """Greet nodes that don't take part yet, and send them what they lack.

        Args:
            windows: of parts at most; None sends all.
            seconds: that answers to a greeting are waited for.
        """
        now = time.monotonic()
        new = [
            node
            for node in self.post.nodes()
            if node not in self.ready
            and now - self._greeted.get(node, -GREETING_SECONDS) >= GREETING_SECONDS
        ]
        if not new:
            return
        self._greeted |= dict.fromkeys(new, now)
        found = self._greet(new, seconds).valid
        named = {node: here.site for node, here in found.items()}
        named |= self.ready
        allowed = {n: here for n, here in found.items() if self._may_join(here.site, named)}
        approved = {node: here for node, here in allowed.items() if here.approved}
        for here in approved.values():
            self.meet(here)
        lacking = {node: here.site for node, here in approved.items() if not here.backbone}
        whole = self._equip(lacking, windows)
        self.ready |= {
            node: here.site for node, here in approved.items() if here.backbone or node in whole
        }
        # What was sent in part goes on at the next look, and not only after a while.
        for node in lacking.keys() - whole:
            self._greeted.pop(node, None)

    def _greet(self, nodes: list[int], seconds: float) -> Answers[int, Here]:
        payload = canonical(self.study.canonical).encode()
        hello = Hello(study=self.study.digest, run=self.run, payload=messages.digest(payload))
        asked = {node: Asked(node, hello, payload, MessageType.QUERY, "hello") for node in nodes}
        timeout = min(seconds, self.study.aggregation.timeout)
        # A quorum need not wait for long for the rest.
        enough = (self.study.aggregation.quorum - len(self.ready), GREETING_SECONDS)
        found = self.post.ask(asked, _here, timeout, enough)
        for node, reason in found.failed.items():
            log.warning("node %d did not name itself: %s", node, reason)
        return found

    def _may_join(self, site: str, named: Mapping[int, str]) -> bool:
        """Leave out a name that two nodes claim, or that the study gives no weight."""
        weights = self.study.aggregation.weights
        if list(named.values()).count(site) > 1:
            log.warning("%s: left out: several nodes call themselves so", site)
            return False
        if weights and site not in weights:
            log.warning("%s: left out: aggregation.weights does not name it", site)
            return False
        return True

    def _equip(self, sites: dict[int, str], windows: int | None) -> set[int]:
        """Send the backbone to nodes that lack it; return those that now have all of it."""
        if not sites or self.backbone is None:
            return set()
        manifest = distribution.manifest(self.backbone, self.study.backbone.digest)
        offers = {node: self._offer(node, site, manifest) for node, site in sites.items()}
        missing = self.post.ask(offers, _wanted, GREETING_SECONDS).valid
        sent = 0
        while any(missing.values()) and (windows is None or sent < windows):
            missing = self._window(sites, missing)
            sent += 1
        return {node for node, rest in missing.items() if not rest}

    def _window(
        self, sites: Mapping[int, str], missing: Mapping[int, dict[str, int]]
    ) -> dict[int, dict[str, int]]:
        """Send each node its next parts; return what nodes that took them still lack."""
        parts = {
            (node, number): part
            for node, rest in missing.items()
            for number, part in enumerate(self._parts(node, sites[node], rest))
        }
        found = self.post.ask(parts, _wanted, PART_SECONDS)
        for (node, _), reason in found.failed.items():
            log.warning("%s: backbone: %s", sites[node], reason)
        left = {node: rest for node, rest in missing.items() if not rest}
        # Parts are taken in order, so that the last answer tells what is still missing.
        last = {node: found.valid[node, number] for node, number in sorted(found.valid)}
        return left | last

    def _parts(self, node: int, site: str, missing: Mapping[str, int]) -> Iterator[Asked]:
        for name, offset, data in islice(self._chunks(missing), WINDOW):
            part = Part(
                site=site,
                study=self.study.digest,
                run=self.run,
                name=name,
                offset=offset,
                payload=messages.digest(data),
            )
            yield Asked(node, part, data, MessageType.QUERY, "backbone")

    def _chunks(self, missing: Mapping[str, int]) -> Iterator[tuple[str, int, bytes]]:
        assert self.backbone is not None
        pinned = self.study.backbone.digest
        return distribution.parts(self.backbone, missing, expected=pinned)

    def _offer(self, node: int, site: str, manifest: bytes) -> Asked:
        offer = Offer(
            site=site,
            study=self.study.digest,
            run=self.run,
            payload=messages.digest(manifest),
        )
        return Asked(node, offer, manifest, MessageType.QUERY, "backbone")


def _here(reply: Reply, payload: bytes) -> Here:
    if not isinstance(reply, Here):
        raise MessageError("expected a site to name itself")
    return reply


def _wanted(reply: Reply, payload: bytes) -> dict[str, int]:
    if not isinstance(reply, Wanted):
        raise MessageError("expected a site to say what it lacks")
    try:
        missing = json.loads(payload)["missing"]
        return {str(name): int(offset) for name, offset in missing.items()}
    except (ValueError, KeyError, TypeError, AttributeError, InputError):
        raise MessageError("expected what is missing as offsets by file name") from None
