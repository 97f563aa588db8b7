"""The frozen backbone: pinned files that turn a record into features.

A backbone is a folder: `config.json`, weights as `safetensors`, `tokenizer.json` for text,
`preprocessor_config.json` for images unless the study states the preprocessing, and
`feature_statistics.safetensors` where features are to be standardised. Its *digest* pins every
file. Nothing in it can name code: the architecture stands on an allow-list, of its configuration
only the fields that the architecture declares are used, and `transformers` is handed those fields
and the tensors, never the folder. So adapters, remote code, kernels and pickles aren't looked for.

A record's features depend on that record alone, whatever it was batched with: to within float32
rounding in any batch (`features`), and bit for bit in slots (`in_slots`).
`tests/common/model/test_backbone.py` shows both for each architecture allowed here.

Slots are there because a product of matrices rounds a row by the place where it stands and by the
batch's shape, and a kernel may be chosen by what a whole batch has in common. Differential
privacy bounds what one record more or less changes, on the premise that the others stay as they
were; a last bit that moved is a small change, and a head that amplifies it can be asked for. So
a batch's shape and the slot in it are functions of the record's own content, slots that no record
takes hold a fixed dummy, and what a kernel computes in a slot is then the record's alone.
"""

import copy
import hashlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from veilgraft import study
from veilgraft.errors import InputError
from veilgraft.model import reading
from veilgraft.model.architecture import (
    IMAGE,
    TEXT,
    as_input_error,
    check,
    load,
    modality,
    weight_files,
)
from veilgraft.model.bundle import (
    FILES,
    MANIFEST,
    STATISTICS,
    digest,
    manifest,
    verify,
    write_manifest,
)
from veilgraft.model.reading import Reader

__all__ = [
    "IMAGE", "MANIFEST", "MAX_BYTES", "STATISTICS", "TEXT", "FrozenBackbone", "Records", "Shape",
    "digest", "identity", "manifest", "modality", "prepare", "slot", "verify", "write_manifest",
    "write_statistics",
]  # fmt: skip

MAX_BYTES = 4 << 30
"""Memory that a backbone's float32 tensors may take unless the caller says otherwise."""

FORMAT = 3
"""Raised when the same files and study would give other features than before."""

IMAGE_SLOTS = 16
TEXT_SLOTS = 192
"""Slots of a batch of images; tokens, or one text, of a batch of texts.

Public constants: a batch whose size followed the data would tell of them in every row. More slots
leave more of them empty, fewer make more batches.
"""

TEXT_STEP = 8
"""Tokens in whose multiples texts are padded."""

Records: TypeAlias = Sequence[str] | Sequence[bytes]


class Shape(NamedTuple):
    """The shape of the batches that a record may stand in; a function of that record alone.

    Attributes:
        slots: rows of a batch.
        tokens: of a row; 0 for images, which have one size after preprocessing.
        padded: whether every row ends in padding, or none does. Attention takes another kernel
            for a batch without padding, so that texts of both sorts must not meet.
    """

    slots: int
    tokens: int = 0
    padded: bool = False


def slot(record: str | bytes, slots: int) -> int:
    """Return the record's place in a batch: public, and a function of its content alone.

    Equal records want the same slot, so they stand in different batches.
    """
    content = record.encode() if isinstance(record, str) else record
    drawn = hashlib.sha256(b"veilgraft/slot/1\n" + content).digest()
    return int.from_bytes(drawn, "big") % slots


