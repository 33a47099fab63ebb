"""The configuration: Hydra composes it from `pipeline/conf` and the command line; mistakes become one sentence."""

from __future__ import annotations

import datetime
import gc
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.errors import PipelineError, first_line, is_number, is_whole

FOLDER = Path(__file__).parent.parent / "conf"


CHOICES = {
    "precision": ("auto", "float32", "mixed_bfloat16", "mixed_float16"),
    "schedule": ("one_cycle", "cosine", "constant"),
    "communication": ("auto", "nccl", "ring"),
    "xla": ("auto", True, False, "clusters"),
}


GROUPS = ("dataset", "model", "augment", "optimizer")


TEXTS = ("name", "resume", "data_dir", "dataset.data_dir", "dataset.cache_dir", "hydra.sweep.dir")  # as typed


def compose(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The resolved and checked configuration for these overrides, as the notebooks and tests ask for it.

    Args:
        overrides: As on the command line: ``["dataset=cifar10", "epochs=5"]``.

    Raises:
        PipelineError: An unknown name (the sentence lists the known ones) or a value out of range.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with _sentences(), initialize_config_dir(config_dir=str(FOLDER), version_base=None):
        return resolve(hydra_compose("config", overrides=[literal(override) for override in overrides]))


def overrides(**values: Any) -> list[str]:
    """Overrides ``key=value`` for `compose`, one for each value that is not None."""
    return [f"{key}={value}" for key, value in values.items() if value is not None]


def literal(override: str) -> str:
    """An override whose value Hydra takes as it is typed, where its key is one of `TEXTS`.

    Hydra's grammar would otherwise refuse ``data_dir=Photos (2024)``, and every letter outside ASCII.
    """
    key, separator, value = override.partition("=")
    if key.lstrip("+") not in TEXTS or not separator or value in ("", "null") or value[0] in "'\"":
        return override
    value = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value)
    return f"{key}='{value}'"


def command(work: Callable[[dict[str, Any], list[str]], Any], compare: Callable[[Path], Any]) -> Callable[[], int]:
    """Make a command of `work`, which gets the resolved configuration and the overrides of the command line.

    With ``--multirun`` each combination of values is a job of its own, in ``runs/SWEEP/JOB``; a job that fails is
    reported and the others still run. `compare` gets the sweep's folder at the end.
    """
    import hydra

    failed: list[str] = []
    problem: list[PipelineError] = []  # Hydra would print a line of its own about an exception that leaves a job

    @hydra.main(config_path=str(FOLDER), config_name="config", version_base=None)
    def hydra_main(config: Any) -> None:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        about = HydraConfig.get()
        if about.mode == RunMode.RUN:
            try:
                work(resolve(config), list(about.overrides.task))
            except PipelineError as error:
                problem.append(error)
            return
        job = _job_name(about.job.override_dirname, about.job.num)
        try:
            print(f"--- {job}")
            settings = resolve(config)
            settings["name"] = f"{Path(about.sweep.dir).name}/{job}"
            work(settings, list(about.overrides.task))
        except PipelineError as error:
            if error.exit_code == 130:
                problem.append(error)
                raise KeyboardInterrupt from None  # the one exception that Hydra's launcher lets through at once
            failed.append(job)
            print(f"error: {job}: {error}", file=sys.stderr)
        except Exception:  # a bug costs its own job, not the others and their comparison
            failed.append(job)
            traceback.print_exc()
        finally:
            gc.collect()  # callbacks and graphs hold each other; the next job needs the memory of what they hold

    def main() -> int:
        os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through, instead of Hydra's own report
        program = Path(sys.argv[0])
        sys.argv[0] = f"python -m {program.parent.name}.{program.stem}" if program.suffix == ".py" else sys.argv[0]
        sweep = None
        if {"-m", "--multirun"} & set(sys.argv):
            names = [argument[5:] for argument in sys.argv if argument.startswith("name=")]
            sys.argv = [argument for argument in sys.argv if not argument.startswith("name=")]
            stamp = datetime.datetime.now().strftime("multirun-%Y%m%d-%H%M%S")
            sweep = Path("runs") / plain_name(names[-1] if names else stamp)
            sys.argv.append(f"hydra.sweep.dir={sweep}")
        given = [literal(argument) for argument in sys.argv[1:] if argument not in ("-m", "--multirun")]
        with _sentences():
            if sweep is not None:  # Hydra's parser wants all overrides in one row
                given = ["--multirun", *given, f"hydra.job.config.override_dirname.exclude_keys={_fixed(given)}"]
            sys.argv[1:] = given
            try:
                hydra_main()
            except KeyboardInterrupt:
                if not problem:
                    raise
        if problem:
            raise problem[0]
        if sweep is not None and sweep.is_dir():
            compare(sweep)
        return 1 if failed else 0

    return main


