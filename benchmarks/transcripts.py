"""What do the everyday commands print on this machine? ``python -m benchmarks.transcripts NAME …``

Some answers are no figure but the output of a command: that all tests of ``tests/gpu`` pass, that the six notebooks
run through on CIFAR-10, that TF-TRT's engines answer in a process of their own. Each is run as a user would run it, in
the project's folder, and the lines it printed are kept with its seconds. A command that fails keeps nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import ROOT, check_names, environment, results
from pipeline.core import cli, config, device
from pipeline.core.errors import PipelineError
from pipeline.data.load import load_from_settings

COMMANDS = {
    "pipeline": "python -m pipeline -p dataset cifar10 -p data_dir DATA",
    "trt_infer": "python -m export.trt_infer image.png",
    "test_gpu": "make test-gpu",
}


def transcribe(words: Sequence[str], shown: dict[str, str], folder: Path = ROOT) -> dict[str, Any] | None:
    """Run a command; its lines appear here as they come.

    Args:
        words: The command and its arguments.
        folder: Where it is run.
        shown: What stands in the kept lines instead of a folder of this machine, by that folder.

    Returns:
        ``seconds`` and ``output``, the lines of standard output; None if the command failed.
    """
    started = time.perf_counter()
    lines = []
    variables = {**environment(), "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    with subprocess.Popen(words, cwd=folder, env=variables, stdout=subprocess.PIPE, encoding="utf-8") as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            for place, name in shown.items():
                line = line.replace(place, name)
            lines.append(line.rstrip())
    seconds = time.perf_counter() - started
    return None if process.returncode else {"seconds": round(seconds, 1), "output": lines}


def write_image(data_dir: str, path: Path) -> str:
    """Write CIFAR-10's first test image as a PNG; returns the name of its class."""
    from PIL import Image

    dataset = load_from_settings(config.compose(["dataset=cifar10", f"data_dir={data_dir}"])["dataset"])
    Image.fromarray(device.to_numpy(dataset.test.images[:1])[0]).save(path)
    return dataset.class_names[int(device.to_numpy(dataset.test.labels[:1])[0])]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transcripts", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="+", metavar="NAME", help="; ".join(f"{n}: {c}" for n, c in COMMANDS.items()))
    parser.add_argument("--data-dir", help="where CIFAR-10 is, for pipeline and trt_infer")
    parser.add_argument("--workers", type=cli.positive, default=1, metavar="N", help="processes of test_gpu")
    arguments = parser.parse_args()
    check_names("transcript", arguments.names, COMMANDS)
    data_dir = str(Path(arguments.data_dir).absolute()) if arguments.data_dir else None
    if data_dir is None and set(arguments.names) != {"test_gpu"}:
        raise PipelineError("pipeline and trt_infer need --data-dir, the folder CIFAR-10 is in or is downloaded to.")
    if set(arguments.names) & {"trt_infer", "test_gpu"} and not device.has_gpu():
        raise PipelineError(
            "trt_infer and test_gpu need an NVIDIA GPU, and none was found here; what works without one: "
            "python -m benchmarks.transcripts pipeline"
        )
    failed = []
    for name in arguments.names:
        command, more, folder = COMMANDS[name], {}, ROOT
        with tempfile.TemporaryDirectory() as temporary:
            words = command.split()
            if name == "test_gpu":
                words.append(f"PY={sys.executable}")
                if arguments.workers > 1:
                    shared = f"-n {arguments.workers} --dist loadfile"
                    words.append(f"ARGS={shared}")
                    command += f' ARGS="{shared}"'
            else:
                places = {"python": sys.executable, "DATA": data_dir}
                words = [places.get(word, word) for word in words]
            if name == "trt_infer":  # in a folder with the picture and the runs
                folder = Path(temporary)
                (folder / "runs").symlink_to(ROOT / "runs")
                more = {"true_label": write_image(data_dir, folder / "image.png")}
            shown = {f"{ROOT}/": "", str(ROOT): ".", **({data_dir: "DATA"} if data_dir else {})}
            shown |= {f"{packages}/": "" for packages in sys.path if packages}
            answer = transcribe(words, shown, folder)
        if answer is None:
            failed.append(name)
        else:
            print(f"written to {results.save(f'transcript-{name}', more | answer, command)}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main)
