"""What a study is planned to spend, and how its ε is shared out."""

import itertools
from typing import Any

import pytest

from veilgraft.errors import InputError
from veilgraft.plan import Plan, plan
from veilgraft.privacy import accounting
from veilgraft.privacy.accounting import Event
from veilgraft.study import Study

SAMPLED = {"algorithm": "dp-sgd", "sample_rate": 0.1, "local_epochs": 1}


def study(privacy: dict[str, Any], evaluation: dict[str, Any], **training: Any) -> Study:
    values = {
        "name": "s",
        "purpose": "p",
        "task": {"labels": ["a", "b"]},
        "backbone": {"digest": "sha256:" + "0" * 64, "modality": "text", "pooling": "cls"},
        "privacy": privacy,
        "training": {"algorithm": "dp-gd", "rounds": 12, "learning_rate": 1.0, **training},
        "evaluation": evaluation,
    }
    return Study.parse(values, name="study.yaml")


def test_without_measurements_all_of_epsilon_is_the_updates() -> None:
    planned = plan(study({"epsilon": 3.0}, {}))
    assert planned.releases == {"update": (12, planned.update)}
    assert planned.sigma == pytest.approx(accounting.noise_multiplier(3.0, 1e-5, steps=12))


@pytest.mark.parametrize("training", [{}, SAMPLED])
def test_measurements_are_inside_the_study_s_epsilon(training: dict[str, Any]) -> None:
    asked = {"private": {"share": 0.2, "every": 5}, "label_counts": {"share": 0.1}}
    planned = plan(study({"epsilon": 3.0}, asked, **training))
    assert planned.evaluated == (5, 10, 12)
    assert planned.releases["evaluation"] == (3, planned.evaluation)
    assert planned.releases["label-counts"] == (1, planned.label_counts)
    assert len(planned.events) == 12 + 3 + 1
    assert accounting.epsilon(planned.events, 1e-5) == pytest.approx(3.0, rel=2e-3)
    assert accounting.epsilon(planned.events, 1e-5) <= 3.0
    assert planned.epsilon() == accounting.epsilon(planned.events, 1e-5)


def test_a_share_is_what_the_measurements_would_cost_alone() -> None:
    planned = plan(study({"epsilon": 3.0}, {"private": {"share": 0.2, "every": 4}}))
    assert planned.evaluation is not None
    assert accounting.epsilon([planned.evaluation] * 3, 1e-5) == pytest.approx(0.6)
    assert planned.sigma > plan(study({"epsilon": 3.0}, {})).sigma


def test_a_study_that_names_its_noise_names_it_for_measurements_too() -> None:
    asked = {"private": {"noise_multiplier": 7.0, "every": 12}}
    planned = plan(study({"noise_multiplier": 5.0}, asked))
    assert planned.events == (Event(5.0),) * 12 + (Event(7.0),)


def test_epsilon_grows_round_by_round_to_the_total() -> None:
    asked = {"private": {"share": 0.3, "every": 6}, "label_counts": {"share": 0.1}}
    planned = plan(study({"epsilon": 3.0}, asked))
    shown = [planned.epsilon(round_) or 0.0 for round_ in range(13)]
    assert shown == sorted(shown)
    assert planned.label_counts is not None
    assert planned.update is not None
    assert shown[0] == pytest.approx(accounting.epsilon([planned.label_counts], 1e-5))
    # An evaluation after the sixth round makes it dearer than the fifth or the seventh.
    steps = [after - before for before, after in itertools.pairwise(shown)]
    assert steps[5] > max(steps[4], steps[6])
    assert shown[12] == planned.epsilon()


def test_rdp_is_never_below_and_close() -> None:
    planned = plan(study({"epsilon": 3.0}, {"private": {"share": 0.2}}, **SAMPLED))
    told, checked = planned.epsilon(), planned.rdp_epsilon()
    assert told is not None
    assert checked is not None
    assert told <= checked <= 1.25 * told


def test_nothing_without_noise_has_a_bound() -> None:
    plain = plan(study({}, {"private": {"share": 0.2, "every": 6}}, algorithm="none"))
    assert plain.releases == {"update": (12, None), "evaluation": (2, None)}
    assert plain.epsilon() is None
    assert plain.rdp_epsilon() is None
    seeded = plan(study({"epsilon": 3.0}, {"label_counts": {"share": 0.1}})).without_bound()
    assert seeded.releases == {"update": (12, None), "label-counts": (1, None)}


def test_a_share_that_no_noise_can_keep_is_one_sentence() -> None:
    with pytest.raises(InputError, match=r"evaluation\.private\.share: an ε of 3e-09 over"):
        plan(study({"epsilon": 3.0, "delta": 1e-12}, {"private": {"share": 1e-9}}))


def test_a_long_plan_is_made_once() -> None:
    long = study({"epsilon": 3.0}, {}, rounds=10_000)
    assert plan(long) is plan(long)
    assert isinstance(plan(long), Plan)


@pytest.mark.parametrize(
    ("privacy", "evaluation", "expected"),
    [
        ({"epsilon": 3.0}, {"private": {}}, "expected exactly one of share and noise_multiplier"),
        (
            {"epsilon": 3.0},
            {"private": {"noise_multiplier": 3.0}},
            "evaluation.private: expected share, as privacy is given by epsilon",
        ),
        (
            {"noise_multiplier": 3.0},
            {"label_counts": {"share": 0.1}},
            "evaluation.label_counts: expected noise_multiplier",
        ),
        (
            {"epsilon": 3.0},
            {"private": {"share": 0.6}, "label_counts": {"share": 0.5}},
            "leave something to training",
        ),
        (
            {"epsilon": 3.0},
            {"private": {"share": 0.1}, "data": {"path": "x"}, "data_is_public": True},
            "expected data or private, not both",
        ),
    ],
)
def test_measurements_that_don_t_fit_the_study_are_refused(
    privacy: dict[str, Any], evaluation: dict[str, Any], expected: str
) -> None:
    with pytest.raises(InputError) as error:
        study(privacy, evaluation)
    assert expected in str(error.value)
