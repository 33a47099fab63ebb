"""What does a custom operation cost or gain inside a network? ``python -m benchmarks.operations``

Trains each network that has one in four ways on the same loop: with the project's compiled operation without XLA and
with XLA's clusters around it, with TensorFlow's own operations without XLA, and with those in a loop that XLA compiles
whole, which it cannot with a custom one. The figures are images/s, augmentation included, the median of whole epochs
after one that compiles. On a CPU the ways with XLA are left out, as they are in training.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

from benchmarks import results
from benchmarks.timing import timed_epochs
from pipeline import ops
from pipeline.core import cli, config, device
from pipeline.data.load import load_from_settings
from pipeline.train import setup

NETWORKS = ("vit_lite", "fashion_mlp")
WAYS = {
    "custom operation": ["model.operations=custom", "xla=false"],
    "custom, XLA clusters": ["model.operations=custom", "xla=clusters"],
    "TensorFlow's own": ["model.operations=tensorflow", "xla=false"],
    "TensorFlow's own, XLA": ["model.operations=tensorflow", "xla=true"],
}


def measure(settings: dict[str, Any], dataset: Any, epochs: int) -> dict[str, Any]:
    """Train one way.

    Returns:
        The figures of `timed_epochs`, and the mean training ``loss`` of the last epoch.
    """
    setup.seed_everything(settings["seed"])
    loop = setup.build_loop(settings, dataset)
    figures, loss = timed_epochs(loop, dataset, epochs)
    return {**figures, "loss": loss}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operations", description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=3, help="measured epochs, after the one that compiles")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of the training")
    arguments = parser.parse_args()
    chosen = [f"dataset={arguments.dataset}", f"batch_size={arguments.batch_size}", "optimizer=adam", *arguments.set]
    chosen += [f"data_dir={arguments.data_dir}"] if arguments.data_dir else []
    dataset = load_from_settings(config.compose([*chosen, f"model={arguments.networks[0]}"])["dataset"])
    ops.build()  # where there is no compiler, say so now
    ways = {name: way for name, way in WAYS.items() if device.has_gpu() or "xla=false" in way}
    figures: dict[str, Any] = {"dataset": dataset.name, "train_images": len(dataset.train.labels), "runs": []}
    print(f"{'network':<12}" + "".join(f"{name:>24}" for name in ways))
    for network in arguments.networks:
        line = f"{network:<12}"
        for name, way in ways.items():
            settings = config.compose([*chosen, f"model={network}", *way])
            run = measure(settings, dataset, arguments.epochs)
            if not math.isfinite(run["loss"]):
                raise ValueError(f"{network}, {name}: the loss is {run['loss']}")
            figures["precision"] = setup.resolve_precision(settings["precision"])
            figures["runs"].append({"network": network, "way": name, "settings": [*chosen, *way], **run})
            line += f"{run['images_per_second']:>22,.0f}/s"
        print(line, flush=True)
    print(f"written to {results.save('operations', figures)}")


if __name__ == "__main__":
    cli.run(main)
