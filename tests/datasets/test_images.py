"""Decoding and resizing of images."""

import io
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.core.errors import PipelineError
from pipeline.data.images import ImageError, decode_image, image_shape, resize_and_center_crop
from tests.conftest import REPOSITORY

RNG = np.random.default_rng(7)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int = 20, width: int = 30, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG written by hand, for what Pillow cannot write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    "kind, options", [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True}), ("TIFF", {"compression": "tiff_lzw"})]
)
def test_lossless_formats_give_back_the_pixels(kind, options):
    pixels = noise()
    assert np.array_equal(decode_image(encoded(Image.fromarray(pixels), kind, **options)), pixels)


def test_a_grey_image_has_one_channel_and_paths_work_like_bytes(tmp_path):
    pixels = noise(channels=1)
    path = tmp_path / "grey.png"
    Image.fromarray(pixels[..., 0]).save(path)
    for source in (path, str(path), path.read_bytes(), memoryview(path.read_bytes())):
        assert np.array_equal(decode_image(source), pixels)


def test_jpeg_stays_close():
    smooth = np.add.outer(np.arange(40), np.arange(40)).astype(np.uint8)
    decoded = decode_image(encoded(Image.fromarray(smooth), "JPEG", quality=95))
    assert decoded.shape == (40, 40, 1)
    assert np.abs(decoded[..., 0].astype(int) - smooth).max() <= 4


def test_one_bit_images_are_black_and_white():
    bits = noise(channels=1)[..., 0] > 127
    assert np.array_equal(decode_image(encoded(Image.fromarray(bits)))[..., 0], np.where(bits, 255, 0))


def test_sixteen_bit_grey_is_scaled_not_cut():
    wide = np.array([[0, 128, 129, 257], [32768, 65535, 65406, 65407]], np.uint16)
    expected = np.rint(wide / 65535 * 255).astype(np.uint8)
    assert np.array_equal(decode_image(encoded(Image.fromarray(wide)))[..., 0], expected)


def test_sixteen_bit_colour_keeps_its_brightness():
    wide = RNG.integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)
    decoded = decode_image(png(7, 5, 16, 2, rows))
    assert decoded.shape == (5, 7, 3)
    assert np.abs(decoded - wide / 65535 * 255).max() <= 1


def test_sixteen_bit_transparent_grey_becomes_white():
    wide = np.array([[1000, 2570]], np.uint16)
    rows = b"\0" + wide.astype(">u2").tobytes()
    decoded = decode_image(png(2, 1, 16, 0, rows, png_chunk(b"tRNS", struct.pack(">H", 1000))))
    assert decoded.ravel().tolist() == [255, 10]


def test_sixteen_bit_grey_with_alpha_is_grey_over_white(tmp_path):
    wide = np.array([[[0x8000, 0xFFFF], [0x8000, 0], [0x2000, 0x8000]]], np.uint16)
    path = tmp_path / "alpha.png"
    path.write_bytes(png(3, 1, 16, 4, b"\0" + wide.astype(">u2").tobytes()))
    share = 0x8000 / 0xFFFF
    expected = [0x8000 / 257, 255, 0x2000 / 257 * share + 255 * (1 - share)]
    decoded = decode_image(path)
    assert decoded.shape == image_shape(path) == (1, 3, 1)
    assert np.abs(decoded.ravel() - expected).max() <= 1


def test_sixteen_bit_tiff_is_scaled_and_32_bits_are_refused():
    wide = np.array([[0, 128, 129, 257], [32768, 65535, 65406, 65407]], np.uint16)
    expected = np.rint(wide / 65535 * 255).astype(np.uint8)
    assert np.array_equal(decode_image(encoded(Image.fromarray(wide), "TIFF"))[..., 0], expected)
    for dtype in (np.float32, np.int32):
        with pytest.raises(ImageError, match="32-bit"):
            decode_image(encoded(Image.fromarray(wide.astype(dtype)), "TIFF"))


