"""A site's part of a round: what each step sums, clips, noises and divides by."""

import math
import pickle
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from veilgraft.model import head as heads
from veilgraft.model.features import Features, units
from veilgraft.privacy import mechanism
from veilgraft.privacy.noise import NoiseSource
from veilgraft.study import Study
from veilgraft_client import fused, training
from veilgraft_client.fused import Fused, Work, together
from veilgraft_client.policy import LARGEST
from veilgraft_client.training import PrivateOptimizer, Trainer

DIM, LABELS, SIGMA, CLIP = 4, 3, 5.0, 0.25
MLP = {"type": "mlp", "hidden": [5], "activation": "tanh"}

Array = npt.NDArray[np.float64]


class Step(NamedTuple):
    """What one use of the mechanism was given."""

    total: Array
    clip: float
    sigma: float


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Every sum that reaches the noise, in order."""
    seen: list[Step] = []
    real = mechanism.add_noise

    def watched(totals: Array, clip_norm: float, noise_multiplier: float, drawn: Array) -> Array:
        for total in totals.reshape(-1, totals.shape[-1]).copy():
            seen.append(Step(total, clip_norm, noise_multiplier))
        return real(totals, clip_norm, noise_multiplier, drawn)

    monkeypatch.setattr(mechanism, "add_noise", watched)
    return seen


def study(
    algorithm: str = "dp-gd",
    *,
    task: str = "classification",
    head: dict[str, Any] | None = None,
    labels: int = LABELS,
    **options: Any,
) -> Study:
    chosen = {"algorithm": algorithm, "rounds": 3, "learning_rate": 1.0, **options}
    noise = {} if algorithm == "none" else {"noise_multiplier": SIGMA}
    values: dict[str, Any] = {
        "name": "s",
        "purpose": "p",
        "task": {"type": task, "labels": [f"l{i}" for i in range(labels)]},
        "backbone": {"digest": "sha256:" + "0" * 64, "modality": "text", "pooling": "cls"},
        "head": head or {},
        "privacy": {"clip_norm": CLIP, **noise},
        "training": chosen,
    }
    return Study.parse(values, name="study.yaml")


def sampled(rate: float, epochs: int, algorithm: str = "dp-sgd", **options: Any) -> Study:
    return study(algorithm, sample_rate=rate, local_epochs=epochs, **options)


def features(count: int = 20, *, instances: int = 2, task: str = "classification") -> Features:
    generator = np.random.default_rng(count)
    # Norms on both sides of the bound: some units are clipped and some are not.
    size = generator.uniform(0.05, 3, (count, 1, 1))
    values = generator.normal(size=(count, instances, DIM)) * size
    mask = generator.random((count, instances)) < 0.7
    targets: Any = generator.integers(0, LABELS, (count, instances))
    if task == "multilabel":
        targets = generator.integers(0, 2, (count, instances, LABELS)).astype(np.float32)
    tensors = (torch.from_numpy(a) for a in (values.astype(np.float32), mask, targets))
    return Features(*tensors)


def alike(count: int, dim: int = DIM) -> Features:
    """Units of zero features and the first label, whose gradient is the bias's alone."""
    values = np.zeros((count, dim), np.float32)
    return units(values, torch.zeros(count, dtype=torch.int64))


def joined(first: Features, second: Features) -> Features:
    pairs = ((getattr(first, n), getattr(second, n)) for n in ("values", "mask", "targets"))
    return Features(*(torch.cat(pair) for pair in pairs))


def start(contract: Study, dim: int = DIM, seed: int = 3) -> dict[str, Array]:
    generator = np.random.default_rng(seed)
    shapes = heads.shapes(contract.head, dim, len(contract.task.labels))
    return {name: generator.normal(size=shape) / 3 for name, shape in shapes.items()}


def zeros(contract: Study, dim: int = DIM) -> dict[str, Array]:
    return {name: np.zeros_like(array) for name, array in start(contract, dim).items()}


Engine = type[Trainer] | type[Fused]


@pytest.fixture(params=[Trainer, Fused], ids=["opacus", "fused"], autouse=True)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """What `trainer` makes; every test runs with each."""
    chosen: Engine = request.param
    monkeypatch.setattr(sys.modules[__name__], "ENGINE", chosen)
    return chosen


ENGINE: Engine = Trainer
only_opacus = pytest.mark.parametrize("engine", [Trainer], ids=["opacus"], indirect=True)


def trainer(contract: Study, held: Features, declared: int = 50) -> Trainer | Fused:
    return ENGINE(contract, held, sigma=SIGMA if contract.private else 0.0, units=declared)


