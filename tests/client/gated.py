"""A site as it stands behind its gate, and the coordinator that it pinned, for tests."""

import contextlib
import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from veilgraft import messages
from veilgraft.config import canonical
from veilgraft.events import EventLog
from veilgraft.identity import SigningKey
from veilgraft.messages import Asked, Envelope, Hello, Offer, Part, Refused, Reply, Request
from veilgraft.model import bundle
from veilgraft.model import head as heads
from veilgraft.model.features import Cohort, Features, units
from veilgraft.study import Study
from veilgraft_client.bundles import Bundles
from veilgraft_client.desk import Desk
from veilgraft_client.gate import Gate, Nonces
from veilgraft_client.ledger import Ledger
from veilgraft_client.metrics import Metrics
from veilgraft_client.policy import Site
from veilgraft_client.studies import Studies
from veilgraft_client.vault import Vault

BACKBONE = Path(__file__).parents[2] / "deploy/veilgraft_deploy/demo/backbone"
DIGEST = bundle.digest(BACKBONE)
DIM = 4
QUICK = 1e-3
"""Seconds to which answers are held where a test does not look at time."""


def study(**sections: Any) -> Study:
    values: dict[str, Any] = {
        "name": "s",
        "purpose": "p",
        "task": {"labels": ["a", "b", "c"]},
        "backbone": {"digest": DIGEST, "modality": "image", "pooling": "cls"},
        "privacy": {"noise_multiplier": 5.0},
        "training": {"algorithm": "dp-gd", "rounds": 3, "learning_rate": 1.0},
    }
    return Study.parse({**values, **sections}, name="study.yaml")


def features(count: int = 20, seed: int = 1) -> Features:
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(count, DIM)).astype(np.float32)
    return units(values, torch.from_numpy(generator.integers(0, 3, count)))


@dataclass
class Party:
    """One site with real files, and the key of its coordinator."""

    gate: Gate
    desk: Desk
    vault: Vault
    studies: Studies
    bundles: Bundles
    nonces: Nonces
    events: EventLog
    identity: SigningKey
    coordinator: SigningKey
    prepared: list[Study] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.vault.site.site

    @property
    def spent(self) -> int:
        return len(self.vault.ledger.events(self.name))

    def approve(self, contract: Study) -> Study:
        """Have a study approved, as a person at the site does."""
        self.studies.propose(canonical(contract.canonical).encode())
        self.desk.do("approve", contract.digest)
        return contract

    def ask(self, envelope: Envelope) -> Reply:
        """Return what the site says, whose signature and name of the request are checked."""
        answer = self.gate.handle(envelope)
        self.identity.public.verify("answer", answer.header, answer.signature)
        reply = messages.decode_answer(answer.header)
        assert reply.request == messages.digest(envelope.header)
        assert reply.payload == messages.digest(answer.payload)
        return reply

    def told(self) -> list[tuple[str, dict[str, Any]]]:
        entries = list(self.events.entries())[1:]  # the first opens the log
        return [(note.kind, note.facts) for note in entries]


@contextlib.contextmanager
def party(
    folder: Path, coordinator: SigningKey | None = None, name: str = "a", **options: Any
) -> Iterator[Party]:
    """Open a site in a folder; `options` are keys of its file."""
    values: dict[str, Any] = {
        "site": name,
        "data": {"path": folder / "records.csv"},
        "units": 20,
        "limits": {"max_epsilon": 50.0},
        "state": folder / "state",
        "reply_seconds": QUICK,
    }
    site = Site.parse({**values, **options}, name="site.yaml")
    key, identity = coordinator or SigningKey.generate(), SigningKey.generate()
    site.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.ExitStack() as opened:
        ledger = opened.enter_context(contextlib.closing(Ledger(site.state / "ledger.db")))
        events = opened.enter_context(contextlib.closing(EventLog(site.state / "events.db")))
        nonces = opened.enter_context(contextlib.closing(Nonces(site.state / "nonces.db")))
        cohort = Cohort(features(), features(0))
        vault = Vault(site, ledger, lambda _: cohort, seed=site.seed)
        studies = Studies(site.state)
        bundles = Bundles(site.state / "backbones", site.limits.max_backbone_bytes)
        prepared: list[Study] = []
        gate = Gate(
            vault,
            studies,
            bundles,
            coordinator=lambda: key.public,
            identity=identity,
            nonces=nonces,
            events=events,
            ready=prepared.append,
        )
        metrics = Metrics(site, ledger)
        desk = Desk(vault, studies, bundles, ledger, events, metrics, ready=prepared.append)
        yield Party(gate, desk, vault, studies, bundles, nonces, events, identity, key, prepared)


def sealed(question: Asked, payload: bytes, key: SigningKey, /, **changes: Any) -> Envelope:
    """Return a question as the coordinator sends it."""
    seal = {
        "key": key.public.id,
        "nonce": secrets.token_hex(16),
        "expires": int(time.time()) + 60,
    }
    header = question.model_copy(update=seal | changes).encode()
    return Envelope(header, payload, key.sign("request", header))


def request(
    contract: Study, key: SigningKey, round_: int = 1, /, *, fill: float = 0.0, **changes: Any
) -> Envelope:
    shapes = heads.shapes(contract.head, DIM, 3)
    return released(
        contract, key, {n: np.full(s, fill) for n, s in shapes.items()}, round_, **changes
    )


def released(
    contract: Study, key: SigningKey, head: heads.Arrays, round_: int = 1, /, **changes: Any
) -> Envelope:
    payload = messages.pack(head)
    asked = Request(
        site="a",
        study=contract.digest,
        run="r",
        round=round_,
        head=messages.digest(payload),
        rate=0.1,
    )
    return sealed(asked, payload, key, **changes)


def hello(contract: Study, key: SigningKey, /, **changes: Any) -> Envelope:
    payload = canonical(contract.canonical).encode()
    asked = Hello(study=contract.digest, run="r", payload=messages.digest(payload))
    return sealed(asked, payload, key, **changes)


def offer(contract: Study, key: SigningKey) -> Envelope:
    payload = json.dumps({"files": bundle.contents(BACKBONE)}).encode()
    asked = Offer(site="a", study=contract.digest, run="r", payload=messages.digest(payload))
    return sealed(asked, payload, key)


def part(contract: Study, key: SigningKey, name: str, offset: int, data: bytes) -> Envelope:
    asked = Part(
        site="a",
        study=contract.digest,
        run="r",
        name=name,
        offset=offset,
        payload=messages.digest(data),
    )
    return sealed(asked, data, key)


def refused(reply: Reply) -> str:
    """Return the code of a no."""
    assert isinstance(reply, Refused), reply
    return reply.code.value
