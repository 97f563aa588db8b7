"""Which sites take part: who they say they are, whether they may, and what they still lack.

A site takes part once a person there has approved the study and the backbone is whole. Sites that
come late are greeted between rounds, and take part from the next.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from flwr.app import MessageType

from veilgraft import messages
from veilgraft.config import canonical
from veilgraft.errors import MessageError, QuorumError
from veilgraft.messages import Hello, Here, Offer, Part, Reply, Wanted
from veilgraft.study import Study
from veilgraft_server import distribution
from veilgraft_server.post import POLL_SECONDS, Answers, Asked, Post

log = logging.getLogger(__name__)

FIRST_GREETING_SECONDS = 120.0
GREETING_SECONDS = 30.0
"""How long an answer to a greeting is waited for: before the first round, and between rounds, when
all others wait. So long passes, too, until a site is greeted again."""

SHYNESS = 4
"""Doublings, at most, of the time until a site is greeted again that gave no sign of getting on."""

PART_SECONDS = 600.0
LATE_SECONDS = 60.0
"""What late sites may take of the others' time between two rounds, beside a greeting."""

WINDOW = 4
"""Parts that are under way to one site at a time."""

AT_ONCE = 4
"""Sites that parts are under way to; so much is in memory. Those that had least come first."""

FIRST_WINDOWS, WINDOWS = 64, 4
"""Windows sent at a look: before the first round, and between rounds."""

COPIES = 3
"""How often a site is sent the whole backbone in one run, which may have lost it; then no more."""