def _fixed(overrides: Sequence[str]) -> list[str]:
    """The keys of the overrides that have one value, and so do not tell the jobs of a sweep apart."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    given = [override for override in overrides if not override.startswith("-")]
    parsed = OverridesParser.create().parse_overrides(given)
    swept = {override.key_or_group for override in parsed if override.is_sweep_override()}
    return sorted({override.key_or_group for override in parsed} - swept)


def _job_name(overrides: str, number: int) -> str:
    """The folder of a sweep's job: the overrides that are its own, or its number where they make no short name."""
    name = overrides.replace("/", "-") or "default"
    return name if len(name.encode()) <= 150 else f"job-{number}"


def resolve(config: Any) -> dict[str, Any]:
    """Turn Hydra's object into a plain dictionary and check what no part checks for itself.

    Raises:
        PipelineError: A value of the wrong type or out of range.
    """
    from omegaconf import OmegaConf

    settings = OmegaConf.to_container(config, resolve=True)
    settings.pop("hydra", None)
    check(settings)
    if settings["name"] is not None:
        settings["name"] = plain_name(str(settings["name"]))
    return settings


def check(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as they are, if each is there and in its range; of a command line or of a run's `config.yaml`.

    Raises:
        PipelineError: One is missing, of the wrong type or out of range.
    """
    expected = _top_level()
    missing = [key for key in expected if key not in settings]
    if missing:
        raise PipelineError(f"The settings lack {', '.join(missing)}.")
    unknown = [key for key in settings if key not in (*expected, *GROUPS, "hydra", "data_digest")]
    if unknown:
        raise PipelineError(f"There is no setting {unknown[0]!r}; {_hint(unknown[0])}")
    for key, known in CHOICES.items():
        if settings[key] not in known:
            raise PipelineError(
                f"{key} is {settings[key]!r}; known values: {', '.join(str(k).lower() for k in known)}."
            )
    for key in ("epochs", "batch_size"):
        if not is_whole(settings[key]) or not 1 <= settings[key] < 2**31:
            raise PipelineError(f"{key} must be a whole number of at least 1, got {settings[key]!r}.")
    if not is_whole(settings["seed"]) or not 0 <= settings["seed"] < 2**32:
        raise PipelineError(f"seed must be a whole number from 0 to 2**32 - 1, got {settings['seed']!r}.")
    for key in ("label_smoothing", "warmup"):
        if not is_number(settings[key]) or not 0 <= settings[key] < 1:
            raise PipelineError(f"{key} must be at least 0 and below 1, got {settings[key]!r}.")
    for group in GROUPS:
        if not isinstance(settings.get(group), dict):
            raise PipelineError(f"{group} is {settings.get(group)!r}; give the name of one in pipeline/conf/{group}.")
    for group, key in (("dataset", "name"), ("model", "name"), ("optimizer", "name"), ("optimizer", "learning_rate")):
        if key not in settings[group]:
            raise PipelineError(f"The settings lack {group}.{key}; a file of pipeline/conf/{group} sets it.")
    for key, value in settings["optimizer"].items():
        if key == "learning_rate" and not (is_number(value) and value > 0):
            raise PipelineError(f"optimizer.learning_rate must be above 0, got {value!r}.")
        if key == "global_clipnorm" and value == 0:
            raise PipelineError("optimizer.global_clipnorm must be null or above 0: with 0 nothing is learnt.")
        if key not in ("name", "nesterov") and value is not None and not (is_number(value) and value >= 0):
            raise PipelineError(f"optimizer.{key} must be null or a number of at least 0, got {value!r}.")
        if key == "nesterov" and not isinstance(value, bool):
            raise PipelineError(f"optimizer.nesterov must be true or false, got {value!r}.")
    patience = settings["early_stopping"]
    if patience is not None and (not is_whole(patience) or patience < 1):
        raise PipelineError(f"early_stopping must be null or a number of epochs of at least 1, got {patience!r}.")
    return settings


def _top_level() -> list[str]:
    """The settings of `config.yaml` that belong to no group."""
    from omegaconf import OmegaConf

    return [key for key in OmegaConf.load(FOLDER / "config.yaml") if key not in ("defaults", "hydra")]


def plain_name(name: str) -> str:
    """`name` where it can be a run's folder; raises `PipelineError` where it cannot."""
    if name in ("", "latest") or "/" in name or name.startswith((".", "-")):
        raise PipelineError(f"{name!r} cannot be the name of a run; take letters, digits, '-' and '_', as in first.")
    return name


def _hint(key: str) -> str:
    """What may have been meant by a setting that does not exist."""
    import difflib

    from omegaconf import OmegaConf

    groups = sorted(path.name for path in FOLDER.iterdir() if path.is_dir() and path.name != "experiment")
    group, _, inside = key.partition(".")
    inside = inside.split(".")[0]
    if inside and group in groups:
        known = sorted({name for path in (FOLDER / group).glob("*.yaml") for name in OmegaConf.load(path)} - {"name"})
        if inside in known:
            return f"this {group} does not have it; +{key}=… adds it."
        near = difflib.get_close_matches(inside, known, n=1)
        return f"did you mean {group}.{near[0]}?" if near else f"known in {group}: {', '.join(known)}."
    known = _top_level()
    known = [*known, *(name for name in groups if name not in known), "experiment"]
    near = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known ones: {', '.join(known)}, and GROUP.KEY (--cfg job)."


class _sentences:
    """Turns Hydra's and OmegaConf's exceptions into a `PipelineError`."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        from hydra.errors import HydraException, MissingConfigException
        from omegaconf.errors import OmegaConfBaseException

        if isinstance(error, MissingConfigException) and error.options:
            group, _, name = str(error.missing_cfg_file).rpartition("/")
            known = ", ".join(sorted(error.options))
            raise PipelineError(f"There is no {group} {name!r}; known ones: {known}.") from None
        unknown = re.match(r"Could not override '([^']+)'", str(error))
        if unknown is not None:
            raise PipelineError(f"There is no setting {unknown[1]!r}; {_hint(unknown[1])}") from None
        if "Config group override must be a string" in str(error):
            raise PipelineError("A group (dataset, model, augment, optimizer, experiment) takes a name.") from None
        if str(error).startswith("Ambiguous value for argument"):
            given = str(error).splitlines()[0].split("'")[1]
            raise PipelineError(
                f"{given} holds a comma: add --multirun to try each of the values, or quote the value twice to take it "
                f"as it is."
            ) from None
        if str(error).startswith("LexerNoViableAltException: "):
            given = first_line(str(error).partition(": ")[2])
            raise PipelineError(
                f'{given} holds letters that need quotes around each value, as in \'dataset.classes=["chat","дом"]\'.'
            ) from None
        if isinstance(error, HydraException | OmegaConfBaseException):
            cause = error.__cause__ if "\n" not in str(error.__cause__ or "\n") else error
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            detail = f" ({str(cause).splitlines()[0]})" if cause is not error and cause is not None else ""
            raise PipelineError(f"{lines[0]}{detail} The settings are listed by --cfg job.") from None
