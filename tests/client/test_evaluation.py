"""What a site measures: sums that one can check by hand, and what one unit can do to them."""

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch

from veilgraft import releases
from veilgraft.model import head as heads
from veilgraft.model.features import Features, units
from veilgraft.plan import plan
from veilgraft.privacy.noise import NoiseSource
from veilgraft.study import Head, Study
from veilgraft_client.evaluation import count_labels, evaluate

Kind = Literal["evaluation", "label-counts"]
HEAD = {"linear0.weight": np.eye(3), "linear0.bias": np.zeros(3)}
"""With this head the largest feature is the label, and features are the logits."""


def study(task: str = "classification", noise: float | None = None, **private: Any) -> Study:
    measured = {"noise_multiplier": noise or 1.0}
    return Study.parse(
        {
            "name": "s",
            "purpose": "p",
            "task": {"type": task, "labels": ["a", "b", "c"]},
            "backbone": {"digest": "sha256:" + "0" * 64, "modality": "text", "pooling": "cls"},
            "privacy": {"noise_multiplier": 1.0} if noise else {},
            "training": {
                "algorithm": "dp-gd" if noise else "none",
                "rounds": 4,
                "learning_rate": 1.0,
            },
            "evaluation": {"private": {**measured, **private}, "label_counts": measured},
        },
        name="study.yaml",
    )


def held(values: list[list[list[float]]], targets: list[Any], mask: list[list[bool]]) -> Features:
    labels = torch.tensor(targets)
    if labels.ndim == 3:
        labels = labels.float()
    return Features(torch.tensor(values, dtype=torch.float32), torch.tensor(mask), labels)


def released(contract: Study, kind: Kind, features: Features) -> np.ndarray:
    with NoiseSource.seeded(1, "test") as source:
        if kind == "evaluation":
            return evaluate(contract, HEAD, features, source)[releases.SUMS]
        return count_labels(contract, features, source)[releases.SUMS]


TWO = held(
    [[[9, 0, 0], [0, 9, 0]], [[0, 0, 9], [0, 0, 0]]],
    [[0, 2], [2, 0]],
    [[True, True], [True, False]],
)
"""A unit of which one of two instances is right, and one of one instance, which is right."""


def test_a_unit_counts_by_the_share_of_its_instances_that_is_right() -> None:
    correct, loss, count = released(study(), "evaluation", TWO)
    assert (correct, count) == (1.5, 2.0)
    wrong = math.log(2 + math.exp(9)) - 0.0
    right = math.log(2 + math.exp(9)) - 9.0
    assert loss == pytest.approx((min(4.0, (wrong + right) / 2) + right) / 4.0, rel=1e-6)


def test_the_loss_of_a_unit_is_bounded_by_the_study_s_constant() -> None:
    far = held([[[1e6, 0, 0]]], [[1]], [[True]])
    assert released(study(loss_bound=2.0), "evaluation", far).tolist() == [0.0, 1.0, 1.0]


def test_labels_are_counted_by_the_share_of_a_unit_s_instances() -> None:
    assert released(study(), "label-counts", TWO).tolist() == [0.5, 0.0, 1.5]
    several = held([[[0.0] * 3]], [[[1, 0, 1]]], [[True]])
    assert released(study("multilabel"), "label-counts", several).tolist() == [1.0, 0.0, 1.0]


def test_several_labels_are_right_by_the_share_of_decisions() -> None:
    unit = held([[[5.0, -5.0, 5.0]]], [[[1, 0, 0]]], [[True]])
    correct, _, count = released(study("multilabel"), "evaluation", unit)
    assert correct == pytest.approx(2 / 3)
    assert count == 1.0


@pytest.mark.parametrize("kind", ["evaluation", "label-counts"])
@pytest.mark.parametrize("task", ["classification", "multilabel"])
def test_no_unit_can_move_a_sum_by_more_than_the_bound(kind: Kind, task: str) -> None:
    contract, generator = study(task), np.random.default_rng(3)
    bound = releases.clip_norm(contract, kind)
    farthest = 0.0
    for _ in range(200):
        instances = int(generator.integers(1, 5))
        values = generator.normal(scale=10.0 ** generator.integers(-2, 3), size=(1, instances, 3))
        targets = generator.integers(0, 3, (1, instances))
        if task == "multilabel":
            targets = generator.integers(0, 2, (1, instances, 3))
        mask = np.ones((1, instances), bool)
        unit = held(values.tolist(), targets.tolist(), mask.tolist())
        farthest = max(farthest, float(np.linalg.norm(released(contract, kind, unit))))
    # Losses beyond their bound and units that are all right come close to it.
    assert 0.9 * bound < farthest <= bound * (1 + 1e-12)


