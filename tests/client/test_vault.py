"""The vault: what it answers, what it refuses, and what that costs."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from veilgraft import messages
from veilgraft.errors import Refusal, RefusedError
from veilgraft.messages import Envelope, Hello, Here, Refused, Release, Request
from veilgraft.model import head as heads
from veilgraft.model.features import Cohort, Features, units
from veilgraft.study import DataSource, Study
from veilgraft_client.ledger import Ledger
from veilgraft_client.policy import Limits, Site
from veilgraft_client.vault import Vault

DIM = 4


def study(**sections: Any) -> Study:
    values: dict[str, Any] = {
        "name": "s",
        "purpose": "p",
        "task": {"labels": ["a", "b", "c"]},
        "backbone": {"digest": "sha256:" + "0" * 64, "modality": "text", "pooling": "cls"},
        "privacy": {"noise_multiplier": 5.0},
        "training": {"algorithm": "dp-gd", "rounds": 3, "learning_rate": 1.0},
    }
    return Study.parse({**values, **sections}, name="study.yaml")


def site(tmp_path: Path, **changes: Any) -> Site:
    values: dict[str, Any] = {
        "site": "a",
        "data": {"path": tmp_path / "records.csv"},
        "units": 20,
        "limits": {"max_epsilon": 50.0},
        "state": tmp_path / "state",
    }
    return Site.parse({**values, **changes}, name="site.yaml")


def features(count: int = 20) -> Features:
    generator = np.random.default_rng(1)
    values = generator.normal(size=(count, DIM)).astype(np.float32)
    return units(values, torch.from_numpy(generator.integers(0, 3, count)))


def vault(tmp_path: Path, held: Features | None = None, **options: Any) -> Vault:
    seed = options.pop("seed", None)
    ledger = Ledger(tmp_path / "state" / "ledger.db")
    own = features() if held is None else held
    cohort = Cohort(own, features(0))
    return Vault(site(tmp_path, **options), ledger, lambda _: cohort, seed=seed)


def request(contract: Study, round_: int = 1, fill: float = 0.0, **changes: Any) -> Envelope:
    shapes = heads.shapes(contract.head, DIM, 3)
    payload = messages.pack({name: np.full(shape, fill) for name, shape in shapes.items()})
    values = {
        "site": "a",
        "study": contract.digest,
        "run": "r",
        "round": round_,
        "head": messages.digest(payload),
        "rate": 0.1,
    }
    return Envelope(Request.model_validate(values | changes).encode(), payload)


def answered(answer: Envelope) -> Release | Refused:
    reply = messages.decode_answer(answer.header)
    assert isinstance(reply, Release | Refused)
    return reply


def test_a_release_holds_the_head_s_arrays_and_names_what_it_answers(tmp_path: Path) -> None:
    contract, own = study(), vault(tmp_path)
    own.approve(contract)
    asked = request(contract)
    answer = own.handle(asked)
    release = answered(answer)
    assert isinstance(release, Release)
    assert release.request == messages.digest(asked.header)
    assert release.payload == messages.digest(answer.payload)
    update = messages.unpack(answer.payload, heads.shapes(contract.head, DIM, 3))
    assert any(array.any() for array in update.values())


def test_a_round_asked_for_again_gives_the_same_bytes(tmp_path: Path) -> None:
    contract, own = study(), vault(tmp_path)
    own.approve(contract)
    first = own.handle(request(contract))
    again = own.handle(request(contract, run="another", attempt=2))
    assert again.payload == first.payload
    assert len(own.ledger.events("a")) == 1


def test_two_vaults_never_give_the_same_noise(tmp_path: Path) -> None:
    contract = study()
    payloads = set()
    for name in ("one", "two"):
        own = vault(tmp_path / name)
        own.approve(contract)
        payloads.add(own.handle(request(contract)).payload)
    assert len(payloads) == 2


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"study": "sha256:" + "f" * 64}, Refusal.STUDY_NOT_APPROVED),
        ({"site": "b"}, Refusal.REQUEST_INVALID),
        ({"round_": 4}, Refusal.REQUEST_INVALID),
        ({"head": "sha256:" + "f" * 64}, Refusal.HEAD_INVALID),
        ({"fill": float("nan")}, Refusal.HEAD_INVALID),
        ({"fill": 10_001.0}, Refusal.HEAD_INVALID),
        ({"kind": "evaluation"}, Refusal.REQUEST_INVALID),
        ({"kind": "label-counts", "round_": 0}, Refusal.REQUEST_INVALID),
    ],
)
def test_what_does_not_fit_the_study_is_refused_and_costs_nothing(
    tmp_path: Path, changes: dict[str, Any], code: Refusal
) -> None:
    contract, own = study(), vault(tmp_path)
    own.approve(contract)
    refused = answered(own.handle(request(contract, **changes)))
    assert isinstance(refused, Refused)
    assert refused.code == code
    assert own.ledger.events("a") == []


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b'{"kind":"update"}', b'{"kind":"hello"'])
def test_any_bytes_are_refused_with_a_code(tmp_path: Path, data: bytes) -> None:
    refused = answered(vault(tmp_path).handle(Envelope(data, data)))
    assert isinstance(refused, Refused)
    assert refused.code == Refusal.REQUEST_INVALID


def test_an_error_inside_leaves_as_a_code_and_its_text_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "patient 4711"

    def broken(_: Study) -> Cohort:
        raise RuntimeError(secret)

    contract = study()
    own = Vault(site(tmp_path), Ledger(tmp_path / "ledger.db"), broken)
    own.approve(contract)
    with caplog.at_level(logging.ERROR):
        answer = own.handle(request(contract))
    assert secret in caplog.text
    assert secret.encode() not in answer.header + answer.payload
    refused = answered(answer)
    assert isinstance(refused, Refused)
    assert refused.code == Refusal.UNAVAILABLE


def test_a_round_that_was_released_for_another_head_is_a_conflict(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    contract, own = study(), vault(tmp_path)
    own.approve(contract)
    own.handle(request(contract, 3))
    with caplog.at_level(logging.WARNING):
        refused = answered(own.handle(request(contract, 3, fill=0.5)))
    assert isinstance(refused, Refused)
    assert refused.code == Refusal.ROUND_CONFLICT
    assert "another head" in caplog.text


@pytest.mark.parametrize(
    ("sections", "options"),
    [
        ({"privacy": {}, "training": {"algorithm": "none", "rounds": 1, "learning_rate": 1}}, {}),
        ({}, {"seed": 1}),
        ({}, {"limits": {"max_epsilon": 1.0}}),
        ({}, {"limits": {"max_epsilon": 50.0, "delta": 1.9e-5}}),
        ({}, {"limits": {"max_epsilon": 50.0, "min_units": 21}}),
        ({}, {"limits": {"max_epsilon": 50.0, "studies": ["sha256:" + "1" * 64]}}),
        ({}, {"limits": {"max_epsilon": 50.0, "backbones": ["sha256:" + "1" * 64]}}),
    ],
)
def test_a_study_that_the_site_s_file_does_not_allow_is_refused(
    tmp_path: Path, sections: dict[str, Any], options: dict[str, Any]
) -> None:
    own = vault(tmp_path, **options)
    with pytest.raises(RefusedError):
        own.approve(study(**sections))
    assert own.ledger.sites() == []


def test_without_noise_or_with_a_seed_only_public_data_take_part(tmp_path: Path) -> None:
    plain = study(privacy={}, training={"algorithm": "none", "rounds": 1, "learning_rate": 1.0})
    own = vault(tmp_path, data_is_public=True, seed=7)
    own.approve(study())
    own.approve(plain)
    assert isinstance(answered(own.handle(request(plain))), Release)
    assert own.ledger.epsilon("a", 1e-5) == float("inf")


def test_the_declared_size_and_not_the_measured_one_divides_the_sum(tmp_path: Path) -> None:
    plain = study(privacy={}, training={"algorithm": "none", "rounds": 1, "learning_rate": 1.0})
    updates = []
    for declared in (20, 40):
        own = vault(tmp_path / str(declared), data_is_public=True, units=declared)
        own.approve(plain)
        payload = own.handle(request(plain)).payload
        updates.append(messages.unpack(payload, heads.shapes(plain.head, DIM, 3)))
    for name, array in updates[0].items():
        np.testing.assert_allclose(array, 2 * updates[1][name])


def test_a_site_of_149_and_one_of_150_declare_and_show_the_same(tmp_path: Path) -> None:
    contract = study(
        training={
            "algorithm": "dp-sgd",
            "rounds": 3,
            "learning_rate": 1.0,
            "sample_rate": 0.2,
            "local_epochs": 1,
        }
    )
    shown = []
    for measured in (149, 150):
        own = vault(tmp_path / str(measured), features(measured), units=150)
        own.approve(contract)
        assert isinstance(answered(own.handle(request(contract))), Release)
        shown.append(own.ledger.epsilon("a", 1e-5))
    assert shown[0] == shown[1]


def test_a_unit_that_is_not_finite_leaves_no_trace(tmp_path: Path) -> None:
    clean = features()
    spoilt = features()
    spoilt.values[3] = float("nan")
    clean.values[3] = 0
    contract = study(privacy={"noise_multiplier": 1e-3, "clip_norm": 1e3})
    updates = []
    for name, held in (("clean", clean), ("spoilt", spoilt)):
        own = vault(tmp_path / name, held, data_is_public=True, seed=1, limits={"max_epsilon": 1e9})
        own.approve(contract)
        answer = own.handle(request(contract))
        assert isinstance(answered(answer), Release)
        updates.append(messages.unpack(answer.payload, heads.shapes(contract.head, DIM, 3)))
    # A unit of zero features moves the bias alone, and a unit that is not finite moves nothing.
    np.testing.assert_allclose(
        updates[0]["linear0.weight"], updates[1]["linear0.weight"], atol=1e-6
    )
    assert not np.allclose(updates[0]["linear0.bias"], updates[1]["linear0.bias"], atol=1e-6)


def test_units_that_are_held_out_are_never_trained_on(tmp_path: Path) -> None:
    contract = study(privacy={}, training={"algorithm": "none", "rounds": 1, "learning_rate": 1.0})
    spoilt = features(7)
    spoilt.values[:] = 1e3

    def updated(name: str, cohort: Cohort) -> bytes:
        ledger = Ledger(tmp_path / name / "ledger.db")
        made = Vault(site(tmp_path, data_is_public=True), ledger, lambda _: cohort)
        made.approve(contract)
        return made.handle(request(contract)).payload

    one, other = Cohort(features(), features(7)), Cohort(features(), spoilt)
    assert updated("one", one) == updated("other", other)


def test_units_that_are_trained_on_are_never_evaluated_on(tmp_path: Path) -> None:
    contract = study(
        privacy={},
        training={"algorithm": "none", "rounds": 1, "learning_rate": 1.0},
        evaluation={"private": {"share": 0.1}, "label_counts": {"share": 0.1}},
    )
    held = Vault(
        site(tmp_path, data_is_public=True, held_out=0.25),
        Ledger(tmp_path / "ledger.db"),
        lambda _: Cohort(features(20), features(7)),
    )
    held.approve(contract)
    evaluated = held.handle(request(contract, kind="evaluation"))
    sums = messages.unpack(evaluated.payload, {"sums": (3,)})["sums"]
    assert sums[2] == 7
    payload = messages.pack({})
    counted = request(contract, 0, kind="label-counts", head=messages.digest(payload))
    answer = held.handle(Envelope(counted.header, payload))
    assert messages.unpack(answer.payload, {"sums": (3,)})["sums"].sum() == 27


def test_the_declared_size_of_the_training_part_divides_an_update(tmp_path: Path) -> None:
    contract = study(privacy={}, training={"algorithm": "none", "rounds": 1, "learning_rate": 1.0})
    sums = []
    for share in (0.0, 0.5):
        own = vault(tmp_path / str(share), data_is_public=True, held_out=share)
        own.approve(contract)
        payload = own.handle(request(contract)).payload
        sums.append(messages.unpack(payload, heads.shapes(contract.head, DIM, 3)))
    for name, array in sums[0].items():
        np.testing.assert_allclose(2 * array, sums[1][name])


def test_a_ledger_counts_by_the_column_that_the_site_names(tmp_path: Path) -> None:
    person = {"noise_multiplier": 5.0, "unit": "patient", "max_instances": 1}
    own = vault(tmp_path, data={"path": "x.csv", "unit": "PID", "unit_type": "integer"})
    own.approve(study(privacy=person))
    assert own.ledger.terms("a").unit == "PID, as integer"
    own.approve(study(privacy={**person, "unit": "patient_id"}))
    own.site = own.site.model_copy(update={"data": DataSource(path=Path("x.csv"), unit="visit")})
    with pytest.raises(RefusedError, match="counts by PID, as integer, for life"):
        own.approve(study(privacy={**person, "noise_multiplier": 6.0}))


def test_a_site_names_itself(tmp_path: Path) -> None:
    hello = Envelope(Hello(study="sha256:" + "0" * 64, run="r").encode())
    assert Here.decode(vault(tmp_path).handle(hello).header).site == "a"


def test_limits_are_a_person_s_to_set(tmp_path: Path) -> None:
    assert Limits(max_epsilon=1.0).delta == 2e-5
    with pytest.raises(Exception, match="max_epsilom: unknown key; did you mean 'max_epsilon'"):
        site(tmp_path, limits={"max_epsilom": 1.0})
