from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from veilgraft_deploy.demo import pretrain

from transformers import AutoImageProcessor, AutoModel, ResNetModel  # isort: skip - pretrain sets it offline

SHIPPED = Path(pretrain.__file__).parent / "backbone"


@pytest.fixture(scope="module")
def atlas() -> Tensor:
    return pretrain.font_atlas()


@pytest.fixture(scope="module")
def backbone(atlas: Tensor) -> ResNetModel:
    return pretrain.pretrain(atlas, seed=5, steps=12)


def glyphs(atlas: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    return pretrain.render_glyphs(atlas, count, torch.Generator().manual_seed(seed))


def test_no_face_draws_two_digits_alike(atlas: Tensor) -> None:
    drawings = len(pretrain.FACES) * len(pretrain.STROKE_WIDTHS)
    assert atlas.shape == (drawings, 62, pretrain.TILE, pretrain.TILE)
    digits = atlas[:, :10].flatten(2).float()
    apart = torch.cdist(digits, digits) + 1e9 * torch.eye(10)
    assert apart.min() > 4 * 255  # a missing glyph's box would be at distance 0 from another's


def test_a_face_that_lacks_characters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "FACES", ("cmr10", "STIXSizOneSymReg"))
    with pytest.raises(ValueError, match=r"STIXSizOneSymReg\.ttf: expected a glyph"):
        pretrain.font_atlas()


def test_the_same_seed_draws_the_same_glyphs_and_another_seed_others(atlas: Tensor) -> None:
    images, labels = glyphs(atlas, 16, seed=3)
    again, labels_again = glyphs(atlas, 16, seed=3)
    others, _ = glyphs(atlas, 16, seed=4)
    assert torch.equal(images, again)
    assert torch.equal(labels, labels_again)
    assert (images != others).flatten(1).any(1).all()


def test_glyphs_are_bright_ink_on_a_dark_ground_in_all_characters(atlas: Tensor) -> None:
    images, labels = glyphs(atlas, 2000, seed=0)
    assert images.shape == (2000, pretrain.SIDE, pretrain.SIDE)
    assert images.dtype == torch.uint8
    assert set(labels.tolist()) == set(range(62))
    legible = images.flatten(1).amax(1) > 100  # the thinnest strokes may vanish
    assert legible.float().mean() > 0.99
    assert 0.1 < (images > 127).float().mean() < 0.4


def test_a_coarse_glyph_keeps_only_8x8_counts_of_a_bitmap() -> None:
    column = torch.zeros(400, 1, 32, 32)
    column[..., 14:17] = 1  # blocks of 8/16 and 4/16, seen between an empty one and each other
    seen = pretrain._at_random_resolution(column, torch.Generator().manual_seed(0))
    expected = torch.tensor([0.3125, 0.4375, 0.46875, 0.40625])  # 5/8, 7/8 of .5; 1/8, 3/8 to .25
    coarse = torch.isclose(seen[:, 0, 0, 12:16], expected, atol=1e-6).all(1)
    assert abs(coarse.float().mean() - pretrain.COARSE_SHARE) < 0.08


def test_pretraining_again_gives_the_same_weights_and_leaves_torchs_generator_alone(
    atlas: Tensor, backbone: ResNetModel
) -> None:
    before = torch.get_rng_state()
    again = pretrain.pretrain(atlas, seed=5, steps=12)
    assert torch.equal(torch.get_rng_state(), before)
    weights = again.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in backbone.state_dict().items())
    assert not again.training


def test_what_is_saved_loads_as_what_was_trained(
    atlas: Tensor, backbone: ResNetModel, tmp_path: Path
) -> None:
    images, _ = glyphs(atlas, 64, seed=2)
    statistics = pretrain.feature_statistics(backbone, images)
    pretrain.save(tmp_path, backbone, statistics)
    loaded = features(images, tmp_path)
    torch.testing.assert_close(loaded.mean(0), statistics["mean"])
    torch.testing.assert_close(loaded.std(0), statistics["scale"])


def features(images: Tensor, folder: Path) -> Tensor:
    model = AutoModel.from_pretrained(folder, local_files_only=True)
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    pictures = [Image.fromarray(image).convert("RGB") for image in images.numpy()]
    with torch.inference_mode():
        values = processor(pictures, return_tensors="pt")["pixel_values"]
        pooled: Tensor = model(values).pooler_output.flatten(1)
    return pooled


def test_the_shipped_folder_is_small_and_complete() -> None:
    names = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert names | {"feature_statistics.safetensors"} <= {file.name for file in SHIPPED.iterdir()}
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 1_000_000


def test_the_image_processor_gives_the_pixels_that_training_saw(atlas: Tensor) -> None:
    images, _ = glyphs(atlas, 8, seed=6)
    processor = AutoImageProcessor.from_pretrained(SHIPPED, local_files_only=True)
    pictures = [Image.fromarray(image).convert("RGB") for image in images.numpy()]
    values = processor(pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(values, pretrain.pixel_values(images), rtol=0, atol=1e-6)


def test_the_image_processor_enlarges_a_digit_as_training_did() -> None:
    counts = np.random.default_rng(0).integers(0, 17, (8, 8))
    picture = Image.fromarray(np.round(counts * 255 / 16).astype(np.uint8)).convert("RGB")
    processor = AutoImageProcessor.from_pretrained(SHIPPED, local_files_only=True)
    values = processor([picture], return_tensors="pt")["pixel_values"]
    enlarged = torch.nn.functional.interpolate(
        torch.from_numpy(counts / 16)[None, None].float(), (32, 32), mode="bilinear"
    )
    torch.testing.assert_close(
        values, (2 * enlarged - 1).expand(-1, 3, -1, -1), rtol=0, atol=2 / 127
    )


def test_shipped_statistics_standardise_the_shipped_features_of_fresh_glyphs(
    atlas: Tensor,
) -> None:
    statistics = load_file(SHIPPED / "feature_statistics.safetensors")
    assert {name: value.shape for name, value in statistics.items()} == {
        "mean": (pretrain.DIM,),
        "scale": (pretrain.DIM,),
    }
    images, _ = glyphs(atlas, 2000, seed=12345)
    standardised = (features(images, SHIPPED) - statistics["mean"]) / statistics["scale"]
    assert standardised.shape == (2000, pretrain.DIM)
    assert standardised.mean(0).abs().max() < 0.15
    assert (standardised.var(0) - 1).abs().max() < 0.3
