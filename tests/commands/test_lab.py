"""`python -m pipeline.lab`: JupyterLab opens the first chapter, with this interpreter as the kernel."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from pipeline.commands import lab

ROOT = Path(__file__).resolve().parents[2]


def test_the_kernel_is_this_interpreter_also_outside_the_checkout(tmp_path):
    other = tmp_path / "data" / "kernels" / "python3"
    other.mkdir(parents=True)
    content = {"argv": ["/bin/false"], "display_name": "other", "language": "python"}
    (other / "kernel.json").write_text(json.dumps(content), encoding="utf-8")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    options = ["--no-browser", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=secret"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JUPYTER_DATA_DIR": str(tmp_path / "data"),
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
    }
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "pipeline.lab", *options],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:

        def ask(path):
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}{path}", headers={"Authorization": "token secret"}
            )
            deadline = time.monotonic() + 60
            while True:
                try:
                    with urllib.request.urlopen(request, timeout=10) as answer:
                        return answer.read(), answer.url
                except urllib.error.URLError:
                    assert time.monotonic() < deadline, (tmp_path / "log").read_text(encoding="utf-8")
                    assert server.poll() is None, (tmp_path / "log").read_text(encoding="utf-8")
                    time.sleep(0.2)

        specifications = json.loads(ask("/api/kernelspecs")[0])
        assert specifications["default"] == "python3"
        assert specifications["kernelspecs"]["python3"]["spec"]["argv"][0] == sys.executable
        assert json.loads(ask("/api/contents/notebooks/01_data.ipynb?content=0")[0])["type"] == "notebook"
        assert ask("/")[1].split("?")[0].endswith("/lab/tree/notebooks/01_data.ipynb")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


def test_the_help_is_short_and_names_the_options_of_jupyterlab(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lab", "--help"])
    lab.main()
    text = capsys.readouterr().out
    assert "--help-all" in text and len(text.splitlines()) < 20
