"""Decoding gives every model the same upright, opaque 8-bit RGB picture, or one clear line about why not."""

import contextlib
import io
import random

import numpy as np
import pytest
from PIL import Image

from workers import images
from workers.errors import SampleError
from workers.images import decode_rgb


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = Image.new("RGB", (30, 10), "white")
    lying.paste("red", (0, 0, 10, 10))
    upright = decode_rgb(encoded(lying, "JPEG", exif=exif, quality=95), "s")
    assert upright.size == (10, 30)
    red, green, _ = np.asarray(upright)[4, 5]
    assert red > 200 > 50 > green


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white(mode: str) -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    clear.putpixel((0, 0), (0, 0, 0, 255))
    image = clear.convert(mode)
    decoded = decode_rgb(encoded(image), "s")
    assert decoded.mode == "RGB"
    assert decoded.getpixel((3, 3)) == (255, 255, 255)
    assert decoded.getpixel((0, 0)) == (0, 0, 0)


def test_16_bit_greyscale_is_scaled_not_clipped() -> None:
    values = np.array([[0, 257, 40000, 65535]], dtype=np.uint16)
    decoded = decode_rgb(encoded(Image.fromarray(values)), "s")
    assert [pixel[0] for pixel in np.asarray(decoded)[0]] == [0, 1, 156, 255]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_kinds_become_rgb(mode: str) -> None:
    image = Image.new("RGB", (5, 3), "white").convert(mode)
    decoded = decode_rgb(encoded(image, "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"), "s")
    assert (decoded.mode, decoded.size) == ("RGB", (5, 3))
    assert np.asarray(decoded)[1, 2].min() > 250


def test_floating_point_is_refused() -> None:
    with pytest.raises(SampleError, match="s: a floating-point image has no agreed range"):
        decode_rgb(encoded(Image.new("F", (2, 2)), "TIFF"), "s")


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (b"", r"s: the image is empty"),
        (b"not an image at all", r"s: not an image Pillow can read \(19 bytes starting b'not an i'\)"),
        (encoded(Image.effect_noise((64, 64), 50))[:900], r"s: the image cannot be decoded \(.*truncated"),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:900], r"s: the image cannot be decoded \(.*truncated"),
    ],
)
def test_damaged_images_say_what_is_wrong(damaged: bytes, message: str) -> None:
    with pytest.raises(SampleError, match=message):
        decode_rgb(damaged, "s")


def test_oversized_image_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(SampleError, match=r"s: the image is too large \(20x10, limit 100 pixels\)"):
        decode_rgb(encoded(Image.new("RGB", (20, 10))), "s")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow also warns about some of the damage
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_random_damage_raises_nothing_but_sample_errors(kind: str) -> None:
    generator = random.Random(7)
    intact = encoded(Image.effect_noise((24, 16), 60).convert("RGB"), kind)
    for _ in range(60):
        damaged = bytearray(intact[: generator.randrange(1, len(intact))] if generator.random() < 0.5 else intact)
        for _ in range(generator.randrange(1, 8)):
            damaged[generator.randrange(min(len(damaged), 200))] = generator.randrange(256)
        with contextlib.suppress(SampleError):
            assert decode_rgb(bytes(damaged), "s").mode == "RGB"