def flat(arrays: heads.Arrays) -> Array:
    return np.concatenate([array.ravel() for array in arrays.values()])


def source(seed: int = 1) -> NoiseSource:
    return NoiseSource.seeded(seed, "training")


def linear_gradients(contract: Study, held: Features, head: dict[str, Array]) -> Array:
    """Per-unit gradients of logistic or softmax regression in closed form, `(units, size)`."""
    values = held.values.double().numpy()
    outputs = values @ head["linear0.weight"].T + head["linear0.bias"]
    if contract.task.type == "multilabel":
        residuals = 1 / (1 + np.exp(-outputs)) - held.targets.numpy()
    else:
        odds = np.exp(outputs - outputs.max(-1, keepdims=True))
        residuals = odds / odds.sum(-1, keepdims=True) - np.eye(LABELS)[held.targets.numpy()]
    residuals *= held.mask.numpy()[..., None]
    weights = np.einsum("uik,uif->ukf", residuals, values).reshape(len(held), -1)
    return np.concatenate([weights, residuals.sum(1)], axis=1)


def mlp_gradients(contract: Study, held: Features, head: dict[str, Array]) -> Array:
    """Per-unit gradients of a tanh layer and a softmax by torch.func, `(units, size)`."""

    def loss(
        p: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor, keep: torch.Tensor
    ) -> torch.Tensor:
        hidden = torch.tanh(x @ p["linear0.weight"].T + p["linear0.bias"])
        outputs = hidden @ p["linear1.weight"].T + p["linear1.bias"]
        losses = functional.cross_entropy(outputs, y, reduction="none")
        return (losses * keep).sum()

    of_units = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))
    tensors = {name: torch.from_numpy(array) for name, array in head.items()}
    grads = of_units(tensors, held.values.double(), held.targets, held.mask.double())
    return np.concatenate([g.flatten(1).numpy() for g in grads.values()], axis=1)


def reference(contract: Study, held: Features, rate: float, declared: int) -> Array:
    """Algorithm 1 of Abadi et al. 2016 for one site's round, written out, from `start`."""
    gradients = linear_gradients if contract.head.type == "linear" else mlp_gradients
    head, own, told = start(contract), source(), contract.training
    velocity, probability = np.zeros(len(flat(head))), told.sample_rate or 1.0
    steps = told.local_steps
    if told.sample_rate is not None:
        taken = own.bernoulli(steps * len(held), probability).view(steps, -1).numpy()
    noise = own.normal(steps * len(velocity)).view(steps, -1).numpy()
    for step in range(steps):
        rows = gradients(contract, held, head)
        if told.sample_rate is not None:
            rows = rows[taken[step]]
        if contract.private:
            norms = np.linalg.norm(rows, axis=1, keepdims=True)
            rows = rows * np.minimum(1, CLIP * (1 - 1e-6) / norms.clip(1e-300))
        total = rows.sum(0)
        if contract.private:
            total = total + SIGMA * CLIP * noise[step]
        gradient = total / (declared * probability)
        if told.sample_rate is None:
            return np.asarray(gradient)
        velocity = told.momentum * velocity + gradient
        moved = np.split(rate * velocity, np.cumsum([a.size for a in head.values()])[:-1])
        head = {n: a - d.reshape(a.shape) for (n, a), d in zip(head.items(), moved, strict=True)}
    return flat(head) - flat(start(contract))


CASES = {
    "dp-gd": study(),
    "dp-gd, momentum is the coordinator's": study(momentum=0.9),
    "dp-gd, several labels": study(task="multilabel"),
    "dp-gd, mlp": study(head=MLP),
    "dp-sgd": sampled(0.3, 2),
    "dp-sgd, momentum": sampled(0.3, 2, momentum=0.9),
    "dp-sgd, several labels": sampled(0.3, 2, task="multilabel"),
    "dp-sgd, mlp": sampled(0.3, 2, head=MLP),
    "none": study("none"),
    "none, mlp": study("none", head=MLP),
    "none, sampled": sampled(0.3, 2, "none", momentum=0.9),
}


@pytest.mark.parametrize("contract", CASES.values(), ids=CASES)
def test_an_update_is_the_papers_round_on_the_same_noise(contract: Study) -> None:
    held = features(task=contract.task.type)
    own = trainer(contract, held, declared=50)
    expected = reference(contract, held, 0.2, 50)
    for _ in range(2):
        # The second round of a kept trainer starts afresh: no momentum, no left-over gradient.
        update = own.update(start(contract), 0.2, source())
        assert list(update) == list(start(contract))
        np.testing.assert_allclose(flat(update), expected, rtol=0, atol=1e-6)


