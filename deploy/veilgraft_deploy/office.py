"""A site's vault put together from its folder: for the process that serves it, and for orders.

Records are read, and features made, in this process alone; where it serves, it has no network.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from contextlib import ExitStack
from functools import cached_property, lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from veilgraft import logs
from veilgraft.durable import PAUSE_SECONDS, BusyError, alone
from veilgraft.errors import Refusal, RefusedError, VeilgraftError
from veilgraft.events import EventLog
from veilgraft.identity import SigningKey, passphrase
from veilgraft.model.backbone import FrozenBackbone
from veilgraft.model.features import Cohort
from veilgraft.study import Study
from veilgraft_client.bundles import Bundles
from veilgraft_client.cohort import cohort
from veilgraft_client.connection import DeskClient
from veilgraft_client.desk import Desk
from veilgraft_client.gate import Gate, Nonces
from veilgraft_client.ledger import Ledger
from veilgraft_client.metrics import Metrics
from veilgraft_client.separation import Separation, measured
from veilgraft_client.service import Service
from veilgraft_client.studies import Studies
from veilgraft_client.vault import Vault
from veilgraft_deploy.place import Place

log = logging.getLogger(__name__)

ORDER_SECONDS = 600.0
BUSY_SECONDS = 60.0
"""How long the folder is waited for where another process has it."""


class Office:
    """All that a site's folder holds, opened; a context manager.

    Args:
        wait_seconds: for another process to be done.
        serving: make the features of a study that is approved, in the background; an order that is
            carried out without a vault ends before they would be made.

    Raises:
        BusyError: another process is at it.
        InputError, ChainError: file and reason.
    """

    def __init__(self, place: Place, wait_seconds: float = 0.0, *, serving: bool = False) -> None:
        self.place = place
        self._ready = self.prepare if serving else _nothing
        self.site = site = place.site
        with ExitStack() as opened:
            opened.enter_context(alone(place.state / "office.lock", wait_seconds))
            self.ledger = Ledger(site.state / "ledger.db")
            opened.callback(self.ledger.close)
            self.events = EventLog(place.events)
            opened.callback(self.events.close)
            self.studies = Studies(site.state)
            self.bundles = Bundles(site.state / "backbones", site.limits.max_backbone_bytes)
            self.vault = Vault(site, self.ledger, self._cohort, seed=site.seed)
            self.metrics = Metrics(site, self.ledger)
            self.separations: tuple[Separation, ...] = ()
            self._opened = lru_cache(maxsize=1)(self._open)
            self._serve_approved()
            self._held = opened.pop_all()

    def _serve_approved(self) -> None:
        for study in self.studies.approved().values():
            try:
                self.vault.approve(study)
            except RefusedError as refusal:
                log.warning("%s: no longer served: %s", study.digest, refusal.detail)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.close()

    @cached_property
    def desk(self) -> Desk:
        """For the site's own people."""
        return Desk(
            self.vault,
            self.studies,
            self.bundles,
            self.ledger,
            self.events,
            self.metrics,
            ready=self._ready,
            facts=self._facts,
        )

    def gate(self) -> Gate:
        """Return what stands before the vault, for the courier."""
        return Gate(
            self.vault,
            self.studies,
            self.bundles,
            coordinator=lambda: self.place.coordinator.identity,
            identity=SigningKey.load(self.place.identity, passphrase()),
            nonces=Nonces(self.site.state / "nonces.db"),
            events=self.events,
            ready=self._ready,
        )

    def prepare(self, study: Study) -> None:
        """Make a study's features in the background; a request that comes first waits for them."""
        thread = threading.Thread(target=self._prepare, args=(study,), daemon=True)
        thread.start()

    def _prepare(self, study: Study) -> None:
        try:
            self.vault.prepare(study)
        except Exception:
            # It stays here; a request will fail in the same way, with a code.
            log.exception("%s: no features", study.digest)

    def _cohort(self, study: Study) -> Cohort:
        return cohort(self.site, study, lambda: self._opened(study))

    def _open(self, study: Study) -> FrozenBackbone:
        device = self.site.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = self.bundles.path(study.backbone.digest)
        limit = self.site.limits.max_backbone_bytes
        return FrozenBackbone.open(folder, study.backbone, device, max_bytes=limit)

    def _facts(self) -> dict[str, Any]:
        return {
            "isolation": self.site.isolation,
            "separations": {each.name: each.holds for each in self.separations},
            "coordinator": self.place.coordinator.identity.fingerprint,
        }


def _nothing(study: Study) -> None:
    pass


def serve(place: Place) -> None:
    """Serve a site's vault until SIGTERM.

    Raises:
        RefusedError: the vault does not stand apart here as `isolation` asks.
        InputError, ChainError: the folder can't be used; nothing is served.
    """
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    logs.configure(place.site.state / "vault.log")
    with Office(place, BUSY_SECONDS, serving=True) as office:
        office.separations = separations(place)
        require_apart(place, office.separations)
        courier = place.courier_user
        service = Service(
            handle=office.metrics.watch(office.gate().handle),
            desk=office.desk.do,
            courier_socket=place.socket,
            local_socket=place.desk,
            allowed_uids=frozenset({courier[0] if courier else place.owner.uid}),
        )
        office.events.note("started", isolation=place.site.isolation)
        with service:
            for study in office.vault.approved.values():
                if office.bundles.has(study.backbone.digest):
                    office.prepare(study)
            stopping.wait()
        office.events.note("stopped")
    # A request that hangs would keep its thread, and the process, for ever; all is on the disk.
    os._exit(0)


def separations(place: Place) -> tuple[Separation, ...]:
    """Return how far this very process stands apart from network and courier."""
    courier = place.courier_user
    uid, groups = courier or (None, frozenset())
    return measured(secrets(place), uid, groups, state=place.state, shared=shared(place))


def secrets(place: Place) -> list[Path]:
    """Return the data, which the courier must not reach."""
    path = place.site.data.path
    return [path] if path else []


def shared(place: Place) -> list[Path]:
    """Return the folders that are there for the courier."""
    return [place.run, place.courier]


def require_apart(place: Place, found: tuple[Separation, ...]) -> None:
    """Raise `RefusedError` where private records would be served without full separation."""
    missing = [each for each in found if not each.holds]
    site = place.site
    if not missing or site.isolation == "reduced" or site.data_is_public:
        return
    reasons = "; ".join(f"{each.name}: {each.reason}" for each in missing)
    raise RefusedError(
        Refusal.UNAVAILABLE,
        f"{place.config}: isolation: full is asked for, and does not hold: {reasons}",
    )


def order(place: Place, verb: str, argument: str = "") -> dict[str, Any]:
    """Have an order carried out: by the vault that runs, or here where none does."""
    end = time.monotonic() + BUSY_SECONDS
    while True:
        if runs(place):
            return DeskClient(place.desk, ORDER_SECONDS).do(verb, argument)
        try:
            with place.as_owner(), Office(place) as office:
                return office.desk.do(verb, argument)
        except BusyError:
            # A vault that is starting will answer soon.
            if time.monotonic() > end:
                raise
            time.sleep(PAUSE_SECONDS)


def runs(place: Place) -> bool:
    """Return whether a vault serves the folder."""
    with contextlib.suppress(VeilgraftError):
        return bool(DeskClient(place.desk, 5.0).do("ping"))
    return False