MAX_WANTED = 1 << 16
"""Bytes in which a site says what it lacks."""


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
    _fruitless: dict[int, int] = field(default_factory=dict)
    _sent: dict[str, int] = field(default_factory=dict)

    def wait(self, seconds: float) -> None:
        """Return once a quorum is ready.

        Raises:
            QuorumError: it is not, after so many seconds.
        """
        quorum, deadline = self.study.aggregation.quorum, time.monotonic() + seconds
        while True:
            self.refresh(FIRST_WINDOWS, FIRST_GREETING_SECONDS, PART_SECONDS)
            if len(self.ready) >= quorum:
                return
            if time.monotonic() > deadline:
                raise QuorumError(
                    f"{len(self.ready)} sites ready after {seconds:g} s; "
                    f"aggregation.quorum is {quorum}"
                )
            time.sleep(POLL_SECONDS)

    def refresh(
        self,
        windows: int = WINDOWS,
        seconds: float = GREETING_SECONDS,
        within: float = LATE_SECONDS,
    ) -> None:
        """Greet nodes that don't take part yet, and send them what they lack.

        Args:
            windows: of parts at most.
            seconds: that answers to a greeting are waited for.
            within: seconds that sending may take.
        """
        now, there = time.monotonic(), self.post.nodes()
        self._part_from({node for node in self.ready if node not in there})
        new = [node for node in there if node not in self.ready and self._is_due(node, now)]
        if not new:
            return
        self._greeted |= dict.fromkeys(new, now)
        found = self._greet(new, seconds).valid
        named = {node: here.site for node, here in found.items()}
        # A site that joined anew is another node; its old one will not come back.
        left = {n for n, s in self.ready.items() if n not in there and s in named.values()}
        self.ready = {n: site for n, site in self.ready.items() if n not in left}
        named |= self.ready
        claims = Counter(named.values())
        allowed = {n: here for n, here in found.items() if self._may_join(here.site, claims)}
        approved = {node: here for node, here in allowed.items() if here.approved}
        for here in approved.values():
            self.meet(here)
        lacking = {node: here.site for node, here in approved.items() if not here.backbone}
        whole, slow = self._equip(lacking, windows, time.monotonic() + within)
        self.ready |= {
            node: here.site for node, here in approved.items() if here.backbone or node in whole
        }
        # What was sent in part goes on at the next look, and not only after a while.
        for node in lacking.keys() - whole - slow:
            self._greeted.pop(node, None)
        for node in new:
            fruitless = node in slow or node not in found
            self._fruitless[node] = self._fruitless.get(node, 0) + 1 if fruitless else 0

    def doubt(self, nodes: Iterable[int]) -> None:
        """Greet nodes anew that said no: they may have lost the backbone, or the approval."""
        for node in nodes:
            self.ready.pop(node, None)
            if not self._fruitless.get(node):
                self._greeted.pop(node, None)

    def _is_due(self, node: int, now: float) -> bool:
        """Whether a node is to be greeted; one that keeps the others waiting, ever less often."""
        if node not in self._greeted:
            return True
        doublings = min(self._fruitless.get(node, 0), SHYNESS)
        return now - self._greeted[node] >= GREETING_SECONDS * (1 << doublings)

    def _part_from(self, gone: set[int]) -> None:
        """Ask nodes that have left no more, until they are back, where the quorum holds without."""
        if gone and len(self.ready) - len(gone) >= self.study.aggregation.quorum:
            for node in gone:
                log.warning("%s: has left", self.ready.pop(node))

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

    def _may_join(self, site: str, claims: Counter[str]) -> bool:
        """Leave out a name that two nodes claim, or that the study gives no weight."""
        weights = self.study.aggregation.weights
        if claims[site] > 1:
            log.warning("%s: left out: several nodes call themselves so", site)
            return False
        if weights and site not in weights:
            log.warning("%s: left out: aggregation.weights does not name it", site)
            return False
        return True

    def _equip(
        self, lacking: Mapping[int, str], windows: int, until: float
    ) -> tuple[set[int], set[int]]:
        """Send the backbone on; return who has all of it, and who did not get on at all."""
        if not lacking or self.backbone is None:
            return set(), set()
        manifest = distribution.manifest(self.backbone, self.study.backbone.digest)
        sizes = {name: file["bytes"] for name, file in json.loads(manifest)["files"].items()}
        most = COPIES * _rest(dict.fromkeys(sizes, 0), sizes)
        sated = {node for node, site in lacking.items() if self._sent.get(site, 0) >= most}
        for node in sated:
            log.warning("%s: was sent the backbone %d times; no more", lacking[node], COPIES)
        fair = sorted(lacking.keys() - sated, key=lambda node: self._sent.get(lacking[node], 0))
        sites = {node: lacking[node] for node in fair[:AT_ONCE]}
        offers = {node: self._offer(node, site, manifest) for node, site in sites.items()}
        first = self.post.ask(offers, _wanted(sizes), _left(until, GREETING_SECONDS)).valid
        missing, last = first, dict(first)
        for _ in range(windows):
            missing = {n: m for n, m in missing.items() if m and self._sent.get(sites[n], 0) < most}
            if not missing or time.monotonic() > until:
                break
            missing = self._window(sites, missing, sizes, _left(until, PART_SECONDS))
            last |= missing
        whole = {node for node, rest in last.items() if not rest}
        got_on = {n for n, rest in last.items() if _rest(rest, sizes) < _rest(first[n], sizes)}
        return whole, sated | (sites.keys() - whole - got_on)

    def _window(
        self,
        sites: Mapping[int, str],
        missing: Mapping[int, dict[str, int]],
        sizes: Mapping[str, int],
        seconds: float,
    ) -> dict[int, dict[str, int]]:
        """Send each node its next parts; return what nodes that took some still lack."""
        parts = {
            (node, number): part
            for node, rest in missing.items()
            for number, part in enumerate(self._parts(node, sites[node], rest))
        }
        for (node, _), part in parts.items():
            # Also an empty part is one.
            self._sent[sites[node]] = self._sent.get(sites[node], 0) + max(1, len(part.payload))
        found = self.post.ask(parts, _wanted(sizes), seconds)
        for (node, _), reason in found.failed.items():
            log.warning("%s: backbone: %s", sites[node], reason)
        left: dict[int, dict[str, int]] = {}
        # Parts may overtake one another: the answer to the last one taken lacks least.
        for (node, _), rest in found.valid.items():
            if node not in left or _rest(rest, sizes) < _rest(left[node], sizes):
                left[node] = rest
        return left

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


def _wanted(sizes: Mapping[str, int]) -> Callable[[Reply, bytes], dict[str, int]]:
    """Return the check of what a site lacks of files of these sizes."""

    def check(reply: Reply, payload: bytes) -> dict[str, int]:
        if not isinstance(reply, Wanted) or len(payload) > MAX_WANTED:
            raise MessageError("expected a site to say what it lacks")
        try:
            missing = dict(json.loads(payload)["missing"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise MessageError("expected what is missing as offsets by file name") from None
        for name, offset in missing.items():
            inside = name in sizes and type(offset) is int and 0 <= offset < max(1, sizes[name])
            if not inside:
                raise MessageError("expected offsets within files that were offered")
        return missing

    return check


def _rest(missing: Mapping[str, int], sizes: Mapping[str, int]) -> int:
    """Return how much is missing, in bytes; of an empty file, one."""
    return sum(max(1, sizes[name]) - offset for name, offset in missing.items())


def _left(until: float, most: float) -> float:
    return max(1.0, min(most, until - time.monotonic()))
