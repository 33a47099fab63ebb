"""Measure the training speed with and without the custom operations: ``python -m benchmarks.operations``

Trains each network that contains a custom operation in four variants: custom operations without XLA, custom operations
with XLA clusters, TensorFlow's operations without XLA, and TensorFlow's operations with XLA. The figures are images/s
including augmentation, as the median of whole epochs after one that compiles. On a CPU the variants with XLA are
skipped, because training does not use XLA there.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks import results
from benchmarks.timing import timed_epochs
from pipeline.core import cli, config, device
from pipeline.data.load import load_from_settings
from pipeline.ops import building
from pipeline.train import setup

NETWORKS = ("vit_lite", "fashion_mlp")
VARIANTS = {
    "custom operation": ["model.operations=custom", "xla=false"],
    "custom, XLA clusters": ["model.operations=custom", "xla=clusters"],
    "TensorFlow's own": ["model.operations=tensorflow", "xla=false"],
    "TensorFlow's own, XLA": ["model.operations=tensorflow", "xla=true"],
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operations", description=__doc__.split(":")[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS, help="(default: all)")
    parser.add_argument("--batch-size", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="epochs after one that compiles (default: %(default)s)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings, such as dataset=cifar10")
    arguments = parser.parse_args()
    chosen = ["dataset=digits", f"batch_size={arguments.batch_size}", "optimizer=adam", *arguments.set]
    dataset = load_from_settings(config.compose([*chosen, f"model={arguments.networks[0]}"]).dataset)
    building.build()  # fail early without a compiler
    variants = {name: overrides for name, overrides in VARIANTS.items() if device.has_gpu() or "xla=false" in overrides}
    figures: dict[str, Any] = {"dataset": dataset.name, "train_images": len(dataset.train.labels), "runs": []}
    print(f"{'network':<12}" + "".join(f"{name:>24}" for name in variants))
    for network in arguments.networks:
        line = f"{network:<12}"
        for name, overrides in variants.items():
            settings = setup.resolve(config.compose([*chosen, f"model={network}", *overrides]))
            setup.seed_everything(settings.seed)
            run, loss = timed_epochs(setup.build_loop(settings, dataset), dataset, arguments.epochs)
            figures["precision"] = settings.precision
            figures["runs"].append(
                {"network": network, "way": name, "settings": [*chosen, *overrides], **run, "loss": loss}
            )
            line += f"{run['images_per_second']:>22,.0f}/s"
        print(line, flush=True)
    print(f"written to {results.save('operations', figures)}")


if __name__ == "__main__":
    cli.run(main)
