"""Sizes of image files as a model sees them: from their headers, upright."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, UnidentifiedImageError

# The EXIF tag of the orientation, and its values that turn an image on its side.
_ORIENTATION = 0x0112
_ON_ITS_SIDE = (5, 6, 7, 8)


class NotAnImage(ValueError):
    """A file that Pillow cannot read."""


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width in pixels of an image file, its EXIF rotation applied; the pixels are not read.

    Raises:
        NotAnImage: the file cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise NotAnImage(f"{path} cannot be read as an image ({type(error).__name__})") from None
    return (width, height) if turned else (height, width)


def picture_sizes(folder: Path) -> tuple[list[tuple[int, int]], int]:
    """Sizes of all images in a folder and its subfolders, in order of path, and how many files are not images."""
    sizes, others = [], 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            sizes.append(picture_size(path))
        except NotAnImage:
            others += 1
    return sizes, others
