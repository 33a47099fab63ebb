"""The configuration: Hydra composes it from `pipeline/conf` and the overrides of the command line.

settings = compose(["dataset=cifar10", "epochs=5"])
settings.dataset.name, settings.epochs
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import PipelineError, first_line

if TYPE_CHECKING:
    from pipeline.core.settings import Settings

FOLDER = Path(__file__).parent.parent / "conf"

# Settings that Hydra must not parse.
TEXTS = ("name", "resume", "init", "data_dir", "dataset.data_dir", "dataset.cache_dir")
FORMER_NAMES = {"model.alpha": "model.negative_slope"}


def compose(overrides: Sequence[str] = ()) -> Settings:
    """Compose and validate the settings.

    Args:
        overrides: As on the command line: ``["dataset=cifar10", "epochs=5"]``.

    Raises:
        PipelineError: A name is unknown, or a value is invalid.
    """
    from hydra import compose as hydra_compose
    from omegaconf import OmegaConf

    from pipeline.core.settings import Settings

    with _hydra():
        composed = hydra_compose("config", overrides=[literal(override) for override in overrides])
        settings = Settings.parse(OmegaConf.to_container(composed, resolve=True))
    if settings.name is not None:
        plain_name(settings.name)
    return settings


def sweep(overrides: Sequence[str]) -> dict[str, list[str]]:
    """Expand a multirun into one job for each combination of values.

    Args:
        overrides: As on the command line; ``seed=1,2`` lists two values.

    Returns:
        The overrides of each job, by job name. The name consists of the overrides that differ between the jobs.

    Raises:
        PipelineError: Hydra cannot parse an override.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    with _hydra():
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        parsed = parser.parse_overrides([literal(override) for override in overrides])
        (combinations,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    swept = {override.get_key_element() for override in parsed if override.is_sweep_override()}
    jobs = {}
    for number, given in enumerate(combinations):
        own = sorted(override for override in given if override.partition("=")[0] in swept)
        name = ",".join(own).replace("/", "-") or "default"
        jobs[name if len(name.encode()) <= 150 else f"job-{number}"] = given
    return jobs


def overrides(**values: Any) -> list[str]:
    """Overrides ``key=value`` for `compose`, one for each value that is not None."""
    return [f"{key}={value}" for key, value in values.items() if value is not None]


def literal(override: str) -> str:
    """Rewrite an override for Hydra: replace a former name, and quote the value of a setting in `TEXTS`.

    Without quotes, Hydra's grammar rejects ``data_dir=Photos (2024)`` and all non-ASCII letters.
    """
    key, separator, value = override.partition("=")
    if key in FORMER_NAMES:
        return f"{FORMER_NAMES[key]}={value}"
    if key.lstrip("+") not in TEXTS or not separator or value in ("", "null") or value[0] in "'\"":
        return override
    value = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value)
    return f"{key}='{value}'"


def plain_name(name: str) -> str:
    """Check that `name` can be the name of a run folder, and return it.

    Raises:
        PipelineError: The name is empty or ``latest``, contains ``/``, or begins with ``.`` or ``-``.
    """
    if name in ("", "latest") or "/" in name or name.startswith((".", "-")):
        raise PipelineError(f"{name!r} cannot be the name of a run; use letters, digits, '-' and '_'.")
    return name


def _hint(key: str) -> str:
    """A suggestion for a setting that does not exist."""
    from omegaconf import OmegaConf

    groups = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
    group, _, inside = key.partition(".")
    prefix, inside = (f"{group}.", inside.split(".")[0]) if inside and group in groups else ("", key)
    if prefix:
        known = sorted({name for path in (FOLDER / group).glob("*.yaml") for name in OmegaConf.load(path)})
        known = [name for name in known if name not in ("name", "defaults")]
        if inside in known:
            return f"this {group} does not have it; add it with +{key}=…"
    else:
        known = sorted({*OmegaConf.load(FOLDER / "config.yaml"), *groups} - {"defaults"})
    near = difflib.get_close_matches(inside, known, n=1)
    return f"did you mean {prefix}{near[0]}?" if near else f"known settings: {', '.join(known)} (--cfg job prints all)."


@contextlib.contextmanager
def _hydra() -> Iterator[None]:
    """Initialize Hydra with the folder `conf`, and convert errors of Hydra and OmegaConf to `PipelineError`."""
    from hydra import initialize_config_dir
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(config_dir=str(FOLDER), version_base=None):
            yield
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        text = str(error)
        given = first_line(text.partition(": ")[2])
        unknown = re.match(r"Could not override '([^']+)'", text)
        if isinstance(error, MissingConfigException) and error.options:
            group, _, name = str(error.missing_cfg_file).rpartition("/")
            message = f"There is no {group} {name!r}; known names: {', '.join(sorted(error.options))}."
        elif unknown is not None:
            message = f"There is no setting {unknown[1]!r}; {_hint(unknown[1])}"
        elif "Config group override must be a string" in text:
            message = "dataset, model, augment, optimizer and experiment must be names, as in model=cnn."
        elif not isinstance(error, HydraException | OmegaConfBaseException):
            raise
        elif text.startswith("Ambiguous value for argument"):
            message = (
                f"{text.splitlines()[0].split(chr(39))[1]} contains a comma; add --multirun to try each of the values, "
                "or quote the value twice to use it as one value."
            )
        elif text.startswith("LexerNoViableAltException: "):
            message = f'{given} contains letters that need quotes, as in \'dataset.classes=["chat","дом"]\'.'
        else:
            cause = error.__cause__ if "\n" not in str(error.__cause__ or "\n") else None
            message = f"{first_line(text)}{f' ({first_line(cause)})' if cause else ''}; --cfg job prints all settings."
        raise PipelineError(message) from error
