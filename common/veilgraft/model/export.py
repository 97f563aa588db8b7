"""The trained model as a folder that loads again, here and where possible in `transformers`.

`head.safetensors` holds the head, `backbone/` the pinned backbone, `config.json` the facts under
the key `veilgraft`, `README.md` the model card. Where a `transformers` class has the same form
(backbone, one linear layer on its pooled output), `config.json` and `model.safetensors` make the
folder loadable with `AutoModelFor….from_pretrained`, with the same logits: the statistics that
standardise features are folded into the linear layer.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from veilgraft import study as contract
from veilgraft.config import Config
from veilgraft.errors import InputError
from veilgraft.model import backbone as backbones
from veilgraft.model import head as heads
from veilgraft.model import tasks
from veilgraft.model.architecture import silent
from veilgraft.model.backbone import FrozenBackbone
from veilgraft.study import Study

HEAD = "head.safetensors"


class _Facts(Config):
    """What `config.json` says of the model under the key `veilgraft`."""

    study: str
    digest: contract.Digest
    private: bool
    task: contract.Task
    backbone: contract.Backbone
    head: contract.Head


@dataclass(frozen=True)
class Prediction:
    """One record's labels and probabilities.

    Attributes:
        labels: the most probable label or, in a multi-label task, those of at least 1/2.
        probabilities: of every label of the study.
    """

    labels: tuple[str, ...]
    probabilities: dict[str, float]


@dataclass(frozen=True)
class Model:
    """An exported model: backbone and head."""

    facts: _Facts
    backbone: FrozenBackbone
    arrays: heads.Arrays

    @property
    def labels(self) -> tuple[str, ...]:
        """The study's labels, in the order of the outputs."""
        return self.facts.task.labels

    @cached_property
    def _head(self) -> torch.nn.Module:
        module = heads.module(self.facts.head, self.backbone.dim, len(self.labels))
        heads.load(module, self.arrays)
        return module.eval()

    def logits(self, inputs: Sequence[str] | Sequence[bytes], batch_size: int = 64) -> Tensor:
        """Return `(records, labels)`, float64; each record's are its own, whatever the batch."""
        parts = range(0, len(inputs), batch_size)
        with torch.inference_mode():
            return torch.cat(
                [self._head(self.backbone.features(inputs[i : i + batch_size]).double())
                 for i in parts]
                or [torch.empty(0, len(self.labels), dtype=torch.float64)]
            )  # fmt: skip

    def predict(
        self, inputs: Sequence[str] | Sequence[bytes], batch_size: int = 64
    ) -> list[Prediction]:
        """Return a prediction for each text, or for each encoded image."""
        task = self.facts.task.type
        found = tasks.probabilities(task, self.logits(inputs, batch_size)).tolist()
        return [self._prediction(row) for row in found]

    def _prediction(self, row: list[float]) -> Prediction:
        probabilities = dict(zip(self.labels, row, strict=True))
        if self.facts.task.type == "multilabel":
            chosen = tuple(label for label, p in probabilities.items() if p >= 0.5)
        else:
            chosen = (max(probabilities, key=probabilities.__getitem__),)
        return Prediction(chosen, probabilities)


def load(folder: Path | str) -> Model:
    """Return the model that `export` wrote; every file of its backbone is verified.

    Raises:
        InputError: the folder is not such a model, or its backbone is not the pinned one.
    """
    folder = Path(folder)
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        arrays = load_file(folder / HEAD)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder}: expected an exported model: {error}") from None
    facts = _Facts.parse(settings.get("veilgraft"), name=f"{path}: veilgraft")
    frozen = FrozenBackbone.open(folder / "backbone", facts.backbone)
    shapes = heads.shapes(facts.head, frozen.dim, len(facts.task.labels))
    if {name: array.shape for name, array in arrays.items()} != shapes:
        raise InputError(f"{folder / HEAD}: expected {shapes}")
    return Model(facts, frozen, arrays)


def export(
    folder: Path,
    study: Study,
    frozen: FrozenBackbone,
    head: heads.Arrays,
    statement: Sequence[str],
    *,
    private: bool,
) -> None:
    """Write the model folder; it appears whole, in place of an earlier one.

    Args:
        frozen: the study's backbone, opened from its folder.
        statement: the privacy statement, a sentence a line, for the model card.
        private: whether all that was released was noised, and from no seed.
    """
    assert study.backbone.path is not None
    staged = folder.with_name(f".{folder.name}")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    spec = study.backbone.model_copy(update={"path": None})
    shutil.copytree(study.backbone.path, staged / "backbone", copy_function=shutil.copyfile)
    backbones.verify(staged / "backbone", spec.digest)
    save_file({name: np.ascontiguousarray(array) for name, array in head.items()}, staged / HEAD)
    facts = _Facts(
        study=study.name,
        digest=study.digest,
        private=private,
        task=study.task,
        backbone=spec,
        head=study.head,
    )
    model = Model(facts, frozen, head)
    settings = _as_transformers(staged, model)
    settings["veilgraft"] = facts.model_dump(mode="json")
    (staged / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (staged / "README.md").write_text(_card(study, statement, settings), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    staged.rename(folder)


def _as_transformers(folder: Path, model: Model) -> dict[str, Any]:
    """Save the model in `transformers`' form where one is the same; return its configuration.

    Whether it is the same is not looked up but tried: logits on probe records must agree.
    """
    if model.facts.head.type != "linear":
        return {}
    whole = model.backbone.with_linear_head(*_folded(model), model.labels)
    if whole is None:
        return {}
    with silent():
        whole.save_pretrained(folder)
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        if (folder / "backbone" / name).exists():
            shutil.copyfile(folder / "backbone" / name, folder / name)
    settings: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if model.facts.task.type == "multilabel":
        settings["problem_type"] = "multi_label_classification"
    return settings


def _folded(model: Model) -> tuple[Tensor, Tensor]:
    """Return weight and bias for features that are not standardised."""
    weight = torch.from_numpy(np.asarray(model.arrays["linear0.weight"]))
    bias = torch.from_numpy(np.asarray(model.arrays["linear0.bias"]))
    if model.backbone.statistics is None:
        return weight, bias
    mean, scale = (part.cpu().double() for part in model.backbone.statistics)
    return weight / scale, bias - (weight / scale) @ mean


def _card(study: Study, statement: Sequence[str], settings: dict[str, Any]) -> str:
    architecture = settings.get("architectures", ["none: load it with `veilgraft.load`"])[0]
    lines = [
        f"# {study.name}",
        "",
        study.purpose,
        "",
        f"- task: {study.task.type}; labels: {', '.join(study.task.labels)}",
        f"- head: {study.head.type} on `{study.backbone.pooling}` features of the backbone "
        f"`{study.backbone.digest}`",
        f"- trained by Veilgraft, study `{study.digest}`",
        f"- `transformers` class of the same form: {architecture}",
        "",
        "## Privacy",
        "",
        *statement,
        "",
        "The backbone was not trained here; what it memorised of its own training data is not "
        "covered.",
        "",
        "## Use",
        "",
        "```python",
        "import veilgraft",
        "",
        'model = veilgraft.load("this/folder")',
        f"model.predict([{'text' if study.backbone.modality == 'text' else 'image_bytes'}])",
        "```",
        "",
    ]
    return "\n".join(lines)
