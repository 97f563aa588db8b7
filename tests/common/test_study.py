"""The contract: what it accepts, what it says of mistakes, and its digest."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from veilgraft.errors import InputError
from veilgraft.study import Study

VALUES: dict[str, Any] = {
    "name": "s",
    "purpose": "p",
    "task": {"labels": ["a", "b"]},
    "backbone": {"digest": "sha256:" + "0" * 64, "modality": "image", "pooling": "mean"},
    "privacy": {"epsilon": 3.0},
    "training": {"algorithm": "dp-gd", "rounds": 10, "learning_rate": 1.0},
}


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def changed(**sections: Any) -> dict[str, Any]:
    values = {k: dict(v) if isinstance(v, dict) else v for k, v in VALUES.items()}
    for name, value in sections.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            values[name] |= value
        else:
            values[name] = value
    return values


def mistakes(values: dict[str, Any]) -> str:
    with pytest.raises(InputError) as error:
        Study.parse(values, name="study.yaml")
    return str(error.value)


def test_a_study_is_read_with_its_defaults(tmp_path: Path) -> None:
    study = Study.read(written(tmp_path, yaml.safe_dump(VALUES)))
    assert study.privacy.delta == 1e-5
    assert study.private


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"privacy": {"epsilom": 3}}, "privacy.epsilom: unknown key; did you mean 'epsilon'?"),
        ({"privacy": {"epsilon": -1}}, "privacy.epsilon: expected a number above 0, got -1"),
        ({"privacy": {"delta": 0.1}}, "privacy.delta: expected a number below 0.001, got 0.1"),
        ({"privacy": {"epsilon": "much"}}, "privacy.epsilon: expected number"),
        ({"task": {"labels": ["a"]}}, "task.labels: expected at least two labels, got 1"),
        ({"task": {"labels": ["a", "a"]}}, "expected distinct labels, got a more than once"),
        ({"task": {"labels": [True, False]}}, "expected text, got true; put it in quotes"),
        ({"training": {"algorithm": "sgd"}}, "training.algorithm: expected 'dp-sgd', 'dp-gd' or"),
        ({"training": {"rounds": 0}}, "training.rounds: expected a number above 0, got 0"),
        ({"training": {"sample_rate": 0.1}}, "expected no sample_rate for algorithm dp-gd"),
        ({"backbone": {"digest": "md5:0"}}, "backbone.digest: expected text of the form"),
        ({"head": {"type": "mlp"}}, "head: expected hidden sizes for type mlp"),
        ({"backbone": None}, "backbone: expected a mapping of keys to values, got null"),
        ({"privacy": {"noise_multiplier": 1.0}}, "expected exactly one of privacy.epsilon"),
        (
            {"privacy": {"unit": "patient_id"}},
            "privacy: expected max_instances beside unit patient_id",
        ),
        (
            {
                "privacy": {"delta": 1e-11},
                "training": {"algorithm": "dp-sgd", "sample_rate": 0.1, "local_epochs": 1},
            },
            "privacy.delta: expected at least 1e-09 where training.sample_rate is given",
        ),
        ({"privacy": {"max_instances": 2}}, "privacy: expected max_instances 1 for unit record"),
        ({"privacy": {"unit": ""}}, "privacy.unit: expected"),
        ({"evaluation": {"data": {"path": "x"}}}, "expected data_is_public: true beside data"),
        ({"extra": 1}, "extra: unknown key; expected one of name, purpose"),
    ],
)
def test_a_mistake_names_file_key_value_and_expectation(
    section: dict[str, Any], expected: str
) -> None:
    message = mistakes(changed(**section))
    assert message.startswith("study.yaml: ")
    assert expected in message


def test_all_mistakes_of_a_file_are_reported_together() -> None:
    message = mistakes(changed(privacy={"delta": 1.0, "epsilon": 0}, name="no spaces please"))
    assert len(message.splitlines()) == 3


def test_noise_of_an_unnoised_study_is_refused() -> None:
    assert "not private" in mistakes(changed(training={"algorithm": "none"}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected a mapping of keys to values, got null"),
        ("- 1", "expected a mapping of keys to values, got [1]"),
        ("a: [1", "line 1: not valid YAML"),
        ("a: 1\na: 2", "line 2: not valid YAML: the key 'a' stands twice"),
        ("a: !!python/object:os.system 1", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_study_is_one_sentence(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(InputError) as error:
        Study.read(written(tmp_path, text))
    assert expected in str(error.value)
    assert "study.yaml" in str(error.value)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no\.yaml: can't be read: No such file"):
        Study.read(tmp_path / "no.yaml")


def test_numbers_that_yaml_takes_for_text_are_numbers() -> None:
    assert Study.parse(changed(privacy={"delta": "1e-6"}), name="s").privacy.delta == 1e-6


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    values = changed(backbone={"path": "models/b"})
    study = Study.read(written(tmp_path, yaml.safe_dump(values)))
    assert study.backbone.path == tmp_path / "models" / "b"


@given(st.permutations(list(VALUES)))
def test_the_digest_does_not_depend_on_the_order_of_keys(order: list[str]) -> None:
    study = Study.parse({key: VALUES[key] for key in order}, name="s")
    assert study.digest == Study.parse(VALUES, name="s").digest


def test_the_digest_is_of_what_binds_and_of_nothing_local() -> None:
    digest = Study.parse(VALUES, name="s").digest
    local = changed(backbone={"path": "here"}, simulation={"sites": 99})
    assert Study.parse(local, name="s").digest == digest
    for section in (
        {"privacy": {"delta": 1e-6}},
        {"training": {"rounds": 11}},
        {"task": {"labels": ["a", "c"]}},
        {"aggregation": {"quorum": 2}},
    ):
        assert Study.parse(changed(**section), name="s").digest != digest


def test_defaults_written_out_do_not_change_the_digest() -> None:
    written_out = changed(privacy={"clip_norm": 1.0, "unit": "record"})
    assert Study.parse(written_out, name="s").digest == Study.parse(VALUES, name="s").digest


def test_the_canonical_form_stays_as_it_is() -> None:
    """A change of this digest breaks every study that was ever approved."""
    assert (
        Study.parse(VALUES, name="s").digest
        == "sha256:e657153c5be795c528907a9053be704afd730c656a9987f3cd0350e837411841"
    )


def test_the_learning_rate_follows_its_schedule() -> None:
    study = Study.parse(changed(training={"schedule": "cosine"}), name="s")
    assert study.learning_rate(1) == 1.0
    assert study.learning_rate(6) == pytest.approx(0.5)


def test_local_steps_are_a_constant_of_the_study() -> None:
    sampled = {"algorithm": "dp-sgd", "sample_rate": 0.2, "local_epochs": 1}
    assert Study.parse(changed(training=sampled), name="s").training.local_steps == 5
