"""`veilgraft study init`: a commented study file from a look at a data path."""

import os
from pathlib import Path

import yaml

from veilgraft.errors import InputError
from veilgraft.model import backbone as backbones
from veilgraft.study import Study
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
  unit: record                 # what is protected; or a column that names a person, and with it
                               # max_instances: of a person's rows, so many are used at most
  epsilon: 3.0                 # of each unit, over all it releases; 8 is weak, 1 is strong
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
#   private: {{share: 0.1, every: 10}}   # or: sites evaluate on units of their own that they hold
#                                      # out for life, with noise, for a share of epsilon

simulation:                    # for veilgraft simulate; not part of the contract
  data:
{data}
  data_is_public: false        # true only where nobody's privacy is at stake: shows accuracies
  sites: 10
{units:<30} # needed where not public: the size each site declares, round, no count
  holdout: 0.2
  partition: {{by: iid}}         # or {{by: dirichlet, alpha: 0.5}}, {{by: column, column: x}}
"""


def draft(data: Path, backbone: Path, name: str, out: Path, units: int | None) -> str:
    """Return the text of a study file that is to be written to `out`.

    The size that a site declares is a person's to give: one that is measured would be a release.

    Raises:
        InputError: the data or the backbone can't be looked at, no labels were found, or a study
            can't have that name.
    """
    beside = out.parent
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
    text_of_file = _TEMPLATE.format(
        units=f"  units: {units}" if units else "  # units: 40",
        file=out.name,
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
    # What is written here must be what `study check` takes.
    Study.parse(yaml.safe_load(text_of_file), name=str(out))
    return text_of_file


def _relative(path: Path, beside: Path) -> str:
    return os.path.relpath(path.resolve(), beside.resolve())


def _yaml(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("\n...\n").strip()
