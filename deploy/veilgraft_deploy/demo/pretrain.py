"""Pretrains the demo's frozen backbone on characters drawn from matplotlib's own fonts.

`python -m veilgraft_deploy.demo.pretrain [--out DIR] [--seed N] [--threads N]` writes the folder
that the demo's study pins: `config.json`, `model.safetensors` and `preprocessor_config.json`, which
`AutoModel` and `AutoImageProcessor` load offline, and `feature_statistics.safetensors`, whose
`mean` and `scale`, float32 of shape `(dim,)`, are each pooled feature's mean and standard deviation
over glyphs that training never drew. Everything in it comes from fonts and a seed: it is public and
describes no person, so standardising private features with it costs no privacy.

The task is to name one of 62 characters, 0-9A-Za-z, light on dark, slanted, bent, thinned or
thickened, and mostly seen as scikit-learn's digits were made: a 32x32 bitmap counted in 4x4
blocks, which leaves 8x8 values of 0 to 16 (Alpaydin and Kaynak, "Cascading classifiers",
Kybernetika 34(4), 1998). The bending is the smooth elastic deformation of Simard, Steinkraus and
Platt, "Best practices for convolutional neural networks", ICDAR 2003, section 2.

No digit of that data set has trained these weights. Its labels did serve to compare some 25 designs
(feature dimension, depth, length of training, bending and the like), all with seed 0, by the
accuracy of a linear probe and of a simulated private head. So the demo's accuracy on it is slightly
optimistic: seeds 1 and 2 gave about a point less.

The same machine, library versions, seed and thread count give the same bytes. Another thread count,
processor or version adds floats in another order and gives slightly other weights.
"""

import argparse
import logging
import math
import os
import string
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR

os.environ["HF_HUB_OFFLINE"] = "1"  # transformers reads it once, when it is imported

from transformers import ResNetConfig, ResNetModel, ViTImageProcessorPil

logger = logging.getLogger(__name__)

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
FACES = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold"),
    *("DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    *("cmb10", "cmr10", "cmss10", "cmtt10", "cmti10", "cmmi10"),
)
FONT_SIZE = 160
STROKE_WIDTHS = (0, 3, 7)  # pixels added around an outline at FONT_SIZE

TILE = 64  # side of a drawing in the atlas
GLYPH = 44  # a character's height in its tile, so that a turned one stays within
SIDE = 32  # side of the bitmap, and of the backbone's input
BLOCK = 4  # side of the blocks that the coarse images count

MAX_ROTATION, MAX_SLANT = math.radians(12), 0.35
MAX_SHIFT = 0.16  # of half the image's side
SCALES, ASPECTS = (0.8, 1.15), (0.75, 1.3)
BEND_KNOTS = 4  # a bend is a smooth surface through 4x4 random shifts
BEND = 0.12  # their standard deviation, in half heights of a character
INK_THRESHOLDS = (0.25, 0.6)  # of the blurred drawing: the lower, the thicker the stroke
COARSE_SHARE, HALF_SHARE = 0.7, 0.15  # seen at 8x8 and at 16x16; the rest at 32x32
CONTRASTS = (0.75, 1.0)

DIM = 64
ARCHITECTURE = ResNetConfig(
    embedding_size=32, hidden_sizes=[32, 64, DIM], depths=[1, 1, 1], layer_type="basic"
)
STEPS, BATCH = 1200, 256
PEAK_LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.05
STATISTICS_GLYPHS = 8192


def font_atlas() -> Tensor:
    """Returns every character in every face and stroke: `(drawings, 62, TILE, TILE)` uint8.

    Raises:
        ValueError: An installed face lacks one of the characters.
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    drawings = [
        [_draw(font, character, stroke) for character in CHARACTERS]
        for font in (_complete_font(folder / f"{face}.ttf") for face in FACES)
        for stroke in STROKE_WIDTHS
    ]
    return torch.from_numpy(np.array(drawings, dtype=np.uint8))


def _complete_font(path: Path) -> ImageFont.FreeTypeFont:
    drawn = FT2Font(str(path)).get_charmap()
    missing = [character for character in CHARACTERS if not drawn.get(ord(character))]
    if missing:
        raise ValueError(f"{path.name}: expected a glyph for each of {CHARACTERS}, lacks {missing}")
    return ImageFont.truetype(str(path), FONT_SIZE)


def _draw(font: ImageFont.FreeTypeFont, character: str, stroke: int) -> np.ndarray:
    """Draws one character as high as GLYPH and at most as wide, in the middle of a tile."""
    page = Image.new("L", (400, 400))
    ImageDraw.Draw(page).text((120, 60), character, font=font, fill=255, stroke_width=stroke)
    ink = page.crop(page.getbbox())
    width = min(GLYPH, max(6, round(ink.width * GLYPH / ink.height)))
    tile, corner = Image.new("L", (TILE, TILE)), ((TILE - width) // 2, (TILE - GLYPH) // 2)
    tile.paste(ink.resize((width, GLYPH), Image.Resampling.BILINEAR), corner)
    return np.asarray(tile)


def render_glyphs(atlas: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws `count` random characters, the same ones from the same state of the generator.

    Args:
        atlas: what `font_atlas` returns.
        count: how many to draw.
        generator: on the CPU; all randomness comes from it.

    Returns:
        Images `(count, SIDE, SIDE)` uint8, ink bright on 0, and labels `(count,)` int64, places
        in CHARACTERS.
    """
    drawing = torch.randint(len(atlas), (count,), generator=generator)
    label = torch.randint(len(CHARACTERS), (count,), generator=generator)
    tiles = atlas[drawing, label].float()[:, None] / 255
    bent = functional.grid_sample(tiles, _sampling_grid(count, generator), align_corners=False)
    threshold = _uniform(INK_THRESHOLDS, count, generator)[:, None, None, None]
    bitmap = (_blur(bent) > threshold).float()
    contrast = _uniform(CONTRASTS, count, generator)[:, None, None, None]
    images = _at_random_resolution(bitmap, generator) * contrast
    return (images[:, 0] * 255).round().to(torch.uint8), label


