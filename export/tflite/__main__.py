"""The command ``python -m export.tflite``."""

from __future__ import annotations

import argparse

from export.tflite import export
from pipeline import runs
from pipeline.core import cli
from pipeline.evaluate import exports


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m export.tflite",
        description="Write the float32, float16 and INT8 TFLite files of a run to its export folder, and print their "
        "size, accuracy and speed.",
        epilog="Example: python -m export.tflite --run runs/first",
    )
    parser.add_argument("--run", help="run folder or name (default: runs/latest)")
    parser.add_argument("--data-dir", help="folder of the run's dataset, if it has moved")
    arguments = parser.parse_args()
    run = runs.find(arguments.run)
    dataset = run.load_dataset(data_dir=arguments.data_dir)
    from rich.console import Console

    with Console(stderr=True).status("converting, calibrating and measuring"):
        paths = export(run, dataset)
    exports.print_table(run, ["model.keras", *(path.name for path in paths.values())])
    print(f"written to {run.export_dir}")


if __name__ == "__main__":
    cli.run(main)
