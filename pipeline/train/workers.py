"""Several processes of this machine train one network, a GPU each: ``python -m pipeline.workers COUNT OVERRIDES…``

python -m pipeline.workers 2 dataset=cifar10 data_dir=DATA model=resnet18 batch_size=256 name=pair

It starts `python -m pipeline.train cluster=environment` COUNT times, each with its own GPU and the description of all
of them (``TF_CONFIG``), and waits. Without a GPU the processes share the cores. On a cluster take scripts/slurm.sh.
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

SECONDS_TO_FOLLOW = 20  # what stops one worker stops the others, each by itself; inside NCCL it takes a lost heartbeat


SECONDS_TO_STOP = 10  # after a polite kill: who waits for another worker inside TensorFlow does not hear it


PORTS = range(20000, 32768)  # below those that Linux hands out by itself


PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


def environments(count: int) -> list[dict[str, str]]:
    """What tells each of `count` workers who it is and which GPU is its own: ``TF_CONFIG``, ``CUDA_VISIBLE_DEVICES``.

    Raises:
        PipelineError: There are GPUs, but fewer than workers.
    """
    gpus = device.gpu_count()
    if gpus and count > gpus:
        raise PipelineError(f"{count} workers need a GPU each, and this machine has {gpus}; set PIPELINE_DEVICE=cpu.")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(str(gpu) for gpu in range(gpus))).split(",")
    addresses = [f"localhost:{port}" for port in _free_ports(count)]
    described = [
        {"TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})}
        for index in range(count)
    ]
    if gpus:
        for index, environment in enumerate(described):
            environment["CUDA_VISIBLE_DEVICES"] = visible[index]
    return described


def _free_ports(count: int) -> list[int]:
    """Ports that are free now, and that Linux hands to nobody else before the workers take them."""
    free: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        if len(free) == count:
            break
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            free.append(port)
    return free


def start(count: int, overrides: Sequence[str]) -> int:
    """Train with `count` workers and wait for them; the first one speaks for all, unless another one fails.

    Args:
        overrides: As for `python -m pipeline.train`; without ``name=`` or ``resume=`` the time names the run.

    Returns:
        0, 130 after Ctrl-C or a polite kill, or the exit code of the worker that failed; the others are stopped then.

    Raises:
        PipelineError: A bad override, ``cluster=`` among them, too few GPUs, or a worker ended without a word.
    """
    settings = config.compose(overrides)
    if settings["cluster"] != "none":
        raise PipelineError("The workers of one machine find each other; leave out cluster=.")
    if settings["resume"] is None:
        cluster.per_worker_batch(settings["batch_size"], count)
    name = settings["resume"] or settings["name"]
    if name is None:
        name = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-workers"
        overrides = [*overrides, f"name={name}"]
    command = [sys.executable, "-m", "pipeline.train", *overrides, "cluster=environment"]
    die_with_me = functools.partial(ctypes.CDLL(None).prctl, PARENT_DEATH_SIGNAL, int(signal.SIGKILL))
    with contextlib.ExitStack() as held:
        problems = [held.enter_context(tempfile.TemporaryFile()) for _ in range(count)]
        workers: list[subprocess.Popen[Any]] = []
        try:
            for index, environment in enumerate(environments(count)):
                environment = {**os.environ, **environment, cluster.LAUNCHER: f"python -m pipeline.workers {count}"}
                silent = {"stdout": subprocess.DEVNULL, "stderr": problems[index]} if index else {}
                workers.append(subprocess.Popen(command, env=environment, preexec_fn=die_with_me, **silent))
            codes = _wait(workers)
        except KeyboardInterrupt as asked:
            if not asked.args:  # of a terminal's Ctrl-C every process has heard itself
                _end_within(SECONDS_TO_FOLLOW, workers)
            stop(workers)
            if workers and workers[0].returncode == 130:  # it has said how to go on
                return 130
            raise PipelineError(
                f"Stopped by {cli.stopped_by(asked)}. If an epoch was finished, go on with: "
                f"python -m pipeline.workers {count} resume={shlex.quote(name)}",
                exit_code=130,
            ) from None
        stop(workers)
        return _verdict(codes, problems)


def _verdict(codes: Sequence[int | None], problems: Sequence[Any]) -> int:
    """The exit code of all workers, from those of the ones that ended by themselves; says what the first does not.

    Args:
        codes: Exit code of each worker; None for one that had to be stopped.
        problems: What each wrote to standard error, as open files.
    """
    if codes[0] == 0:  # the run is finished, whatever became of the others
        return 0
    causes = [index for index, code in enumerate(codes) if code not in (0, None, cluster.LOST)]
    if not causes:
        return 1
    failed = min(causes, key=lambda index: codes[index] > 0)  # who was killed first: the others have failed of it
    problems[failed].seek(0)
    sys.stderr.write(problems[failed].read().decode(errors="backslashreplace"))
    if codes[failed] < 0:
        raise PipelineError(f"Worker {failed} was ended by {signal.Signals(-codes[failed]).name}.", exit_code=1)
    return codes[failed]


def _wait(workers: Sequence[subprocess.Popen[Any]]) -> list[int | None]:
    """Wait until the first has ended, or another one not well, and the others have had a while to follow it.

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
    """Wait for all of them to end by themselves, but no longer."""
    deadline = time.monotonic() + seconds
    for worker in workers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(max(0.0, deadline - time.monotonic()))


def stop(workers: Sequence[subprocess.Popen[Any]]) -> None:
    """End what still runs: politely, and after `SECONDS_TO_STOP`, or on a second Ctrl-C, by force."""
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
