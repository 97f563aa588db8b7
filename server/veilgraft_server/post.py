"""Questions out, answers in: the one way in which a coordinator talks with nodes.

On a network every question is signed and good for one run of time, and an answer counts only if
the site that the registry knows behind that node has signed it. A question that is not answered is
asked again, with a new nonce: sites answer the same question with the same bytes, so that asking
costs no privacy. A site that stays away is waited for only so long as it seems to be there.
"""

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from veilgraft import messages
from veilgraft.errors import MessageError
from veilgraft.identity import PublicKey, SigningKey
from veilgraft.messages import Envelope, Hello, Question, Refused, Reply
from veilgraft_server.carrier import Answer, Carrier, Letter, LostError, MissingError

POLL_SECONDS = 0.2
LOOK_SECONDS = 3.0
"""Between looks at which nodes are there."""

RESEND_SECONDS = 45.0
"""After which a question is asked again; twice as long each time."""

RESTARTED_SECONDS = 8.0
"""After a node has started anew, until what it was asked before is asked again.

What its predecessor had taken is lost with it; what still lay there is answered by then.
"""

PAUSE_SECONDS = 2.0
"""After an answer that could not be had, before the question is asked again; likewise."""

DOUBLINGS = 4
"""Of either, at most; what is asked again and again stays with the SuperLink until it expires."""

VALID_SECONDS = 12 * 3600.0
"""For which a question is good at most, however long is waited: sites refuse more than a day."""

AWAY_SECONDS = 90.0
"""A node that has been away for so long is waited for no longer: it restarts within 60 s."""

SKEW_SECONDS = 300
"""By which a site's clock may be ahead."""

REFUSED = "refused"
"""How the reason begins why a site's own no does not count."""

Name = TypeVar("Name")
Checked = TypeVar("Checked")
Check = Callable[[Reply, bytes], Checked]
"""Takes an answer and its payload; raises `MessageError` where it does not count."""


@dataclass(frozen=True)
class Asked:
    """One question to one node.

    Attributes:
        node: Flower's id of it.
        type: Flower's message type.
        group: what belongs together; shown in Flower's logs.
    """

    node: int
    question: Question
    payload: bytes
    type: str
    group: str


@dataclass
class _Waiting:
    asked: Asked
    attempt: int = 0
    due: float = 0.0
    asked_at: float = 0.0
    sent: set[str] = field(default_factory=set)
    reason: str = "no answer"

    @property
    def patience(self) -> int:
        """By how much longer is waited than at the first attempt."""
        return 1 << min(max(self.attempt - 1, 0), DOUBLINGS)


@dataclass(frozen=True)
class Answers(Generic[Name, Checked]):
    """What came back: answers that count, and why others don't, by what was asked."""

    valid: dict[Name, Checked]
    failed: dict[Name, str]


