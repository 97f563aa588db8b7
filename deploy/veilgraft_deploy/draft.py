"""`veilgraft study init`: a commented study file from a look at a data path."""

import os
from pathlib import Path

import yaml

from veilgraft.errors import InputError
from veilgraft.model import backbone as backbones
from veilgraft_client import dataset

_TEMPLATE = """\
# A Veilgraft study: the contract that coordinator and sites hold in common.
# Check it with: veilgraft study check {file}
name: {name}
purpose: {purpose}
task:
  type: classification         # or multilabel: any number of labels for a record
  labels: {labels}

backbone:                      # frozen; turns a record into features, once
  digest: {digest}
  path: {path}
  modality: {modality}
  pooling: mean                # or cls, pooler: as the architecture offers
  standardise: {standardise}          # by public statistics; see veilgraft backbone prepare
{reading}
head:
  type: linear                 # or mlp, with hidden: [64]

privacy:
  unit: record                 # what is protected
  epsilon: 3.0                 # of each unit, over all rounds together; 8 is weak, 1 is strong
  delta: 1e-5                  # well below one over the number of units
  clip_norm: 1.0               # bound on what one unit can change

training:
  algorithm: dp-gd             # or dp-sgd, with sample_rate and local_epochs
  rounds: 40                   # fewer suit a smaller epsilon
  learning_rate: 4.0
  schedule: constant           # or cosine, plateau
  momentum: 0.0

aggregation:
  weights: equal               # or a public constant for each site
  quorum: 2                    # fewer valid releases stop the run
  timeout: 600                 # seconds that a round waits

# evaluation:
#   data: {{path: public-test.csv}}   # records on which accuracy may be shown as it is
#   data_is_public: true

simulation:                    # for veilgraft simulate; not part of the contract
  data:
{data}
  data_is_public: false        # true only where nobody's privacy is at stake: shows accuracies
  sites: 10
  holdout: 0.2
  partition: {{by: iid}}         # or {{by: dirichlet, alpha: 0.5}}, {{by: column, column: x}}
"""


def draft(data: Path, backbone: Path, name: str, beside: Path) -> str:
    """Return the text of a study file that is to lie in the folder `beside`.

    Raises:
        InputError: the data or the backbone can't be looked at, or no labels were found.
    """
    seen = dataset.describe(data)
    modality = backbones.modality(backbone)
    if seen.modality != modality:
        raise InputError(f"{data}: holds {seen.modality}, and the backbone takes {modality}")
    if not seen.labels:
        raise InputError(f"{data}: found no column with 2 to 100 distinct labels")
    source = {
        "path": _relative(data, beside),
        "input": seen.inputs[0],
        "label": seen.label_columns[0],
    }
    if seen.format == "images":
        source = {"path": source["path"]}
    text = modality == "text"
    statistics = (backbone / backbones.STATISTICS).exists()
    return _TEMPLATE.format(
        file="study.yaml",
        name=name,
        purpose=_yaml(f"Tell {len(seen.labels)} labels of {modality}s apart."),
        labels=_yaml(list(seen.labels)),
        digest=backbones.digest(backbone),
        path=_yaml(_relative(backbone, beside)),
        modality=modality,
        standardise=_yaml(statistics),
        reading="  max_length: 128              # tokens; longer texts are cut\n" if text else "",
        data="\n".join(f"    {key}: {_yaml(value)}" for key, value in source.items()),
    )


def _relative(path: Path, beside: Path) -> str:
    return os.path.relpath(path.resolve(), beside.resolve())


def _yaml(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("\n...\n").strip()
