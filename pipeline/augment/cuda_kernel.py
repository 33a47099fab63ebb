"""The augmentation kernel for CUDA; imported only where there is a GPU, or under Numba's simulator of one.

It is compiled for the operations that are on, the shape and the output type, so that what is off costs nothing. What it
does to be limited by memory alone:

- A block takes a few images. Their bytes are first copied to shared memory, eight at a time and in order, so that
  flips, shifts and rotations read shared memory only. Images too large for that are read through the cache.
- The draws of an image are made once: each operation of each image by a thread of its own, at the same time.
- A thread makes four neighbouring pixels and packs their values into 64-bit words; the threads of a warp exchange these
  through shared memory, so that every write to global memory is a full line.
- Index arithmetic is in unsigned 32 bits, for which Numba adds no test for negative indices.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import numpy as np
from numba import config, cuda, types

from pipeline.augment import pixel
from pipeline.augment.pixel import (
    BRIGHTNESS,
    CONTRAST,
    COSINE,
    CUTOUT,
    DEVIATION,
    FACTOR,
    FLIP,
    FLIPPED,
    GROUP,
    LEFT,
    NOISE,
    OFFSET,
    ONE,
    OPERATION_COUNT,
    PARAMETER_COUNT,
    PER_PIXEL,
    ROTATE,
    SALT_AND_PEPPER,
    SHIFT_X,
    SHIFT_Y,
    SIDE,
    SINE,
    THRESHOLD,
    TOP,
    TRANSLATE,
    ZERO,
    bias,
    bilinear,
    bilinear_taps,
    clip,
    corrupted,
    cut_out,
    draw,
    gain,
    grain,
    inverse_map,
    normalise,
    normals,
    philox,
    reflect,
)

# A batch of few images is no mistake here.
warnings.filterwarnings("ignore", message="Grid size .* will likely result in GPU under-utilization")

SIMULATED = bool(config.ENABLE_CUDASIM)
WARP = 32
LARGEST_BLOCK = 256
GROUPS_A_THREAD = 4
STAGED_BYTES = 32 * 1024  # larger images are not copied to shared memory; with the rest a block stays below 48 KiB
NOT_A_NUMBER = np.float32(math.nan)

if SIMULATED:

    def pack_float16(a, b, c, d):
        return np.array([a, b, c, d], np.float16).view(np.uint64)[0]

    def pack_float32(a, b):
        return np.array([a, b], np.float32).view(np.uint64)[0]

else:
    from llvmlite import ir
    from numba.cuda.extending import intrinsic

    def _assembly(builder: Any, text: str, arguments: Any) -> Any:
        """Emit PTX that makes one 64-bit word of float32 registers."""
        kind = ir.FunctionType(ir.IntType(64), [ir.FloatType()] * len(arguments))
        constraints = ",".join(["=l", *"f" * len(arguments)])
        return builder.call(ir.InlineAsm(kind, text, constraints, side_effect=False), arguments)

    @intrinsic
    def pack_float16(typing_context, a, b, c, d):
        """Round four float32 to float16 and pack them into a uint64, the first one lowest."""

        def generate(context, builder, signature, arguments):
            halves = "".join(f"cvt.rn.f16.f32 h{i}, ${i + 1}; " for i in range(4))
            text = "{ .reg .b16 h0, h1, h2, h3; " + halves + "mov.b64 $0, {h0, h1, h2, h3}; }"
            return _assembly(builder, text, arguments)

        return types.uint64(*[types.float32] * 4), generate

    @intrinsic
    def pack_float32(typing_context, a, b):
        """Put the bits of two float32 into a uint64, the first one lowest."""

        def generate(context, builder, signature, arguments):
            return _assembly(builder, "mov.b64 $0, {$1, $2};", arguments)

        return types.uint64(types.float32, types.float32), generate


@functools.cache
def specialised(
    shape: tuple[int, int, int], operations: tuple[int, ...], half: bool, packed: bool, words: bool
) -> tuple[Any, int, int, int]:
    """The kernel for one shape, set of operations and output type.

    Args:
        shape: (H, W, C).
        operations: The numbers of those that are on.
        half: float16 output, else float32.
        packed: Whether whole 64-bit words of four pixels can be written: H·W is a multiple of 4 and the output aligned.
        words: Whether whole 64-bit words can be read: H·W·C is a multiple of 8 and the images aligned.

    Returns:
        The kernel, the images a block takes, the block's threads, and the bytes of shared memory it needs.
    """
    height, width, channels = shape
    size = height * width * channels
    group = GROUP if packed else 1
    groups = height * width // group
    value_bytes = 2 if half else 4
    # Several groups a thread, which share what is worked out once; whole warps, so that none works on two images.
    threads_an_image = min(LARGEST_BLOCK, -(-groups // (GROUPS_A_THREAD * WARP)) * WARP)
    images_a_block = LARGEST_BLOCK // threads_an_image
    block = threads_an_image * images_a_block
    staged = size <= STAGED_BYTES
    image_bytes = -(-size // 8) * 8
    group_words = GROUP * channels * value_bytes // 8
    exchanged = packed and group_words > 1
    exchange_start = images_a_block * image_bytes if staged else 0
    draws_start = exchange_start + (block * group_words * 8 if exchanged else 0)
    shared_bytes_needed = draws_start + images_a_block * PARAMETER_COUNT * 4

    flips, translates, rotates = FLIP in operations, TRANSLATE in operations, ROTATE in operations
    brightens, contrasts, noisy = BRIGHTNESS in operations, CONTRAST in operations, NOISE in operations
    peppered, cuts = SALT_AND_PEPPER in operations, CUTOUT in operations
    clips = brightens or contrasts or noisy
    draws = len(operations) > 0
    same_row = width % group == 0
    steps = -(-groups // threads_an_image)
    full = groups % threads_an_image == 0  # no thread ever without a group
    staged_items = size // 8 if words else size
    staging_steps = -(-staged_items // threads_an_image)
    drawing_threads = images_a_block * OPERATION_COUNT
    value_count = group * channels
    first_draw, first_exchanged = draws_start // 4, exchange_start // 8
    image_stride = image_bytes if staged else 0

    def augment(images, image_words, indices, settings, seed, epoch, scale, shift, out):
        # images uint8 [N, H·W·C]; image_words the same memory as uint64; indices int64 [M]; settings float32
        # [operations, 3]; scale and shift C float32; out [M, …] uint64 where packed, else floats.
        thread = np.uint32(cuda.threadIdx.x)
        member = np.uint32(thread // np.uint32(threads_an_image))
        lane = np.uint32(thread % np.uint32(threads_an_image))
        first_row = np.uint32(cuda.blockIdx.x * images_a_block)
        row = np.uint32(first_row + member)
        exists = row < len(indices)
        index = np.int64(-1)
        if exists:
            index = indices[row]
        usable = index >= 0 and index < len(images)
        place = np.uint64(index if usable else 0)

        shared_bytes = cuda.shared.array(0, types.uint8)
        shared_words = cuda.shared.array(0, types.uint64)
        shared_floats = cuda.shared.array(0, types.float32)

        if staged and usable:
            for step in range(staging_steps):
                i = np.uint64(lane) + np.uint64(step * threads_an_image)
                if i < np.uint64(staged_items):
                    if words:
                        shared_words[np.uint64(member * np.uint32(image_stride // 8)) + i] = image_words[place, i]
                    else:
                        shared_bytes[np.uint64(member * np.uint32(image_stride)) + i] = images[place, i]
        if draws and thread < drawing_threads:
            drawn_member = np.uint32(thread // np.uint32(OPERATION_COUNT))
            operation = np.uint32(thread % np.uint32(OPERATION_COUNT))
            drawn_row = np.uint32(first_row + drawn_member)
            if drawn_row < len(indices):
                start = np.uint32(first_draw + drawn_member * PARAMETER_COUNT)
                draw(operation, indices[drawn_row], seed, epoch, settings, height, width, shared_floats, start)
        cuda.syncthreads()

        # Without `exists`, the last block's spare threads would take what an earlier kernel left in shared memory.
        drawn = np.uint32(first_draw + member * PARAMETER_COUNT)
        flipped = flips and exists and shared_floats[np.uint32(drawn + FLIPPED)] > ZERO
        shift_x = shared_floats[np.uint32(drawn + SHIFT_X)] if translates and exists else ZERO
        shift_y = shared_floats[np.uint32(drawn + SHIFT_Y)] if translates and exists else ZERO
        cosine = shared_floats[np.uint32(drawn + COSINE)] if rotates and exists else ONE
        sine = shared_floats[np.uint32(drawn + SINE)] if rotates and exists else ZERO
        contrast = shared_floats[np.uint32(drawn + FACTOR)] if contrasts and exists else ONE
        brightness = shared_floats[np.uint32(drawn + OFFSET)] if brightens and exists else ZERO
        deviation = shared_floats[np.uint32(drawn + DEVIATION)] if noisy and exists else ZERO
        threshold = shared_floats[np.uint32(drawn + THRESHOLD)] if peppered and exists else ZERO
        left = shared_floats[np.uint32(drawn + LEFT)] if cuts and exists else ZERO
        top = shared_floats[np.uint32(drawn + TOP)] if cuts and exists else ZERO
        side = shared_floats[np.uint32(drawn + SIDE)] if cuts and exists else ZERO
        factor = gain(contrast)
        offset = bias(contrast, brightness)

        pixels = shared_bytes
        image_start = np.uint32(member * image_stride)
        if not staged:
            pixels = images[place]

        whole_x, whole_y = np.int32(shift_x), np.int32(shift_y)
        result = out[np.uint64(row if exists else 0)]
        warp_lane = np.uint32(thread % np.uint32(WARP))
        exchanged_start = np.uint64(np.uint32(first_exchanged + thread * group_words))
        warp_start = np.uint64(np.uint32(first_exchanged + (thread - warp_lane) * group_words + warp_lane))

        for step in range(steps):
            number = np.uint32(step * threads_an_image + lane)
            values = cuda.local.array(value_count, types.float32)
            if full or number < groups:
                first = np.uint32(number * np.uint32(group))
                first_y = np.uint32(first // np.uint32(width))
                first_x = np.uint32(first % np.uint32(width))
                for k in range(group):
                    x, y = np.int32(first_x + k), np.int32(first_y)
                    if not same_row:
                        x, y = np.int32((first + k) % np.uint32(width)), np.int32((first + k) // np.uint32(width))
                    if rotates:
                        at = inverse_map(x, y, shift_x, shift_y, cosine, sine, height, width)
                        around = bilinear_taps(at[0], at[1], flipped, height, width)
                        for channel in range(channels):
                            values[k * channels + channel] = bilinear(pixels, image_start, around, channel, channels)
                    else:
                        column = reflect(np.int32(x - whole_x), width) if translates else x
                        line = reflect(np.int32(y - whole_y), height) if translates else y
                        if flipped:
                            column = np.int32(width - 1 - column)
                        start = np.uint64(image_start + np.uint32((line * width + column) * channels))
                        for channel in range(channels):
                            values[k * channels + channel] = np.float32(pixels[start + np.uint64(channel)])
                for k in range(value_count):
                    values[k] = values[k] * factor + offset
                if noisy and deviation > ZERO:
                    for channel in range(channels):
                        block = np.uint32((first // np.uint32(GROUP)) * np.uint32(channels) + np.uint32(channel))
                        noise_words = philox(index, NOISE, block, PER_PIXEL, seed, epoch)
                        noise = normals(noise_words[0], noise_words[1]) + normals(noise_words[2], noise_words[3])
                        for k in range(group):
                            values[k * channels + channel] += deviation * noise[(first + k) % GROUP]
                if clips:
                    for k in range(value_count):
                        values[k] = clip(values[k])
                if peppered and threshold > ZERO:
                    grains = philox(index, SALT_AND_PEPPER, first // np.uint32(GROUP), PER_PIXEL, seed, epoch)
                    for k in range(group):
                        word = grains[(first + k) % GROUP]
                        if corrupted(word, threshold):
                            for channel in range(channels):
                                values[k * channels + channel] = grain(word)
                for k in range(group):
                    x, y = np.int32(first_x + k), np.int32(first_y)
                    if not same_row:
                        x, y = np.int32((first + k) % np.uint32(width)), np.int32((first + k) // np.uint32(width))
                    hidden = cuts and cut_out(x, y, left, top, side)
                    for channel in range(channels):
                        change = shift[channel] if usable else NOT_A_NUMBER
                        value = normalise(values[k * channels + channel], scale[channel], change)
                        values[k * channels + channel] = ZERO if hidden else value

            if packed:
                for w in range(group_words):
                    if half:
                        word = pack_float16(values[4 * w], values[4 * w + 1], values[4 * w + 2], values[4 * w + 3])
                    else:
                        word = pack_float32(values[2 * w], values[2 * w + 1])
                    if exchanged:
                        shared_words[exchanged_start + np.uint64(w)] = word
                    elif exists and (full or number < groups):
                        result[np.uint64(number)] = word
                if exchanged:
                    if SIMULATED:  # which has no warps
                        cuda.syncthreads()
                    else:
                        cuda.syncwarp()
                    target = np.uint64(np.uint32((number - warp_lane) * group_words + warp_lane))
                    for w in range(group_words):
                        if exists and (full or target + np.uint64(w * WARP) < np.uint64(groups * group_words)):
                            result[target + np.uint64(w * WARP)] = shared_words[warp_start + np.uint64(w * WARP)]
                    if SIMULATED:
                        cuda.syncthreads()
                    else:
                        cuda.syncwarp()
            elif exists and (full or number < groups):
                for channel in range(channels):
                    result[np.uint64(number * channels + channel)] = values[channel]

    scope = {**globals(), **pixel.compiled(cuda.jit(device=True))}
    kernel = cuda.jit(pixel.rebound(augment, scope, "augment"))
    return kernel, images_a_block, block, shared_bytes_needed


def launch(
    images: Any, indices: Any, settings: Any, operations: tuple[int, ...], seed: int, epoch: int,
    scale: tuple[float, ...], shift: tuple[float, ...], out: Any,
) -> None:  # fmt: skip
    """Queue the kernel on CuPy's current stream; returns at once.

    Args:
        images: uint8 [N, H, W, C], contiguous, CuPy (NumPy under the simulator).
        indices: int64 [M], same place; an image whose index is out of range comes out as NaN.
        settings: float32 [operations, 3], same place, the policy's probabilities and ranges.
        operations: The numbers of the operations that are on.
        seed: From 0 to 2**32 - 1.
        epoch: Likewise.
        scale: C numbers, 1 / std.
        shift: C numbers, - mean / std.
        out: float32 or float16 [M, H, W, C], contiguous, same place; written.
    """
    count, height, width, channels = images.shape
    rows, size = len(out), height * width * channels
    words = size % 8 == 0 and _address(images) % 8 == 0
    packed = height * width % GROUP == 0 and _address(out) % 8 == 0
    kernel, images_a_block, block, shared_bytes = specialised(
        (height, width, channels), operations, out.dtype == np.float16, packed, words
    )
    flat = images.reshape(count, size)
    target = out.reshape(rows, size)
    arrays = [
        flat,
        flat.view(np.uint64) if words else flat,
        indices,
        settings,
        target.view(np.uint64) if packed else target,
    ]
    stream = 0
    if not SIMULATED:
        import cupy

        # Without `sync=False` Numba would wait for the stream of every array. CuPy's null stream and Numba's default
        # one are the same legacy stream, 0.
        arrays = [cuda.as_cuda_array(array, sync=False) for array in arrays]
        pointer = cupy.cuda.get_current_stream().ptr
        stream = cuda.external_stream(pointer) if pointer else 0
    flat, flat_words, indices, settings, target = arrays
    scale, shift = (tuple(np.float32(value) for value in values) for values in (scale, shift))
    kernel[-(-rows // images_a_block), block, stream, shared_bytes](
        flat, flat_words, indices, settings, np.uint32(seed), np.uint32(epoch), scale, shift, target
    )


def _address(array: Any) -> int:
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr
