"""Open the notebooks in JupyterLab: python -m pipeline.lab [JUPYTERLAB OPTION ...]"""

from __future__ import annotations

import os
import sys

from pipeline.core import cli
from pipeline.notebooks import chapters, execution

HELP = """\
usage: python -m pipeline.lab [-h] [--help-all] [JUPYTERLAB OPTION ...]

Open the notebooks in JupyterLab, with this interpreter as the kernel. It uses notebooks/ in the current folder or, if
there is none, in the project's checkout. runs/ and logs/ are written to the current folder. Stop with Ctrl-C.

options:
  -h, --help    show this help message and exit
  --help-all    show all options of JupyterLab and exit

examples:
  python -m pipeline.lab
  python -m pipeline.lab --port 8890 --no-browser"""


def main() -> None:
    """Start JupyterLab with the first notebook open, and serve until Ctrl-C."""
    if {"-h", "--help"} & set(sys.argv):
        print(HELP)
        return
    from jupyterlab.labapp import LabApp

    first = chapters.discover()[0].path
    options = [
        f"--ServerApp.root_dir={first.parent.parent.absolute()}",
        f"--LabApp.default_url=/lab/tree/{first.parent.name}/{first.name}",
        "--MultiKernelManager.default_kernel_name=python3",
    ]
    if os.geteuid() == 0:  # in a container; Jupyter does not start otherwise
        options.append("--ServerApp.allow_root=True")
    with execution.private_kernels():
        LabApp.launch_instance([*options, *sys.argv[1:]])


if __name__ == "__main__":
    cli.run(main)