def test_a_release_of_dp_gd_does_not_depend_on_momentum_or_rate() -> None:
    updates = [
        flat(trainer(study(momentum=m), features()).update(start(study()), rate, source()))
        for m, rate in ((0.0, 1.0), (0.9, 1.0), (0.9, 0.01))
    ]
    np.testing.assert_array_equal(updates[0], updates[1])
    np.testing.assert_array_equal(updates[0], updates[2])


@pytest.mark.parametrize(
    ("contract", "expected"),
    [(study(), 1), (sampled(0.25, 2), 8), (sampled(1.0, 3), 3), (sampled(0.4, 1), 2)],
)
def test_a_round_uses_the_mechanism_once_a_step_at_the_studys_noise_and_bound(
    steps: list[Step], contract: Study, expected: int
) -> None:
    trainer(contract, features()).update(start(contract), 0.1, source())
    assert [(s.clip, s.sigma) for s in steps] == [(CLIP, SIGMA)] * expected


def test_an_empty_sample_is_noised_and_counts_as_a_step(steps: list[Step]) -> None:
    contract = sampled(0.01, 1)
    update = trainer(contract, alike(2), declared=2).update(zeros(contract), 1e-6, source())
    assert len(steps) == 100
    assert sum(not s.total.any() for s in steps) > 90
    # The weights' gradient is zero throughout, so they have moved by a hundred steps' noise.
    moved = update["linear0.weight"].std() / (1e-6 * SIGMA * CLIP / (2 * 0.01) * 10)
    assert 0.5 < moved < 1.6


@pytest.mark.parametrize("contract", [study(), sampled(0.5, 2)], ids=["dp-gd", "dp-sgd"])
def test_a_site_without_units_releases_noise_of_the_same_kind(
    steps: list[Step], contract: Study
) -> None:
    update = trainer(contract, features(3).select(slice(0))).update(start(contract), 1.0, source())
    assert len(steps) == contract.training.local_steps
    assert flat(update).all()
    assert not any(s.total.any() for s in steps)


def test_one_more_unit_of_several_huge_instances_moves_the_sum_by_the_bound(
    steps: list[Step],
) -> None:
    held = features(20, instances=3)
    huge = Features(
        torch.full((1, 3, DIM), 1e4), torch.ones(1, 3, dtype=torch.bool), torch.tensor([[0, 1, 1]])
    )
    for own in (held, joined(held, huge)):
        trainer(study(), own).update(zeros(study()), 1.0, source())
    distance = np.linalg.norm(steps[0].total - steps[1].total)
    assert CLIP * (1 - 3e-6) < distance <= CLIP


def test_weights_and_bias_share_one_bound(steps: list[Step]) -> None:
    # The bias's gradient alone is √(2/3) long, the weights' √(2/3) · 2: both beyond the bound.
    one = units(np.ones((1, DIM), np.float32), torch.tensor([0]))
    trainer(study(), one).update(zeros(study()), 1.0, source())
    weights, bias = np.split(steps[0].total, [LABELS * DIM])
    scale = CLIP * (1 - 1e-6) / np.sqrt(5)
    assert np.linalg.norm(weights) == pytest.approx(2 * scale, rel=1e-12)
    assert np.linalg.norm(bias) == pytest.approx(scale, rel=1e-12)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    values=st.lists(st.floats(width=32), min_size=2 * DIM, max_size=2 * DIM),
    targets=st.tuples(st.integers(0, LABELS - 1), st.integers(0, LABELS - 1)),
    head=st.sampled_from([None, MLP]),
)
def test_no_unit_whatever_it_holds_moves_the_sum_beyond_the_bound(
    steps: list[Step], values: list[float], targets: tuple[int, int], head: dict[str, Any] | None
) -> None:
    steps.clear()
    contract, held = study(head=head), features(6)
    rows = torch.tensor(values, dtype=torch.float32).view(1, 2, DIM)
    other = Features(rows, torch.ones(1, 2, dtype=torch.bool), torch.tensor([targets]))
    for own in (held, joined(held, other)):
        update = trainer(contract, own).update(start(contract), 1.0, source())
        assert np.isfinite(flat(update)).all()
    assert np.linalg.norm(steps[0].total - steps[1].total) <= CLIP


