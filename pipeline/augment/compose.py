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

from pipeline.augment import operations, pixel
from pipeline.augment.operations import OPERATIONS

# Numba's cache on disk only detects changes of the file with the kernel.
DIGEST = hashlib.sha256(
    b"".join(Path(f).read_bytes() for f in (__file__, pixel.__file__, operations.__file__))
).hexdigest()
SLOTS = 4  # parameters of an image for each operation
VALUES = 6  # number, probability and four values of each operation
HOOKS = ("draw", "column", "line", "move", "affine", "colour", "perturb", "replace", "hides")
# By method: what a sequence of calls changes, its other arguments, and whether a call is skipped if it has no effect.
SEQUENCES = {
    "move": ("x, y", "height, width", False),
    "column": ("x", "width", False),
    "line": ("y", "height", False),
    "colour": ("red, green, blue", "", True),
    "perturb": ("", "values, start, first, count, channels, index, seed, epoch", True),
    "replace": ("", "values, start, first, count, channels, index, seed, epoch", True),
}


def compiled(jit: Callable[[Callable[..., Any]], Any], names: Sequence[str] = tuple(OPERATIONS)) -> types.ModuleType:
    """A module with the functions of `pixel`, compiled, and those which apply a set of operations to one image.

    The parameters of an image are drawn with ``draw(position, image, seed, epoch, settings, height, width, parameters,
    start)`` for each position in `names`, which writes `SLOTS` float32 from `parameters[start]` on, and read with
    ``load(parameters, start)``. The other functions have the result as the last argument:

    - ``fractional``, ``entangled``: whether interpolation is needed, and whether x and y depend on each other.
    - ``whole_column``, ``whole_line``: the source of a pixel if no interpolation is needed.
    - ``move``, then ``columns``, ``lines``: the position in the source, then the arguments of `pixel.corners`.
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
        if isinstance(value, types.FunctionType) and not name.startswith("_")
    }
    for name, operation in chosen.items():
        functions.update({f"{name}_{hook}": getattr(operation, hook) for hook in HOOKS if hasattr(operation, hook)})
    for name, function in functions.items():
        scope[name] = jit(rebound(function, scope, name))

    def having(*hooks: str) -> list[str]:
        return [name for name in chosen if any(hasattr(chosen[name], hook) for hook in hooks)]

    def define(name: str, arguments: str, lines: list[str]) -> None:
        text = f"def {name}({arguments}):\n" + "".join(f"    {line}\n" for line in lines)
        local: dict[str, Any] = {}
        exec(text, scope, local)
        scope[name] = jit(local[name])

    def active(name: str) -> str:
        pairs = enumerate(chosen[name].neutral)
        return " or ".join(f"drawn[{place[name]}][{i}] != {_constant(value)}" for i, value in pairs)

    def define_any(name: str, members: list[str]) -> None:
        scope[name.upper()] = bool(members)
        define(name, "drawn", ["return " + (" or ".join(map(active, members)) or "False")])

    def define_sequence(name: str, members: list[str]) -> None:
        hook = name.removeprefix("whole_").removeprefix("tap_")
        changed, others, guarded = SEQUENCES[hook]
        arguments = ", ".join(filter(None, (changed, others)))
        lines = []
        for member in members:
            given = arguments.replace("index, ", f"(index, np.uint32({chosen[member].number}), ").replace(
                "epoch", "epoch)"
            )
            call = f"{member}_{hook}({given}, drawn[{place[member]}])"
            line = f"{changed} = {call}" if changed else call
            lines.append(f"if {active(member)}: {line}" if guarded else line)
        define(name, f"{arguments}, drawn", [*lines, f"return {changed}"])

    loaded = ""
    draw = [
        "stream = image, np.uint32(settings[position, 0]), seed, epoch",
        "words = image_words(stream, np.uint32(0))",
        "applied = uniform(words[0]) < settings[position, 1]",
        "uniforms = uniform(words[1]), uniform(words[2])",
        "values = settings[position, 2], settings[position, 3], settings[position, 4], settings[position, 5]",
    ]
    for name, position in place.items():
        size = len(chosen[name].neutral)
        draw += [
            f"if position == {position}:",
            f"    p = {name}_draw(uniforms, values, height, width, stream)",
            f"    n = ({''.join(f'{_constant(value)}, ' for value in chosen[name].neutral)})",
        ]
        slots = [f"np.uint32(start + {position * SLOTS + i})" for i in range(size)]
        draw += [f"    parameters[{slot}] = p[{i}] if applied else n[{i}]" for i, slot in enumerate(slots)]
        loaded += f"({''.join(f'parameters[{slot}], ' for slot in slots)}), "
    define("draw", "position, image, seed, epoch, settings, height, width, parameters, start", draw)
    define("load", "parameters, start", [f"return ({loaded or '(ZERO,), '})"])

    whole, moving = having("column", "line"), [name for name in having("move") if name not in having("column")]
    define_any("fractional", moving)
    define_any("entangled", [name for name in moving if not chosen[name].separable])
    # From the result back to the image: the reverse of the order in which the operations are applied.
    flips = [name for name in whole if name not in having("move")][::-1]
    define_sequence("move", having("move")[::-1])
    for axis, position, size in (("column", "x", "width"), ("line", "y", "height")):
        define_sequence(f"whole_{axis}", whole[::-1])
        define_sequence(f"tap_{axis}", flips)
        tap = f"np.int32(tap_{axis}(%s, {size}, drawn))"
        lines = [f"first, second, distance = neighbours({position}, {size})"]
        define(
            f"{axis}s", f"{position}, {size}, drawn", [*lines, f"return {tap % 'first'}, {tap % 'second'}, distance"]
        )

    scope["CLIPS"] = bool(having("affine", "colour", "perturb"))
    lines = ["factor, offset = ONE, -HALF"]
    lines += [f"factor, offset = {name}_affine(factor, offset, drawn[{place[name]}])" for name in having("affine")]
    define("affine", "drawn", [*lines, "return factor * BYTE, offset + HALF"])
    for name, predicate in (("colour", "colours"), ("perturb", "perturbs"), ("replace", "replaces")):
        define_any(predicate, having(name))
        define_sequence(name, having(name))
    define_any("covers", having("hides"))
    hidden = " or ".join(f"{name}_hides(x, y, drawn[{place[name]}])" for name in having("hides"))
    define("hides", "x, y, drawn", [f"return {hidden or 'False'}"])
    return module


def rebound(function: Callable[..., Any], scope: dict[str, Any], name: str) -> Callable[..., Any]:
    """A copy of a function under another name, which looks up its global variables in `scope`."""
    copy = types.FunctionType(function.__code__, scope, name, function.__defaults__, function.__closure__)
    copy.__doc__, copy.__qualname__ = function.__doc__, name
    return copy


def _constant(value: float) -> str:
    return f"np.float32({value})"
