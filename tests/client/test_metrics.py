"""A vault's figures: for the site's own people, and in nothing that leaves."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from veilgraft import messages
from veilgraft.errors import MessageError, Refusal
from veilgraft.messages import Envelope, Hello, Request
from veilgraft.model import head as heads
from veilgraft.model.features import Cohort, units
from veilgraft.service import vault_pb2
from veilgraft.study import Study
from veilgraft_client.ledger import Ledger
from veilgraft_client.metrics import Metrics
from veilgraft_client.policy import Site
from veilgraft_client.vault import Vault

DIM = 4
STUDY = Study.parse(
    {
        "name": "s",
        "purpose": "p",
        "task": {"labels": ["a", "b", "c"]},
        "backbone": {"digest": "sha256:" + "0" * 64, "modality": "text", "pooling": "cls"},
        "privacy": {"noise_multiplier": 5.0},
        "training": {"algorithm": "dp-gd", "rounds": 3, "learning_rate": 1.0},
    },
    name="study.yaml",
)


def vault(folder: Path) -> Vault:
    site = Site.parse(
        {
            "site": "a",
            "data": {"path": folder / "records.csv"},
            "units": 20,
            "limits": {"max_epsilon": 50.0},
            "state": folder,
        },
        name="site.yaml",
    )
    generator = np.random.default_rng(1)
    values = generator.normal(size=(20, DIM)).astype(np.float32)
    labels = torch.from_numpy(generator.integers(0, 3, 20))
    cohort = Cohort(units(values, labels), units(values[:0], labels[:0]))
    return Vault(site, Ledger(folder / "ledger.db"), lambda _: cohort)


def update(round_: int) -> Envelope:
    shapes = heads.shapes(STUDY.head, DIM, 3)
    payload = messages.pack({name: np.zeros(shape) for name, shape in shapes.items()})
    header = Request(
        site="a",
        study=STUDY.digest,
        run="r",
        round=round_,
        head=messages.digest(payload),
        rate=0.1,
    )
    return Envelope(header.encode(), payload)


HELLO = Envelope(Hello(study=STUDY.digest, run="r").encode())
ASKED = [HELLO, update(1), update(1), update(9), Envelope(b"metrics"), Envelope(b'{"kind":"x"}')]


@pytest.fixture
def own(tmp_path: Path) -> Vault:
    made = vault(tmp_path)
    made.approve(STUDY)
    return made


def figures(metrics: Metrics) -> dict[str, float]:
    return {
        ":".join([sample.name.removeprefix("veilgraft_"), *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(metrics.render())
        for sample in family.samples
    }


def test_answers_are_counted_by_kind_and_refusals_by_code(own: Vault) -> None:
    metrics = Metrics(own.site, own.ledger)
    handle = metrics.watch(own.handle)
    for asked in ASKED:
        handle(asked)
    shown = figures(metrics)
    assert shown["requests_answered_total:here"] == 1
    assert shown["requests_answered_total:release"] == 2
    assert shown["requests_refused_total:request-invalid"] == 3
    assert shown["requests_refused_total:unavailable"] == 0
    assert {name for name in shown if name.startswith("requests_refused_total:")} == {
        f"requests_refused_total:{code}" for code in Refusal
    }


def test_the_budget_is_the_ledgers(own: Vault, tmp_path: Path) -> None:
    metrics = Metrics(own.site, own.ledger)
    granted = own.ledger.life_epsilon("a")
    shown = figures(metrics)
    assert shown["epsilon_spent"] == 0
    assert shown["epsilon_granted"] == pytest.approx(granted)
    assert (shown["epsilon_cap"], shown["delta"]) == (50, own.site.limits.delta)
    own.handle(update(1))
    after = figures(metrics)
    assert after["epsilon_spent"] == pytest.approx(own.ledger.epsilon("a", own.site.limits.delta))
    assert 0 < after["epsilon_spent"] < after["epsilon_granted"]


def test_a_site_that_granted_nothing_has_spent_nothing(tmp_path: Path) -> None:
    fresh = vault(tmp_path)
    shown = figures(Metrics(fresh.site, fresh.ledger))
    assert (shown["epsilon_spent"], shown["epsilon_granted"]) == (0, 0)


def test_a_watched_vault_answers_with_the_very_bytes_of_one_that_is_not(own: Vault) -> None:
    watched = Metrics(own.site, own.ledger).watch(own.handle)
    for asked in ASKED:
        first = own.handle(asked)
        for _ in range(3):
            assert watched(asked) == first


def test_no_figure_stands_in_an_answer(own: Vault) -> None:
    metrics = Metrics(own.site, own.ledger)
    handle = metrics.watch(own.handle)
    for asked in ASKED:
        answer = handle(asked)
        metrics.render()
        assert all(type(value) in (str, bool) for value in json.loads(answer.header).values())
        assert b"epsilon" not in answer.header + answer.payload


def test_no_question_asks_for_figures(own: Vault) -> None:
    for kind in ("metrics", "status", "ledger"):
        header = json.dumps({"kind": kind, "study": STUDY.digest, "run": "r"}).encode()
        with pytest.raises(MessageError):
            messages.decode_question(header)
        reply = messages.decode_answer(own.handle(Envelope(header)).header)
        assert isinstance(reply, messages.Refused)
        assert reply.code == Refusal.REQUEST_INVALID


def test_the_couriers_socket_has_one_call_and_its_answers_have_no_room_for_figures() -> None:
    services = vault_pb2.DESCRIPTOR.services_by_name
    (ask,) = services["Vault"].methods
    assert ask.name == "Ask"
    assert {field.name for field in ask.output_type.fields} == {
        "header",
        "signature",
        "data",
        "size",
    }
    for answer in (messages.Here, messages.Wanted, messages.Release, messages.Refused):
        for name, field in answer.model_json_schema()["properties"].items():
            types = [
                field.get("type", "string"),
                *(each["type"] for each in field.get("anyOf", [])),
            ]
            assert set(types) <= {"string", "boolean", "null"}, name


def test_a_vault_that_fails_is_not_counted_and_its_error_is_passed_on(own: Vault) -> None:
    def fails(envelope: Envelope) -> Envelope:
        raise OSError

    metrics = Metrics(own.site, own.ledger)
    watched: Callable[[Envelope], Envelope] = metrics.watch(fails)
    with pytest.raises(OSError):
        watched(HELLO)
    assert figures(metrics)["requests_answered_total:here"] == 0
