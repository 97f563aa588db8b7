"""What may be loaded: architectures on a list, and exactly the tensors that they declare."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from veilgraft.errors import InputError
from veilgraft.model.bundle import read_json

TEXT = frozenset({
    "albert", "bert", "camembert", "deberta-v2", "distilbert", "electra", "mpnet", "roberta",
    "xlm-roberta",
})  # fmt: skip
"""Text architectures that may be loaded: encoders whose first token stands for the whole."""

IMAGE: Mapping[str, int] = {
    "convnext": 0,
    "convnextv2": 0,
    "deit": 2,
    "dinov2": 1,
    "efficientnet": 0,
    "mobilenet_v1": 0,
    "mobilenet_v2": 0,
    "regnet": 0,
    "resnet": 0,
    "swin": 0,
    "vit": 1,
}
"""Image architectures that may be loaded, with the leading tokens that are no patch."""

# Fields that this architecture reads without declaring them.
_UNDECLARED = {
    "deberta-v2": {
        "attention_head_size", "conv_act", "conv_groups", "conv_kernel_size", "embedding_size",
        "norm_rel_ebd", "pooler_hidden_size", "position_buckets", "share_att_key",
    },
}  # fmt: skip
_NAMES_CODE = re.compile(
    r"auto_map|custom_|remote_code|(attn|attention|experts)_implementation|kernel(?!_sizes?$)"
    r"|(^|_)hub|quanti[sz]|adapter|peft|(^|_)lora|fusion|compile|distributed|per_layer_config"
    r"|transformers_weights",
    re.IGNORECASE,
)
_COUNTS_LAYERS = re.compile(r"layers|depth|repeat|hidden_groups|inner_group")


def modality(folder: Path) -> Literal["image", "text"]:
    """Return what the folder's architecture takes; raises `InputError` if it is not allowed."""
    path = folder / "config.json"
    return "text" if _architecture(path, read_json(path)) in TEXT else "image"


def _architecture(path: Path, settings: Mapping[str, Any]) -> str:
    kind, known = settings.get("model_type"), sorted(TEXT | IMAGE.keys())
    if kind not in known:
        raise InputError(f"{path}: model_type: expected one of {', '.join(known)}, got {kind!r}")
    return str(kind)


def _refuse_code(path: Path, value: object) -> None:
    """Raise `InputError` where a key at any depth names what would run or change the model."""
    if isinstance(value, list):
        for item in value:
            _refuse_code(path, item)
    elif isinstance(value, dict):
        for key, item in value.items():
            # Labels are free text, and never reach the model.
            if item is None or key in ("id2label", "label2id"):
                continue
            if _NAMES_CODE.search(key):
                raise InputError(
                    f"{path}: {key}: expected no key that names code, kernels, adapters or "
                    "quantisers"
                )
            _refuse_code(path, item)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files; raises `InputError` if there are none."""
    whole = folder / "model.safetensors"
    files = [whole] if whole.exists() else sorted(folder.glob("model-*-of-*.safetensors"))
    if not files:
        raise InputError(f"{whole}: missing; weights are read from safetensors, never from pickles")
    return files


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return each tensor's shape by its name, from the files' headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                names = file.keys()
                here = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: can't be read as safetensors: {error}") from None
        if twice := shapes.keys() & here.keys():
            raise InputError(f"{path}: {min(twice)}: stands in more than one file")
        shapes |= here
    return shapes


def _config(folder: Path, tensors: int) -> Any:
    """Return the architecture's own configuration object."""
    path = folder / "config.json"
    settings = read_json(path)
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{folder / 'adapter_config.json'}: expected no adapter")
    for other in (path, folder / "preprocessor_config.json", folder / "tokenizer_config.json"):
        if other.exists():
            _refuse_code(other, read_json(other))
    kind = _architecture(path, settings)

    from transformers.configuration_utils import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    made = CONFIG_MAPPING[kind]
    # The base class's fields say how to load and what to return, which is not the folder's to say.
    declared = {f.name for f in dataclasses.fields(made)} | made.attribute_map.keys()
    declared -= {f.name for f in dataclasses.fields(PreTrainedConfig)}
    declared |= _UNDECLARED.get(kind, set())
    own = {key: value for key, value in settings.items() if key in declared}
    _check_counts(path, own, tensors)
    with as_input_error(path):
        return made(**own)


def _check_counts(path: Path, settings: Mapping[str, Any], tensors: int) -> None:
    # Each layer holds a tensor or more; a larger count would build modules without end.
    for key, value in settings.items():
        counts = value if isinstance(value, list) else [value]
        large = [n for n in counts if isinstance(n, int | float) and n > tensors]
        if large and _COUNTS_LAYERS.search(key):
            raise InputError(
                f"{path}: {key}: expected at most {tensors}, the number of tensors, got {large[0]}"
            )


def check(folder: Path, pooling: str, max_bytes: int) -> tuple[Any, Any]:
    """Return configuration and model class once names, shapes and sizes are known to fit.

    The model is built on the meta device, and then loaded with one zero stretched to each
    tensor's shape, so that nothing of the weights' size is allocated where all fits.
    """
    shapes = _shapes(folder)
    config = _config(folder, len(shapes))

    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    model_class = MODEL_MAPPING[type(config)]
    with as_input_error(folder / "config.json"), torch.device("meta"):
        meta = model_class(config)
    wanted = sum(t.numel() * t.element_size() for t in (*meta.parameters(), *meta.buffers()))
    stored = sum(4 * torch.Size(shape).numel() for shape in shapes.values())
    if max(wanted, stored) > max_bytes:
        raise InputError(
            f"{folder}: expected at most {max_bytes} bytes of float32 tensors, "
            f"got {max(wanted, stored)}"
        )
    stand_ins = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    load(folder, model_class, config, stand_ins, pooling)
    return config, model_class


def load(
    folder: Path, model_class: Any, config: Any, tensors: dict[str, torch.Tensor], pooling: str
) -> Any:
    """Return the model with exactly these tensors; what `transformers` would draw is refused."""
    with as_input_error(folder), silent(), torch.random.fork_rng(devices=[]):
        model, report = model_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    prefix = f"{model_class.base_model_prefix}."
    whole = any(name.startswith(prefix) for name in tensors)
    problems = [
        *(
            f"{folder}: {name}: expected a tensor, found none"
            for name in sorted(report["missing_keys"])
            if pooling == "pooler" or not name.startswith("pooler.")
        ),
        *(
            f"{folder}: {name}: expected shape {tuple(wanted)}, got {tuple(came)}"
            for name, came, wanted in sorted(report["mismatched_keys"])
        ),
        # Beside a prefixed backbone stands the head that it was trained with.
        *(
            f"{folder}: {name}: the architecture has no such tensor"
            for name in sorted(report["unexpected_keys"])
            if not whole or name.startswith(prefix)
        ),
    ]
    if problems:
        raise InputError(*problems)
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def as_input_error(path: Path) -> Iterator[None]:
    """Turn what an architecture raises on odd settings into an `InputError` that names `path`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - architectures raise anything on odd settings
        raise InputError(f"{path}: does not fit the architecture: {error}") from None


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keep the library's progress bar and its report, of which `load` says all that matters."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
