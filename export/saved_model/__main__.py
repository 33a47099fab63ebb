"""The command ``python -m export.saved_model``."""

from __future__ import annotations

import argparse

from export.saved_model import save
from pipeline import runs
from pipeline.core import cli


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m export.saved_model",
        description="Write the SavedModel of a run to its export folder, for TensorFlow and TensorFlow Serving.",
        epilog="Example: python -m export.saved_model --run runs/first",
    )
    parser.add_argument("--run", help="run folder or name (default: runs/latest)")
    print(save(runs.find(parser.parse_args().run)))


if __name__ == "__main__":
    cli.run(main)
