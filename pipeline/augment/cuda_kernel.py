"""The augmentation kernel for CUDA; imported only with a GPU or under Numba's CUDA simulator.

The kernel is compiled for one set of operations, image shape and output type, so disabled operations cost nothing.
These choices make memory bandwidth the only limit of its speed:

- A block processes a few images. It first copies their bytes to shared memory in order, eight bytes per read, so that
  flips, shifts and rotations only read shared memory. Larger images are read through the cache.
- The random parameters of an image are drawn once, by one thread per operation.
- A thread computes four neighbouring pixels and packs the values into 64-bit words. The threads of a warp exchange the
  words through shared memory, so that writes to global memory fill whole cache lines.
- Index arithmetic uses unsigned 32-bit integers, for which Numba adds no check for negative indices.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import numpy as np
from numba import config, cuda, types

from pipeline.augment import compose, pixel
from pipeline.augment.policy import Policy

# Small batches are supported.
warnings.filterwarnings("ignore", message="Grid size .* will likely result in GPU under-utilization")

SIMULATED = bool(config.ENABLE_CUDASIM)
WARP = 32
LARGEST_BLOCK = 256
GROUPS_PER_THREAD = 4
STAGED_BYTES = 32 * 1024  # limit for copying images to shared memory; keeps a block below 48 KiB in total
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
        """Emit PTX that packs float32 registers into one 64-bit word."""
        kind = ir.FunctionType(ir.IntType(64), [ir.FloatType()] * len(arguments))
        constraints = ",".join(["=l", *"f" * len(arguments)])
        return builder.call(ir.InlineAsm(kind, text, constraints, side_effect=False), arguments)

    @intrinsic
    def pack_float16(typing_context, a, b, c, d):
        """Round four float32 to float16 and pack them into a uint64, the first in the lowest bits."""

        def generate(context, builder, signature, arguments):
            halves = "".join(f"cvt.rn.f16.f32 h{i}, ${i + 1}; " for i in range(4))
            text = "{ .reg .b16 h0, h1, h2, h3; " + halves + "mov.b64 $0, {h0, h1, h2, h3}; }"
            return _assembly(builder, text, arguments)

        return types.uint64(*[types.float32] * 4), generate

    @intrinsic
    def pack_float32(typing_context, a, b):
        """Pack two float32 into a uint64, the first in the lowest bits."""

        def generate(context, builder, signature, arguments):
            return _assembly(builder, "mov.b64 $0, {$1, $2};", arguments)

        return types.uint64(types.float32, types.float32), generate


@functools.cache
def specialised(
    shape: tuple[int, int, int], operations: tuple[str, ...], half: bool, packed: bool, words: bool
) -> tuple[Any, int, int, int]:
    """The kernel for one image shape, set of operations and output type.

    Args:
        shape: (H, W, C).
        operations: Names of the enabled operations.
        half: float16 output, otherwise float32.
        packed: Write 64-bit words of four pixels: H·W is a multiple of 4 and the output is aligned.
        words: Read 64-bit words: H·W·C is a multiple of 8 and the images are aligned.

    Returns:
        The kernel, images per block, threads per block, and bytes of shared memory per block.
    """
    px = compose.compiled(cuda.jit(device=True), operations)
    height, width, channels = shape
    size = height * width * channels
    group = px.GROUP if packed else 1
    groups = height * width // group
    value_bytes = 2 if half else 4
    # A thread processes several groups and computes shared values once. A warp never processes two images.
    threads_per_image = min(LARGEST_BLOCK, -(-groups // (GROUPS_PER_THREAD * WARP)) * WARP)
    images_per_block = LARGEST_BLOCK // threads_per_image
    block = threads_per_image * images_per_block
    staged = size <= STAGED_BYTES
    image_bytes = -(-size // 8) * 8
    group_words = px.GROUP * channels * value_bytes // 8
    exchanged = packed and group_words > 1
    exchange_start = images_per_block * image_bytes if staged else 0
    draws_start = exchange_start + (block * group_words * 8 if exchanged else 0)
    operation_count = len(operations)
    parameter_count = operation_count * compose.SLOTS
    shared_bytes_needed = draws_start + images_per_block * parameter_count * 4

    draws = len(operations) > 0
    colours = px.COLOURS and channels == 3
    clips = px.CLIPS
    same_row = width % group == 0
    steps = -(-groups // threads_per_image)
    full = groups % threads_per_image == 0  # every thread has a group in every step
    staged_items = size // 8 if words else size
    staging_steps = -(-staged_items // threads_per_image)
    drawing_threads = images_per_block * operation_count
    value_count = group * channels
    first_draw, first_exchanged = draws_start // 4, exchange_start // 8
    image_stride = image_bytes if staged else 0

    def augment(images, image_words, indices, settings, seed, epoch, scale, shift, out):
        # images uint8 [N, H·W·C]; image_words the same memory as uint64; indices int64 [M]; settings float32
        # [operations, 6]; scale and shift C float32; out [M, …] uint64 if packed, otherwise floating point.
        thread = np.uint32(cuda.threadIdx.x)
        member = np.uint32(thread // np.uint32(threads_per_image))
        lane = np.uint32(thread % np.uint32(threads_per_image))
        first_row = np.uint32(cuda.blockIdx.x * images_per_block)
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
                i = np.uint64(lane) + np.uint64(step * threads_per_image)
                if i < np.uint64(staged_items):
                    if words:
                        shared_words[np.uint64(member * np.uint32(image_stride // 8)) + i] = image_words[place, i]
                    else:
                        shared_bytes[np.uint64(member * np.uint32(image_stride)) + i] = images[place, i]
        if draws and thread < drawing_threads:
            drawn_member = np.uint32(thread // np.uint32(operation_count))
            operation = np.uint32(thread % np.uint32(operation_count))
            # In the last block, threads without an image get the parameters of the last one: shared memory is
            # uninitialised, and their reads must stay inside the image.
            drawn_row = np.uint32(min(np.int64(first_row + drawn_member), len(indices) - 1))
            start = np.uint32(first_draw + drawn_member * parameter_count)
            px.draw(operation, indices[drawn_row], seed, epoch, settings, height, width, shared_floats, start)
        cuda.syncthreads()

        drawn = px.load(shared_floats, np.uint32(first_draw + member * parameter_count))
        factor, offset = px.affine(drawn)

        pixels = shared_bytes
        image_start = np.uint32(member * image_stride)
        if not staged:
            pixels = images[place]

        result = out[np.uint64(row if exists else 0)]
        warp_lane = np.uint32(thread % np.uint32(WARP))
        exchanged_start = np.uint64(np.uint32(first_exchanged + thread * group_words))
        warp_start = np.uint64(np.uint32(first_exchanged + (thread - warp_lane) * group_words + warp_lane))

        for step in range(steps):
            number = np.uint32(step * threads_per_image + lane)
            values = cuda.local.array(value_count, types.float32)
            if full or number < groups:
                first = np.uint32(number * np.uint32(group))
                first_y = np.uint32(first // np.uint32(width))
                first_x = np.uint32(first % np.uint32(width))
                for k in range(group):
                    x, y = np.int32(first_x + k), np.int32(first_y)
                    if not same_row:
                        x, y = np.int32((first + k) % np.uint32(width)), np.int32((first + k) // np.uint32(width))
                    if px.FRACTIONAL:
                        at = px.move(np.float32(x), np.float32(y), height, width, drawn)
                        columns = px.columns(at[0], width, drawn)
                        taps = px.corners(columns, px.lines(at[1], height, drawn), width)
                        for channel in range(channels):
                            values[k * channels + channel] = px.bilinear(pixels, image_start, taps, channel, channels)
                    else:
                        column = px.whole_column(x, width, drawn)
                        line = px.whole_line(y, height, drawn)
                        start = np.uint64(image_start + np.uint32((line * width + column) * channels))
                        for channel in range(channels):
                            values[k * channels + channel] = np.float32(pixels[start + np.uint64(channel)])
                for k in range(value_count):
                    values[k] = values[k] * factor + offset
                if colours:
                    for k in range(group):
                        red, green, blue = px.colour(values[3 * k], values[3 * k + 1], values[3 * k + 2], drawn)
                        values[3 * k], values[3 * k + 1], values[3 * k + 2] = red, green, blue
                if px.PERTURBS:
                    px.perturb(values, 0, first, group, channels, index, seed, epoch, drawn)
                if clips:
                    for k in range(value_count):
                        values[k] = px.clip(values[k])
                if px.REPLACES:
                    px.replace(values, 0, first, group, channels, index, seed, epoch, drawn)
                for k in range(group):
                    x, y = np.int32(first_x + k), np.int32(first_y)
                    if not same_row:
                        x, y = np.int32((first + k) % np.uint32(width)), np.int32((first + k) // np.uint32(width))
                    hidden = px.COVERS and px.hides(x, y, drawn)
                    for channel in range(channels):
                        change = shift[channel] if usable else NOT_A_NUMBER
                        value = values[k * channels + channel] * scale[channel] + change
                        values[k * channels + channel] = px.ZERO if hidden else value

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
                    if SIMULATED:  # the simulator has no warps
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

    return cuda.jit(augment), images_per_block, block, shared_bytes_needed


def launch(
    images: Any, indices: Any, policy: Policy, seed: int, epoch: int,
    scale: tuple[float, ...], shift: tuple[float, ...], out: Any,
) -> None:  # fmt: skip
    """Queue the kernel on CuPy's current stream and return without waiting.

    Args:
        images: uint8 [N, H, W, C], contiguous, CuPy (NumPy under the simulator).
        indices: int64 [M], same device. The result for an index out of range is NaN.
        policy: Its `settings` are on the same device.
        seed, epoch: From 0 to 2**32 - 1.
        scale: C numbers, 1 / std.
        shift: C numbers, -mean / std.
        out: float32 or float16 [M, H, W, C], contiguous, same device; the result.
    """
    count, height, width, channels = images.shape
    rows, size = len(out), height * width * channels
    words = size % 8 == 0 and _address(images) % 8 == 0
    packed = height * width % pixel.GROUP == 0 and _address(out) % 8 == 0
    kernel, images_per_block, block, shared_bytes = specialised(
        (height, width, channels), policy.operations, out.dtype == np.float16, packed, words
    )
    flat = images.reshape(count, size)
    target = out.reshape(rows, size)
    flat_words, target = flat.view(np.uint64) if words else flat, target.view(np.uint64) if packed else target
    arrays = [flat, flat_words, indices, policy.settings, target]
    stream = 0
    if not SIMULATED:
        import cupy

        # With `sync=True`, the default, Numba waits for the stream of every array. CuPy's null stream and Numba's
        # default stream are both the legacy stream, 0.
        arrays = [cuda.as_cuda_array(array, sync=False) for array in arrays]
        pointer = cupy.cuda.get_current_stream().ptr
        stream = cuda.external_stream(pointer) if pointer else 0
    flat, flat_words, indices, settings, target = arrays
    scale, shift = (tuple(np.float32(value) for value in values) for values in (scale, shift))
    kernel[-(-rows // images_per_block), block, stream, shared_bytes](
        flat, flat_words, indices, settings, np.uint32(seed), np.uint32(epoch), scale, shift, target
    )


def _address(array: Any) -> int:
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr
