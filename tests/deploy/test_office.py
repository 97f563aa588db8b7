"""One process at a time has a site's folder."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tests.client.gated import BACKBONE, study

from veilgraft.config import canonical
from veilgraft.durable import BusyError
from veilgraft.errors import RefusedError
from veilgraft.identity import SigningKey
from veilgraft.invitation import Coordinator
from veilgraft.study import Study
from veilgraft_deploy import office
from veilgraft_deploy.office import Office, order
from veilgraft_deploy.place import Place, pin

CA = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    site = {
        "site": "a",
        "data": {"path": "records.csv"},
        "units": 10,
        "limits": {"max_epsilon": 1.0},
        "state": "state",
    }
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    (tmp_path / "state").mkdir(mode=0o700)
    made = Place.open(tmp_path)
    key = SigningKey.generate().public.text
    pin(made.pinned, Coordinator(host="h", port=1, ca=CA, key=key))
    yield made


def test_a_second_process_is_told_that_the_folder_is_taken(place: Place) -> None:
    with Office(place), pytest.raises(BusyError, match="another process has it"):
        Office(place)
    with Office(place):
        pass


def test_an_office_that_can_t_be_opened_leaves_the_folder_free(place: Place) -> None:
    ledger = place.state / "ledger.db"
    ledger.write_text("no ledger")
    for _ in range(2):
        with pytest.raises(Exception, match="can't open the ledger"):
            Office(place)
    ledger.unlink()
    with Office(place):
        pass


def test_an_order_waits_for_who_has_the_folder(place: Place) -> None:
    first = Office(place)
    timer = threading.Timer(1.0, lambda: first.__exit__(None, None, None))
    timer.start()
    assert order(place, "status")["site"] == "a"
    timer.join()


def test_an_order_gives_up_where_nobody_lets_go(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(office, "BUSY_SECONDS", 0.5)
    with Office(place), pytest.raises(BusyError):
        order(place, "status")


def test_an_order_makes_no_features_behind_the_back_of_who_gave_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A thread that is in a library when its process ends takes the process down with it.
    contract, made = study(), list[Study]()
    monkeypatch.setattr(Office, "prepare", lambda self, study: made.append(study))
    order(place, "propose", canonical(contract.canonical))
    with Office(place) as opened:
        opened.bundles.add(BACKBONE, contract.backbone.digest)
    with pytest.raises(RefusedError, match="over budget"):
        order(place, "approve", contract.digest)
    weak = study(privacy={"noise_multiplier": 50.0})
    order(place, "propose", canonical(weak.canonical))
    order(place, "approve", weak.digest)
    assert made == []
    order(place, "withdraw", weak.digest)
    with Office(place, serving=True) as serving:
        serving.desk.do("approve", weak.digest)
    assert made == [weak]