def test_a_step_of_dp_sgd_takes_each_unit_at_the_priced_rate_and_clips_it_once(
    steps: list[Step],
) -> None:
    contract, held = sampled(0.2, 100), features(10)
    absent = Features(
        torch.full((1, 2, DIM), 1e4), torch.zeros(1, 2, dtype=torch.bool), torch.tensor([[0, 1]])
    )
    present = Features(absent.values, torch.ones_like(absent.mask), absent.targets)
    for last in (absent, present):
        # At a learning rate of zero the head stays, and only the last unit differs.
        trainer(contract, joined(held, last)).update(zeros(contract), 0.0, source())
    assert len(steps) == 1000
    pairs = zip(steps[:500], steps[500:], strict=True)
    distances = np.array([np.linalg.norm(a.total - b.total) for a, b in pairs])
    taken = distances > 0
    assert distances.max() <= CLIP
    assert distances[taken].min() > CLIP * (1 - 3e-6)
    assert abs(taken.mean() - 0.2) < 4 * np.sqrt(0.2 * 0.8 / 500)


def test_sample_sizes_are_binomial_at_the_priced_rate(steps: list[Step]) -> None:
    contract, count, rate = sampled(0.1, 30), 400, 0.1
    trainer(contract, alike(count)).update(zeros(contract), 0.0, source())
    # Every unit's gradient is the same and is clipped, so a sum's length counts its units.
    sizes = np.array([np.linalg.norm(s.total) / (CLIP * (1 - 1e-6)) for s in steps])
    variance = count * rate * (1 - rate)
    assert len(sizes) == 300
    np.testing.assert_allclose(sizes, sizes.round(), atol=1e-9)
    assert abs(sizes.mean() - count * rate) < 4 * np.sqrt(variance / 300)
    assert sizes.var() == pytest.approx(variance, rel=4 * np.sqrt(2 / 300))


@pytest.mark.parametrize("measured", [1, 90])
@pytest.mark.parametrize(
    ("contract", "scale"),
    [
        (study(labels=10), 1 / 50),
        # Eight steps of rate 0.1, each divided by the 12.5 units that a sample should hold.
        (sampled(0.25, 2, labels=10), 0.1 * np.sqrt(8) / 12.5),
    ],
    ids=["dp-gd", "dp-sgd"],
)
def test_noise_in_a_release_has_the_promised_deviation_for_the_declared_size(
    contract: Study, scale: float, measured: int
) -> None:
    own = trainer(contract, alike(measured, dim=1000), declared=50)
    noise = own.update(zeros(contract, 1000), 0.1, source())["linear0.weight"]
    # Ten thousand normals: four standard errors of their deviation are 2.8%.
    assert noise.std() == pytest.approx(SIGMA * CLIP * scale, rel=0.028)
    assert abs(noise.mean()) < 4 * SIGMA * CLIP * scale / 100


@pytest.mark.parametrize("contract", [study(), study(head=MLP), study("none")])
@pytest.mark.parametrize("target", [0, 1, -1, -100, LABELS])
def test_what_a_masked_instance_holds_has_no_effect(contract: Study, target: int) -> None:
    held = features()
    assert not held.mask.all()
    values = torch.where(held.mask[..., None], held.values, 1e4)
    targets = torch.where(held.mask, held.targets, target)
    first, second = (
        flat(trainer(contract, own).update(start(contract), 1.0, source()))
        for own in (held, Features(values, held.mask, targets))
    )
    np.testing.assert_array_equal(first, second)


@only_opacus
@pytest.mark.parametrize("head", [None, MLP], ids=["linear", "mlp"])
def test_units_in_memory_at_once_do_not_matter(
    steps: list[Step], monkeypatch: pytest.MonkeyPatch, head: dict[str, Any] | None
) -> None:
    contract, held = study(head=head), features(5000)
    for size in (20_000, training.PHYSICAL_INSTANCES, 1024, 6):
        monkeypatch.setattr(training, "PHYSICAL_INSTANCES", size)
        trainer(contract, held).update(start(contract), 1.0, source())
    for step in steps:
        np.testing.assert_allclose(step.total, steps[0].total, rtol=0, atol=1e-9)
    assert np.linalg.norm(steps[0].total) > CLIP


def test_dropout_comes_from_the_releases_own_source(steps: list[Step]) -> None:
    contract = study(head={**MLP, "dropout": 0.5})
    own, plain = trainer(contract, features()), trainer(study(head=MLP), features())
    first, again = (own.update(start(contract), 1.0, source(1)) for _ in range(2))
    np.testing.assert_array_equal(flat(first), flat(again))
    own.update(start(contract), 1.0, source(2))
    plain.update(start(contract), 1.0, source(1))
    # These are sums before their noise, on one head: what differs between them is the masks.
    assert not np.allclose(steps[0].total, steps[2].total)
    assert not np.allclose(steps[0].total, steps[3].total)


def global_states() -> bytes:
    """All that torch's, numpy's and random's global generators are made of."""
    return pickle.dumps((torch.get_rng_state().numpy(), np.random.get_state(), random.getstate()))


