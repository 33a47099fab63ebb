"""Find a learning rate with a short range test: python -m pipeline.find_lr [SETTING=VALUE ...]"""

from __future__ import annotations

import argparse

from pipeline import runs
from pipeline.core import cli

DESCRIPTION = """\
Find a learning rate before a training: train about 100 steps with a growing learning rate and measure the loss
(Smith, 2017). It takes the settings of python -m pipeline.train, prints a suggestion and saves a figure in
runs/find_lr, but no network."""

EXAMPLE = "example: python -m pipeline.find_lr dataset=cifar10 data_dir=data model=resnet18 optimizer=adamw"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.find_lr",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="SETTING=VALUE", help="a setting of python -m pipeline.train")
    arguments, unknown = parser.parse_known_intermixed_args()

    from pipeline.data.load import load_from_settings
    from pipeline.evaluate import figures
    from pipeline.train import plan
    from pipeline.train.find_lr import range_test

    settings = plan.complete(plan.read_overrides(arguments.overrides, unknown)).settings
    result = range_test(settings, load_from_settings(settings.dataset))
    name = f"{settings.dataset.name}-{settings.model.name}-{settings.optimizer.name}"
    path = runs.RUNS / "find_lr" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figures.save_figure(path, figures.learning_rate_figure(result.rates, result.losses, result.suggestion))
    print(
        f"suggested: optimizer.learning_rate={result.suggestion:g} (configured: {settings.optimizer.learning_rate:g}); "
        f"the training loss was lowest at {result.rates[result.losses.argmin()]:.2g}\nfigure: {path}"
    )


if __name__ == "__main__":
    cli.run(main)
