"""Exit codes and messages of commands."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core import cli
from pipeline.core.errors import PipelineError

REPOSITORY = Path(__file__).resolve().parents[2]


def raises(error, cause=None):
    def main():
        raise error from cause

    return main


@pytest.mark.parametrize(
    ("main", "code", "word"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (raises(PipelineError("no disk", 1)), 1, "no disk"),
        (raises(KeyboardInterrupt()), 130, "Ctrl-C"),
        (raises(KeyboardInterrupt("SIGTERM")), 130, "SIGTERM"),
        (raises(PermissionError(13, "Permission denied", "model.keras")), 1, "Permission denied: 'model.keras'"),
        (raises(OSError("truncated file")), 1, "truncated file"),
        (raises(BrokenPipeError(32, "Broken pipe")), 1, "Broken pipe"),  # a socket; standard output is open
        (raises(MemoryError()), 1, "memory"),
    ],
)
def test_commands_end_with_a_code_and_one_line(main, code, word, capsys, monkeypatch):
    monkeypatch.delenv("PIPELINE_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    printed = capsys.readouterr().err
    assert end.value.code == code and word in printed
    assert len(printed.strip().splitlines()) == (1 if word else 0)


@pytest.mark.parametrize("error", [PipelineError("no disk"), OSError("no disk"), KeyboardInterrupt()])
def test_the_traceback_has_all_causes(error, capsys, monkeypatch):
    monkeypatch.setenv("PIPELINE_TRACEBACK", "1")
    with pytest.raises(SystemExit):
        cli.run(raises(error, ZeroDivisionError("the cause")))
    printed = capsys.readouterr().err
    assert "ZeroDivisionError: the cause" in printed and type(error).__name__ in printed


def command(code):
    return [sys.executable, "-c", f"import os, sys, time\nfrom pipeline.core import cli\n{code}"]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_ends_early_is_not_an_error(lines, unbuffered):
    code = f"def main():\n  time.sleep(0.5)\n  for i in range({lines}): print(i)\ncli.run(main)"
    environment = {**ENVIRONMENT, "PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(
        command(code), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_help_for_a_reader_that_has_ended_is_not_an_error():
    code = "import argparse\ntime.sleep(0.5)\ncli.run(lambda: argparse.ArgumentParser().parse_args(['--help']))"
    with subprocess.Popen(
        command(code),
        env={**ENVIRONMENT, "PYTHONUNBUFFERED": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_a_full_disk_on_standard_output_is_an_error():
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        answer = subprocess.run(
            command("cli.run(lambda: print('text'))"), env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert answer.returncode == 1
    assert "No space left" in answer.stderr and len(answer.stderr.splitlines()) == 1


def test_sigterm_ends_the_called_command_first():
    child = "import time; print('started', flush=True); time.sleep(60)"
    code = f"cli.run(lambda: cli.call([sys.executable, '-c', {child!r}]))"
    with subprocess.Popen(
        command(code), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == ""  # ends when the child has ended
        assert "SIGTERM" in process.stderr.read()
    assert process.returncode == 130


@pytest.mark.parametrize(("message", "by"), [("<EMPTY MESSAGE>", "Ctrl-C"), ("SIGTERM", "SIGTERM")])
def test_an_interrupt_inside_tensorflow_is_an_interrupt(message, by):
    with pytest.raises(KeyboardInterrupt) as stop, cli.interrupts():
        raise RuntimeError(f"AbortedError: x\n\nAt:\n  KeyboardInterrupt: {message}\n\nAt:\n")
    assert cli.stopped_by(stop.value) == by
    with pytest.raises(RuntimeError), cli.interrupts():
        raise RuntimeError("another error")
