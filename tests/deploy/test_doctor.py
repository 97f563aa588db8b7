"""The doctor: what is wrong with connection, clock and permissions, and what to do."""

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.deploy.joined import Edge, answers, edge, records

from veilgraft.errors import InputError
from veilgraft_deploy import doctor
from veilgraft_deploy.joining import prepare


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    with edge(tmp_path_factory.mktemp("edge")) as made:
        yield made


@pytest.mark.parametrize("ahead", [0, -200, 4, 280])
def test_an_edge_that_answers_with_about_the_same_time_is_well(there: Edge, ahead: float) -> None:
    there.ahead = ahead if ahead > 0 else ahead / 50
    try:
        facts, problems = doctor.connection(there.coordinator)
    finally:
        there.ahead = 0.0
    assert facts["reached"]
    assert problems == []


@pytest.mark.parametrize("ahead", [-20, 400, 1e6, -1e6])
def test_a_clock_that_flower_would_refuse_is_told(there: Edge, ahead: float) -> None:
    there.ahead = ahead
    try:
        facts, (problem,) = doctor.connection(there.coordinator)
    finally:
        there.ahead = 0.0
    assert facts["clock_ahead_seconds"] == pytest.approx(-ahead, abs=10)
    assert "set up NTP" in problem


@pytest.mark.parametrize("date", ["", "yesterday", "Mon, 99 Foo 2026 99:99:99 GMT", "0" * 500])
def test_a_date_that_is_none_breaks_nothing(there: Edge, date: str) -> None:
    there.date = date
    try:
        assert doctor.connection(there.coordinator) == ({"reached": True}, [])
    finally:
        there.date = None


def test_an_edge_that_can_t_be_reached_is_told(there: Edge) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        away = there.coordinator.model_copy(update={"port": free.getsockname()[1]})
    facts, (problem,) = doctor.connection(away)
    assert facts == {"reached": False}
    assert "can't be reached" in problem
    assert "firewall" in problem


def test_another_machine_under_the_edge_s_name_is_not_believed(there: Edge, tmp_path: Path) -> None:
    with edge(tmp_path) as other:
        stolen = there.coordinator.model_copy(update={"port": other.port})
        facts, (problem,) = doctor.connection(stolen)
    assert facts == {"reached": False}
    assert "CERTIFICATE_VERIFY_FAILED" in problem
    assert other.asked == []


def test_an_edge_that_points_elsewhere_or_says_no_is_told(there: Edge) -> None:
    there.status, there.location = 302, "http://127.0.0.1:1/"
    try:
        assert "not as a coordinator: 302" in doctor.connection(there.coordinator)[1][0]
        there.status = 403
        assert "not as a coordinator: 403" in doctor.connection(there.coordinator)[1][0]
    finally:
        there.status, there.location = 200, None


def test_a_ca_that_is_none_is_a_sentence(there: Edge) -> None:
    ca = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    with pytest.raises(InputError, match="expected a certificate as PEM"):
        doctor.connection(there.coordinator.model_copy(update={"ca": ca}))


def test_files_that_others_may_change_are_told(there: Edge, tmp_path: Path) -> None:
    place = prepare(there.invitation(), answers(records(tmp_path / "a.parquet")), tmp_path / "a")
    assert doctor._permissions(place) == []
    place.config.chmod(0o666)
    place.identity.chmod(0o640)
    one, other = sorted(doctor._permissions(place))
    assert "expected mode 600, got 640" in one + other
    assert "others may change it; chmod 600" in one + other


def test_data_that_the_courier_may_read_is_told(there: Edge) -> None:
    # Not pytest's own folder, which other users can't enter.
    with tempfile.TemporaryDirectory() as base:
        Path(base).chmod(0o711)
        data = records(Path(base) / "a.parquet")
        data.chmod(0o644)
        asked = answers(data, isolation="full", courier_user=64200)
        place = prepare(there.invitation(), asked, Path(base) / "a")
        facts, problems = doctor.check(place)
    holds = {each["name"]: each["holds"] for each in facts["separations"]}
    assert not holds["files"]
    if os.geteuid() == 0:
        assert any(str(data) in problem for problem in problems)
