"""How a record becomes a model's input, by rules that look at that record alone."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch.nn.utils.rnn import pad_sequence

from veilgraft import study
from veilgraft.config import Config
from veilgraft.errors import InputError
from veilgraft.model import images
from veilgraft.model.architecture import as_input_error, modality
from veilgraft.model.bundle import read_json

MAX_SIDE = 2048
"""Pixels that an image's side may have after preprocessing."""

_Channels: TypeAlias = tuple[float, float, float]


class Reader(Protocol):
    """Turns records into a model's inputs."""

    @property
    def blank(self) -> dict[str, torch.Tensor]:
        """The inputs of the largest record there can be."""
        ...

    def probe(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """The inputs of one drawn record."""
        ...

    def __call__(self, records: Any, /) -> dict[str, torch.Tensor]:
        """Return the inputs of one batch."""
        ...


class _Tokens:
    """Texts to `input_ids` and `attention_mask` `(n, tokens)`, padded to the longest."""

    def __init__(self, path: Path, config: Any, max_length: int) -> None:
        from tokenizers import Tokenizer

        with as_input_error(path):
            self._tokenizer = Tokenizer.from_file(str(path))
        largest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
        if largest >= config.vocab_size:
            raise InputError(f"{path}: expected tokens below {config.vocab_size}, got {largest}")
        # With an offset, as RoBERTa has, the model takes fewer; the blank record tells.
        if max_length > config.max_position_embeddings:
            raise InputError(
                f"backbone.max_length: expected at most {config.max_position_embeddings}, "
                f"got {max_length}"
            )
        self._tokenizer.enable_truncation(max_length)
        self._tokenizer.no_padding()
        # The model's own padding token, by which RoBERTa numbers positions.
        self._padding = config.pad_token_id or 0
        self._max_length = max_length
        if not self._encoded([""])[0]:
            raise InputError(f"{path}: expected a post-processor that adds a first token")

    @property
    def blank(self) -> dict[str, torch.Tensor]:
        ids = torch.full((1, self._max_length), self._encoded([""])[0][0])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def probe(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        ids = torch.randint(self._tokenizer.get_vocab_size(), (1, 4), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def __call__(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        rows = [torch.tensor(ids) for ids in self._encoded(texts)]
        masks = [torch.ones_like(row) for row in rows]
        return {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=self._padding),
            "attention_mask": pad_sequence(masks, batch_first=True),
        }

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        return [one.ids for one in self._tokenizer.encode_batch_fast(list(texts))]


class _Shortest(Config):
    shortest_edge: PositiveInt


class _Rectangle(Config):
    height: PositiveInt
    width: PositiveInt


class _ImageProcessor(Config):
    """The options of `preprocessor_config.json` that are implemented; all others are refused."""

    do_resize: Literal[True] = True
    size: _Rectangle | _Shortest | PositiveInt
    resample: Literal[0, 1, 2, 3, 4, 5]
    crop_pct: PositiveFloat | None = None
    do_center_crop: bool | None = None
    crop_size: _Rectangle | None = None
    do_rescale: bool = True
    rescale_factor: PositiveFloat = 1 / 255
    do_normalize: bool = True
    image_mean: _Channels = (0.0, 0.0, 0.0)
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (1.0, 1.0, 1.0)
    do_pad: Literal[False] | None = None
    do_reduce_labels: Literal[False] | None = None
    include_top: Literal[False] | None = None
    rescale_offset: Literal[False] | None = None
    do_convert_rgb: bool | None = None
    data_format: Literal["channels_first"] | None = None
    image_processor_type: str = ""
    feature_extractor_type: str = ""
    processor_class: str | None = None

    @model_validator(mode="after")
    def _gives_one_size(self) -> Self:
        resize, (height, width) = self.geometry
        rows, columns = (resize, resize) if isinstance(resize, int) else resize
        if height > rows or width > columns:
            raise ValueError(f"expected a crop within {rows} × {columns}, got {height} × {width}")
        return self

    @property
    def geometry(self) -> tuple[int | tuple[int, int], tuple[int, int]]:
        """What to resize to (height and width, or the shorter side), and what to crop from it."""
        convnext = "ConvNext" in self.image_processor_type + self.feature_extractor_type
        share = self.crop_pct or (0.875 if convnext else None)
        crop = self.crop_size if self.do_center_crop is not False else None
        match self.size:
            # These crop a fixed share, and from 384 pixels on they stretch instead.
            case int(side) | _Shortest(shortest_edge=side) if share:
                return (int(side / share) if side < 384 else (side, side)), (side, side)
            case _Shortest(shortest_edge=side) if crop:
                return side, (crop.height, crop.width)
            case _Rectangle(height=height, width=width):
                crop = crop or self.size
                return (height, width), (crop.height, crop.width)
        raise ValueError(
            "expected size to be height and width, or shortest_edge with a centre crop"
        )


@dataclasses.dataclass(frozen=True)
class _Pixels:
    """Encoded images to `pixel_values` `(n, 3, height, width)`, float32."""

    resize: int | tuple[int, int]
    crop: tuple[int, int]
    resample: int
    factor: float
    mean: _Channels
    std: _Channels

    @classmethod
    def read(cls, folder: Path, stated: study.Preprocessing | None) -> Self:
        """Return what the study states or, where it says nothing, what the folder does."""
        if stated is not None:
            _check_sides("backbone.preprocessing.size", stated.size)
            square = (stated.size, stated.size)
            return cls(square, square, Image.Resampling.BILINEAR, 1 / 255, stated.mean, stated.std)
        path = folder / "preprocessor_config.json"
        if not path.exists():
            raise InputError(f"backbone.preprocessing: missing, and so is {path}")
        options = _ImageProcessor.parse(read_json(path), name=str(path))
        _check_sides(f"{path}: size", *options.geometry[1])
        return cls(
            *options.geometry,
            options.resample,
            options.rescale_factor if options.do_rescale else 1.0,
            options.image_mean if options.do_normalize else (0.0, 0.0, 0.0),
            options.image_std if options.do_normalize else (1.0, 1.0, 1.0),
        )

    @property
    def blank(self) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.zeros(1, 3, *self.crop)}

    def probe(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.randn(1, 3, *self.crop, generator=generator)}

    def __call__(self, encoded: Sequence[bytes]) -> dict[str, torch.Tensor]:
        pixels = torch.from_numpy(np.stack([self._fit(images.decode(one)) for one in encoded]))
        values = pixels.permute(0, 3, 1, 2).float().mul_(self.factor)
        mean, std = (torch.tensor(c).view(3, 1, 1) for c in (self.mean, self.std))
        return {"pixel_values": values.sub_(mean).div_(std)}

    def _fit(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Return the crop of the resized image, `(height, width, 3)`.

        Only the crop is computed: resizing a long strip to its shorter side would need memory
        without bound.
        """
        height, width = self.crop
        rows, columns = self._resized(image)
        top, left = (rows - height) // 2, (columns - width) // 2
        down, across = image.height / rows, image.width / columns
        box = (left * across, top * down, (left + width) * across, (top + height) * down)
        return np.asarray(image.resize((width, height), Image.Resampling(self.resample), box))

    def _resized(self, image: Image.Image) -> tuple[int, int]:
        if not isinstance(self.resize, int):
            return self.resize
        short = min(image.size)
        return (
            int(self.resize * image.height / short),
            int(self.resize * image.width / short),
        )


def _check_sides(key: str, *sides: int) -> None:
    if max(sides) > MAX_SIDE:
        raise InputError(f"{key}: expected at most {MAX_SIDE} pixels a side, got {max(sides)}")


def reader(folder: Path, spec: study.Backbone, config: Any) -> Reader:
    """Return the reader of what the architecture takes; `InputError` if that is not `spec`'s."""
    takes = modality(folder)
    if takes != spec.modality:
        raise InputError(f"backbone.modality: {folder} takes {takes}, got {spec.modality}")
    if takes == "text":
        return _Tokens(folder / "tokenizer.json", config, spec.max_length)
    return _Pixels.read(folder, spec.preprocessing)
