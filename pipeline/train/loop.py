"""The training loop: each epoch is one augmentation launch and one call of a compiled TensorFlow graph.

    loop = Loop(network, optimizer, policy, mean, std, …)
    for epoch in range(epochs):
        logs = loop.train_epoch(dataset.train, epoch)
        validation = loop.validate(dataset.validation)

The kernel writes the images in the order of the epoch, and the graph takes slices of them, so only the permutation is
copied to the GPU. An epoch that does not fit into a quarter of the free memory (on a CPU: that has more than 16 steps)
is processed in shards of whole batches.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy

from pipeline import augment, ops
from pipeline.core import device
from pipeline.core.errors import PipelineError, first_line
from pipeline.train.cluster import Cluster, Key, per_worker_batch
from pipeline.train.loss_scale import GradientScaler

SINGLE = Cluster()

SHARD_FRACTION_OF_FREE_MEMORY = 0.25
CPU_STEPS_PER_SHARD = 16  # so that the progress bar moves and Ctrl-C takes effect
EVALUATION_BATCH_FACTOR = 4  # evaluation needs less memory per image, because it stores no layer outputs
FAST_EVALUATION_BATCH = 256
FEATURES_BATCH = 32


class Loop:
    """Trains and evaluates one network on arrays that stay on the device.

    Args:
        network: From `models.build`: normalised float images to logits.
        optimizer: A Keras optimizer; None for evaluation only.
        policy: An `augment` policy for training images.
        mean: Per-channel mean, in units of pixel / 255.
        std: Per-channel standard deviation, same units.
        batch_size: Images per step, over all processes; a split smaller than that is one batch.
        seed: Seed of the permutation and the augmentation.
        label_smoothing: Fraction of the target spread over all classes (Szegedy et al., 2016).
        class_weights: Weight of each class in the loss (mean over the images: 1), or None for equal weights.
        backbone_factor: Variables of the layer ``backbone`` move by this fraction of the optimizer's step.
        precision: Name of the dtype policy; images are float16 for the mixed policies, otherwise float32.
        xla: What XLA compiles: True (the whole graph), "clusters" (all but custom operations) or False (nothing).
        workers: The processes that train together; each takes an equal part of every batch.
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
        class_weights: Sequence[float] | None = None,
        backbone_factor: float = 1.0,
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
            self._train_steps = _training_graph(
                network, optimizer, self._scaler, label_smoothing, class_weights, backbone_factor, xla is True, workers
            )
        self._evaluate_steps = _evaluation_graph(network, label_smoothing, xla is True)

    def train_epoch(
        self, split: Any, epoch: int, progress: Callable[[int, float], None] | None = None
    ) -> dict[str, float]:
        """Train for one epoch on `split`, without the last images of the permutation if they do not fill a batch.

        Args:
            split: A `pipeline.data.dataset.Split`.
            epoch: From 0; with the seed it determines the order and every random number.
            progress: Called after each shard with the number of images in it and the mean loss so far.

        Returns:
            ``loss`` and ``accuracy``, measured during the epoch, and ``images_per_second``.

        Raises:
            PipelineError: The loss is no longer finite, or the device's memory is too small.
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
            size = images.shape[0] * images.shape[1] * self.workers.count
            loss, correct, done = loss + shard_loss, correct + shard_correct, done + size
            self.check_finite(shard_loss, epoch)
            if progress is not None:
                progress(size, loss / done)
        seconds = time.perf_counter() - started
        return {"loss": loss / done, "accuracy": correct / done, "images_per_second": done / seconds}

    def images_an_epoch(self, count: int) -> int:
        """The number of images in the whole batches of `count` training images."""
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
        """This process's part of every batch of the epoch's order, and its size."""
        own = per_worker_batch(batch, self.workers.count)
        batches = order.reshape(-1, batch)[:, self.workers.index * own : (self.workers.index + 1) * own]
        return batches.reshape(-1), own

    def evaluate(self, split: Any) -> dict[str, Any]:
        """Evaluate the network on a split without augmentation, in this process only.

        Returns:
            ``loss``, ``accuracy`` and ``top5`` (floats; the last is the fraction of images whose class is among the
            five most probable), ``predictions`` (int32 [N], NumPy).

        Raises:
            PipelineError: The split is empty.
        """
        losses, predictions, correct, top5 = self._measure(split, numpy.arange(len(split.labels), dtype=numpy.int32))
        return {
            "loss": float(losses.mean()),
            "accuracy": float(correct.mean()),
            "top5": float(top5.mean()),
            "predictions": predictions,
        }

    def validate(self, split: Any) -> dict[str, float]:
        """Evaluate the network on a split without augmentation; each training process evaluates an equal part.

        Returns:
            ``loss``, ``accuracy`` and ``top5`` as in `evaluate`. They are the same in all processes, so that early
            stopping stops all of them in the same epoch.
        """
        count, workers = len(split.labels), self.workers
        if workers.count == 1:
            return {name: value for name, value in self.evaluate(split).items() if name != "predictions"}
        size = -(-count // workers.count)
        own = numpy.arange(workers.index * size, (workers.index + 1) * size, dtype=numpy.int32)
        inside = own < count  # the last part is padded, so that all processes use the same graph
        losses, _, correct, top5 = self._measure(split, numpy.where(inside, own, 0))
        sums = [float(values[inside].sum()) for values in (losses, correct, top5)]
        totals = workers.total(sums, Key.VALIDATION)
        return {name: float(total) / count for name, total in zip(("loss", "accuracy", "top5"), totals, strict=True)}

    def _measure(self, split: Any, order: numpy.ndarray) -> tuple[numpy.ndarray, ...]:
        """Per image at `order` (int32 [M]): loss, predicted class, top-1 and top-5 correctness; NumPy arrays [M]."""
        count = len(order)
        if count == 0:
            raise PipelineError("The split to evaluate is empty; add images to it.")
        faster = min(EVALUATION_BATCH_FACTOR * self.batch_size, FAST_EVALUATION_BATCH)
        batch = min(max(self.batch_size, faster), count)
        shards = []
        for images, labels in self._shards(split, _padded(order, batch), batch, self.normalise_only, 0):
            figures = self._guarded(self._evaluate_steps, images, labels)
            shards.append([device.to_numpy(figure).reshape(-1) for figure in figures])
        losses, predicted, ranks = (numpy.concatenate(figures)[:count] for figures in zip(*shards, strict=True))
        return losses, predicted, predicted == device.to_numpy(split.labels)[order], ranks < 5

    def features(self, split: Any) -> numpy.ndarray:
        """The outputs of the layer ``features`` for a split without augmentation, float32 [N, D], on the host."""
        tf = device.tensorflow()
        import keras

        layer = self.network.get_layer("features")
        extractor = keras.Model(self.network.inputs, layer.output)

        @tf.function(jit_compile=self.xla is True)
        def extract(images: Any) -> Any:
            return tf.cast(extractor(images, training=False), tf.float32)

        count = len(split.labels)
        batch = min(max(self.batch_size, FEATURES_BATCH), count)
        order = _padded(numpy.arange(count, dtype=numpy.int32), batch)
        parts = []
        for images, _ in self._shards(split, order, batch, self.normalise_only, 0):
            parts += [device.to_numpy(self._guarded(extract, images[step])) for step in range(images.shape[0])]
        return numpy.concatenate(parts)[:count]

    @property
    def variables(self) -> list[Any]:
        """What a checkpoint contains: the variables of the network, of the optimizer and of the loss scale."""
        return [*self.network.variables, *self.optimizer.variables, *self._scaler.variables]

    def sync_initial_state(self) -> None:
        """Copy the weights of process 0 to all processes, and give each process different random numbers for dropout.

        Checkpoints contain only the random state of the first process, so a resumed training calls this after loading
        one.
        """
        if self.workers.count == 1:
            return
        self.workers.broadcast(_floats(self.variables))
        tf = device.tensorflow()
        for variable in self.network.non_trainable_variables:
            if "seed_generator" in variable.path:  # the seed and the number of draws
                variable.assign(variable.value + tf.constant([self.workers.index, 0], variable.value.dtype))

    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return float(device.to_numpy(self.optimizer.learning_rate))

    def _shards(
        self, split: Any, order: numpy.ndarray, batch: int, policy: Any, epoch: int
    ) -> Iterator[tuple[Any, Any]]:
        """Yield TensorFlow tensors in `order`: images [steps, batch, H, W, C] and int32 labels [steps, batch].

        With mixup or CutMix, the labels are float32 [steps, batch, K].
        """
        xp = device.xp()
        steps = len(order) // batch
        bytes_a_step = batch * math.prod(split.images.shape[1:]) * numpy.dtype(self.dtype).itemsize
        if (steps, bytes_a_step) not in self._shard_steps:  # once, because each size compiles a graph
            fitting = max(1, int(device.free_memory() * SHARD_FRACTION_OF_FREE_MEMORY) // bytes_a_step)
            self._shard_steps[steps, bytes_a_step] = min(fitting, steps if device.has_gpu() else CPU_STEPS_PER_SHARD)
        shard_steps = self._shard_steps[steps, bytes_a_step]
        for first in range(0, steps, shard_steps):
            with self._explain_out_of_memory():
                indices = xp.asarray(order[first * batch : (first + shard_steps) * batch])
                taken = len(indices) // batch
                images = augment.apply(
                    split.images, policy, self.mean, self.std,
                    seed=self.seed, epoch=epoch, indices=indices, dtype=self.dtype,
                )  # fmt: skip
                images = images.reshape(taken, batch, *images.shape[1:])
                labels = xp.ascontiguousarray(split.labels[indices]).reshape(taken, batch)
                if policy.mixup or policy.cutmix:
                    labels = xp.eye(self.network.output_shape[-1], dtype=xp.float32)[labels]
                    for step in range(taken):
                        images[step], labels[step] = augment.mix(
                            images[step], labels[step], policy, seed=self.seed, epoch=epoch, step=first + step
                        )
                shard = device.to_tensorflow(images), device.to_tensorflow(labels)
            yield shard

    def _guarded(self, graph: Any, *inputs: Any) -> Any:
        # The graph is traced in its first call; a graph that XLA compiles must not contain a custom operation.
        contexts = {True: ops.without_custom_operations, "clusters": _clustered, False: contextlib.nullcontext}
        try:
            with contexts[self.xla](), self._explain_out_of_memory():
                return graph(*inputs)
        except device.tensorflow().errors.UnimplementedError as error:
            if not self.xla:
                raise
            raise PipelineError(
                f"XLA cannot compile this network on this device ({first_line(error)}); set xla=false."
            ) from error

    def _explain_out_of_memory(self) -> contextlib.AbstractContextManager[None]:
        return device.explain_out_of_memory(f"batch_size is {self.batch_size}: halve it, or use smaller images")


@contextlib.contextmanager
def _clustered() -> Iterator[None]:
    """Enable auto-clustering inside the block: XLA compiles the operations that it supports (only on a GPU)."""
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


def _padded(order: numpy.ndarray, batch: int) -> numpy.ndarray:
    """`order` (int32 [M]) with zeros after it, so that image 0 fills the last batch."""
    padded = numpy.zeros(-(-len(order) // batch) * batch, numpy.int32)
    padded[: len(order)] = order
    return padded


def _floats(variables: Iterable[Any]) -> list[Any]:
    """The Keras variables among these that hold floating-point numbers."""
    return [variable for variable in variables if variable.dtype.startswith(("float", "bfloat"))]


def cross_entropy(tf: Any, logits: Any, labels: Any, label_smoothing: float) -> Any:
    """Cross-entropy with smoothed targets, float32 [N], of logits [N, K] and labels: int32 [N], or float32 [N, K]."""
    classes = logits.shape[-1]
    low = label_smoothing / classes
    if labels.dtype.is_floating:
        targets = labels * (1.0 - label_smoothing) + low
    else:
        targets = tf.one_hot(labels, classes, 1.0 - label_smoothing + low, low)
    return tf.nn.softmax_cross_entropy_with_logits(targets, tf.cast(logits, tf.float32))


def _training_graph(
    network: Any,
    optimizer: Any,
    scaler: GradientScaler,
    label_smoothing: float,
    class_weights: Sequence[float] | None,
    backbone_factor: float,
    xla: bool,
    workers: Cluster,
) -> Callable:
    """A graph that does one optimisation step for each batch of images [S, B, H, W, C] and labels [S, B].

    It returns the sum of the losses and the number of correct images of all processes, float32 scalars. Several
    processes average the gradients in each step, and the moving statistics of normalisation at the end.
    """
    tf = device.tensorflow()
    variables = network.trainable_variables
    optimizer.build(variables)
    moving = _floats(network.non_trainable_variables)
    slow = network.get_layer("backbone").trainable_variables if backbone_factor != 1.0 else []

    @tf.function(jit_compile=xla)
    def train_steps(images: Any, labels: Any) -> Any:
        total, correct = tf.constant(0.0), tf.constant(0.0)
        for step in tf.range(tf.shape(images)[0]):
            moving_before = [tf.identity(variable.value) for variable in moving] if scaler.variables else []
            with tf.GradientTape() as tape:
                logits = network(images[step], training=True)
                losses = cross_entropy(tf, logits, labels[step], label_smoothing)
                loss = weighted = tf.reduce_mean(losses)
                if class_weights is not None:
                    hard = tf.one_hot(labels[step], logits.shape[-1]) if labels.dtype.is_integer else labels[step]
                    weighted = tf.reduce_mean(losses * tf.linalg.matvec(hard, tf.constant(class_weights, tf.float32)))
                penalised = weighted + tf.add_n(network.losses) if network.losses else weighted
                scaled = scaler.scaled(penalised)
            gradients = tape.gradient(scaled, variables)
            if workers.count > 1:
                sums = workers.total(gradients, Key.GRADIENTS, xla=xla)
                gradients = [sum_ / workers.count for sum_ in sums]
            slow_before = [tf.identity(variable.value) for variable in slow]
            scaler.apply(optimizer, gradients, variables, moving, moving_before)
            for variable, before in zip(slow, slow_before, strict=True):
                variable.assign(before + backbone_factor * (variable.value - before))
            true = labels[step] if labels.dtype.is_integer else tf.argmax(labels[step], -1, output_type=tf.int32)
            hits = tf.equal(tf.argmax(logits, axis=-1, output_type=tf.int32), true)
            total += loss * tf.cast(tf.shape(labels)[1], tf.float32)
            correct += tf.reduce_sum(tf.cast(hits, tf.float32))
        if workers.count > 1:
            statistics = [variable.value for variable in moving]
            total, correct, *sums = workers.total([total, correct, *statistics], Key.STATISTICS, xla=xla)
            for variable, sum_ in zip(moving, sums, strict=True):
                variable.assign(sum_ / workers.count)
        return total, correct

    return train_steps


def _evaluation_graph(network: Any, label_smoothing: float, xla: bool) -> Callable:
    """A graph that returns for each image the loss (float32 [S, B]), the predicted class (int32 [S, B]) and the number
    of classes that are more probable than the true one (int32 [S, B])."""
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
