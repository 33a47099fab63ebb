"""The command ``python -m export.tftrt``."""

from __future__ import annotations

import argparse

from export import tensorrt_library
from export.tftrt import PRECISIONS, export
from pipeline import runs
from pipeline.core import cli
from pipeline.evaluate import exports


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m export.tftrt",
        description="Build the TF-TRT engines of a run in its export folder, and print their size, accuracy and speed. "
        "Needs an NVIDIA GPU and TensorRT 8.6.",
        epilog="Example: python -m export.tftrt --run runs/first --precision INT8",
    )
    parser.add_argument("--run", help="run folder or name (default: runs/latest)")
    parser.add_argument(
        "--precision", default="INT8", type=str.upper, choices=PRECISIONS, help="(default: %(default)s)"
    )
    parser.add_argument("--data-dir", help="folder of the run's dataset, if it has moved")
    arguments = parser.parse_args()
    tensorrt_library.require()
    run = runs.find(arguments.run)
    dataset = run.load_dataset(data_dir=arguments.data_dir)
    from rich.console import Console

    with Console(stderr=True).status(f"calibrating, building and measuring {arguments.precision} engines"):
        path = export(run, dataset, arguments.precision)
    exports.print_table(run, ["model.keras", path.name])
    row = exports.recorded(run)[path.name]
    print(f"{row['nodes_converted']} of {row['nodes']} nodes converted, engines: {row['engines']}")
    print(f"written to {path}")


if __name__ == "__main__":
    cli.run(main)