@pytest.mark.parametrize("spoilt", [math.nan, math.inf])
def test_a_unit_that_is_not_finite_counts_for_nothing(spoilt: float) -> None:
    contract = study(noise=1e-3)
    other = held([[[spoilt, 0, 0]]], [[0]], [[True]])
    one = held([[[9, 0, 0]]], [[0]], [[True]])
    both = Features(
        torch.cat([one.values, other.values]),
        torch.cat([one.mask, other.mask]),
        torch.cat([one.targets, other.targets]),
    )
    alone = released(contract, "evaluation", one)
    assert np.array_equal(released(contract, "evaluation", both), alone)


def test_what_a_masked_instance_holds_makes_no_difference() -> None:
    spoilt = held([[[9, 0, 0], [math.nan] * 3]], [[0, 0]], [[True, False]])
    clean = held([[[9, 0, 0], [0, 0, 0]]], [[0, 0]], [[True, False]])
    contract = study(noise=1e-3)
    one, other = (released(contract, "evaluation", each) for each in (spoilt, clean))
    assert np.array_equal(one, other)


@pytest.mark.parametrize("hidden", [(), (16,)])
def test_whether_a_unit_is_right_depends_on_that_unit_alone(hidden: tuple[int, ...]) -> None:
    """Two labels that no head could tell apart: which is larger hangs on rounding."""
    generator, dim = np.random.default_rng(7), 96
    spec = Head(type="mlp", hidden=hidden) if hidden else Head()
    shapes = heads.shapes(spec, dim, 3)
    head = {name: generator.normal(size=shape) for name, shape in shapes.items()}
    weight, bias = (head[f"linear{len(hidden)}.{name}"] for name in ("weight", "bias"))
    weight[1] = weight[0] + 1e-16 * generator.normal(size=weight.shape[1])
    weight[2], bias[:] = 0, (0, 0, -1e6)
    values = generator.normal(size=(67, dim)).astype(np.float32)
    everybody = units(values, torch.from_numpy(generator.integers(0, 2, 67)))

    def right(those: list[int]) -> float:
        asked = study().model_copy(update={"head": spec})
        with NoiseSource.seeded(1, "test") as source:
            sums = evaluate(asked, head, everybody.select(torch.tensor(those)), source)
        return float(sums[releases.SUMS][0])

    outcomes = [right([unit]) for unit in range(67)]
    assert 20 < sum(outcomes) < 47
    for first in range(67):
        assert right(list(range(first, 67))) == sum(outcomes[first:])


def test_with_nobody_held_out_noise_alone_is_released() -> None:
    contract = study(noise=2.0)
    found = released(contract, "evaluation", TWO.select(slice(0)))
    assert found.shape == (3,)
    assert np.isfinite(found).all()
    assert (found != 0).all()


@pytest.mark.parametrize("kind", ["evaluation", "label-counts"])
def test_the_noise_has_the_deviation_that_the_plan_pays_for(kind: Kind) -> None:
    contract = study(noise=3.0)
    event = plan(contract).releases[kind][1]
    assert event is not None
    assert event.noise_multiplier == 3.0
    nobody, drawn = TWO.select(slice(0)), []
    for index in range(400):
        with NoiseSource.seeded(index, "spread") as source:
            if kind == "evaluation":
                drawn.append(evaluate(contract, HEAD, nobody, source)[releases.SUMS])
            else:
                drawn.append(count_labels(contract, nobody, source)[releases.SUMS])
    expected = 3.0 * releases.clip_norm(contract, kind)
    assert releases.deviation(contract, kind) == expected
    # Six standard errors of a deviation from 1,200 normals are 12%.
    assert np.std(drawn) == pytest.approx(expected, rel=0.12)
