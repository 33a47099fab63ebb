"""python -m pipeline.lab: JupyterLab on the notebooks, with kernels of this interpreter.

What follows goes to JupyterLab: python -m pipeline.lab --port 8890 --no-browser
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.core import cli
from pipeline.core.errors import PipelineError
from pipeline.notebooks import chapters, execution


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the current folder, opened at the first notebook, until Ctrl-C.

    Args:
        arguments: JupyterLab's own options; those of the process by default.

    Raises:
        PipelineError: JupyterLab is not installed, or there are no notebooks here.
    """
    try:
        from jupyterlab.labapp import LabApp
    except ModuleNotFoundError as error:
        raise PipelineError(
            f"{error.name} is not installed for {sys.executable}; run: make lab (or pip install -r requirements.txt)"
        ) from None
    first = chapters.discover()[0].path
    here = Path.cwd()
    options = [
        f"--ServerApp.root_dir={here}",
        f"--LabApp.default_url=/lab/tree/{first}",
        "--MultiKernelManager.default_kernel_name=python3",
    ]
    if os.geteuid() == 0:  # in a container; Jupyter refuses it otherwise
        options.append("--ServerApp.allow_root=True")
    with execution.private_kernels():
        LabApp.launch_instance([*options, *(sys.argv[1:] if arguments is None else arguments)])
    return 0


if __name__ == "__main__":
    cli.run(main)
