"""A study's rounds, with numbers that one can check by hand."""

import math
import weakref
from typing import Any

import numpy as np
import pytest

from veilgraft import messages
from veilgraft.errors import InputError, MessageError
from veilgraft.study import Study
from veilgraft_server import checkpoint, rounds
from veilgraft_server.aggregation import Average, largest_norm, validated
from veilgraft_server.checkpoint import Drop, Progress, Round


def study(algorithm: str = "dp-gd", **training: Any) -> Study:
    sampled = {"sample_rate": 0.5, "local_epochs": 1} if algorithm == "dp-sgd" else {}
    noise = {} if algorithm == "none" else {"noise_multiplier": 1.0}
    return Study.parse(
        {
            "name": "s",
            "purpose": "p",
            "task": {"labels": ["a", "b"]},
            "backbone": {"digest": "sha256:" + "0" * 64, "modality": "text", "pooling": "cls"},
            "privacy": noise,
            "training": {
                "algorithm": algorithm, "rounds": 4, "learning_rate": 0.5, **sampled, **training,
            },
        },
        name="s",
    )  # fmt: skip


def filled(value: float) -> dict[str, np.ndarray]:
    return {"linear0.weight": np.full((2, 1), value), "linear0.bias": np.full(2, value)}


def start(contract: Study) -> rounds.State:
    return rounds.init(contract, 1, np.random.default_rng(0))


def averaged(contract: Study, updates: dict[str, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    average = Average(contract, updates)
    for site, update in updates.items():
        average.add(site, update)
    return average.mean()


def weight(head: Any) -> float:
    return float(head["linear0.weight"][0, 0])


def test_a_linear_head_starts_at_zero() -> None:
    assert weight(start(study()).head) == 0


def test_gradients_are_averaged_and_stepped_along() -> None:
    after = rounds.apply(
        study(), start(study()), averaged(study(), {"a": filled(1.0), "b": filled(3.0)})
    )
    assert weight(after.head) == -0.5 * 2.0
    assert after.round == 1


def test_momentum_adds_a_share_of_the_last_step() -> None:
    contract = study(momentum=0.5)
    state = start(contract)
    for _ in range(2):
        state = rounds.apply(contract, state, filled(1.0))
    assert weight(state.head) == -0.5 * (1.0 + 1.5)


def test_local_changes_are_averaged_and_added() -> None:
    contract = study("dp-sgd")
    after = rounds.apply(
        contract, start(contract), averaged(contract, {"a": filled(1.0), "b": filled(3.0)})
    )
    assert weight(after.head) == 2.0
    assert weight(rounds.model(after)) == 2.0


def test_the_model_is_the_mean_of_the_last_half_of_the_iterates() -> None:
    contract = study()
    state, seen = start(contract), []
    for _ in range(4):
        state = rounds.apply(contract, state, filled(1.0))
        seen.append(weight(rounds.model(state)))
    assert seen == [-0.5, -1.0, -1.5, -1.75]


def test_named_weights_are_used_and_scaled_to_those_that_answered() -> None:
    values = study().model_dump()
    values["aggregation"]["weights"] = {"a": 1.0, "b": 3.0, "c": 96.0}
    named = Study.model_validate(values)
    assert weight(averaged(named, {"a": filled(0.0), "b": filled(1.0)})) == 0.75


def test_the_order_of_the_answers_does_not_matter_nor_who_is_missing() -> None:
    updates = {name: filled(0.1 * i + 1e-17) for i, name in enumerate("abcdefgh")}
    expected = averaged(study(), updates)
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(list(updates))
        average = Average(study(), [*updates, "bb", "z"])
        for site in order:
            average.add(site, updates[site])
        mean = average.mean()
        assert all(np.array_equal(mean[name], expected[name]) for name in expected)


def test_an_update_that_comes_in_its_turn_is_forgotten() -> None:
    average = Average(study(), "abc")
    for site in "ab":
        update = filled(1.0)
        there = weakref.ref(update["linear0.weight"])
        average.add(site, update)
        del update
        assert there() is None


def test_plateau_halves_the_rate_when_the_accuracy_does_not_rise() -> None:
    contract = study(schedule="plateau", patience=2)
    state = start(contract)
    rates = []
    for accuracy in (0.5, 0.6, 0.6, 0.6, 0.7):
        state = rounds.observe(contract, state, accuracy)
        rates.append(rounds.rate(contract, state))
    assert rates == [0.5, 0.5, 0.5, 0.25, 0.25]


def test_the_norm_bound_holds_what_an_honest_site_can_send_and_little_more() -> None:
    shapes = {name: array.shape for name, array in filled(0).items()}
    assert largest_norm(study("none"), "update", shapes) == math.inf
    assert largest_norm(study(), "update", shapes) == pytest.approx(1 + 2 + 6.5)
    # Two local steps at rate .5 and sample rate .5.
    assert largest_norm(study("dp-sgd"), "update", shapes) == pytest.approx(
        2 * 0.5 / 0.5 * (1 + 2 + 6.5)
    )


def test_an_update_beyond_the_norm_bound_is_refused() -> None:
    shapes = {name: array.shape for name, array in filled(0).items()}
    assert validated(messages.pack(filled(0.5)), shapes, 1.0)
    with pytest.raises(MessageError, match=r"L2 norm of at most 1, got 1\.02"):
        validated(messages.pack(filled(0.51)), shapes, 1.0)


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Any) -> None:
    contract = study(momentum=0.5)
    state = rounds.apply(contract, start(contract), filled(1.0))
    history = (Round(1, 0.5, 0.7, 1.0, 1, 1, 0.01, (Drop("b", "no answer"),)),)
    path = tmp_path / "checkpoint.safetensors"
    saved = Progress(state, history, {"a": [3.5, -0.25]})
    checkpoint.save(path, contract.digest, saved)
    back = checkpoint.load(path, contract.digest)
    assert back.history == history
    assert back.labels == saved.labels
    again = rounds.apply(contract, back.state, filled(1.0))
    expected = rounds.apply(contract, state, filled(1.0))
    assert weight(again.head) == weight(expected.head)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_another_studys_checkpoint_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(path, "sha256:other", Progress(start(study())))
    with pytest.raises(InputError, match="expected study"):
        checkpoint.load(path, study().digest)


def test_a_torn_checkpoint_is_one_sentence(tmp_path: Any) -> None:
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(path, study().digest, Progress(start(study())))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match="can't read the checkpoint"):
        checkpoint.load(path, study().digest)
