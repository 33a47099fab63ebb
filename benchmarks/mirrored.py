"""Measure TensorFlow's `MultiWorkerMirroredStrategy`: ``python -m benchmarks.mirrored --data-dir DATA``

The same work as benchmarks.workers without augmentation: ResNet-18 on CIFAR-10 with 512 images per process and
mixed_float16, one process for each GPU. The figure is the images/s of all processes together (median of whole epochs).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import environment, results
from pipeline import models
from pipeline.core import cli, device
from pipeline.core.errors import PipelineError
from pipeline.data.load import load_dataset
from pipeline.train import setup
from pipeline.train.loop import cross_entropy
from pipeline.train.workers import environments

BATCH_SIZE = 512
RESULT = "images/s: "


def train(data_dir: str, precision: str, xla: bool, epochs: int) -> None:
    """Train in one of the processes that TF_CONFIG lists; prints the images/s of all of them.

    Args:
        data_dir: Folder of CIFAR-10.
        precision: Name of the dtype policy.
        xla: Whether XLA compiles the gradients. It cannot compile the strategy's sum and the update after it.
        epochs: Number of epochs; the first one compiles and is not measured.
    """
    tf = device.tensorflow()
    import keras

    communication = tf.distribute.experimental.CommunicationImplementation
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=communication.NCCL if device.has_gpu() else communication.RING
    )
    strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    count = strategy.num_replicas_in_sync
    dataset = load_dataset("cifar10", data_dir=data_dir, progress=False)
    steps = len(dataset.train) // (BATCH_SIZE * count)
    shape = (steps, BATCH_SIZE, *dataset.image_shape)
    uint8 = device.to_tensorflow(dataset.train.images[: steps * BATCH_SIZE])
    images = tf.cast(tf.reshape(uint8, shape), tf.float16 if "float16" in precision else tf.float32) / 255
    labels = tf.reshape(device.to_tensorflow(dataset.train.labels[: steps * BATCH_SIZE]), shape[:2])
    with setup.precision_policy(precision), strategy.scope():
        network = models.build("resnet18", dataset.image_shape, dataset.num_classes)
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True)
        optimizer.build(network.trainable_variables)

    @tf.function(jit_compile=xla)
    def gradients_of(images, labels):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(cross_entropy(tf, network(images, training=True), labels, 0.1))
        return tape.gradient(loss, network.trainable_variables)

    def step(images, labels):
        # Keras's optimizer adds the gradients of all processes before it applies them.
        gradients = [gradient / count for gradient in gradients_of(images, labels)]
        optimizer.apply(gradients, network.trainable_variables)

    @tf.function
    def epoch():
        for index in tf.range(steps):
            strategy.run(step, args=(images[index], labels[index]))
        return tf.reduce_sum(network.trainable_variables[0])

    seconds = []
    for _ in range(epochs):
        started = time.perf_counter()
        float(epoch())
        seconds.append(time.perf_counter() - started)
    print(f"{RESULT}{steps * BATCH_SIZE * count / statistics.median(seconds[1:])}", flush=True)


def measure(count: int, arguments: list[str]) -> float:
    """Start `count` processes with these arguments; return the images/s that the first one prints.

    Raises:
        PipelineError: A process failed; its error message is on standard error.
    """
    command = [sys.executable, "-m", "benchmarks.mirrored", *arguments, "--worker"]
    processes = [
        subprocess.Popen(command, env={**environment(), **variables}, stdout=subprocess.PIPE, text=True)
        for variables in environments(count)
    ]
    printed = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise PipelineError("A process failed; see its error message above.", 1)
    return float(printed[0].rpartition(RESULT)[2])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mirrored", description=__doc__.split(":")[0])
    parser.add_argument("--data-dir", required=True, help="folder of CIFAR-10, or of its download")
    parser.add_argument("--counts", type=cli.positive, nargs="+", help="numbers of processes (default: 1 and all GPUs)")
    parser.add_argument("--precision", default="mixed_float16", help="dtype policy (default: %(default)s)")
    parser.add_argument("--xla", action=argparse.BooleanOptionalAction, default=True, help="compile with XLA")
    parser.add_argument("--epochs", type=int, default=5, help="the first one compiles (default: %(default)s)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return train(arguments.data_dir, arguments.precision, arguments.xla, arguments.epochs)
    data = ["--data-dir", str(Path(arguments.data_dir).absolute()), "--precision", arguments.precision]
    passed = [*data, "--xla" if arguments.xla else "--no-xla", "--epochs", str(arguments.epochs)]
    measured = []
    for count in arguments.counts or [1, device.gpu_count()]:
        measured.append({"workers": count, "images_per_second": measure(count, passed)})
        print(f"{count} processes: {measured[-1]['images_per_second']:,.0f} images/s", flush=True)
    settings = {"precision": arguments.precision, "xla": arguments.xla, "batch_size_per_process": BATCH_SIZE}
    print(f"written to {results.save('mirrored', {**settings, 'runs': measured})}")


if __name__ == "__main__":
    cli.run(main)
