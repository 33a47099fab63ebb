"""Several training processes on one machine, with one GPU each: ``python -m pipeline.workers COUNT OVERRIDES…``

It starts `python -m pipeline.train cluster=environment` COUNT times and waits. Each process gets the description of all
of them (``TF_CONFIG``). Without a GPU the processes share the cores. On a cluster use scripts/slurm.sh.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import functools
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from pipeline.core import cli, config, device
from pipeline.core.errors import PipelineError
from pipeline.train import cluster

SECONDS_TO_FOLLOW = 20  # until all processes end after the first one; inside NCCL, only a lost heartbeat ends them
SECONDS_TO_STOP = 10  # from SIGTERM to SIGKILL; a process that waits inside TensorFlow ignores SIGTERM
PORTS = range(20000, 32768)  # below the range that Linux assigns
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


def environments(count: int) -> list[dict[str, str]]:
    """Environment variables (TF_CONFIG, CUDA_VISIBLE_DEVICES) that assign a number and a GPU to each process.

    Raises:
        PipelineError: There are GPUs, but fewer than `count`.
    """
    gpus = device.gpu_count()
    if gpus and count > gpus:
        raise PipelineError(
            f"{count} training processes need one GPU each, and this machine has {gpus}; start {gpus}, or set "
            "PIPELINE_DEVICE=cpu."
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(str(gpu) for gpu in range(gpus))).split(",")
    addresses = [f"localhost:{port}" for port in free_ports(count)]
    described = [
        {"TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})}
        for index in range(count)
    ]
    if gpus:
        for index, environment in enumerate(described):
            environment["CUDA_VISIBLE_DEVICES"] = visible[index]
    return described


def free_ports(count: int) -> list[int]:
    """Find free ports of this machine, outside the range that Linux assigns to other programs."""
    free: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        if len(free) == count:
            break
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            free.append(port)
    return free


def start(count: int, overrides: Sequence[str]) -> int:
    """Train with `count` processes and wait for them; only process 0 prints, unless another process fails.

    Args:
        count: Number of processes.
        overrides: As for `python -m pipeline.train`; without ``name=`` or ``resume=``, the run is named by the time.

    Returns:
        0, 130 after Ctrl-C or SIGTERM, or the exit code of the process that failed; the others are then stopped.

    Raises:
        PipelineError: An override is invalid or sets ``cluster=``, there are too few GPUs, or a process was killed.
    """
    settings = config.compose(overrides)
    if settings.cluster != "none":
        raise PipelineError(f"pipeline.workers sets the cluster itself; leave out cluster={settings.cluster}.")
    if settings.resume is None:
        cluster.per_worker_batch(settings.batch_size, count)
    name = settings.resume or settings.name
    if name is None:
        name = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-workers"
        overrides = [*overrides, f"name={name}"]
    command = [sys.executable, "-m", "pipeline.train", *overrides, "cluster=environment"]
    die_with_me = functools.partial(ctypes.CDLL(None).prctl, PARENT_DEATH_SIGNAL, int(signal.SIGKILL))
    with contextlib.ExitStack() as stack:
        problems = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(count)]
        workers: list[subprocess.Popen[Any]] = []
        try:
            for index, environment in enumerate(environments(count)):
                environment = {**os.environ, **environment, cluster.LAUNCHER: f"python -m pipeline.workers {count}"}
                silent = {"stdout": subprocess.DEVNULL, "stderr": problems[index]} if index else {}
                workers.append(subprocess.Popen(command, env=environment, preexec_fn=die_with_me, **silent))
            codes = _wait(workers)
        except KeyboardInterrupt as stopped:
            if not stopped.args:  # the terminal has sent Ctrl-C to every process
                _end_within(SECONDS_TO_FOLLOW, workers)
            stop(workers)
            if workers and workers[0].returncode == 130:  # this process has printed how to resume
                return 130
            raise PipelineError(
                f"Stopped by {cli.stopped_by(stopped)}. If an epoch was finished, resume with: "
                f"python -m pipeline.workers {count} resume={shlex.quote(name)}",
                exit_code=130,
            ) from stopped
        stop(workers)
        return _verdict(codes, problems)


def _verdict(codes: Sequence[int | None], problems: Sequence[Any]) -> int:
    """The exit code of the training; prints the error output of the process that failed first.

    Args:
        codes: Exit code of each process; None for one that had to be stopped.
        problems: Standard error of each, as open files.
    """
    if codes[0] == 0:  # the run is finished, whatever happened to the others
        return 0
    causes = [index for index, code in enumerate(codes) if code not in (0, None, cluster.LOST)]
    if not causes:
        return 1
    failed = min(causes, key=lambda index: codes[index] > 0)  # a killed process causes the errors of the others
    problems[failed].seek(0)
    sys.stderr.write(problems[failed].read().decode(errors="backslashreplace"))
    if codes[failed] < 0:
        signal_name = signal.Signals(-codes[failed]).name
        raise PipelineError(f"Training process {failed} was ended by {signal_name}.", exit_code=1)
    return codes[failed]


def _wait(workers: Sequence[subprocess.Popen[Any]]) -> list[int | None]:
    """Wait until process 0 has ended or another one has failed, then give the others time to end.

    Returns:
        The exit code of each; None for one that still runs.
    """
    codes = [worker.poll() for worker in workers]
    while codes[0] is None and not any(codes):
        time.sleep(0.2)
        codes = [worker.poll() for worker in workers]
    _end_within(SECONDS_TO_FOLLOW, workers)
    return [worker.poll() for worker in workers]


def _end_within(seconds: float, workers: Sequence[subprocess.Popen[Any]]) -> None:
    """Wait at most `seconds` for all processes to end."""
    deadline = time.monotonic() + seconds
    for worker in workers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(max(0.0, deadline - time.monotonic()))


def stop(workers: Sequence[subprocess.Popen[Any]]) -> None:
    """End the processes that still run: by SIGTERM, and after `SECONDS_TO_STOP` or a second Ctrl-C by SIGKILL."""
    try:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
        _end_within(SECONDS_TO_STOP, workers)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