@dataclass(frozen=True)
class Post:
    """See the module's docstring.

    Attributes:
        key: signs questions; None in a simulation, where nothing is signed.
        sender: finds the name and the key of the site behind a node; None where it is unknown.
    """

    carrier: Carrier
    key: SigningKey | None = None
    sender: Callable[[int], tuple[str, PublicKey] | None] = lambda _: None
    _seen: dict[int, float] = field(default_factory=dict)
    """When each node was there last: one that has left holds up one round, and no further one."""

    def ask(
        self,
        questions: Mapping[Name, Asked],
        check: Check[Checked],
        timeout: float,
        enough: tuple[int, float] | None = None,
    ) -> Answers[Name, Checked]:
        """Ask all at once; return when each is answered, its node is away, or time is over.

        Args:
            questions: by any name; one node may be asked several.
            timeout: seconds.
            enough: a number of valid answers, with which so many seconds are enough.
        """
        waiting = {name: _Waiting(asked) for name, asked in questions.items()}
        answers: Answers[Name, Checked] = Answers({}, {})
        ids: dict[str, Name] = {}
        began = looked = time.monotonic()
        deadline = began + timeout
        while waiting and time.monotonic() < deadline:
            ids |= self._send(waiting, deadline)
            for id_, answer in self._fetched(ids, waiting):
                name = ids.pop(id_, None)
                if name is not None and name in waiting:
                    self._take(name, answer, waiting, check, answers)
            if time.monotonic() - looked > LOOK_SECONDS:
                looked = time.monotonic()
                self._look(waiting, answers)
            if enough and len(answers.valid) >= enough[0] and time.monotonic() - began > enough[1]:
                break
            if waiting:
                time.sleep(POLL_SECONDS)
        answers.failed.update({name: each.reason for name, each in waiting.items()})
        return answers

    def _fetched(
        self, ids: Mapping[str, Name], waiting: Mapping[Name, _Waiting]
    ) -> Iterator[tuple[str, Answer]]:
        try:
            yield from self.carrier.fetch(list(ids))
        except LostError:
            for each in waiting.values():
                each.due = min(each.due, time.monotonic() + PAUSE_SECONDS)

    def nodes(self) -> list[int]:
        """Return the nodes that are there."""
        return sorted(self.carrier.there())

    def _send(self, waiting: Mapping[Name, _Waiting], deadline: float) -> dict[str, Name]:
        now = time.monotonic()
        due = [name for name, each in waiting.items() if each.due <= now]
        if not due:
            return {}
        letters = [self._letter(waiting[name], deadline - now) for name in due]
        for name in due:
            waiting[name].asked_at = time.time()
            waiting[name].due = now + RESEND_SECONDS * waiting[name].patience
        ids = self.carrier.send(letters)
        return {id_: name for id_, name in zip(ids, due, strict=True) if id_}

    def _letter(self, waiting: _Waiting, seconds: float) -> Letter:
        asked = waiting.asked
        waiting.attempt += 1
        question = asked.question.model_copy(update={"attempt": waiting.attempt})
        envelope = self._sealed(question, asked.payload, min(seconds, VALID_SECONDS))
        waiting.sent.add(messages.digest(envelope.header))
        return Letter(asked.node, envelope, asked.type, asked.group, seconds)

    def _sealed(self, question: Question, payload: bytes, seconds: float) -> Envelope:
        if self.key is None:
            return Envelope(question.encode(), payload)
        seal = {
            "key": self.key.public.id,
            "nonce": secrets.token_hex(16),
            "expires": int(time.time() + seconds) + SKEW_SECONDS,
        }
        header = question.model_copy(update=seal).encode()
        return Envelope(header, payload, self.key.sign("request", header))

    def _take(
        self,
        name: Name,
        answer: Answer,
        waiting: dict[Name, _Waiting],
        check: Check[Checked],
        answers: Answers[Name, Checked],
    ) -> None:
        each = waiting[name]
        try:
            answers.valid[name] = check(*self._opened(answer, each))
        except MissingError as error:
            each.reason = str(error)
            if self.key is not None:
                each.due = min(each.due, time.monotonic() + PAUSE_SECONDS * each.patience)
                return
            answers.failed[name] = each.reason
        except MessageError as error:
            answers.failed[name] = str(error)
        del waiting[name]

    def _opened(self, came: Answer, waiting: _Waiting) -> tuple[Reply, bytes]:
        """Return an answer that is the site's own, to what it was asked."""
        if isinstance(came, MessageError):
            raise came
        envelope = came
        answer = messages.decode_answer(envelope.header)
        if self.key is not None:
            self._verify(waiting.asked.node, envelope, answer)
        if answer.request not in waiting.sent:
            raise MessageError("answers another request")
        question = waiting.asked.question
        if not isinstance(question, Hello) and answer.site != question.site:
            raise MessageError("the header does not fit the site")
        if isinstance(answer, Refused):
            raise MessageError(f"{REFUSED}: {answer.code}")
        if answer.payload != messages.digest(envelope.payload):
            raise MessageError("the header does not fit the payload")
        return answer, envelope.payload

    def _verify(self, node: int, envelope: Envelope, answer: Reply) -> None:
        known = self.sender(node)
        if known is None:
            raise MessageError("the registry knows no site behind this node")
        if not envelope.signature:
            raise MissingError("no answer from the site's vault")
        site, key = known
        key.verify("answer", envelope.header, envelope.signature)
        if answer.site != site:
            raise MessageError("the header names another site")

    def _look(self, waiting: dict[Name, _Waiting], answers: Answers[Name, Checked]) -> None:
        now, there = time.monotonic(), self.carrier.there()
        for name, each in list(waiting.items()):
            seen = self._seen.setdefault(each.asked.node, now)
            if each.asked.node in there:
                self._seen[each.asked.node] = now
                if each.asked_at < there[each.asked.node] < time.time() - RESTARTED_SECONDS:
                    each.due = now
            elif now - seen > AWAY_SECONDS:
                answers.failed[name] = f"away: {each.reason}"
                del waiting[name]
