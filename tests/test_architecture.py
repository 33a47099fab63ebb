"""The import rules of docs/architecture.md: packages form layers, and modules form no cycle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A module imports only from its own package and from packages to its left.
LAYERS = (
    "pipeline.core", "pipeline.data", "pipeline.augment", "pipeline.ops", "pipeline.models", "pipeline.runs",
    "pipeline.evaluate", "pipeline.train", "pipeline.notebooks", "pipeline.commands", "pipeline.__main__", "export",
    "benchmarks",
)  # fmt: skip


def modules():
    files = [path for package in ("pipeline", "export", "benchmarks") for path in (ROOT / package).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imported(path, known):
    """The project's modules that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if name in known and name != "pipeline"}


MODULES = modules()
IMPORTS = {name: imported(path, MODULES) - {name} for name, path in MODULES.items()}


def layer(name):
    return next(index for index, package in enumerate(LAYERS) if f"{name}.".startswith(f"{package}."))


@pytest.mark.parametrize("name", [name for name in MODULES if name != "pipeline"])
def test_a_module_imports_only_from_lower_layers(name):
    upward = [other for other in IMPORTS[name] if layer(other) > layer(name)]
    assert not upward, f"{name} imports {upward}"


def test_there_is_no_import_cycle():
    finished, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path, name])
        if name in finished:
            return
        path.append(name)
        for other in sorted(IMPORTS[name]):
            visit(other)
        finished.add(path.pop())

    for name in MODULES:
        visit(name)


def test_export_does_not_import_training():
    training = {name for name in MODULES if name.startswith("pipeline.train")}
    exporting = [name for name in MODULES if name.startswith("export")]
    assert [name for name in exporting if IMPORTS[name] & training] == []


def is_command(path):
    return 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")


def test_commands_are_not_imported_as_libraries():
    commands = {name for name, path in MODULES.items() if is_command(path)}
    assert {name: others & commands for name, others in IMPORTS.items() if others & commands} == {}


def test_the_top_level_has_at_most_14_modules_and_packages():
    top = {name for name in MODULES if name.count(".") <= 1 and name.startswith("pipeline")} | {"export", "benchmarks"}
    assert len(top) <= 14, sorted(top)