@pytest.mark.parametrize("kind, tolerance", [("TIFF", 0), ("HEIF", 4), ("AVIF", 4)])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_photo_formats_are_decoded_upright(tmp_path, kind, tolerance, orientation):
    colours = np.array([[[230, 40, 40], [40, 230, 40], [40, 40, 230]], [[230, 230, 40], [20, 20, 20], [240, 240, 240]]])
    pixels = np.kron(colours, np.ones((32, 32, 1))).astype(np.uint8)
    seen = np.rot90(pixels, {1: 0, 3: 2, 6: -1, 8: 1}[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo"
    path.write_bytes(encoded(Image.fromarray(pixels), kind, exif=exif.tobytes(), quality=95))
    decoded = decode_image(path)
    assert decoded.shape == image_shape(path) == seen.shape
    assert np.abs(decoded.astype(int) - seen).mean() <= tolerance
    grey = decode_image(encoded(Image.fromarray(pixels[..., 0]), kind))
    assert grey.shape == (64, 96, 1)


def test_palette_images_show_their_colours():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 200])
    image.putdata([0, 1])
    assert decode_image(encoded(image)).tolist() == [[[255, 0, 0], [0, 0, 200]]]
    assert decode_image(encoded(image, transparency=0)).tolist() == [[[255, 255, 255], [0, 0, 200]]]


def test_alpha_is_blended_over_white():
    pixels = np.array([[[200, 100, 0, 0], [200, 100, 0, 255], [200, 100, 0, 51]]], np.uint8)
    share = 51 / 255
    blended = [round(value * share + 255 * (1 - share)) for value in (200, 100, 0)]
    decoded = decode_image(encoded(Image.fromarray(pixels)))
    assert decoded[0, :2].tolist() == [[255, 255, 255], [200, 100, 0]]
    assert np.abs(decoded[0, 2].astype(int) - blended).max() <= 1


def test_grey_with_alpha_stays_grey():
    pixels = np.array([[[10, 255], [10, 0]]], np.uint8)
    assert decode_image(encoded(Image.fromarray(pixels, "LA"))).tolist() == [[[10], [255]]]


