"""One site's records, as its own file names them, become the units that a study trains on."""

from collections.abc import Callable

import numpy as np
import torch

from veilgraft.model import features as contract
from veilgraft.model.backbone import FrozenBackbone
from veilgraft.model.features import Cohort, FeatureStore
from veilgraft.study import Study
from veilgraft_client import dataset, units
from veilgraft_client.policy import Site


def cohort(site: Site, study: Study, open_backbone: Callable[[], FrozenBackbone]) -> Cohort:
    """Return the site's features, computed once and found again later.

    Units that are held out stand apart, by the site's own key, for the life of the data.

    Raises:
        InputError: records, key or backbone can't be read as the study asks.
        OSError: features can't be kept.
    """
    column = site.data.unit or study.privacy.column if study.privacy.column else None
    records = dataset.read(site.data, study.task, modality=study.backbone.modality, unit=column)
    store = FeatureStore(site.state / "features")
    values = store.get(study.backbone, open_backbone, records.inputs, records.fingerprint)
    key, names = units.site_key(site.state, site.seed), units.keys(records)
    if column is None:
        made = contract.units(values, torch.from_numpy(records.targets))
    else:
        made, names = units.gather(
            values,
            records.targets,
            names,
            units.digests(records),
            study.privacy.max_instances,
            key,
        )
    held = np.array([units.is_held_out(key, name, site.held_out) for name in names], bool)
    if not held.any():
        return Cohort(made, made.select(slice(0, 0)))
    chosen = torch.from_numpy(held)
    return Cohort(made.select(~chosen), made.select(chosen))
