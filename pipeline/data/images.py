"""One picture at a time: encoded bytes to pixels as a person would see them, and pixels to the size a network takes.

image = decode_image("photo.jpg")            # uint8 [H, W, 3], or [H, W, 1] where the file is grey
image = fit_image(image, (32, 32, 3))        # uint8 [32, 32, 3]

Data sets and predictions both go through these two functions, so a network sees in use what it saw in training.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pipeline.core.errors import PipelineError

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")


SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"})


OTHER_SUFFIXES = frozenset(
    {".heic", ".heif", ".avif", ".tif", ".tiff", ".jxl", ".jp2", ".svg", ".raw", ".dng", ".cr2", ".nef"}
)


MAX_PIXELS = 64_000_000


warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of more pixels than that: they are refused anyway


_SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")


class ImageError(PipelineError):
    """An image that cannot be used: `path` is the file (or "image data"), `reason` says why, in a few words."""

    def __init__(self, path: str, reason: str):
        super().__init__(f"{path} cannot be read as an image: {reason}.", exit_code=1)
        self.path = path
        self.reason = reason


def decode_image(source: bytes | bytearray | memoryview | str | os.PathLike[str]) -> np.ndarray:
    """Decode a PNG, JPEG, BMP, GIF (first frame) or WebP image.

    16-bit samples are scaled to 8 bits, palettes and CMYK become RGB, transparent parts are blended over white, and
    the orientation in the EXIF data is applied.

    Args:
        source: The encoded bytes, or the path of a file.

    Returns:
        uint8 [H, W, 3] in RGB order, or [H, W, 1] for a grey image; NumPy, in host memory.

    Raises:
        ImageError: The file is missing, empty, truncated, of another format, damaged, or declares more than 64
            megapixels (found out before any pixel is decoded).
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        name, data = "image data", bytes(source)
    else:
        name = os.fspath(source)
        try:
            kind = Path(source).stat().st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # a pipe or a device may never end
                raise ImageError(name, "no regular file")
            data = Path(source).read_bytes()
        except OSError as error:
            raise ImageError(name, f"{error.strerror or error}".lower()) from None
    if not data:
        raise ImageError(name, "the file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(name, _too_large(f"{image.width}×{image.height} pixels"))
            if image.format in ("JPEG", "MPO") and not _jpeg_is_complete(data):
                raise ImageError(name, "truncated")
            image.load()
            return to_rgb8(image)
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(name, "not a PNG, JPEG, BMP, GIF or WebP image, or damaged at its beginning") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(name, _too_large("too many pixels")) from None
    except MemoryError:
        raise ImageError(name, "no memory left to decode it") from None
    except Exception as error:  # damaged bytes make Pillow's decoders raise nearly anything
        truncated = "truncated" in str(error).lower() or isinstance(error, EOFError) or _webp_is_cut(data)
        raise ImageError(name, "truncated" if truncated else f"damaged ({error or type(error).__name__})") from None


def _too_large(declared: str) -> str:
    return f"it declares {declared}, more than the {MAX_PIXELS // 1_000_000} megapixels allowed"


def _jpeg_is_complete(data: bytes) -> bool:
    """Whether an end-of-image marker follows the JPEG's first scan.

    Decoders fill what is missing with grey, without an error where a file was padded with zeros to its full size.
    """
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xDA:  # start of scan: a 0xFF in the compressed data is never followed by 0xD9
            return data.find(b"\xff\xd9", position) >= 0
        position += 1 if marker == 0xFF else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return True  # an unusual header is the decoder's business


def _webp_is_cut(data: bytes) -> bool:
    """Whether a WebP file is shorter than its RIFF header says."""
    return data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") + 8 > len(data)


def to_rgb8(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, C] of a loaded Pillow image: orientation applied, 8 bits, grey or RGB, over white."""
    with contextlib.suppress(Exception):  # damaged EXIF data does not make the pixels unreadable
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode in _SIXTEEN_BIT:
        wide = np.asarray(image).astype(np.int64)
        if isinstance(image.info.get("transparency"), int):
            wide[wide == image.info["transparency"]] = 65535
        return np.clip((wide + 128) // 257, 0, 255).astype(np.uint8)[..., None]
    if image.has_transparency_data:
        grey = image.mode in ("1", "L", "LA", "La")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if grey else "RGB")
    elif image.mode in ("1", "L"):
        image = image.convert("L")
    else:
        image = image.convert("RGB")
    pixels = np.array(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def resize_and_center_crop(image: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Bring an image to a network's shape without distorting it.

    The shorter side is resized to fit and the longer one cropped around its centre (bilinear, antialiased when
    shrinking). Grey becomes RGB by repeating it, RGB becomes grey by its luma (ITU-R BT.601).

    Args:
        image: uint8 [h, w, c] with c 1 or 3, in host memory.
        shape: (H, W, C) with C 1 or 3.

    Returns:
        uint8 [H, W, C]; `image` itself where the shape is right already.

    Raises:
        PipelineError: `image` is not uint8 [h, w, 1 or 3], or `shape` is no size.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3) or 0 in image.shape:
        raise PipelineError(f"fit_image got {image.dtype} {list(image.shape)}; pass uint8 [H, W, 1] or [H, W, 3].")
    height, width, channels = shape
    if height < 1 or width < 1 or channels not in (1, 3):
        raise PipelineError(f"fit_image got the shape {tuple(shape)}; pass (height, width, 1 or 3).")
    if image.shape == tuple(shape):
        return image
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    if picture.mode == "RGB" and channels == 1:
        picture = picture.convert("L")
    if picture.size != (width, height):
        scale = min(picture.width / width, picture.height / height)
        left, top = (picture.width - width * scale) / 2, (picture.height - height * scale) / 2
        box = (left, top, left + width * scale, top + height * scale)
        picture = picture.resize((width, height), Image.Resampling.BILINEAR, box=_inside(box, picture.size))
    if picture.mode == "L" and channels == 3:
        picture = picture.convert("RGB")
    pixels = np.array(picture)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _inside(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """`box` without the rounding error that would put its edge outside an image of `size` (width, height)."""
    return max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(size[0])), min(box[3], float(size[1]))
