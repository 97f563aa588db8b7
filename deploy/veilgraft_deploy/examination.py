"""A look at a site's own records, device and ledger, for the site's eyes only.

`site check` runs it in a process without network, as the vault's user.
"""

import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from veilgraft.chain import ChainError
from veilgraft.errors import RefusedError
from veilgraft.model.backbone import FrozenBackbone
from veilgraft.plan import Plan, plan
from veilgraft.study import Study
from veilgraft_client import dataset, policy, units
from veilgraft_client.dataset import Records
from veilgraft_client.ledger import Ledger, Terms
from veilgraft_client.policy import Site
from veilgraft_deploy.progress import Watcher

TRIED = 16
"""Records on which the backbone is measured."""

SHOWN = 5
"""Groups of near-equal ids that are shown one by one."""


def examine(
    site: Site, study: Study, watcher: Watcher, backbone: Path | None = None
) -> dict[str, Any]:
    """Return what a person at the site should know before the study is approved.

    The counts are measured and exact, and some ids are shown as they stand: all of it is to stay
    at the site.

    Args:
        backbone: the backbone's folder, whose speed is then measured on this device.

    Raises:
        InputError: the site's records can't be read as the study asks.
    """
    column = site.data.unit or study.privacy.column if study.privacy.column else None
    records = dataset.read(
        site.data,
        study.task,
        modality=study.backbone.modality,
        unit=column,
        tell=watcher.say,
    )
    planned = plan(study)
    return {
        "site": site.site,
        "study": study.digest,
        "records": len(records),
        "bad_records": records.bad,
        "labels": _labels(study, records),
        **_units(study, site, records, column),
        **_cost(site, study, planned),
        **(_speed(site, study, records, backbone) if backbone else {}),
    }


def _speed(site: Site, study: Study, records: Records, folder: Path) -> dict[str, Any]:
    """Return how long the backbone takes on this device, tried on a few of the site's records."""
    device = site.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    limit = site.limits.max_backbone_bytes
    backbone = FrozenBackbone.open(folder, study.backbone, device, max_bytes=limit)
    tried = records.inputs[:TRIED]
    backbone.features(tried)
    began = time.perf_counter()
    backbone.features(tried)
    each = (time.perf_counter() - began) / max(1, len(tried))
    return {"device": device, "features_take_seconds": each * len(records)}


def _labels(study: Study, records: Records) -> dict[str, int]:
    targets, names = records.targets, study.task.labels
    if targets.ndim == 2:
        return dict(zip(names, targets.sum(0).astype(int).tolist(), strict=True))
    counts = Counter(targets.tolist())
    return {name: counts[index] for index, name in enumerate(names)}


def _units(study: Study, site: Site, records: Records, column: str | None) -> dict[str, Any]:
    """Return how many units there are, and what looks wrong about their ids."""
    sizes = Counter(units.keys(records))
    facts: dict[str, Any] = {
        "unit": study.privacy.unit,
        "units": len(sizes) if column else len(records),
        "declared_units": site.units,
    }
    if site.held_out:
        key = units.site_key(site.state)
        held = sum(units.is_held_out(key, name, site.held_out) for name in sizes)
        facts["held_out_units"] = held
    if column is None:
        return facts
    limit = study.privacy.max_instances
    near = units.near_equal(records.table["unit"].to_pylist())
    return facts | {
        "most_rows_of_a_unit": max(sizes.values()),
        "rows_beyond_max_instances": sum(max(0, size - limit) for size in sizes.values()),
        "near_equal_ids": len(near),
        "for_example": [" = ".join(map(repr, group)) for group in near[:SHOWN]],
    }


def _cost(site: Site, study: Study, planned: Plan) -> dict[str, Any]:
    """Return what the study would cost, and why it would be refused; grants nothing."""
    facts: dict[str, Any] = {
        "epsilon": planned.epsilon(),
        "delta": planned.delta,
        "releases": {kind: count for kind, (count, _) in planned.releases.items()},
        "max_epsilon": site.limits.max_epsilon,
        "refused": None,
    }
    try:
        policy.check_study(site, study, planned, seeded=False)
        with _copied(site) as ledger:
            cap = site.limits.max_epsilon if planned.update else None
            terms = Terms(cap, site.limits.delta, site.held_out, site.unit(study))
            ledger.grant(site.site, study.digest, planned, terms, units=site.units)
            facts["epsilon_for_life"] = ledger.life_epsilon(site.site)
    except RefusedError as refusal:
        facts["refused"] = refusal.detail
    return facts


@contextmanager
def _copied(site: Site) -> Iterator[Ledger]:
    """Give a copy of the site's ledger, for a trial: pricing may take long, and a vault is at work.

    It lies in the site's own folder, which nobody else reads.
    """
    path = site.state / "ledger.db"
    with tempfile.TemporaryDirectory(prefix=".trial-", dir=site.state) as folder:
        copy = Path(folder) / path.name
        if path.exists():
            try:
                with closing(sqlite3.connect(path)) as held, closing(sqlite3.connect(copy)) as own:
                    held.backup(own)
            except sqlite3.Error as error:
                raise ChainError(f"{path}: can't be read: {error}") from None
        with closing(Ledger(copy)) as ledger:
            yield ledger
