"""Turn the bytes of an image file into the RGB picture every model sees; the only place that decodes."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from workers.errors import SampleError

# Pillow warns above this many pixels; the largest page of the common benchmarks has 39 million.
MAX_PIXELS = 89_478_485

# What Pillow's decoders raise on damaged files, found by damaging files.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    IndexError,
    KeyError,
    AttributeError,
    OverflowError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def decode_rgb(image_bytes: bytes, where: str) -> Image.Image:
    """The image as RGB: upright as its EXIF tag says, transparent pixels on white, 16-bit grey scaled to 8.

    Of a file with several frames the first is taken. Raises SampleError, naming `where`, if the image is empty,
    truncated, corrupt, of an unknown kind, or larger than MAX_PIXELS.
    """
    if not image_bytes:
        raise SampleError(f"{where}: the image is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(image_bytes)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise SampleError(f"{where}: the image is too large ({width}x{height}, limit {MAX_PIXELS} pixels)")
            image.load()
            return _as_rgb(ImageOps.exif_transpose(image), where)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise SampleError(f"{where}: the image is too large (limit {MAX_PIXELS} pixels)") from None
    except UnidentifiedImageError:
        raise SampleError(
            f"{where}: not an image Pillow can read ({len(image_bytes)} bytes starting {image_bytes[:8]!r})"
        ) from None
    except _DECODE_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SampleError(f"{where}: the image cannot be decoded ({reason})") from None


def _as_rgb(image: Image.Image, where: str) -> Image.Image:
    if image.has_transparency_data:
        # `convert("RGB")` alone would show whatever colour lies under the transparent pixels, mostly black.
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("RGB")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # `convert("RGB")` alone would clip at 255, which makes almost everything white.
        values = np.asarray(image.convert("I"), dtype=np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise SampleError(f"{where}: 32-bit greyscale has no agreed range; store the image with 8 or 16 bits")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise SampleError(f"{where}: a floating-point image has no agreed range; store it with 8 or 16 bits")
    return image.convert("RGB")
