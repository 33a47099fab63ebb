"""Decode an image to RGB or grey pixels, and resize it to a network's input shape.

image = decode_image("photo.jpg", (32, 32))              # uint8 [H, W, 3], or [H, W, 1] if the file is grey
image = resize_and_center_crop(image, (32, 32, 3))       # uint8 [32, 32, 3]

Datasets and predictions both use these two functions, so that a network predicts on the pixels that it was trained on.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pillow_heif
from PIL import ExifTags, Image, ImageOps, __version__, features

from pipeline.core.errors import PipelineError
from pipeline.core.settings import MAX_PIXELS

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "HEIF", "AVIF")
SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".heic", ".heif", ".hif", ".avif"}
)
OTHER_SUFFIXES = frozenset({".jxl", ".jp2", ".svg", ".raw", ".dng", ".cr2", ".nef"})
_NAMES = "PNG, JPEG, BMP, GIF, WebP, TIFF, HEIC, AVIF"
_GREY = ("1", "L", "LA", "La")
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")

pillow_heif.register_heif_opener()
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses images of more than twice this size, and warns of others
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", "Truncated File Read|Corrupt EXIF data", UserWarning)


class ImageError(PipelineError):
    """An image that cannot be used.

    Attributes:
        path: The file, or "image data" for bytes.
        reason: Why, in a few words.
    """

    def __init__(self, path: str, reason: str):
        super().__init__(f"{path} cannot be read as an image: {reason}.", exit_code=1)
        self.path = path
        self.reason = reason


@functools.cache
def decoder_version() -> str:
    """Identifies the code that determines the decoded pixels: this file, Pillow and the libraries of the formats."""
    code = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=16).hexdigest()
    libraries = (f"{name} {features.version(name)}" for name in ("jpg", "libjpeg_turbo", "webp", "libtiff", "avif"))
    heif = f"libheif {pillow_heif.libheif_version()}"
    return ", ".join((f"images.py {code}", f"Pillow {__version__}", *libraries, heif))


def decode_image(
    source: bytes | bytearray | memoryview | str | os.PathLike[str], size: tuple[int, int] | None = None
) -> np.ndarray:
    """Decode a PNG, JPEG, BMP, GIF, WebP, TIFF, HEIC or AVIF image; the first one of a file with several.

    16-bit samples are scaled to 8 bits, palettes and CMYK become RGB, transparent parts are blended over white, and
    the orientation in the EXIF data is applied.

    Args:
        source: The encoded bytes, or the path of a file.
        size: Height and width to which the image will be resized. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if
            both sides still have twice the larger of these numbers of pixels, which is several times faster.

    Returns:
        uint8 [H, W, 3] in RGB order, or [H, W, 1] for a grey image; NumPy, in host memory.

    Raises:
        ImageError: The file is missing, empty, truncated, damaged (PNG: a checksum is wrong), in another format, has
            32-bit samples, or declares more than 64 megapixels (checked before any pixel is decoded).
    """
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else "image data"
    with _explained(name):
        data = Path(name).read_bytes() if isinstance(source, str | os.PathLike) else source
        if not data:
            raise ImageError(name, "the file is empty")
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.format in ("JPEG", "MPO"):
                if not _jpeg_is_complete(bytes(data)):
                    raise ImageError(name, "truncated")
                if size is not None:
                    image.draft(None, (2 * max(size), 2 * max(size)))
            elif image.format == "PNG":
                _check_png(name, memoryview(data))
            if image.mode in ("I", "F"):
                raise ImageError(name, "32-bit samples; convert it to 8 or 16 bits")
            grey = _is_grey(image)
            image.load()
            return to_rgb8(image.convert("LA") if grey and image.mode == "RGBA" else image)


def image_shape(path: str | os.PathLike[str]) -> tuple[int, int, int]:
    """The (height, width, channels) that `decode_image` would return, from the beginning of the file.

    Args:
        path: The path of a file.

    Raises:
        ImageError: The file is missing, empty, damaged at its beginning, in another format, or too large.
    """
    with _explained(os.fspath(path)), Image.open(path, formats=FORMATS) as image:
        width, height = image.size
        with contextlib.suppress(Exception):  # damaged EXIF data
            # PngImageFile.getexif decodes the whole image; the size of a TIFF image takes account of the orientation.
            if image.format != "TIFF" and Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) >= 5:
                width, height = height, width
        return height, width, 1 if _is_grey(image) else 3


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Convert the errors of reading and decoding an image to `ImageError`."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        raise ImageError(name, f"not an image in a supported format ({_NAMES}), or damaged at its beginning") from error
    except Image.DecompressionBombError as error:
        raise ImageError(name, f"it declares more than {MAX_PIXELS // 1_000_000} megapixels") from error
    except Exception as error:  # Pillow's decoders raise almost any exception for damaged bytes
        if isinstance(error, OSError) and error.errno:
            raise ImageError(name, error.strerror.lower()) from error
        raise ImageError(name, f"damaged or truncated ({error or type(error).__name__})") from error


def _is_grey(image: Image.Image) -> bool:
    """Whether an image that is not loaded yet is grey; Pillow loads 16-bit grey with alpha as RGBA."""
    grey_with_alpha = image.format == "PNG" and [tile.args for tile in image.tile] == ["LA;16B"]
    return image.mode in (*_GREY, *_SIXTEEN_BIT) or grey_with_alpha


def _check_png(name: str, data: memoryview) -> None:
    """Verify the checksums of all chunks and that the last one exists; Pillow skips those of the pixels."""
    start, kind = 8, b""
    while kind != b"IEND":
        kind = bytes(data[start + 4 : start + 8])
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if end > len(data):
            raise ImageError(name, "truncated")
        if zlib.crc32(data[start + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise ImageError(name, "damaged (a checksum is wrong)")
        start = end


def _jpeg_is_complete(data: bytes) -> bool:
    """Whether an end-of-image marker follows the JPEG's first scan.

    Decoders fill missing data with grey, and report no error if a file was padded with zeros to its full size.
    """
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xDA:  # start of scan; compressed data never contains 0xFF 0xD9
            return data.find(b"\xff\xd9", position) >= 0
        position += 1 if marker == 0xFF else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return True  # the decoder reports an invalid header


def to_rgb8(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, C] of a loaded Pillow image: orientation applied, 8 bits, grey or RGB, over white."""
    with contextlib.suppress(Exception):  # damaged EXIF data does not make the pixels unreadable
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode in _SIXTEEN_BIT:
        wide = np.asarray(image).astype(np.int64)
        if isinstance(image.info.get("transparency"), int):
            wide[wide == image.info["transparency"]] = 65535
        return np.clip((wide + 128) // 257, 0, 255).astype(np.uint8)[..., None]
    grey = image.mode in _GREY
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.atleast_3d(np.array(image.convert("L" if grey else "RGB")))


def resize_and_center_crop(image: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Resize an image to a network's input shape without distorting it.

    The shorter side is resized to fit and the longer one cropped around its centre (bilinear, antialiased when
    shrinking). Grey becomes RGB by repetition; RGB becomes grey by its luma (ITU-R BT.601).

    Args:
        image: uint8 [h, w, c], c is 1 or 3, in host memory.
        shape: (H, W, C), C is 1 or 3.

    Returns:
        uint8 [H, W, C]; `image` itself if it already has that shape.

    Raises:
        PipelineError: `image` is not uint8 [h, w, 1 or 3].
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3) or 0 in image.shape:
        raise PipelineError(f"Expected a uint8 image [H, W, 1] or [H, W, 3], got {image.dtype} {list(image.shape)}.")
    height, width, channels = shape
    if image.shape == tuple(shape):
        return image
    resized = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    if resized.mode == "RGB" and channels == 1:
        resized = resized.convert("L")
    if resized.size != (width, height):
        scale = min(resized.width / width, resized.height / height)
        left, top = (resized.width - width * scale) / 2, (resized.height - height * scale) / 2
        # Rounding errors must not put the box outside the image.
        right, bottom = min(left + width * scale, resized.width), min(top + height * scale, resized.height)
        box = (max(left, 0), max(top, 0), right, bottom)
        resized = resized.resize((width, height), Image.Resampling.BILINEAR, box=box)
    if resized.mode == "L" and channels == 3:
        resized = resized.convert("RGB")
    return np.atleast_3d(np.array(resized))
