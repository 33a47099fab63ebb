"""Several machines train one network: every process holds all of it, and gradients are averaged after each step.

    cluster=slurm          # one task a node, as scripts/slurm.sh starts them
    cluster=environment    # the variable TF_CONFIG names the workers

TensorFlow's own cluster resolvers find the workers and its collective operations (NCCL or gRPC) add the gradients. A
training step then is: gradients in one flat buffer, its sum over all workers, update; XLA, where it is on, compiles the
first and the last of them.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import math
import os
import signal
from collections.abc import Sequence
from typing import Any

import numpy

from pipeline.core import device
from pipeline.core.errors import PipelineError, first_line

KINDS = ("none", "slurm", "environment")


LAUNCHER = "PIPELINE_LAUNCHER"  # the variable that tells workers by which command all of them were started


FIRST_PORT, TASKS_A_NODE = 16000, 16  # of Slurm's job steps: 16 ports each, all below those that Linux hands out


LOST = 3  # exit code of a worker that ends because another one has


GROUP_KEY = 7001  # of TensorFlow's collectives; any number nobody else uses


HOSTS_GROUP_KEY = 7002  # of those on the CPUs, whichever devices the others run on


class Key(enum.IntEnum):
    """Which of a program's collectives a worker means; TensorFlow matches the workers' calls by it."""

    GRADIENTS = 1
    STATISTICS = 2
    BARRIER = 3
    VALIDATION = 4
    WEIGHTS = 5
    FACTS = 6


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers of a training.

    Attributes:
        index: This process, from 0; process 0 alone writes the run folder.
        count: Number of processes.
        communication: How the sums travel: "nccl" (between GPUs), "ring" (TensorFlow's own, through the hosts).
    """

    index: int = 0
    count: int = 1
    communication: str = "ring"

    @property
    def is_chief(self) -> bool:
        return self.index == 0

    def average(self, tensors: Sequence[Any], key: Key) -> list[Any]:
        """The mean of each tensor over all workers, in the tensor's own dtype; every worker must call it alike.

        Args:
            tensors: Float tensors of any shapes; they travel as one float32 buffer.
            key: Tells this call from the others in a program.
        """
        if self.count == 1:
            return list(tensors)
        return self.unpack(self.all_reduce(self.pack(tensors), key) / self.count, tensors)

    def broadcast(self, variables: Sequence[Any]) -> None:
        """Give every worker the first one's values of float Keras variables; every worker must call it alike."""
        if self.count == 1:
            return
        tf = device.tensorflow()
        values = [v.value if self.is_chief else tf.zeros_like(v.value) for v in variables]
        firsts = self.unpack(self.all_reduce(self.pack(values), Key.WEIGHTS), values)
        for variable, value in zip(variables, firsts, strict=True):
            variable.assign(value)

    def assert_same_config(self, facts: dict[str, str]) -> None:
        """Make sure that all workers mean the same training; every worker must call it.

        Args:
            facts: What must be alike, as text, by its name in a sentence; the names themselves must be alike.

        Raises:
            PipelineError: Some are not; in all workers, with the same sentence.
        """
        if self.count == 1:
            return
        tf = device.tensorflow()
        table = numpy.zeros((self.count, len(facts)), numpy.float32)  # a row a worker; its own, until they are summed
        table[self.index] = [int.from_bytes(hashlib.sha256(fact.encode()).digest()[:3]) for fact in facts.values()]
        with tf.device("CPU:0"):  # by gRPC in any case: how gradients travel may be what is not alike
            table = _sum(self.count, tf.constant(table), Key.FACTS, HOSTS_GROUP_KEY, "ring").numpy()
        others = [index for index in range(self.count) if (table[index] != table[0]).any()]
        if others:
            different = [
                name for name, own, first in zip(facts, table[others[0]], table[0], strict=True) if own != first
            ]
            raise PipelineError(
                f"All workers must train alike; worker {others[0]} and worker 0 have different: {', '.join(different)}."
            )

    def pack(self, tensors: Sequence[Any]) -> Any:
        """One float32 buffer of all tensors, [sum of their sizes]; XLA can compile it."""
        tf = device.tensorflow()
        return tf.concat([tf.reshape(tf.cast(tensor, tf.float32), [-1]) for tensor in tensors], axis=0)

    def all_reduce(self, packed: Any, key: Key) -> Any:
        """A buffer added up over all workers; nothing that XLA can compile between processes."""
        return _sum(self.count, packed, key, GROUP_KEY, self.communication)

    def unpack(self, packed: Any, like: Sequence[Any]) -> list[Any]:
        """The tensors in a buffer of `pack`, with the shapes and dtypes of `like`; XLA can compile it."""
        tf = device.tensorflow()
        parts = tf.split(packed, [math.prod(tensor.shape) for tensor in like])
        return [tf.cast(tf.reshape(part, tensor.shape), tensor.dtype) for part, tensor in zip(parts, like, strict=True)]

    def barrier(self) -> None:
        """Wait for all workers: one that leaves early is a lost one to the others."""
        self.average([device.tensorflow().zeros([1])], Key.BARRIER)


