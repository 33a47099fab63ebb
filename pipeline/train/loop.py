"""The training loop on the device: an epoch is one augmentation launch, a hand-over, and one call of a compiled graph.

    loop = Loop(network, optimizer, policy, mean, std, …)
    for epoch in range(epochs):
        logs = loop.train_epoch(dataset.train, epoch)
    loop.evaluate(dataset.validation)

The kernel writes the images in the epoch's order, so the graph only takes slices: nothing but the permutation crosses
the bus. Where an epoch is larger than the memory set aside for it (or, on a CPU, than a second or so of work), it is
done in shards of whole batches.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy

from pipeline import augment, ops
from pipeline.core import device
from pipeline.core.errors import PipelineError, first_line
from pipeline.train.cluster import Cluster, Key, per_worker_batch
from pipeline.train.loss_scale import GradientScaler

SINGLE = Cluster()


SHARD_FRACTION_OF_FREE_MEMORY = 0.25


CPU_STEPS_PER_SHARD = 16  # so that the progress bar moves and Ctrl-C is heard


EVALUATED_FOR_EACH_TRAINED = 4  # images: without gradients no layer's output is kept


FAST_EVALUATION_BATCH = 256


class Loop:
    """Trains and evaluates one network on arrays that stay on the device.

    Args:
        network: From `models.build`: normalised float images to logits.
        optimizer: A Keras optimizer; None for evaluation only.
        policy: An `augment` policy for training images.
        mean: Per-channel mean, in units of pixel / 255.
        std: Per-channel standard deviation, same units.
        batch_size: Images a step; a split smaller than that is one batch.
        seed: Of the permutation and the augmentation.
        label_smoothing: Fraction of the target spread over all classes (Szegedy et al., 2016).
        precision: The dtype policy's name; the images are float16 for the mixed ones, else float32.
        xla: What XLA compiles: True is the whole graph, "clusters" the operations that it knows, in clusters around
            those that it does not (custom ones), False nothing.
        workers: The processes that train together; each takes its share of every batch.
    """

    def __init__(
        self,
        network: Any,
        optimizer: Any,
        policy: Any,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        batch_size: int = 128,
        seed: int = 0,
        label_smoothing: float = 0.0,
        precision: str = "float32",
        xla: bool | str = False,
        workers: Cluster = SINGLE,
    ):
        self.network = network
        self.optimizer = optimizer
        self.policy = policy
        self.normalise_only = augment.load_policy("none")
        self.mean = mean
        self.std = std
        self.batch_size = batch_size
        self.seed = seed
        self.dtype = "float16" if precision.startswith("mixed") else "float32"
        self.xla = xla
        self.workers = workers
        self._shard_steps: dict[tuple[int, int], int] = {}
        if optimizer is not None:
            self._scaler = GradientScaler(optimizer, precision)
            self._train_steps = _training_graph(network, optimizer, self._scaler, label_smoothing, xla is True, workers)
        self._evaluate_steps = _evaluation_graph(network, label_smoothing, xla is True)

    def train_epoch(
        self, split: Any, epoch: int, progress: Callable[[int, float], None] | None = None
    ) -> dict[str, float]:
        """Train on every image of `split` once, except the rest that fills no batch.

        Args:
            split: A `datasets.Split`.
            epoch: From 0; with the seed it decides the order and every random draw.
            progress: Called after each shard with the images done in it and the mean loss so far.

        Returns:
            ``loss`` and ``accuracy`` over the epoch as it was trained, and ``images_per_second``.

        Raises:
            PipelineError: The loss is not finite any more, or the device's memory is too small.
        """
        count = len(split.labels)
        batch = self._batch(count)
        order = permutation(self.seed, epoch, count)[: self.images_an_epoch(count)]
        if self.workers.count > 1:
            order, batch = self._share(order, batch)
        started = time.perf_counter()
        loss = correct = done = 0.0
        for images, labels in self._shards(split, order, batch, self.policy, epoch):
            shard_loss, shard_correct = (float(value) for value in self._guarded(self._train_steps, images, labels))
            size = images.shape[0] * images.shape[1]
            loss, correct, done = loss + shard_loss, correct + shard_correct, done + size
            self.check_finite(shard_loss, epoch)
            if progress is not None:
                progress(size * self.workers.count, loss / done)
        if self.workers.count > 1:
            loss, correct, done = self._synchronise(loss, correct, done)
        seconds = time.perf_counter() - started
        return {"loss": loss / done, "accuracy": correct / done, "images_per_second": done / seconds}

    def images_an_epoch(self, count: int) -> int:
        """How many of `count` training images fill whole batches."""
        return count - count % self._batch(count)

    def _batch(self, count: int) -> int:
        return min(self.batch_size, max(count - count % self.workers.count, 1))

    def check_finite(self, loss: float, epoch: int) -> None:
        """Raise `PipelineError` unless the loss of an epoch (from 0) is a finite number."""
        if not math.isfinite(loss):
            raise PipelineError(
                f"The loss is no longer finite in epoch {epoch + 1} (learning rate "
                f"{self.learning_rate():.3g}); lower optimizer.learning_rate or set precision=float32.",
                exit_code=1,
            )

    def _share(self, order: numpy.ndarray, batch: int) -> tuple[numpy.ndarray, int]:
        """This worker's part of every batch of the epoch's order, and its size."""
        own = per_worker_batch(batch, self.workers.count)
        batches = order.reshape(-1, batch)[:, self.workers.index * own : (self.workers.index + 1) * own]
        return batches.reshape(-1), own

    def _synchronise(self, *figures: float) -> list[float]:
        """At the end of an epoch: the workers' figures added, and their moving statistics averaged."""
        tf = device.tensorflow()
        moving = _floats(self.network.non_trainable_variables)
        means = self.workers.average([tf.constant(figures, tf.float32), *(v.value for v in moving)], Key.STATISTICS)
        for variable, mean in zip(moving, means[1:], strict=True):
            variable.assign(mean)
        return [float(mean) * self.workers.count for mean in means[0]]

    def average_metrics(self, figures: dict[str, Any]) -> dict[str, float]:
        """The numbers among `evaluate`'s figures, their means over all workers.

        Each worker measures by itself, and kernels chosen apart may round otherwise; what is decided by the figures,
        early stopping for one, must be decided alike, or one worker would wait for another that has stopped.
        """
        numbers = {name: value for name, value in figures.items() if isinstance(value, float)}
        if self.workers.count == 1:
            return numbers
        (means,) = self.workers.average([device.tensorflow().constant(list(numbers.values()))], Key.VALIDATION)
        return dict(zip(numbers, (float(mean) for mean in means), strict=True))

    def evaluate(self, split: Any) -> dict[str, Any]:
        """Loss and accuracy without augmentation, and the predicted classes.

        Returns:
            ``loss``, ``accuracy`` and ``top5`` (floats; the last is the share of images whose class is among the five
            most probable), ``predictions`` (int32 [N], NumPy).
        """
        count = len(split.labels)
        if count == 0:
            raise PipelineError("There are no images to evaluate on; this split is empty.")
        faster = min(EVALUATED_FOR_EACH_TRAINED * self.batch_size, FAST_EVALUATION_BATCH)
        batch = min(max(self.batch_size, faster), count)
        padded = numpy.zeros(-(-count // batch) * batch, numpy.int32)  # the last batch is filled up with image 0
        padded[:count] = numpy.arange(count)
        shards = []
        for images, labels in self._shards(split, padded, batch, self.normalise_only, 0):
            figures = self._guarded(self._evaluate_steps, images, labels)
            shards.append([device.to_numpy(figure).reshape(-1) for figure in figures])
        losses, predicted, ranks = (numpy.concatenate(figures)[:count] for figures in zip(*shards, strict=True))
        return {
            "loss": float(losses.mean()),
            "accuracy": float((predicted == device.to_numpy(split.labels)).mean()),
            "top5": float((ranks < 5).mean()),
            "predictions": predicted,
        }

    @property
    def variables(self) -> list[Any]:
        """Everything a checkpoint must hold: the network's, the optimizer's and the loss scale's variables."""
        return [*self.network.variables, *self.optimizer.variables, *self._scaler.variables]

    def sync_initial_state(self) -> None:
        """All workers begin with the first one's weights, and each with random draws of its own (dropout, stochastic
        depth); alone it does nothing.

        Only the first one's draws are in the checkpoints, so a resumed training calls this after loading one.
        """
        if self.workers.count == 1:
            return
        self.workers.broadcast(_floats(self.variables))
        tf = device.tensorflow()
        for variable in self.network.non_trainable_variables:
            if "seed_generator" in variable.path:  # its seed, and how many draws it has made
                variable.assign(variable.value + tf.constant([self.workers.index, 0], variable.value.dtype))

    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return float(device.to_numpy(self.optimizer.learning_rate))

    def _shards(
        self, split: Any, order: numpy.ndarray, batch: int, policy: Any, epoch: int
    ) -> Iterator[tuple[Any, Any]]:
        """Yield TensorFlow tensors: images [steps, batch, H, W, C] and int32 labels [steps, batch], in `order`."""
        xp = device.xp()
        steps = len(order) // batch
        bytes_a_step = batch * math.prod(split.images.shape[1:]) * numpy.dtype(self.dtype).itemsize
        if (steps, bytes_a_step) not in self._shard_steps:  # once: another size would be another graph to compile
            fitting = max(1, int(device.free_memory() * SHARD_FRACTION_OF_FREE_MEMORY) // bytes_a_step)
            self._shard_steps[steps, bytes_a_step] = min(fitting, steps if device.has_gpu() else CPU_STEPS_PER_SHARD)
        shard_steps = self._shard_steps[steps, bytes_a_step]
        for first in range(0, steps, shard_steps):
            with self._memory_sentence():
                indices = xp.asarray(order[first * batch : (first + shard_steps) * batch])
                taken = len(indices) // batch
                images = augment.apply(
                    split.images, policy, self.mean, self.std,
                    seed=self.seed, epoch=epoch, indices=indices, dtype=self.dtype,
                )  # fmt: skip
                images = images.reshape(taken, batch, *images.shape[1:])
                labels = xp.ascontiguousarray(split.labels[indices]).reshape(taken, batch)
                shard = device.to_tensorflow(images), device.to_tensorflow(labels)
            yield shard

    def _guarded(self, graph: Any, *inputs: Any) -> Any:
        # The graph is traced in its first call; what XLA compiles as a whole must not hold a custom operation.
        ways = {True: ops.without_custom_operations, "clusters": _clustered, False: contextlib.nullcontext}
        try:
            with ways[self.xla](), self._memory_sentence():
                return graph(*inputs)
        except device.tensorflow().errors.UnimplementedError as error:
            if not self.xla:
                raise
            raise PipelineError(f"XLA cannot compile this network here ({first_line(error)}); set xla=false.") from None

    def _memory_sentence(self) -> contextlib.AbstractContextManager[None]:
        return device.out_of_memory_sentence(f"batch_size is {self.batch_size}: halve it, or use smaller images")


@contextlib.contextmanager
def _clustered() -> Iterator[None]:
    """TensorFlow gives XLA what it can of the graphs that run meanwhile (auto-clustering, on a GPU only)."""
    optimizer = device.tensorflow().config.optimizer
    before = optimizer.get_jit()
    optimizer.set_jit("autoclustering")
    try:
        yield
    finally:
        optimizer.set_jit(before)


def permutation(seed: int, epoch: int, count: int) -> numpy.ndarray:
    """The order of `count` images in an epoch, int32 [count], in host memory: the same for the same seed and epoch."""
    generator = numpy.random.Generator(numpy.random.Philox(key=[seed, epoch]))
    return generator.permutation(numpy.int32(count)).astype(numpy.int32)


def _floats(variables: Iterable[Any]) -> list[Any]:
    """The Keras variables among these that hold floating-point numbers."""
    return [variable for variable in variables if variable.dtype.startswith(("float", "bfloat"))]


def cross_entropy(tf: Any, logits: Any, labels: Any, label_smoothing: float) -> Any:
    """Cross-entropy of each image with smoothed targets, float32 [N]."""
    classes = logits.shape[-1]
    targets = tf.one_hot(labels, classes, 1.0 - label_smoothing + label_smoothing / classes, label_smoothing / classes)
    return tf.nn.softmax_cross_entropy_with_logits(targets, tf.cast(logits, tf.float32))


def _training_graph(
    network: Any, optimizer: Any, scaler: GradientScaler, label_smoothing: float, xla: bool, workers: Cluster
) -> Callable:
    """A graph that takes one optimisation step for each batch of images [S, B, H, W, C] and labels [S, B].

    Alone, XLA compiles the whole loop. With other workers it compiles the two halves of a step, because its sum does
    not reach other processes (docs/decisions.md).

    Returns the sum of the losses and the number of correct images, float32 scalars.
    """
    tf = device.tensorflow()
    variables = network.trainable_variables
    optimizer.build(variables)
    alone = workers.count == 1

    @tf.function(jit_compile=xla and not alone)
    def gradients_of(images: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            logits = network(images, training=True)
            loss = tf.reduce_mean(cross_entropy(tf, logits, labels, label_smoothing))
            penalised = loss + tf.add_n(network.losses) if network.losses else loss
            scaled = scaler.scaled(penalised)
        correct = tf.equal(tf.argmax(logits, axis=-1, output_type=tf.int32), labels)
        images_seen = tf.cast(tf.shape(labels)[0], tf.float32)
        gradients = tape.gradient(scaled, variables)
        sums = loss * images_seen, tf.reduce_sum(tf.cast(correct, tf.float32))
        return gradients if alone else workers.pack(gradients), *sums

    @tf.function(jit_compile=xla and not alone)
    def update(gradients: Any) -> None:
        gradients = gradients if alone else workers.unpack(gradients / workers.count, variables)
        optimizer.apply(scaler.unscale_and_clip(gradients), variables)

    @tf.function(jit_compile=xla and alone)
    def train_steps(images: Any, labels: Any) -> Any:
        total, correct = tf.constant(0.0), tf.constant(0.0)
        for step in tf.range(tf.shape(images)[0]):
            gradients, loss, hits = gradients_of(images[step], labels[step])
            update(gradients if alone else workers.all_reduce(gradients, Key.GRADIENTS))
            total, correct = total + loss, correct + hits
        return total, correct

    return train_steps


def _evaluation_graph(network: Any, label_smoothing: float, xla: bool) -> Callable:
    """A graph that gives for each image the loss (float32 [S, B]), the predicted class (int32 [S, B]) and how many
    classes are more probable than the true one (int32 [S, B])."""
    tf = device.tensorflow()

    @tf.function(jit_compile=xla)
    def evaluate_steps(images: Any, labels: Any) -> Any:
        steps = tf.shape(images)[0]
        losses = tf.TensorArray(tf.float32, size=steps, element_shape=labels.shape[1:])
        predictions = tf.TensorArray(tf.int32, size=steps, element_shape=labels.shape[1:])
        ranks = tf.TensorArray(tf.int32, size=steps, element_shape=labels.shape[1:])
        for step in tf.range(steps):
            logits = network(images[step], training=False)
            losses = losses.write(step, cross_entropy(tf, logits, labels[step], label_smoothing))
            predictions = predictions.write(step, tf.argmax(logits, axis=-1, output_type=tf.int32))
            true = tf.gather(logits, labels[step][:, None], axis=1, batch_dims=1)
            ranks = ranks.write(step, tf.reduce_sum(tf.cast(logits > true, tf.int32), axis=-1))
        return losses.stack(), predictions.stack(), ranks.stack()

    return evaluate_steps
