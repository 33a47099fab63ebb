"""Data-parallel training: each process has a copy of the network, and gradients are averaged in each step.

    cluster=slurm          # one task per node, as scripts/slurm.sh starts them
    cluster=environment    # the variable TF_CONFIG lists the processes

TensorFlow's cluster resolvers find the processes, and its collective operations (NCCL or gRPC) add the gradients. XLA
compiles the sum by NCCL into the training loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import hashlib
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy

from pipeline.core import device
from pipeline.core.errors import PipelineError, first_line

LAUNCHER = "PIPELINE_LAUNCHER"  # environment variable with the command that started all processes
FIRST_PORT, TASKS_PER_NODE = 16000, 16  # 16 ports per Slurm job step, below the range that Linux assigns
LOST = 3  # exit code of a process that ends because another one has ended
OTHER_ENDED = "Another process of this training has ended."
SECONDS_BETWEEN_CHECKS = 5.0  # whether the other processes still run
GROUP_KEY = 7001  # of TensorFlow's collectives; any unused number
HOSTS_GROUP_KEY = 7002  # of the collectives on the CPUs
XLA_GROUP_KEY = 7003  # of those that XLA compiles; it connects by the id of the group, which works only once


class Key(enum.IntEnum):
    """Keys by which TensorFlow matches the collective operations of the processes."""

    GRADIENTS = 1
    STATISTICS = 2
    BARRIER = 3
    VALIDATION = 4
    WEIGHTS = 5
    FACTS = 6


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of a training. Every process must call the same methods in the same order.

    Attributes:
        index: Number of this process, from 0; only process 0 writes the run folder.
        count: Number of processes.
        communication: How sums are computed: "nccl" (between GPUs) or "ring" (TensorFlow's, through host memory).
    """

    index: int = 0
    count: int = 1
    communication: str = "ring"

    @property
    def is_chief(self) -> bool:
        return self.index == 0

    def total(self, values: Sequence[Any], key: Key, *, xla: bool = False) -> list[Any]:
        """Add each value over all processes; they are sent as one float32 buffer.

        Args:
            values: Float tensors or numbers.
            key: The same in all processes, and another one for each place in the code.
            xla: Whether XLA compiles the graph that calls this, which requires NCCL.

        Returns:
            Tensors with the shapes and dtypes of `values`, on the same device.
        """
        tf = device.tensorflow()
        tensors = [tf.convert_to_tensor(value) for value in values]
        if self.count == 1:
            return tensors
        group, communication = (XLA_GROUP_KEY, "nccl") if xla else (GROUP_KEY, self.communication)
        buffer = tf.concat([tf.reshape(tf.cast(tensor, tf.float32), [-1]) for tensor in tensors], axis=0)
        sums = tf.split(
            _sum(self.count, buffer, key, group, communication), [math.prod(tensor.shape) for tensor in tensors]
        )
        return [
            tf.cast(tf.reshape(sum_, tensor.shape), tensor.dtype) for sum_, tensor in zip(sums, tensors, strict=True)
        ]

    def broadcast(self, variables: Sequence[Any]) -> None:
        """Copy the values of float Keras variables from process 0 to all processes."""
        tf = device.tensorflow()
        values = [v.value if self.is_chief else tf.zeros_like(v.value) for v in variables]
        for variable, value in zip(variables, self.total(values, Key.WEIGHTS), strict=True):
            variable.assign(value)

    def assert_same_config(self, facts: dict[str, str]) -> None:
        """Verify that the configuration of all processes is identical.

        Args:
            facts: Values that must be identical, as text by name; all processes must pass the same names.

        Raises:
            PipelineError: There are differences; every process raises the same message.
        """
        if self.count == 1:
            return
        tf = device.tensorflow()
        table = numpy.zeros((self.count, len(facts)), numpy.float32)  # one row per process, filled by the sum
        table[self.index] = [int.from_bytes(hashlib.sha256(fact.encode()).digest()[:3]) for fact in facts.values()]
        with tf.device("CPU:0"):  # always by gRPC, because the communication may be what differs
            table = _sum(self.count, tf.constant(table), Key.FACTS, HOSTS_GROUP_KEY, "ring").numpy()
        others = [index for index in range(self.count) if (table[index] != table[0]).any()]
        if others:
            different = [name for name, same in zip(facts, table[others[0]] == table[0], strict=True) if not same]
            raise PipelineError(
                f"All training processes need the same settings; processes 0 and {others[0]} differ in: "
                f"{', '.join(different)}."
            )

    @contextlib.contextmanager
    def watch_peers(self, explanation: Callable[[], str]) -> Iterator[None]:
        """Inside the block, end this process with exit code `LOST` if another one has ended.

        Without this, a process waits forever for a lost one inside the NCCL kernel of its GPU. Process 0 checks all
        others, and they check process 0, as TensorFlow's `MultiWorkerMirroredStrategy` does.

        Args:
            explanation: Called before this process ends; its text is added to the error message.
        """
        finished = threading.Event()
        if self.count > 1:
            threading.Thread(target=self._watch, args=(finished, explanation), daemon=True).start()
        try:
            yield
        finally:
            finished.set()

    def _watch(self, finished: threading.Event, explanation: Callable[[], str]) -> None:
        from tensorflow.python.eager import context

        errors = device.tensorflow().errors
        failures = 0
        while not finished.wait(SECONDS_BETWEEN_CHECKS):
            try:
                for index in range(1, self.count) if self.is_chief else [0]:
                    task = f"/job:worker/replica:0/task:{index}"
                    context.context().check_collective_ops_peer_health(task, timeout_in_ms=10_000)
                failures = 0
            except (errors.UnavailableError, errors.FailedPreconditionError, errors.DeadlineExceededError):
                failures += 1  # the first time, this process may still end by itself
            if failures == 2:
                print(f"error: {OTHER_ENDED} {explanation()}", file=sys.stderr, flush=True)
                os._exit(LOST)

    def barrier(self) -> None:
        """Wait for all processes."""
        self.total([0.0], Key.BARRIER)

    def leave(self) -> None:
        """Wait for all processes at the end; process 0 has saved the run, so it ignores the loss of another process."""
        try:
            self.barrier()
        except Exception as error:  # TensorFlow reports a lost process by several kinds of errors
            if not (self.is_chief and explain(error, self)):
                raise