def _sum(count: int, tensor: Any, key: Key, group: int, communication: str) -> Any:
    return device.tensorflow().raw_ops.CollectiveReduceV2(
        input=tensor, group_size=count, group_key=group, instance_key=int(key), ordering_token=[],
        merge_op="Add", final_op="Id", communication_hint=communication,
    )  # fmt: skip


def connect(kind: str, communication: str = "auto") -> Cluster:
    """Join the other workers; returns when all of them are there.

    Must be called before TensorFlow does anything else.

    Args:
        kind: One of `KINDS`.
        communication: "nccl", "ring", or "auto": NCCL where this worker has a GPU.

    Raises:
        PipelineError: An unknown kind, or the environment does not describe a cluster.
    """
    if kind not in KINDS:
        raise PipelineError(f"cluster is {kind!r}; known values: {', '.join(KINDS)}.")
    if kind == "none":
        return Cluster()
    if kind == "environment" and "TF_CONFIG" not in os.environ:
        raise PipelineError("cluster=environment needs the variable TF_CONFIG; set it in every worker's environment.")
    tf = device.tensorflow()
    try:
        resolvers = tf.distribute.cluster_resolver
        resolver = _slurm_resolver() if kind == "slurm" else resolvers.TFConfigClusterResolver()
        jobs = resolver.cluster_spec().as_dict()
        if set(jobs) != {"worker"}:
            raise PipelineError(
                f"cluster={kind} describes {', '.join(jobs) or 'nobody'}; every process must be a worker."
            )
        workers = jobs["worker"]
        hosts = ",".join(sorted({worker.rpartition(":")[0] for worker in workers}))
        # gRPC would take a proxy even to localhost.
        around = os.environ.get("no_grpc_proxy", os.environ.get("no_proxy"))  # noqa: SIM112
        os.environ["no_grpc_proxy"] = f"{around},{hosts}" if around else hosts  # noqa: SIM112
        # The strategy is not used; making it starts this worker's server and connects it to the others.
        tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver)
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))  # the server has put its own in its place
        if communication == "auto":
            communication = "nccl" if device.has_gpu() else "ring"
        return Cluster(int(resolver.task_id), len(workers), communication)
    except (ValueError, KeyError, RuntimeError, OSError, tf.errors.OpError) as error:
        raise PipelineError(f"cluster={kind} did not come together ({first_line(error)}).", exit_code=1) from None


def _slurm_resolver() -> Any:
    """The workers of a step of a Slurm job, any number of tasks a node, each with the GPUs that Slurm gave it.

    TensorFlow reads Slurm's variables. Its `SlurmClusterResolver` does more with them than is right here: it sorts the
    nodes as text, where Slurm numbers the tasks in the order of the list (node9 before node10); it fails where a task
    sees fewer GPUs than tasks share its node; and it takes the same ports for every job.

    Raises:
        PipelineError: This is no step of a Slurm job, or too many tasks share a node.
    """
    tf = device.tensorflow()
    from tensorflow.python.distribute.cluster_resolver import slurm_cluster_resolver as slurm

    try:
        rank, job, step = (int(os.environ[f"SLURM_{name}"]) for name in ("PROCID", "JOB_ID", "STEP_ID"))
        hosts = slurm.expand_hostlist(os.environ["SLURM_STEP_NODELIST"])
        tasks = slurm.expand_tasks_per_node(os.environ["SLURM_STEP_TASKS_PER_NODE"])
    except (KeyError, ValueError) as error:
        raise PipelineError(
            f"cluster=slurm is for a step of a Slurm job; start it with srun, as scripts/slurm.sh does ({error})."
        ) from None
    if len(hosts) != len(tasks):
        raise PipelineError(f"Slurm's variables name {len(hosts)} nodes and task counts of {len(tasks)}; start again.")
    if max(tasks) > TASKS_A_NODE:
        raise PipelineError(f"{max(tasks)} tasks share a node; cluster=slurm takes up to {TASKS_A_NODE}.")
    port = FIRST_PORT + TASKS_A_NODE * ((31 * job + step) % 1024)
    workers = [f"{host}:{port + task}" for host, count in zip(hosts, tasks, strict=True) for task in range(count)]
    return tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": workers}), task_type="worker", task_id=rank, rpc_layer="grpc"
    )


def per_worker_batch(batch_size: int, count: int) -> int:
    """What each of `count` workers takes of a batch of at least one image.

    Raises:
        PipelineError: They cannot share it evenly.
    """
    images, rest = divmod(batch_size, count)
    if rest:
        raise PipelineError(
            f"A batch of {batch_size} images cannot be shared evenly by {count} workers; set batch_size to a multiple "
            f"of {count}."
        )
    return images


def nccl_line(error: Exception) -> str | None:
    """The line of an error that speaks of NCCL; None where none does."""
    return next((first_line(line) for line in str(error).splitlines() if "nccl" in line.lower()), None)


def is_lost_worker(error: Exception, workers: Cluster) -> bool:
    """Whether an error of a training step says that another worker has ended."""
    errors = device.tensorflow().errors
    kinds = (errors.UnavailableError, errors.AbortedError, errors.CancelledError, errors.DeadlineExceededError)
    return workers.count > 1 and isinstance(error, kinds)
