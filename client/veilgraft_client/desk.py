"""What a site's own people can have done: an order is a verb and an argument, the answer is JSON.

The vault serves it on a socket of its own, out of the courier's reach; before a vault runs, the
command line opens the same desk itself.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any

from veilgraft.errors import InputError
from veilgraft.events import EventLog
from veilgraft.plan import plan
from veilgraft.study import Study
from veilgraft_client.bundles import Bundles
from veilgraft_client.ledger import Ledger
from veilgraft_client.metrics import Metrics
from veilgraft_client.studies import Studies
from veilgraft_client.vault import Vault


class Desk:
    """See the module's docstring. Threads may share it.

    Args:
        ready: is told of a study that was approved and whose backbone is there.
        facts: what else `status` shows.
    """

    def __init__(
        self,
        vault: Vault,
        studies: Studies,
        bundles: Bundles,
        ledger: Ledger,
        events: EventLog,
        metrics: Metrics,
        *,
        ready: Callable[[Study], None] = lambda _: None,
        facts: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self._vault = vault
        self._studies = studies
        self._bundles = bundles
        self._ledger = ledger
        self._events = events
        self._metrics = metrics
        self._ready = ready
        self._facts = facts
        self._lock = threading.Lock()

    def do(self, verb: str, argument: str) -> dict[str, Any]:
        """Carry out an order.

        Raises:
            InputError: no such verb, or an argument that can't be used.
            RefusedError: the site's own file says no.
        """
        # What only looks never waits for what changes: pricing a study may take minutes, and a
        # vault that does not answer looks like one that does not run.
        match verb:
            case "ping":
                return {"site": self._vault.site.site}
            case "status":
                return self._status()
            case "metrics":
                return {"text": self._metrics.render()}
            case "verify":
                return {"ledger": self._ledger.verify(), "log": self._events.verify()}
        with self._lock:
            return self._change(verb, argument)

    def _change(self, verb: str, argument: str) -> dict[str, Any]:
        match verb:
            case "approve":
                return self._approve(argument)
            case "withdraw":
                return self._withdraw(argument)
            case "reject":
                return self._reject(argument)
            case "purge":
                return self._purge()
            case "propose":
                return {"study": self._studies.propose(argument.encode()).digest}
            case _:
                raise InputError(f"{verb}: no such order")

    def _status(self) -> dict[str, Any]:
        site = self._vault.site
        return {
            "site": site.site,
            **self._facts(),
            "approved": [self._shown(study) for study in self._vault.approved.values()],
            "proposed": [self._waiting(study) for study in self._studies.proposed().values()],
            "max_epsilon": site.limits.max_epsilon,
            "epsilon_for_life": self._life(),
            "anchor": self._ledger.head(),
        }

    def _shown(self, study: Study) -> dict[str, Any]:
        return {**self._waiting(study), "epsilon": plan(study).epsilon()}

    def _waiting(self, study: Study) -> dict[str, Any]:
        """Return what a study says of itself: to price what a stranger proposed may take hours."""
        return {
            "study": study.digest,
            "name": study.name,
            "purpose": study.purpose,
            "rounds": study.training.rounds,
            "paid": self._ledger.paid(self._vault.site.site, study.digest),
            "asked_epsilon": study.privacy.epsilon,
            "asked_noise_multiplier": study.privacy.noise_multiplier,
            "backbone": self._bundles.has(study.backbone.digest),
        }

    def _life(self) -> float | None:
        site = self._vault.site.site
        if site not in self._ledger.sites():
            return 0.0
        found = self._ledger.life_epsilon(site)
        return None if found == float("inf") else found

    def _approve(self, digest: str) -> dict[str, Any]:
        study = self._studies.find(digest)
        # The grant first: a study that the site's file refuses is never among the approved.
        self._vault.approve(study)
        self._studies.approve(digest)
        self._events.note("approved", study=digest, epsilon=plan(study).epsilon())
        if self._bundles.has(study.backbone.digest):
            self._ready(study)
        return self._shown(study)

    def _withdraw(self, digest: str) -> dict[str, Any]:
        self._studies.withdraw(digest)
        self._vault.withdraw(digest)
        self._events.note("withdrawn", study=digest)
        return {"withdrawn": digest}

    def _reject(self, digest: str) -> dict[str, Any]:
        self._studies.reject(digest)
        self._events.note("rejected", study=digest)
        return {"rejected": digest}

    def _purge(self) -> dict[str, Any]:
        """Remove features and backbones; they are made, or sent, again where they are needed."""
        folder = self._vault.site.state / "features"
        features = list(folder.glob("*.npy"))
        # What was being made when a process was killed holds features, too.
        for path in (*features, *folder.glob(".*.partial")):
            path.unlink(missing_ok=True)
        backbones = self._bundles.purge()
        for digest in self._vault.approved:
            self._vault.forget(digest)
        self._events.note("purged", features=len(features), backbones=backbones)
        return {"features": len(features), "backbones": backbones}
