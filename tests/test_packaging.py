"""Installation: the pinned versions agree with each other, and services and notebooks are complete."""

import ast
import importlib.metadata
import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
REQUIREMENTS = sorted(path.name for path in ROOT.glob("requirements*.txt"))


def normal(name):
    """A distribution's name as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file):
    """Names and versions in a requirements file: {name: version}; every line must be a pin, an include or a comment."""
    found = {}
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
        line = line.split("#")[0].strip()
        if not line or line.startswith(("-r ", "-c ")):
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)(?:\[[a-z,-]+\])?==([A-Za-z0-9.]+)", line)
        assert match, f"{file}: {line!r} is not an exact pin"
        assert normal(match[1]) not in found, f"{file}: {match[1]} is pinned twice"
        found[normal(match[1])] = match[2]
    return found


@pytest.mark.parametrize("file", REQUIREMENTS)
def test_requirements_agree_with_the_constraints(file):
    constraints = pins("constraints.txt")
    included = re.findall(r"^-[rc] (\S+)", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert included, "neither the constraints nor a file that includes them"
    for name in included:
        assert (ROOT / name).is_file()
    differing = {n: v for n, v in pins(file).items() if constraints.get(n, v) != v}
    assert not differing
    if file == "requirements.txt":
        assert set(pins(file)) <= set(constraints), "a direct dependency without a constraint"


def test_the_gpu_stack_builds_on_the_cpu_stack():
    cpu, gpu = pins("requirements.txt"), pins("requirements-gpu.txt")
    assert gpu["tensorflow"] == cpu["tensorflow"]
    assert "-r requirements.txt" in (ROOT / "requirements-gpu.txt").read_text(encoding="utf-8").splitlines()
    assert {"cudf-cu12", "cupy-cuda12x", "numba-cuda"} <= set(gpu)


def test_constraints_are_what_is_installed_here():
    """The pins are versions that work together: those that `make` installed here."""
    if not list((ROOT / ".venv").glob(".installed-*")):
        pytest.skip("this environment was not made by make")
    direct = pins("requirements.txt")
    installed = {name: importlib.metadata.version(name) for name in direct}
    assert installed == direct


def test_every_import_of_the_packages_is_a_requirement():
    modules, named = set(), set()
    for folder in ("pipeline", "export"):
        for path in (ROOT / folder).rglob("*.py"):
            named |= set(re.findall(r"requirements[a-z-]*\.txt", path.read_text(encoding="utf-8")))
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    modules |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                    modules.add(node.module.split(".")[0])
    providers = importlib.metadata.packages_distributions()
    pinned = {n for file in (*REQUIREMENTS, "constraints.txt") for n in pins(file)}
    own = {"pipeline", "export", "benchmarks"}  # `pip install -e .` provides these
    missing = {m for m in modules & set(providers) - own if not {normal(d) for d in providers[m]} & pinned}
    assert not missing
    assert named <= set(REQUIREMENTS), "an error message names a file that does not exist"


def test_conda_and_docker_take_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    python = dict(entry.split("=") for entry in conda)["python"]
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(rf"^FROM python:{re.escape(python)}-", dockerfile, flags=re.MULTILINE)
    assert python.startswith("3.11.")
    for entry in pip:  # versions only in the requirements files
        assert re.fullmatch(r"-r requirements[a-z-]*\.txt", entry)
        assert (ROOT / entry.removeprefix("-r ")).is_file()
    assert "-r requirements-gpu.txt" in pip
    known = {name: version for file in REQUIREMENTS for name, version in pins(file).items()}
    for name, version in re.findall(r"([A-Za-z0-9._-]+)(?:\[[a-z,-]+\])?==([0-9][A-Za-z0-9.]*)", dockerfile):
        assert known[normal(name)] == version
    copied = set(re.findall(r"\S+\.txt", re.search(r"^COPY (.*\.txt).*$", dockerfile, flags=re.MULTILINE)[1]))
    assert {"constraints.txt", *re.findall(r"-r (\S+)", dockerfile), "requirements.txt"} <= copied


def test_compose_has_the_three_services_and_reserves_the_gpu_for_two():
    services = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert set(services) == {"pipeline", "lab", "tensorboard"}
    reserved = set()
    for name, service in services.items():
        assert service["build"] == "."
        devices = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
        if any(device["driver"] == "nvidia" and "gpu" in device["capabilities"] for device in devices):
            reserved.add(name)
        # Ports are open to this machine only.
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        module = re.search(r"python -m ([a-z.]+)", service["command"])[1]
        assert importlib.util.find_spec(module), module
    assert reserved == {"pipeline", "lab"}


def test_no_registry_is_named():
    """The package index is the user's setting."""
    files = [*REQUIREMENTS, "constraints.txt", "environment.yml", "Dockerfile", "compose.yaml", "Makefile"]
    for file in files:
        content = (ROOT / file).read_text(encoding="utf-8")
        assert not re.search(r"index-url|find-links|pypi\.|://(?!127\.0\.0\.1)", content), file


# --- notebooks -----------------------------------------------------------------------------------------------------


def test_the_five_chapters_come_first():
    assert CHAPTERS[:5] == ["01_data", "02_augment", "03_train", "04_export", "05_infer"]


@pytest.mark.parametrize("name", CHAPTERS)
def test_notebook_is_committed_clean_and_thin(name):
    notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert next(c["cell_type"] for c in notebook["cells"]) == "markdown", "a chapter starts with text"
    tagged = [c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    assert all(isinstance(s, (ast.Assign, ast.AnnAssign)) for s in ast.parse("".join(tagged[0]["source"])).body)
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        lines = "".join(cell["source"]).splitlines()
        tree = ast.parse("\n".join("pass" if line.lstrip().startswith(("%", "!")) else line for line in lines))
        defined = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
        assert not defined, "functions live in the packages"