def test_cmyk_becomes_rgb():
    decoded = decode_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    red, green, blue = decoded.reshape(-1, 3).mean(axis=0)
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    pixels = noise(3, 5)
    # How a viewer turns what is stored, by the EXIF standard's numbers.
    seen = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1),
        7: pixels.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(pixels, 1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decode_image(encoded(Image.fromarray(pixels), exif=exif)), seen)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_cost_the_image():
    pixels = noise()
    assert np.array_equal(decode_image(encoded(Image.fromarray(pixels), exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")), pixels)


def test_the_first_frame_of_a_gif():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    decoded = decode_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert np.array_equal(np.unique(decoded.reshape(-1, 3), axis=0), [[255, 0, 0]])


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.9, 0.97])
@pytest.mark.parametrize(
    "kind, options",
    [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("BMP", {}),
        ("GIF", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("HEIF", {}),
        ("AVIF", {}),
    ],
)
def test_a_truncated_image_is_refused(kind, options, share):
    data = encoded(Image.fromarray(noise(40, 60)), kind, **options)
    with pytest.raises(ImageError):
        decode_image(data[: int(len(data) * share)])


def test_the_checksum_of_png_pixels_is_verified():
    data = encoded(Image.fromarray(noise()))
    position = data.index(b"IEND") - 5  # the last byte before the length of IEND
    with pytest.raises(ImageError, match="checksum"):
        decode_image(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])


def test_a_png_without_its_end_is_refused():
    data = encoded(Image.fromarray(noise()))
    for removed in (1, 4, 12):
        with pytest.raises(ImageError, match="truncated"):
            decode_image(data[:-removed])
    assert np.array_equal(decode_image(data + b"trailer"), decode_image(data))


def photo(height, width):
    """An image with large and small structures: mean level, a gradient, waves and noise."""
    y, x = np.mgrid[:height, :width] / height
    waves = [np.sin(20 * x + 7 * y), np.sin(90 * y * x), np.cos(35 * (x - y))]
    image = 128 + 70 * np.stack(waves, axis=-1) + RNG.normal(0, 10, (height, width, 1))
    return Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_scaled_decoding_changes_a_photo_little(mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo(600, 900).convert(mode), "JPEG", quality=92, exif=exif)
    full, scaled = decode_image(data), decode_image(data, (64, 48))
    assert full.shape[:2] == ((600, 900) if orientation == 1 else (900, 600))
    assert scaled.shape == (full.shape[0] // 4, full.shape[1] // 4, full.shape[2])
    shape = (64, 48, full.shape[2])
    difference = np.abs(resize_and_center_crop(full, shape).astype(int) - resize_and_center_crop(scaled, shape))
    assert difference.mean() < 1 and difference.max() <= 8


@pytest.mark.parametrize("size", [None, (151, 151), (600, 900), (10, 300), (2000, 2000)])
def test_decoding_is_not_scaled_above_a_quarter_of_the_size(size):
    data = encoded(photo(600, 900), "JPEG")
    assert np.array_equal(decode_image(data, size), decode_image(data))


def test_scaled_decoding_of_12_megapixels_is_three_times_faster():
    data = encoded(Image.fromarray(np.tile(np.array(photo(600, 800)), (5, 5, 1))), "JPEG", quality=92)

    def seconds(size):
        times = []
        for _ in range(3):
            start = time.process_time()
            resize_and_center_crop(decode_image(data, size), (224, 224, 3))
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(None) > 3 * seconds((224, 224))


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_a_jpeg_padded_with_zeros_is_not_taken_for_half_grey(options):
    data = encoded(Image.fromarray(noise(64, 64)), "JPEG", **options)
    with pytest.raises(ImageError, match="truncated"):
        decode_image(data[: len(data) // 2] + bytes(len(data) // 2))


def test_a_jpeg_with_bytes_behind_its_end_is_fine():
    data = encoded(Image.fromarray(noise()), "JPEG")
    assert np.array_equal(decode_image(data + b"camera trailer"), decode_image(data))


def test_absurdly_large_images_are_refused_before_decoding():
    for side in (8001, 100_000):
        with pytest.raises(ImageError, match=r"\b64\b"):
            decode_image(png(side, 8000, 8, 2, b""))
    with pytest.raises(ImageError, match="damaged"):
        decode_image(png(8000, 8000, 8, 2, b""))


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "empty"),
        (b"just some text", "PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "PNG"),
        (b"\x89PNG\r\n\x1a\n" + b"\xff" * 50, "damaged"),
    ],
)
def test_what_is_not_an_image_is_refused(data, reason):
    with pytest.raises(ImageError, match=reason):
        decode_image(data)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(ImageError, match=r"missing\.png"):
        decode_image(tmp_path / "missing.png")
    with pytest.raises(ImageError, match=str(tmp_path)):
        decode_image(tmp_path)


def test_resizing_keeps_an_image_of_the_right_shape():
    image = noise()
    assert resize_and_center_crop(image, (20, 30, 3)) is image


def test_resizing_crops_the_longer_side_around_the_centre():
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = (10, 200, 30)
    assert np.array_equal(resize_and_center_crop(image, (10, 10, 3)), image[:, 10:20])
    assert np.array_equal(resize_and_center_crop(image.transpose(1, 0, 2), (10, 10, 3)), image[:, 10:20])


def test_too_many_pixels_are_refused_without_a_warning_of_pillow(tmp_path):
    header = encoded(Image.new("L", (1, 1)), "PNG")
    large = header[:16] + (10_000).to_bytes(4, "big") + (9_500).to_bytes(4, "big") + header[24:29]
    large += zlib.crc32(large[12:29]).to_bytes(4, "big") + header[33:]
    (tmp_path / "large.png").write_bytes(large)
    script = "import sys; from pipeline.data.images import decode_image; decode_image(sys.argv[1])"
    answer = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "large.png"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert "64 megapixels" in answer.stderr
    assert "Warning" not in answer.stderr


def test_shrinking_averages():
    image = noise(64, 64)
    small = resize_and_center_crop(image, (8, 8, 3))
    # A triangle filter's mean over the image is the image's own, up to the edges.
    assert np.abs(small.mean(axis=(0, 1)) - image.mean(axis=(0, 1))).max() < 4
    assert small.std() < image.std() / 4


def test_grey_and_colour_convert():
    grey, colour = noise(channels=1), noise()
    assert np.array_equal(resize_and_center_crop(grey, (20, 30, 3)), np.repeat(grey, 3, axis=2))
    luma = colour @ [0.299, 0.587, 0.114]
    assert np.abs(resize_and_center_crop(colour, (20, 30, 1))[..., 0] - luma).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (7, 500), (333, 2), (31, 33)])
def test_any_size_fits(size):
    for image in (noise(1, 1), noise(3, 1000, 1), noise(999, 5)):
        assert resize_and_center_crop(image, (*size, 3)).shape == (*size, 3)


@pytest.mark.parametrize("image", [noise().astype(np.float32), noise()[..., 0], noise(channels=2), noise()[:0]])
def test_resizing_refuses_what_is_not_an_image(image):
    with pytest.raises(PipelineError, match="uint8"):
        resize_and_center_crop(image, (8, 8, 3))