@pytest.mark.parametrize("algorithm", ["dp-gd", "dp-sgd", "none"])
def test_no_global_generator_is_touched(algorithm: str) -> None:
    head = {**MLP, "dropout": 0.5}
    contract = sampled(0.5, 2, head=head) if algorithm == "dp-sgd" else study(algorithm, head=head)
    before = global_states()
    with source() as own:
        trainer(contract, features()).update(start(contract), 1.0, own)
    assert global_states() == before


@pytest.fixture
def units_gradients(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Every batch of per-unit gradients that reaches the clipping, `(units, size)`, in order."""
    seen: list[torch.Tensor] = []
    real = mechanism.clipped_sum

    def watched(grads: Sequence[torch.Tensor], clip_norm: float) -> torch.Tensor:
        seen.append(torch.cat([grad.flatten(1) for grad in grads], 1))
        return real(grads, clip_norm)

    monkeypatch.setattr(mechanism, "clipped_sum", watched)
    return seen


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's threads for the test."""
    usual = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(usual)


HEADS: dict[str, dict[str, Any]] = {
    "linear": {},
    "wide": {"type": "mlp", "hidden": [96, 70]},
    **{
        f"{activation}, {len(hidden)} hidden": {
            "type": "mlp",
            "hidden": hidden,
            "activation": activation,
        }
        for activation in ("relu", "gelu", "tanh")
        for hidden in ([5], [7, 5])
    },
}


def gradients(contract: Study, held: Features, seen: list[torch.Tensor]) -> torch.Tensor:
    """The per-unit gradients of one round from `start`, `(units, size)`."""
    seen.clear()
    trainer(contract, held).update(start(contract), 1.0, source())
    return torch.cat(seen)


@only_opacus
@pytest.mark.parametrize("task", ["classification", "multilabel"])
@pytest.mark.parametrize("instances", [1, 3])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_a_units_gradient_is_the_same_to_the_last_bit_whoever_else_is_there(
    units_gradients: list[torch.Tensor],
    threads: Callable[[int], None],
    head: dict[str, Any],
    instances: int,
    task: str,
) -> None:
    threads(1)
    contract, held = study(head=head, task=task), features(2000, instances=instances, task=task)
    together = gradients(contract, held, units_gradients)
    for first, last in ((1, 2000), *((70 - count, 70) for count in range(1, 71))):
        fewer = gradients(contract, held.select(slice(first, last)), units_gradients)
        assert torch.equal(fewer, together[first:last])


@only_opacus
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_a_units_gradient_is_the_same_to_the_last_bit_on_any_number_of_threads(
    units_gradients: list[torch.Tensor], threads: Callable[[int], None], head: dict[str, Any]
) -> None:
    contract, held = study(head=head, task="multilabel"), features(2000, task="multilabel")
    threads(1)
    together = gradients(contract, held, units_gradients)
    for count in (2, 3):
        threads(count)
        fewer = gradients(contract, held.select(slice(1, 2000)), units_gradients)
        assert torch.equal(fewer, together[1:])


def cancelling(
    count: int, dim: int, hidden: list[int], labels: int
) -> tuple[Features, dict[str, Array]]:
    """Units and a head as large as may be whose first outputs cancel: rounding is what is left."""
    generator = np.random.default_rng([count, dim, labels])
    draw, half, order = generator.uniform, dim // 2, generator.permutation(dim // 2)
    contract = study(head={"type": "mlp", "hidden": hidden}, labels=labels)
    head = zeros(contract, dim)
    first, *others = (name for name in head if name.endswith("weight"))
    columns = draw(-LARGEST, LARGEST, (len(head[first]), half))
    head[first] = np.concatenate([columns, -columns[:, order]], 1)
    for name in others:
        head[name] = generator.choice([-LARGEST, LARGEST], head[name].shape)
    values = draw(-LARGEST, LARGEST, (count, half))
    values = np.concatenate([values, values[:, order]], 1)
    return units(
        values.astype(np.float32), torch.from_numpy(generator.integers(0, labels, count))
    ), head


@pytest.mark.parametrize(("count", "hidden"), [(60, [64]), (60, [64, 64]), (301, [256])])
def test_no_unit_moves_the_others_gradients_through_a_head_made_to_amplify_rounding(
    steps: list[Step], count: int, hidden: list[int]
) -> None:
    contract = study(head={"type": "mlp", "hidden": hidden}, labels=2)
    held, head = cancelling(count, 96, hidden, 2)
    trainer(contract, held).update(head, 1.0, source())
    for gone in range(12):
        kept = held.select(torch.arange(count) != gone)
        trainer(contract, kept).update(head, 1.0, source())
        assert np.linalg.norm(steps[-1].total - steps[0].total) <= CLIP


def test_one_unit_does_not_move_anothers_gradient_through_a_linear_head_made_to_round(
    steps: list[Step],
) -> None:
    """Terms that cancel but for their rounding, which moves one unit along the other's gradient.

    The last feature tells the other unit's outputs and leaves the rounding as it is.
    """
    contract, half, generator = study(), 1023, np.random.default_rng(0)
    value = LARGEST * (1 - 1e-3 * generator.random())
    weights = LARGEST * generator.uniform(0.9, 1, (LABELS, 1)) * np.ones(half)
    tilt = np.array([[0.0], [1e3], [0.0]])
    values = np.full((2, 2 * half + 1), value, np.float32)
    values[:, -1] = 0, 1
    held = units(values, torch.tensor([2, 0]))
    head = {
        "linear0.weight": np.concatenate([weights, -weights, tilt], 1),
        "linear0.bias": np.zeros(LABELS),
    }
    for own in (held, held.select(slice(1))):
        trainer(contract, own).update(head, 1.0, source())
    assert np.linalg.norm(steps[0].total - steps[1].total) <= CLIP


@only_opacus
def test_small_batches_are_added_up_so_that_rounding_stays_within_its_bound(
    steps: list[Step],
) -> None:
    """Units too small to be seen beside the first: in one running sum all of them would be lost."""
    parameter, small, count = torch.nn.Parameter(torch.zeros(1).double()), 2.0**-56, 5000
    sgd = torch.optim.SGD([parameter], lr=1.0)
    optimizer = PrivateOptimizer(sgd, SIGMA, CLIP, 1.0)
    optimizer.drawn = np.zeros(1)
    for value in (CLIP / 2, *[small] * count):
        parameter.grad_sample = torch.tensor([[value]], dtype=torch.float64)  # type: ignore[attr-defined]
        optimizer.clip_and_accumulate()
    optimizer.add_noise()
    # Those in the first unit's partial sum are lost, and no more.
    lost = CLIP / 2 + count * small - steps[0].total[0]
    assert 0 < lost < 1100 * small


@only_opacus
@pytest.mark.parametrize("head", [None, MLP], ids=["linear", "mlp"])
@pytest.mark.parametrize("instances", [1, 2, 50])
def test_gradients_in_memory_at_once_are_bounded(
    units_gradients: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    head: dict[str, Any] | None,
    instances: int,
) -> None:
    monkeypatch.setattr(training, "PHYSICAL_NUMBERS", 1000)
    contract, held = study(head=head), features(300, instances=instances)
    trainer(contract, held).update(start(contract), 1.0, source())
    assert sum(len(batch) for batch in units_gradients) == 300
    for batch in units_gradients:
        assert len(batch) == 1 or batch.numel() * instances <= 1000


@pytest.mark.parametrize("value", [1.001 * LARGEST, 1e30, math.inf, math.nan])
def test_a_unit_with_a_number_too_large_counts_for_nothing_and_the_site_is_told(
    steps: list[Step], value: float, caplog: pytest.LogCaptureFixture
) -> None:
    held = features(20)
    held.mask[3, 0] = True
    spoilt = Features(held.values.clone(), held.mask, held.targets)
    spoilt.values[3, 0, 1] = value
    without = held.select(torch.arange(20) != 3)
    for own in (spoilt, without):
        trainer(study(), own).update(zeros(study()), 1.0, source())
    assert np.array_equal(steps[0].total, steps[1].total)
    assert "1 units count for nothing" in caplog.text


@pytest.mark.parametrize("target", [-1, -100, LABELS])
def test_a_unit_with_no_label_of_the_study_counts_for_nothing(
    steps: list[Step], target: int, caplog: pytest.LogCaptureFixture
) -> None:
    held = features(20)
    spoilt = held.select(torch.arange(20))
    spoilt.targets[3, 0], spoilt.mask[3, 0] = target, True
    without = held.select(torch.arange(20) != 3)
    for own in (spoilt, without):
        trainer(study(), own).update(zeros(study()), 1.0, source())
    assert np.array_equal(steps[0].total, steps[1].total)
    assert "1 units count for nothing" in caplog.text


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 1.5])
@pytest.mark.parametrize("there", [False, True])
def test_a_share_of_a_label_that_is_none_spoils_its_unit_at_most(
    steps: list[Step], value: float, there: bool
) -> None:
    contract = study(task="multilabel")
    held = features(20, task="multilabel")
    spoilt = held.select(torch.arange(20))
    spoilt.targets[3, -1, 1] = value
    spoilt.mask[3, -1] = there
    without = held.select(torch.arange(20))
    without.mask[3, -1:] = False
    if there:
        without.mask[3] = False
    for own in (spoilt, without):
        trainer(contract, own).update(zeros(contract), 1.0, source())
    assert np.isfinite(steps[0].total).all()
    assert np.array_equal(steps[0].total, steps[1].total)