class FrozenBackbone:
    """A verified backbone that turns records into features and never changes.

    Attributes:
        dim: size of a feature vector.
        statistics: public mean and scale, `(dim,)` each, where features are standardised.
    """

    def __init__(self, model: Any, reader: Reader, spec: study.Backbone) -> None:
        self._model = model
        self._reader = reader
        self._spec = spec
        self.statistics: tuple[torch.Tensor, torch.Tensor] | None = None
        self.dim = self._pooled(reader.blank).shape[1]

    @classmethod
    def open(
        cls,
        folder: Path,
        spec: study.Backbone,
        device: torch.device | str = "cpu",
        *,
        max_bytes: int = MAX_BYTES,
    ) -> Self:
        """Verify the folder, load it and try it on one blank record.

        Raises:
            InputError: the digest is another; the folder names code or an architecture that is
                not allowed; tensors are missing, extra, of the wrong shape or too large; or the
                folder can't give what `spec` asks for.
        """
        verify(folder, spec.digest)
        config, model_class = check(folder, spec.pooling, max_bytes)
        reader = reading.reader(folder, spec, config)
        tensors = {k: v for path in weight_files(folder) for k, v in load_file(path).items()}
        model = load(folder, model_class, config, tensors, spec.pooling)
        with as_input_error(folder):
            backbone = cls(model, reader, spec)
        if spec.standardise:
            backbone.statistics = _statistics(folder / STATISTICS, backbone.dim)
        # Only now: had the blank record indexed out of range on a GPU, the process would be lost.
        model.to(device)
        return backbone

    @property
    def device(self) -> torch.device:
        """Where the backbone computes."""
        device: torch.device = self._model.device
        return device

    def shapes(self, records: Records) -> list[Shape]:
        """Return for each record the shape of the batches that it may stand in."""
        if self._spec.modality == "image":
            return [Shape(IMAGE_SLOTS)] * len(records)
        starts = range(0, len(records), 256)
        batches = (self._reader(records[start : start + 256]) for start in starts)
        lengths = [n for batch in batches for n in batch["attention_mask"].sum(1).tolist()]
        return [_text_shape(length, self._spec.max_length) for length in lengths]

    def in_slots(self, shape: Shape, placed: Mapping[int, str | bytes]) -> torch.Tensor:
        """Return the features of the records in their order, `(n, dim)`, float32, on the CPU.

        On one machine with one number of threads, a record's are bit for bit a function of that
        record alone, whatever stands in the other slots. What is not finite is left so.

        Args:
            shape: what `shapes` says of each of these records.
            placed: records by their `slot`; one or more.

        Raises:
            InputError: an image can't be decoded.
        """
        slots = list(placed)
        records: Any = list(placed.values())
        inputs = self._dummies(shape)
        for name, rows in self._reader(records).items():
            # A text shorter than the batch is followed by the dummy's padding.
            inputs[name][slots, : rows.shape[1]] = rows
        return self._standardised(self._pooled(inputs))[slots]

    def features(self, records: Records) -> torch.Tensor:
        """Return the features of one batch, `(n, dim)`, float32, on the CPU.

        They depend on the other records within float32 rounding; see `in_slots`. What is not
        finite is left so; it is for the training to drop the unit.

        Raises:
            InputError: an image can't be decoded.
        """
        if not records:
            return torch.empty(0, self.dim)
        return self._standardised(self._pooled(self._reader(records)))

    def _dummies(self, shape: Shape) -> dict[str, torch.Tensor]:
        """Return the inputs of a batch of dummies: blank images, or texts of the first token."""
        blank = self._reader.blank
        if not shape.tokens:
            rows = blank["pixel_values"].repeat(shape.slots, 1, 1, 1)
            # As the reader lays images out, for which convolutions take less time.
            return {"pixel_values": rows.contiguous(memory_format=torch.channels_last)}
        mask = torch.ones(shape.slots, shape.tokens, dtype=torch.int64)
        if shape.padded:
            mask[:, 1:] = 0
        padding = self._model.config.pad_token_id or 0
        ids = blank["input_ids"][:, : shape.tokens]
        return {"input_ids": torch.where(mask == 1, ids, padding), "attention_mask": mask}

    def _standardised(self, values: torch.Tensor) -> torch.Tensor:
        if self.statistics is None:
            return values
        mean, scale = self.statistics
        return (values - mean) / scale

    def with_linear_head(
        self, weight: torch.Tensor, bias: torch.Tensor, labels: Sequence[str]
    ) -> Any | None:
        """Return a `transformers` classifier of this backbone and one linear layer, or None.

        Whether an architecture's classifier has that form is not looked up but tried: on a drawn
        record its logits must be the linear layer's on this backbone's pooled output.

        Args:
            weight: `(labels, dim)`, for features that are not standardised.
            bias: `(labels,)`.
        """
        probe = self._reader.probe(torch.Generator().manual_seed(0))
        wanted = self._pooled(probe).to(weight.dtype) @ weight.T + bias
        with torch.random.fork_rng(devices=[]):
            classifier = _classifier(self._model, weight, bias, labels)
        if classifier is None:
            return None
        with torch.inference_mode():
            came = classifier(**probe).logits
        same = torch.allclose(came.to(wanted.dtype), wanted, rtol=1e-4, atol=1e-4)
        return classifier if same else None

    def _pooled(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        model, pooling = self._model, self._spec.pooling
        with torch.inference_mode():
            output = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()})
            offered = _poolings(output, inputs.get("attention_mask"), model.config.model_type)
        if pooling not in offered:
            names = ", ".join(sorted(offered))
            raise InputError(
                f"backbone.pooling: {model.config.model_type} offers {names}, got {pooling}"
            )
        # A clone made outside inference mode may enter a head that is being trained.
        return offered[pooling].cpu().clone()


