"""The configuration: Hydra composes it from `pipeline/conf` and the command line; mistakes become one sentence."""

from __future__ import annotations

import datetime
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline import PipelineError

FOLDER = Path(__file__).parent / "conf"
CHOICES = {
    "precision": ("auto", "float32", "mixed_bfloat16", "mixed_float16"),
    "schedule": ("one_cycle", "cosine", "constant"),
    "xla": ("auto", True, False),
}
TEXTS = ("name", "resume", "data_dir", "dataset.data_dir", "dataset.cache_dir")  # taken as they are typed


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
        job = about.job.override_dirname or "default"
        try:
            print(f"--- {job}")
            settings = resolve(config)
            settings["name"] = f"{Path(about.sweep.dir).name}/{job.replace('/', '-')}"
            work(settings, list(about.overrides.task))
        except PipelineError as error:
            if error.exit_code == 130:
                raise
            failed.append(job)
            print(f"error: {job}: {error}", file=sys.stderr)

    def main() -> int:
        os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through, instead of Hydra's own report
        program = Path(sys.argv[0])
        sys.argv[0] = f"python -m {program.parent.name}.{program.stem}" if program.suffix == ".py" else sys.argv[0]
        sweep = None
        if {"-m", "--multirun"} & set(sys.argv):
            names = [argument[5:] for argument in sys.argv if argument.startswith("name=")]
            sys.argv = [argument for argument in sys.argv if not argument.startswith("name=")]
            stamp = datetime.datetime.now().strftime("multirun-%Y%m%d-%H%M%S")
            sweep = Path("runs") / _plain_name(names[-1] if names else stamp)
            sys.argv.append(f"hydra.sweep.dir={sweep}")
            # Hydra's parser wants all overrides in one row.
            overrides = [argument for argument in sys.argv[1:] if argument not in ("-m", "--multirun")]
            sys.argv[1:] = ["--multirun", *overrides]
        sys.argv[1:] = [argument if sweep and "," in argument else literal(argument) for argument in sys.argv[1:]]
        with _sentences():
            hydra_main()
        if problem:
            raise problem[0]
        if sweep is not None and sweep.is_dir():
            compare(sweep)
        return 1 if failed else 0

    return main


def resolve(config: Any) -> dict[str, Any]:
    """Turn Hydra's object into a plain dictionary and check what no part checks for itself.

    Raises:
        PipelineError: A value of the wrong type or out of range.
    """
    from omegaconf import OmegaConf

    settings = OmegaConf.to_container(config, resolve=True)
    settings.pop("hydra", None)
    for key, known in CHOICES.items():
        if settings[key] not in known:
            raise PipelineError(
                f"{key} is {settings[key]!r}; known values: {', '.join(str(k).lower() for k in known)}."
            )
    for key in ("epochs", "batch_size"):
        if not isinstance(settings[key], int) or isinstance(settings[key], bool) or settings[key] < 1:
            raise PipelineError(f"{key} must be a whole number of at least 1, got {settings[key]!r}.")
    if not isinstance(settings["seed"], int) or not 0 <= settings["seed"] < 2**32:
        raise PipelineError(f"seed must be a whole number from 0 to 2**32 - 1, got {settings['seed']!r}.")
    for key in ("label_smoothing", "warmup"):
        if not isinstance(settings[key], int | float) or not 0 <= settings[key] < 1:
            raise PipelineError(f"{key} must be at least 0 and below 1, got {settings[key]!r}.")
    if (
        not isinstance(settings["optimizer"]["learning_rate"], int | float)
        or settings["optimizer"]["learning_rate"] <= 0
    ):
        raise PipelineError(f"optimizer.learning_rate must be above 0, got {settings['optimizer']['learning_rate']!r}.")
    patience = settings["early_stopping"]
    if patience is not None and (not isinstance(patience, int) or patience < 1):
        raise PipelineError(f"early_stopping must be null or a number of epochs of at least 1, got {patience!r}.")
    if settings["name"] is not None:
        settings["name"] = _plain_name(str(settings["name"]))
    return settings


def _plain_name(name: str) -> str:
    """`name` where it can be a run's folder; raises `PipelineError` where it cannot."""
    if name in ("", "latest") or "/" in name or name.startswith("."):
        raise PipelineError(f"name is {name!r}; give a plain folder name, other than latest.")
    return name


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
            import difflib

            from omegaconf import OmegaConf

            known = [key for key in OmegaConf.load(FOLDER / "config.yaml") if key not in ("defaults", "hydra")]
            near = difflib.get_close_matches(unknown[1], known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known ones: {', '.join(known)}, and GROUP.KEY (--cfg job)."
            raise PipelineError(f"There is no setting {unknown[1]!r}; {hint}") from None
        if isinstance(error, HydraException | OmegaConfBaseException):
            cause = error.__cause__ if "\n" not in str(error.__cause__ or "\n") else error
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            detail = f" ({str(cause).splitlines()[0]})" if cause is not error and cause is not None else ""
            raise PipelineError(f"{lines[0]}{detail} The settings are listed by --cfg job.") from None
