"""Pay, compute, store, send: the order of a release, and what a failure within it leaves."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from veilgraft import messages
from veilgraft.errors import Refusal, RefusedError
from veilgraft.messages import Envelope, Refused, Release, Request
from veilgraft.model import head as heads
from veilgraft.model.features import Cohort, units
from veilgraft.privacy import mechanism
from veilgraft.study import Study
from veilgraft_client import fused, policy, training
from veilgraft_client.fused import Fused
from veilgraft_client.ledger import Key, Ledger
from veilgraft_client.policy import Site
from veilgraft_client.training import Trainer
from veilgraft_client.vault import Vault

DIM, LABELS, COUNT, SIGMA = 300, 3, 20, 5.0


class WatchedLedger(Ledger):
    """A ledger that writes down when it was asked to pay and to store."""

    def __init__(self, path: Path, log: list[str]) -> None:
        super().__init__(path)
        self.log = log
        self.returned: list[bytes] = []

    def reserve_all(self, keys: Sequence[Key]) -> list[int | bytes | RefusedError]:
        found = super().reserve_all(keys)
        self.log += ["reserve" for each in found if not isinstance(each, RefusedError)]
        return found

    def commit_all(self, releases: Sequence[tuple[int, bytes]]) -> list[bytes]:
        self.log.append("commit")
        found = super().commit_all(releases)
        self.returned += found
        return found


class RacedLedger(WatchedLedger):
    """A ledger in which another process always commits the same release first."""

    def commit_all(self, releases: Sequence[tuple[int, bytes]]) -> list[bytes]:
        Ledger.commit_all(self, [(each, payload[::-1]) for each, payload in releases])
        return super().commit_all(releases)


@pytest.fixture(params=["fused", "opacus"], autouse=True)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `auto` is; every test runs with each."""
    monkeypatch.setenv(policy.AUTO, request.param)
    return str(request.param)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens at a site, in order, as far as ledger and training go."""
    entries: list[str] = []

    def watch(kind: type[Trainer] | type[Fused]) -> None:
        real = kind.update

        def watched(self: Any, *args: Any) -> Any:
            entries.append("compute")
            return real(self, *args)

        monkeypatch.setattr(kind, "update", watched)

    watch(Trainer)
    watch(Fused)
    return entries


def study(algorithm: str = "dp-gd") -> Study:
    chosen = {"algorithm": algorithm, "rounds": 2, "learning_rate": 1.0}
    if algorithm == "dp-sgd":
        chosen |= {"sample_rate": 0.5, "local_epochs": 1}
    values: dict[str, Any] = {
        "name": "s",
        "purpose": "p",
        "task": {"labels": ["a", "b", "c"]},
        "backbone": {"digest": "sha256:" + "0" * 64, "modality": "text", "pooling": "cls"},
        "privacy": {"noise_multiplier": SIGMA},
        "training": chosen,
    }
    return Study.parse(values, name="study.yaml")


def features(_: Study) -> Cohort:
    generator = np.random.default_rng(1)
    values = generator.normal(size=(COUNT, DIM)).astype(np.float32)
    made = units(values, torch.from_numpy(generator.integers(0, LABELS, COUNT)))
    return Cohort(made, made.select(slice(0)))


def vault(tmp_path: Path, ledger: Ledger, contract: Study, seed: int | None = None) -> Vault:
    values: dict[str, Any] = {
        "site": "a",
        "data": {"path": tmp_path / "records.csv"},
        "data_is_public": seed is not None,
        "units": COUNT,
        "limits": {"max_epsilon": 50.0},
        "state": tmp_path / "state",
    }
    own = Vault(Site.parse(values, name="site.yaml"), ledger, features, seed=seed)
    own.approve(contract)
    return own


def request(contract: Study, round_: int = 1, fill: float = 0.0) -> Envelope:
    shapes = heads.shapes(contract.head, DIM, LABELS)
    payload = messages.pack({name: np.full(shape, fill) for name, shape in shapes.items()})
    values = {
        "site": "a",
        "study": contract.digest,
        "run": "r",
        "round": round_,
        "head": messages.digest(payload),
        "rate": 0.1,
    }
    return Envelope(Request.model_validate(values).encode(), payload)


def code(answer: Envelope) -> Refusal | None:
    decoded = messages.decode_answer(answer.header)
    return decoded.code if isinstance(decoded, Refused) else None


def test_a_release_is_paid_then_computed_then_stored(tmp_path: Path, log: list[str]) -> None:
    contract, ledger = study(), WatchedLedger(tmp_path / "ledger.db", log)
    answer = vault(tmp_path, ledger, contract).handle(request(contract))
    assert code(answer) is None
    assert log == ["reserve", "compute", "commit"]
    assert [answer.payload] == ledger.returned


def test_what_is_sent_is_what_the_ledger_stored_and_not_what_was_computed(
    tmp_path: Path, log: list[str]
) -> None:
    contract, ledger = study(), RacedLedger(tmp_path / "ledger.db", log)
    own = vault(tmp_path, ledger, contract)
    answer = own.handle(request(contract))
    release = messages.decode_answer(answer.header)
    assert isinstance(release, Release)
    assert [answer.payload] == ledger.returned
    assert release.payload == messages.digest(answer.payload)
    assert own.handle(request(contract)).payload == answer.payload


def test_what_the_ledger_does_not_pay_for_is_not_computed(tmp_path: Path, log: list[str]) -> None:
    contract, ledger = study(), WatchedLedger(tmp_path / "ledger.db", log)
    own = vault(tmp_path, ledger, contract)
    own.handle(request(contract))
    log.clear()
    assert code(own.handle(request(contract, fill=1.0))) == Refusal.ROUND_CONFLICT
    assert log == []
    assert code(own.handle(request(contract))) is None
    assert log == ["reserve"]


def _before_training(patch: pytest.MonkeyPatch, error: Callable[..., Any]) -> None:
    patch.setattr(Trainer, "update", error)
    patch.setattr(Fused, "update", error)


def _between_forward_and_backward(patch: pytest.MonkeyPatch, error: Callable[..., Any]) -> None:
    patch.setattr(training, "unit_losses", error)
    patch.setattr(fused, "_residual", error)


def _at_the_noise(patch: pytest.MonkeyPatch, error: Callable[..., Any]) -> None:
    patch.setattr(mechanism, "add_noise", error)


def _at_the_commit(patch: pytest.MonkeyPatch, error: Callable[..., Any]) -> None:
    patch.setattr(Ledger, "commit_all", error)


@pytest.mark.parametrize(
    "fails", [_before_training, _between_forward_and_backward, _at_the_noise, _at_the_commit]
)
@pytest.mark.parametrize("algorithm", ["dp-gd", "dp-sgd"])
def test_a_failure_is_unavailable_and_the_same_round_then_succeeds_at_no_further_cost(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: Callable[[pytest.MonkeyPatch, Callable[..., Any]], None],
    algorithm: str,
) -> None:
    def error(*_: Any) -> None:
        raise MemoryError("patient 4711")

    contract, ledger = study(algorithm), Ledger(tmp_path / "ledger.db")
    own = vault(tmp_path, ledger, contract)
    with monkeypatch.context() as patch:
        fails(patch, error)
        failed = own.handle(request(contract))
    assert code(failed) == Refusal.UNAVAILABLE
    assert b"4711" not in failed.header + failed.payload
    assert code(own.handle(request(contract))) is None
    kinds = [entry.kind for entry in ledger.entries("a")]
    assert kinds == ["terms", "grant", "reserve", "retry", "commit"]
    assert len(ledger.events("a")) == 1


@pytest.mark.parametrize("seed", [None, 7], ids=["private", "repeatable"])
def test_two_rounds_on_one_head_hold_independent_noise(tmp_path: Path, seed: int | None) -> None:
    contract = study()
    own = vault(tmp_path, Ledger(tmp_path / "ledger.db"), contract, seed)
    shapes = heads.shapes(contract.head, DIM, LABELS)
    first, second = (
        messages.unpack(own.handle(request(contract, round_)).payload, shapes) for round_ in (1, 2)
    )
    # One head and one set of records: the sums are equal, and the noise is all that differs.
    difference = np.concatenate([(first[name] - second[name]).ravel() for name in shapes])
    expected = np.sqrt(2) * SIGMA * contract.privacy.clip_norm / COUNT
    # Six standard errors of a deviation from 903 normals are 14%.
    assert difference.std() == pytest.approx(expected, rel=0.14)