def _sum(count: int, tensor: Any, key: Key, group: int, communication: str) -> Any:
    return device.tensorflow().raw_ops.CollectiveReduceV2(
        input=tensor, group_size=count, group_key=group, instance_key=int(key), ordering_token=[],
        merge_op="Add", final_op="Id", communication_hint=communication,
    )  # fmt: skip


def connect(kind: str, communication: str) -> Cluster:
    """Join the other processes; returns when all of them have joined.

    Must be called before TensorFlow does anything else.

    Args:
        kind: "none", "slurm" or "environment".
        communication: "nccl" or "ring".

    Raises:
        PipelineError: The environment does not describe a cluster, or the processes do not find each other.
    """
    if kind == "none":
        return Cluster()
    if kind == "environment" and "TF_CONFIG" not in os.environ:
        raise PipelineError("cluster=environment needs the variable TF_CONFIG; set it for every training process.")
    tf = device.tensorflow()
    try:
        resolvers = tf.distribute.cluster_resolver
        resolver = _slurm_resolver() if kind == "slurm" else resolvers.TFConfigClusterResolver()
        jobs = resolver.cluster_spec().as_dict()
        if set(jobs) != {"worker"}:
            raise PipelineError(f"cluster={kind} supports only processes of the type worker, got {list(jobs)}.")
        workers = jobs["worker"]
        hosts = ",".join(sorted({worker.rpartition(":")[0] for worker in workers}))
        # gRPC would use a proxy even for localhost.
        around = os.environ.get("no_grpc_proxy", os.environ.get("no_proxy"))  # noqa: SIM112
        os.environ["no_grpc_proxy"] = f"{around},{hosts}" if around else hosts  # noqa: SIM112
        # The strategy is not used, but creating it starts this process's server and connects it to the others.
        tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver)
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))  # the server has replaced the handler
        return Cluster(int(resolver.task_id), len(workers), communication)
    except (ValueError, KeyError, RuntimeError, OSError, tf.errors.OpError) as error:
        raise PipelineError(f"cluster={kind} could not connect ({first_line(error)}).", exit_code=1) from error


def _slurm_resolver() -> Any:
    """The processes of a Slurm job step; each has the GPUs that Slurm assigned to its task.

    TensorFlow reads Slurm's variables. Its `SlurmClusterResolver` is not usable here: it sorts the nodes as text, but
    Slurm numbers the tasks in the order of the list (node9 before node10); it fails if a task sees fewer GPUs than its
    node has tasks; and it uses the same ports for every job.

    Raises:
        PipelineError: This is not a step of a Slurm job, or too many tasks share a node.
    """
    tf = device.tensorflow()
    from tensorflow.python.distribute.cluster_resolver import slurm_cluster_resolver as slurm

    try:
        rank, job, step = (int(os.environ[f"SLURM_{name}"]) for name in ("PROCID", "JOB_ID", "STEP_ID"))
        hosts = slurm.expand_hostlist(os.environ["SLURM_STEP_NODELIST"])
        tasks = slurm.expand_tasks_per_node(os.environ["SLURM_STEP_TASKS_PER_NODE"])
    except (KeyError, ValueError) as error:
        raise PipelineError(
            f"cluster=slurm needs a step of a Slurm job; start it with srun, as scripts/slurm.sh does ({error})."
        ) from error
    if len(hosts) != len(tasks) or max(tasks) > TASKS_PER_NODE:
        raise PipelineError(
            f"cluster=slurm supports up to {TASKS_PER_NODE} tasks per node, got {tasks} on {len(hosts)} nodes."
        )
    port = FIRST_PORT + TASKS_PER_NODE * ((31 * job + step) % 1024)
    workers = [f"{host}:{port + task}" for host, count in zip(hosts, tasks, strict=True) for task in range(count)]
    return tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": workers}), task_type="worker", task_id=rank, rpc_layer="grpc"
    )


def per_worker_batch(batch_size: int, count: int) -> int:
    """The number of images of a batch that each of `count` processes gets.

    Raises:
        PipelineError: The batch cannot be divided evenly.
    """
    images, rest = divmod(batch_size, count)
    if rest:
        raise PipelineError(
            f"A batch of {batch_size} images cannot be divided evenly among {count} processes; set batch_size to a "
            f"multiple of {count}."
        )
    return images


def explain(error: Exception, workers: Cluster) -> PipelineError | None:
    """Convert an error caused by NCCL or by another process to a `PipelineError`; return None for other errors."""
    if workers.communication == "nccl":
        line = next((first_line(line) for line in str(error).splitlines() if "nccl" in line.lower()), None)
        if line is not None:
            fix = "if no other process has ended, set communication=ring"
            return PipelineError(f"NCCL failed ({line}); {fix}.", exit_code=1)
    errors = device.tensorflow().errors
    kinds = (errors.UnavailableError, errors.AbortedError, errors.CancelledError, errors.DeadlineExceededError)
    if workers.count > 1 and isinstance(error, kinds):
        return PipelineError(OTHER_ENDED, exit_code=LOST)
    return None