def _uniform(bounds: tuple[float, float], count: int, generator: torch.Generator) -> Tensor:
    low, high = bounds
    return low + (high - low) * torch.rand(count, generator=generator)


def _sampling_grid(count: int, generator: torch.Generator) -> Tensor:
    """Returns where in its tile each pixel looks, `(count, SIDE, SIDE, 2)`, -1 to 1 a side."""
    angle = _uniform((-MAX_ROTATION, MAX_ROTATION), count, generator)
    slant = _uniform((-MAX_SLANT, MAX_SLANT), count, generator)
    height = GLYPH / TILE / _uniform(SCALES, count, generator)
    aspect = _uniform(ASPECTS, count, generator).sqrt()
    cosine, sine = angle.cos(), angle.sin()
    across = torch.stack([cosine + slant * sine, slant * cosine - sine], 1)
    down = torch.stack([sine, cosine], 1)
    turn = torch.stack([across / aspect[:, None], down], 1) * height[:, None, None]
    shift = MAX_SHIFT * (2 * torch.rand(count, 2, 1, generator=generator) - 1)
    affine = torch.cat([turn, -turn @ shift], 2)
    grid = functional.affine_grid(affine, [count, 1, SIDE, SIDE], align_corners=False)
    knots = torch.randn(count, 2, BEND_KNOTS, BEND_KNOTS, generator=generator)
    bend = functional.interpolate(knots, (SIDE, SIDE), mode="bicubic", align_corners=True)
    return grid + BEND * GLYPH / TILE * bend.permute(0, 2, 3, 1)


def _blur(images: Tensor) -> Tensor:
    binomial = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    return functional.conv2d(images, torch.outer(binomial, binomial)[None, None], padding=2)


def _at_random_resolution(bitmap: Tensor, generator: torch.Generator) -> Tensor:
    """Sees each bitmap at a quarter, half or all of its resolution, at its own size again."""
    half, coarse = (
        functional.interpolate(functional.avg_pool2d(bitmap, block), (SIDE, SIDE), mode="bilinear")
        for block in (2, BLOCK)
    )
    draw = torch.rand(len(bitmap), generator=generator)[:, None, None, None]
    finer = torch.where(draw < COARSE_SHARE + HALF_SHARE, half, bitmap)
    return torch.where(draw < COARSE_SHARE, coarse, finer)


def pixel_values(images: Tensor) -> Tensor:
    """Turns `(count, SIDE, SIDE)` uint8 into the backbone's input, `(count, 3, SIDE, SIDE)`.

    Equals the shipped image processor on the same images as RGB, without a trip through PIL.
    """
    return (images.float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


def pretrain(atlas: Tensor, seed: int, steps: int = STEPS) -> ResNetModel:
    """Trains backbone and linear classifier on fresh glyphs; returns the backbone, in eval mode.

    `steps` is more than 10, for the learning rate rises over the first tenth of them.
    """
    with torch.random.fork_rng(devices=[]):  # layers draw their first weights from torch's own
        torch.manual_seed(seed)
        backbone = ResNetModel(ARCHITECTURE).train()
        classifier = nn.Linear(DIM, len(CHARACTERS))
    generator = torch.Generator().manual_seed(seed)
    parameters = [*backbone.parameters(), *classifier.parameters()]
    optimizer = torch.optim.AdamW(parameters, PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        images, labels = render_glyphs(atlas, BATCH, generator)
        logits = classifier(backbone(pixel_values(images)).pooler_output.flatten(1))
        loss = functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            accuracy = (logits.argmax(1) == labels).float().mean().item()
            logger.info("step %d: loss %.3f, accuracy %.3f", step, loss.item(), accuracy)
    return backbone.eval()


def feature_statistics(backbone: ResNetModel, images: Tensor) -> dict[str, Tensor]:
    """Returns `mean` and `scale`, float32 `(DIM,)`, of the backbone's features of the images."""
    with torch.inference_mode():
        parts = [backbone(pixel_values(part)).pooler_output for part in torch.split(images, BATCH)]
    features = torch.cat(parts).flatten(1)
    return {"mean": features.mean(0), "scale": features.std(0)}


def save(folder: Path, backbone: ResNetModel, statistics: dict[str, Tensor]) -> None:
    """Writes the four files that the demo's study pins."""
    backbone.save_pretrained(folder)
    size, half = {"height": SIDE, "width": SIDE}, [0.5, 0.5, 0.5]
    ViTImageProcessorPil(size=size, image_mean=half, image_std=half).save_pretrained(folder)
    save_file(statistics, folder / "feature_statistics.safetensors")
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes for its owner alone; these are for everyone


def main() -> None:
    """Pretrains and writes the folder; see the module's own text."""
    parser = argparse.ArgumentParser(prog="python -m veilgraft_deploy.demo.pretrain")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "backbone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    atlas = font_atlas()
    backbone = pretrain(atlas, arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed + 1)  # draws what training did not
    images, _ = render_glyphs(atlas, STATISTICS_GLYPHS, generator)
    save(arguments.out, backbone, feature_statistics(backbone, images))


if __name__ == "__main__":
    main()
