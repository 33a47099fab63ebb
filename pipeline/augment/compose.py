"""Compile `operations` for one device: ``compiled(numba.njit)`` or ``compiled(numba.cuda.jit(device=True), names)``.

Each function that the kernels call is generated as a sequence of calls of the operations' methods, so that a kernel has
no code for a particular operation, and the code for a set of operations contains nothing else.
"""

from __future__ import annotations

import hashlib
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.augment import operations, pixel
from pipeline.augment.operations import OPERATIONS

# Numba's cache on disk only detects changes of the file with the kernel.
DIGEST = hashlib.sha256(
    b"".join(Path(f).read_bytes() for f in (__file__, pixel.__file__, operations.__file__))
).hexdigest()
SLOTS = 4  # parameters of an image for each operation
HOOKS = ("draw", "column", "line", "move", "affine", "colour", "perturb", "replace", "hides")
GROUP_OF_PIXELS = "values, start, first, count, channels, index, seed, epoch"


def compiled(jit: Callable[[Callable[..., Any]], Any], names: Sequence[str] = tuple(OPERATIONS)) -> types.ModuleType:
    """A module with the functions of `pixel`, compiled, and those which apply a set of operations to one image.

    ``draw(position, image, seed, epoch, settings, height, width, parameters, start)`` draws the parameters of one image
    for the operation at this position in `names` and writes them to `parameters`, in which the image has
    ``len(names) · SLOTS`` float32 from `start` on. ``load(parameters, start)`` reads them; ``NEUTRAL`` are those of an
    unchanged image. The other functions have the result of ``load`` as the last argument:

    - ``fractional``, ``entangled``: whether interpolation is needed, and whether x and y depend on each other.
    - ``whole_column``, ``whole_line``: the source of a pixel if no interpolation is needed.
    - ``move``, then ``columns``, ``lines``: the position in the source, then the arguments of `pixel.corners`.
    - ``moves``: the same as ``move`` for arrays of positions, in loops that the compiler vectorises.
    - ``affine``: factor and offset from a byte to a fraction of full scale.
    - ``colour``, ``perturb``, ``replace``, ``hides``: as the methods of `Operation`.
    - ``colours``, ``perturbs``, ``replaces``, ``covers``: whether these have an effect on the image.

    The constants in capitals tell the same for the whole set of operations.

    Args:
        jit: Numba decorator, such as ``numba.njit``.
        names: The operations, in the order of `OPERATIONS`.
    """
    module = types.ModuleType(__name__)
    scope = vars(module)
    scope.update({key: value for key, value in vars(pixel).items() if not key.startswith("__")})
    chosen = {name: OPERATIONS[name] for name in OPERATIONS if name in names}
    place = {name: position for position, name in enumerate(chosen)}
    functions = {
        name: value
        for source in (pixel, operations)
        for name, value in vars(source).items()
        if isinstance(value, types.FunctionType) and value.__module__ == source.__name__ and not name.startswith("_")
    }
    for name, operation in chosen.items():
        functions.update({f"{name}_{hook}": getattr(operation, hook) for hook in HOOKS if hasattr(operation, hook)})
    for name, function in functions.items():
        scope[name] = jit(rebound(function, scope, name))

    def define(name: str, arguments: str, *lines: str) -> None:
        local: dict[str, Any] = {}
        exec("\n    ".join([f"def {name}({arguments}):", *lines]), scope, local)
        scope[name] = jit(local[name])

    def having(hook: str) -> list[str]:
        return [name for name in chosen if hasattr(chosen[name], hook)]

    def calls(hook: str, members: list[str], arguments: str) -> list[str]:
        return [f"{name}_{hook}({arguments}, drawn[{place[name]}])" for name in members]

    def active(name: str) -> str:
        """Whether the drawn parameters are not neutral."""
        neutral = enumerate(chosen[name].neutral)
        return " or ".join(f"drawn[{place[name]}][{i}] != np.float32({value})" for i, value in neutral)

    def define_any(name: str, members: list[str]) -> None:
        scope[name.upper()] = bool(members)
        define(name, "drawn", "return " + (" or ".join(active(member) for member in members) or "False"))

    loads = []
    draw = [
        "stream = image, np.uint32(settings[position, 0]), seed, epoch",
        "words = image_words(stream, np.uint32(0))",
        "applied = uniform(words[0]) < settings[position, 1]",
        "uniforms = uniform(words[1]), uniform(words[2])",
        "values = settings[position, 2], settings[position, 3], settings[position, 4], settings[position, 5]",
    ]
    scope["NEUTRAL"] = np.zeros(len(chosen) * SLOTS, np.float32)
    for name, position in place.items():
        scope["NEUTRAL"][position * SLOTS :][: len(chosen[name].neutral)] = chosen[name].neutral
        slots = [f"parameters[np.uint32(start + {position * SLOTS + i})]" for i in range(len(chosen[name].neutral))]
        loads.append(f"({', '.join(slots)},)")
        draw.append(f"if position == {position}:")
        draw.append(f"    p = ({''.join(f'np.float32({value}), ' for value in chosen[name].neutral)})")
        draw.append(f"    if applied: p = {name}_draw(uniforms, values, height, width, stream)")
        draw += [f"    {slot} = p[{i}]" for i, slot in enumerate(slots)]
    define("draw", "position, image, seed, epoch, settings, height, width, parameters, start", *draw)
    define("load", "parameters, start", f"return ({', '.join(loads) or '(ZERO,)'},)")

    # From the result back to the image: the reverse of the order in which the operations are applied.
    moving, whole = having("move")[::-1], having("column")[::-1]
    fractional = [name for name in moving if name not in whole]
    define_any("fractional", fractional)
    define_any("entangled", [name for name in fractional if not chosen[name].separable])
    steps = [f"x, y = {call}" for call in calls("move", moving, "x, y, height, width")]
    define("move", "x, y, height, width, drawn", *steps, "return x, y")
    steps = ["pass"]
    for name, call in zip(moving, calls("move", moving, "across[i], down[i], height, width"), strict=True):
        steps += [f"if {active(name)}:", "    for i in range(len(across)):", f"        across[i], down[i] = {call}"]
    define("moves", "across, down, height, width, drawn", *steps)
    for axis, size in (("column", "width"), ("line", "height")):
        steps = [f"at = {call}" for call in calls(axis, whole, f"at, {size}")]
        define(f"whole_{axis}", f"at, {size}, drawn", *steps, "return at")
        flips = [name for name in whole if name not in moving]
        steps = [f"at = {call}" for call in calls(axis, flips, f"at, {size}")]
        define(f"flipped_{axis}", f"at, {size}, drawn", *steps, "return np.int32(at)")
        both = ", ".join(f"flipped_{axis}({at}, {size}, drawn)" for at in ("first", "second"))
        step = f"first, second, distance = neighbours(position, {size})"
        define(f"{axis}s", f"position, {size}, drawn", step, f"return {both}, distance")

    scope["CLIPS"] = bool(having("affine") or having("colour") or having("perturb"))
    steps = [f"factor, offset = {call}" for call in calls("affine", having("affine"), "factor, offset")]
    define("affine", "drawn", "factor, offset = ONE, -HALF", *steps, "return factor * BYTE, offset + HALF")
    define_any("colours", having("colour"))
    steps = []
    for name, call in zip(having("colour"), calls("colour", having("colour"), "red, green, blue"), strict=True):
        steps.append(f"if {active(name)}: red, green, blue = {call}")
    define("colour", "red, green, blue, drawn", *steps, "return red, green, blue")
    for hook in ("perturb", "replace"):
        define_any(f"{hook}s", having(hook))
        steps = ["pass"]
        for name in having(hook):
            stream = f"(index, np.uint32({chosen[name].number}), seed, epoch)"
            call = calls(hook, [name], f"values, start, first, count, channels, {stream}")[0]
            steps.append(f"if {active(name)}: {call}")
        define(hook, f"{GROUP_OF_PIXELS}, drawn", *steps)
    define_any("covers", having("hides"))
    define("hides", "x, y, drawn", "return " + (" or ".join(calls("hides", having("hides"), "x, y")) or "False"))
    return module


def rebound(function: Callable[..., Any], scope: dict[str, Any], name: str) -> Callable[..., Any]:
    """A copy of a function under another name, which looks up its global variables in `scope`."""
    copy = types.FunctionType(function.__code__, scope, name, function.__defaults__, function.__closure__)
    copy.__doc__, copy.__qualname__ = function.__doc__, name
    return copy