only_fused = pytest.mark.parametrize("engine", [Fused], ids=["fused"], indirect=True)


@pytest.mark.parametrize("instances", [1, 2])
def test_a_step_of_many_units_holds_those_it_took_and_each_once(
    steps: list[Step], instances: int
) -> None:
    """Samples of different sizes, each of more units than are computed at once."""
    count, contract = 3000, sampled(0.5, 4)
    held = features(count, instances=instances)
    first = torch.zeros(count, 1, 1)
    first[0] = 1e3
    mask = torch.ones_like(held.mask)
    alone = Features(held.values * 0 + first, mask, torch.zeros_like(held.targets))
    trainer(contract, alone).update(zeros(contract), 0.0, source())
    taken = source().bernoulli(len(steps) * count, 0.5).view(-1, count)
    for step, chosen in zip(steps, taken, strict=True):
        # The first unit is the only one whose weights' gradient is not zero.
        weights = np.linalg.norm(step.total[: LABELS * DIM])
        assert weights == pytest.approx(CLIP if chosen[0] else 0.0, rel=1e-3, abs=1e-12)
        # Of the others, only the bias's: all alike.
        others = int(chosen.sum()) - int(chosen[0])
        one = np.array([-2.0, 1.0, 1.0]) / np.sqrt(6) * CLIP
        assert np.linalg.norm(step.total[LABELS * DIM :] - others * one) <= CLIP


