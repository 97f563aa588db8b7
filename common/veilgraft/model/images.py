"""Encoded images become RGB pixels, by rules that look at that one image alone."""

import io

import numpy as np
from PIL import Image, ImageOps

from veilgraft.errors import InputError

# A fixed list also keeps out the decoders that start other programs (EPS).
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")


def decode(data: bytes) -> Image.Image:
    """Return the image's first frame in mode RGB, upright.

    EXIF orientation is applied, transparency is laid on white, and greyscale of 16 bits is
    scaled by 1/257, so that 65535 becomes 255, whatever the image's own brightest value is.

    Raises:
        InputError: the bytes are no image of `FORMATS`, are damaged or cut short, hold more
            pixels than `PIL.Image.MAX_IMAGE_PIXELS`, or hold values that 16 bits can't.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image)
            return _rgb(ImageOps.exif_transpose(image))
    except (InputError, Image.DecompressionBombError) as error:
        raise InputError(str(error)) from None
    except Exception:  # noqa: BLE001 - decoders raise nearly anything on damaged bytes
        names = ", ".join(FORMATS)
        raise InputError(f"expected a whole image ({names}), got what can't be decoded") from None


def _check_size(image: Image.Image) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        size = f"{image.width} × {image.height}"
        raise InputError(f"expected an image of at most {limit} pixels, got {size}")


def _rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    elif image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise InputError("expected 8 or 16 bits a channel, got an image of floats or of 32 bits")
    return Image.fromarray((values // 257).astype(np.uint8))
