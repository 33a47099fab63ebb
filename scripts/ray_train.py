"""Train one network in several processes with Ray Train: python scripts/ray_train.py COUNT [SETTING=VALUE ...]

Each Ray worker runs `python -m pipeline.train … cluster=environment` in the folder where this command was started, with
the TF_CONFIG that Ray Train has set. If a process ends, Ray starts all of them again from the newest checkpoint.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works without `pip install -e .`, as python -m does

from pipeline.core import cli, config
from pipeline.core.errors import PipelineError
from pipeline.train import cluster

WRONG_USE = 2  # exit code for an invalid setting, which a restart does not correct
SET_BY_RAY = ("OMP_NUM_THREADS", "TF_CPP_MIN_LOG_LEVEL", "TF_USE_LEGACY_KERAS")  # not for the training processes
OF_A_RESUMED_RUN = ("data_dir=", "communication=", "xla=")  # the run folder contains the other settings


def work(job: dict[str, Any]) -> int:
    """Run one training process; Ray calls this in each worker, where the project need not be importable."""
    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    overrides = job["resume"] if Path(job["folder"], job["run"], "config.yaml").is_file() else job["start"]
    inherited = {name: value for name, value in os.environ.items() if name not in SET_BY_RAY}
    code = subprocess.call(
        [sys.executable, "-m", "pipeline.train", *overrides, "cluster=environment"],
        cwd=job["folder"],
        env={"PIPELINE_LOG": f"logs/ray-{index}.log", **inherited, "PIPELINE_LAUNCHER": job["launcher"]},
        stdout=subprocess.DEVNULL if index else None,
        preexec_fn=lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL),  # PR_SET_PDEATHSIG: end with the worker
    )
    if code not in (0, WRONG_USE):
        raise RuntimeError(f"Training process {index} has ended with exit code {code}.")
    return code


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python scripts/ray_train.py",
        description="Train one network in several processes with Ray Train, each with its own GPU if there are GPUs. "
        "Uses the running Ray cluster, or starts Ray on this machine. All machines need this folder and the data at "
        "the same paths.",
        epilog="example: python scripts/ray_train.py 2 dataset=cifar10 data_dir=data model=resnet18 batch_size=256",
    )
    parser.add_argument("count", type=cli.positive, metavar="COUNT", help="number of processes")
    parser.add_argument("overrides", nargs="*", metavar="SETTING=VALUE", help="settings of python -m pipeline.train")
    parser.add_argument("--max-failures", type=int, default=3, help="number of restarts (default: %(default)s)")
    arguments = parser.parse_intermixed_args()
    launcher = f"python scripts/ray_train.py {arguments.count}"
    settings, overrides = config.compose(arguments.overrides), arguments.overrides
    name = settings.name or f"{datetime.datetime.now():%Y%m%d-%H%M%S}-ray"
    run = Path("runs", name)
    if settings.resume is None:
        cluster.per_worker_batch(settings.batch_size, arguments.count)
        if (run / "config.yaml").exists():
            raise PipelineError(f"{run} contains a run already; choose another name=…, or resume={run}.")
        resume = [f"resume={run}", *(override for override in overrides if override.startswith(OF_A_RESUMED_RUN))]
        if settings.name is None:
            overrides = [*overrides, f"name={name}"]
    else:
        run, resume = Path(settings.resume), overrides
    job = {"folder": str(Path.cwd()), "run": str(run), "start": overrides, "resume": resume, "launcher": launcher}
    hint = f"If an epoch was finished, resume with: {launcher} resume={shlex.quote(str(run))}"
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "TF_CPP_MIN_LOG_LEVEL": "3"}
    try:
        import ray.train
        from ray.train.tensorflow import TensorflowTrainer
    except ImportError as error:
        raise PipelineError("scripts/ray_train.py needs Ray; run: pip install -r requirements-extras.txt") from error
    terminated = signal.getsignal(signal.SIGTERM)
    ray.init(include_dashboard=False, logging_level="warning", logging_config=ray.LoggingConfig(log_level="ERROR"))
    signal.signal(signal.SIGTERM, terminated)  # Ray's handler aborts this process
    try:
        gpus = ray.cluster_resources().get("GPU", 0) and os.environ.get("PIPELINE_DEVICE") != "cpu"
        result = TensorflowTrainer(
            work,
            train_loop_config=job,
            scaling_config=ray.train.ScalingConfig(num_workers=arguments.count, use_gpu=bool(gpus)),
            run_config=ray.train.RunConfig(
                name=run.name,
                storage_path=str(Path("logs/ray").resolve()),
                failure_config=ray.train.FailureConfig(
                    max_failures=arguments.max_failures, controller_failure_limit=arguments.max_failures
                ),
            ),
        ).fit()
    except ray.train.TrainingFailedError as error:
        restarts = arguments.max_failures
        raise PipelineError(f"The training failed after {restarts} restarts; see above. {hint}", exit_code=1) from error
    except (KeyboardInterrupt, SystemExit) as stop:  # on Ctrl-C, Ray stops the training processes and exits
        raise PipelineError(f"Stopped. {hint}", exit_code=130) from stop
    finally:
        ray.shutdown()
    return result.return_value


if __name__ == "__main__":
    cli.run(main)