@only_fused
@pytest.mark.parametrize("at_once", [1, 7, 100])
@pytest.mark.parametrize("instances", [1, 3])
def test_parts_of_any_size_add_up_to_the_same(
    steps: list[Step], monkeypatch: pytest.MonkeyPatch, at_once: int, instances: int
) -> None:
    contract, held = sampled(0.3, 1), features(500, instances=instances)
    trainer(contract, held).update(start(contract), 0.1, source())
    monkeypatch.setattr(fused, "ROWS", at_once * instances)
    trainer(contract, held).update(start(contract), 0.1, source())
    half = len(steps) // 2
    for one, other in zip(steps[:half], steps[half:], strict=True):
        np.testing.assert_allclose(one.total, other.total, rtol=0, atol=1e-12)


def deep(count: int, last: float, bias: float) -> tuple[Study, dict[str, Array]]:
    """A head of one number a layer that grows by 1e4 in each."""
    contract = study(head={"type": "mlp", "hidden": [1] * count, "activation": "relu"}, labels=2)
    head = {
        name: np.full(array.shape, 0.0 if "bias" in name else 1e4)
        for name, array in zeros(contract, 1).items()
    }
    head[f"linear{count}.weight"] = np.array([[last], [-last]])
    head[f"linear{count}.bias"] = np.array([bias, 0.0])
    return contract, head


@pytest.mark.parametrize("layers", [14, 20, 39, 78])
@pytest.mark.parametrize("instances", [1, 2])
def test_no_head_makes_a_refusal_of_one_unit(layers: int, instances: int) -> None:
    """A head whose outputs overflow for one unit, and for no other."""
    contract, head = deep(layers, 1.0, 0.0)
    values = np.zeros((50, instances, 1), np.float32)
    values[0] = 1.0
    mask = torch.ones(50, instances, dtype=torch.bool)
    held = Features(torch.from_numpy(values), mask, torch.zeros(50, instances).long())
    found = flat(trainer(contract, held).update(head, 1.0, source()))
    assert np.isfinite(found).all()


@pytest.mark.parametrize("bias", [300.0, 372.1, 372.7, 700.0])
@pytest.mark.parametrize("layers", [13, 14, 37, 38, 39])
def test_a_gradient_whose_factors_underflow_is_clipped_all_the_same(
    steps: list[Step], layers: int, bias: float
) -> None:
    contract, head = deep(layers, 0.0, bias)
    values = contract.model_dump()
    values["privacy"]["clip_norm"] = 1e-9
    tight = Study.model_validate(values)
    one = units(np.ones((1, 1), np.float32), torch.tensor([0]))
    trainer(tight, one).update(head, 1.0, source())
    assert np.linalg.norm(steps[0].total) <= 1e-9


