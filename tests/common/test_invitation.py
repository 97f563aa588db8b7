import time
from pathlib import Path

import pytest
import yaml
from tests.system.command import DEMO

from veilgraft.errors import InputError
from veilgraft.identity import SigningKey
from veilgraft.invitation import Coordinator, Invitation
from veilgraft.study import Study

CA = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"


def invitation(**changes: object) -> Invitation:
    coordinator = Coordinator(
        host="coordinator.example", port=9443, ca=CA, key=SigningKey.generate().public.text
    )
    values: dict[str, object] = {
        "site": "a",
        "coordinator": coordinator,
        "token": "t" * 43,
        "expires": int(time.time()) + 60,
        "study": Study.read(DEMO / "study.yaml").canonical,
    }
    return Invitation.model_validate(values | changes)


def test_an_invitation_is_read_as_it_was_written(tmp_path: Path) -> None:
    made, path = invitation(), tmp_path / "a.yaml"
    made.write(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Invitation.read(path) == made
    assert Invitation.read(path).contract.digest == Study.read(DEMO / "study.yaml").digest


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"token": "short"}, "token: expected text of the form"),
        ({"site": "../a"}, "site: expected text of the form"),
        ({"extra": 1}, "unknown key"),
        ({"expires": 0}, "expires: expected a number above 0"),
    ],
)
def test_what_is_no_invitation_is_refused(
    tmp_path: Path, change: dict[str, object], expected: str
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump({**invitation().model_dump(mode="json"), **change}))
    with pytest.raises(InputError, match=expected):
        Invitation.read(path)


def test_a_study_that_is_not_canonical_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    made = invitation().model_dump(mode="json")
    made["study"]["simulation"] = {"sites": 3}
    path.write_text(yaml.safe_dump(made))
    with pytest.raises(InputError, match="canonical form"):
        Invitation.read(path)
    made["study"] = {"format": 2}
    path.write_text(yaml.safe_dump(made))
    with pytest.raises(InputError, match="format: expected 1, got 2"):
        Invitation.read(path)


@pytest.mark.parametrize("host", ["", "a b", "-x", "http://x", "x/y"])
def test_a_host_is_a_host(host: str) -> None:
    with pytest.raises(ValueError, match="host"):
        Coordinator(host=host, port=1, ca=CA, key="ed25519:" + "0" * 64)


def test_an_ipv6_address_is_bracketed() -> None:
    made = Coordinator(host="fd00::1", port=9443, ca=CA, key="ed25519:" + "0" * 64)
    assert made.address == "[fd00::1]:9443"