def _text_shape(length: int, max_length: int) -> Shape:
    # A token of padding or more, unless the text is as long as a text can be.
    tokens = min((length // TEXT_STEP + 1) * TEXT_STEP, max_length)
    return Shape(max(1, TEXT_SLOTS // tokens), tokens, length < tokens)


def _classifier(
    model: Any, weight: torch.Tensor, bias: torch.Tensor, labels: Sequence[str]
) -> Any | None:
    """Return the architecture's classifier with the model's weights and one linear layer."""
    from transformers.models.auto import modeling_auto as auto

    text = model.config.model_type in TEXT
    classifiers = (
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        if text
        else auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    )
    config = copy.deepcopy(model.config)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    made = classifiers[type(config)](config).eval()
    base = getattr(made, made.base_model_prefix)
    inside = set(base.modules())
    linear = [m for m in made.modules() if isinstance(m, nn.Linear) and m not in inside]
    if len(linear) != 1 or linear[0].weight.shape != weight.shape:
        return None
    if base.load_state_dict(model.state_dict(), strict=False).missing_keys:
        return None
    linear[0].load_state_dict({"weight": weight, "bias": bias})
    return made


def _poolings(output: Any, mask: torch.Tensor | None, kind: str) -> dict[str, torch.Tensor]:
    """Return each pooling that the architecture offers, `(n, dim)`.

    `mean` is over a text's own tokens, special ones included; over an image's patches without
    the leading tokens; or over all places of a feature map. `cls` is the first token where the
    architecture has one, `pooler` its own pooled output.
    """
    hidden, special = output.last_hidden_state, IMAGE.get(kind, 1)
    offered = {}
    if mask is not None:
        own = mask.to(hidden.device).unsqueeze(2)
        offered["mean"] = hidden.masked_fill(own == 0, 0.0).sum(1) / own.sum(1)
    else:
        offered["mean"] = hidden[:, special:].mean(1) if hidden.ndim == 3 else hidden.mean((2, 3))
    if hidden.ndim == 3 and special:
        offered["cls"] = hidden[:, 0]
    pooler = output.get("pooler_output")
    if pooler is not None:
        offered["pooler"] = pooler.flatten(1)
    return offered


def _statistics(path: Path, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return public mean and scale, `(dim,)` each."""
    try:
        stored = load_file(path)
        mean, scale = stored["mean"].float(), stored["scale"].float()
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"{path}: can't be read for backbone.standardise: {error!r}") from None
    if mean.shape != (dim,) or scale.shape != (dim,):
        raise InputError(
            f"{path}: expected mean and scale of shape ({dim},), "
            f"got {tuple(mean.shape)} and {tuple(scale.shape)}"
        )
    if not (mean.isfinite().all() and scale.isfinite().all() and (scale > 0).all()):
        raise InputError(f"{path}: expected a finite mean and a finite scale above zero")
    return mean, scale


def identity(spec: study.Backbone) -> dict[str, Any]:
    """Return all that shapes features, as plain values: equal identities, equal features."""
    used = {"digest", "modality", "pooling", "standardise"}
    used.add("max_length" if spec.modality == "text" else "preprocessing")
    return {"format": FORMAT, **spec.model_dump(mode="json", include=used)}


def prepare(source: Path, out: Path, *, max_bytes: int = MAX_BYTES) -> str:
    """Copy what loading needs to the new folder `out`, with a manifest, and return its digest.

    Links in `source` are followed. `out` appears whole or not at all. Where `out` is `source`,
    nothing is copied or removed, and the manifest is written there.

    Raises:
        InputError: `open` would refuse the folder, or `out` exists already.
    """
    if out.exists() and out.samefile(source):
        check(out, "mean", max_bytes)
        return write_manifest(out)
    if out.exists():
        raise InputError(f"{out}: expected a folder that does not exist yet")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        staged = Path(temporary) / out.name
        staged.mkdir()
        for path in {path for pattern in FILES for path in source.glob(pattern)}:
            shutil.copyfile(path, staged / path.name)
        check(staged, "mean", max_bytes)
        made = write_manifest(staged)
        staged.rename(out)
    return made


def write_statistics(
    folder: Path, spec: study.Backbone, public: Records, *, batch_size: int = 32
) -> str:
    """Measure the features of public records, write them beside the weights, return the digest.

    `feature_statistics.safetensors` holds `mean` and `scale`, float32 `(dim,)`; `scale` is the
    standard deviation, and no less than a hundredth of its root mean square over the dimensions,
    so that a dimension that hardly moves in public records can't dominate on private ones.

    Args:
        spec: how the records are read; its digest pins the folder as it is before.
        public: records whose statistics may be shown to anyone; at least two.

    Raises:
        InputError: the folder can't be opened, or the features are too few or not finite.
    """
    backbone = FrozenBackbone.open(folder, spec.model_copy(update={"standardise": False}))
    starts = range(0, len(public), batch_size)
    batches = [backbone.features(public[start : start + batch_size]) for start in starts]
    values = torch.cat(batches).double() if batches else torch.empty(0, backbone.dim)
    if len(values) < 2 or not bool(values.isfinite().all()):
        raise InputError(f"{folder}: expected two or more public records with finite features")
    scale = values.std(0)
    floor = 0.01 * scale.square().mean().sqrt().clamp(min=1e-6)
    statistics = {"mean": values.mean(0).float(), "scale": scale.clamp(min=floor).float()}
    save_file(statistics, folder / STATISTICS)
    (folder / STATISTICS).chmod(0o644)
    return write_manifest(folder)