@only_fused
def test_one_site_s_unit_spoils_no_other_site() -> None:
    contract = sampled(0.5, 2)
    spoilt, sound = features(3, instances=1), features(40, instances=1)
    spoilt.values[0] = math.nan
    spoilt.mask[:], sound.mask[:] = True, True
    both = [Fused(contract, held, sigma=SIGMA, units=50) for held in (spoilt, sound)]
    works = [Work(each, start(contract), 0.1, source(i)) for i, each in enumerate(both)]
    apart = [each.update(start(contract), 0.1, source(i)) for i, each in enumerate(both)]
    for one, other in zip(together(works), apart, strict=True):
        assert np.isfinite(flat(one)).all()
        np.testing.assert_allclose(flat(one), flat(other), rtol=0, atol=1e-9)


@only_fused
@pytest.mark.parametrize("task", ["classification", "multilabel"])
@pytest.mark.parametrize("head", [{}, {**MLP, "dropout": 0.3}], ids=["linear", "mlp"])
@pytest.mark.parametrize("algorithm", ["dp-gd", "dp-sgd", "none"])
def test_sites_that_are_trained_together_release_what_each_would_alone(
    head: dict[str, Any], task: str, algorithm: str
) -> None:
    if algorithm == "dp-sgd":
        contract = sampled(0.2, 2, head=head, task=task, momentum=0.5)
    else:
        contract = study(algorithm, head=head, task=task)
    sigma = SIGMA if contract.private else 0.0
    works = []
    for size in (1, 9, 60, 200):
        own = Fused(contract, features(size, task=task), sigma=sigma, units=size)
        works.append(Work(own, start(contract, seed=size), size / 100, source(size)))
    for size, work, found in zip((1, 9, 60, 200), works, together(works), strict=True):
        alone = work.trainer.update(work.start, work.rate, source(size))
        np.testing.assert_allclose(flat(found), flat(alone), rtol=0, atol=1e-9)


@only_fused
@pytest.mark.parametrize("instances", [1, 3, 20])
@pytest.mark.parametrize("head", ["linear", "wide", "gelu, 2 hidden", "tanh, 1 hidden"])
def test_all_that_decides_on_a_unit_is_its_own_to_the_last_bit(
    monkeypatch: pytest.MonkeyPatch, head: str, instances: int
) -> None:
    seen: list[Array] = []
    real = fused._Sites._gradient

    def watched(sites: Any, deltas: list[Array], inputs: list[Array]) -> Array:
        seen.append(np.concatenate(deltas, axis=2))
        return real(sites, deltas, inputs)

    monkeypatch.setattr(fused._Sites, "_gradient", watched)
    contract, held = study(head=HEADS[head]), features(200, instances=instances)

    def decided(*parts: tuple[int, int]) -> Array:
        """Return what each site's units are scaled to, where these are the sites' units."""
        seen.clear()
        engines = [Fused(contract, held.select(slice(*p)), sigma=SIGMA, units=9) for p in parts]
        together([Work(each, start(contract), 1.0, source()) for each in engines])
        return np.concatenate(seen, axis=1)

    (everything,) = decided((0, 200))
    alone = [[(1, 200)], [(0, 1)], *([(70 - count, 70)] for count in range(1, 71, 9))]
    for parts in (*alone, [(0, 3), (3, 70), (70, 71), (71, 200)], [(9, 9), (60, 68), (150, 200)]):
        for (first, last), rows in zip(parts, decided(*parts), strict=True):
            whole = everything[first * instances : last * instances]
            assert np.array_equal(rows[: len(whole)], whole)


@pytest.mark.parametrize("algorithm", ["dp-gd", "dp-sgd"])
def test_instances_that_cancel_are_clipped_like_any_others(
    steps: list[Step], algorithm: str
) -> None:
    """Two instances of one input and opposite labels, which leave nothing but their rounding."""
    contract = sampled(0.9, 1) if algorithm == "dp-sgd" else study()
    generator = np.random.default_rng(5)
    values = np.repeat(generator.normal(size=(60, 1, DIM)), 4, axis=1) * 1e3
    values[:, 2:] *= -1 + 1e-7 * generator.normal(size=(60, 2, 1))
    targets = np.tile([0, 1, 0, 1], (60, 1))
    mask = torch.ones(60, 4, dtype=torch.bool)
    held = Features(torch.from_numpy(values.astype(np.float32)), mask, torch.from_numpy(targets))
    trainer(contract, held).update(zeros(contract), 0.0, source())
    trainer(contract, held.select(slice(1, None))).update(zeros(contract), 0.0, source())
    if algorithm == "dp-gd":
        assert np.linalg.norm(steps[0].total - steps[1].total) <= CLIP
    gradients = linear_gradients(contract, held, zeros(contract))
    assert np.linalg.norm(gradients, axis=1).max() > 0
