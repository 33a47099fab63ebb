"""Replace `auto` in the settings, and build the network, the optimizer and the training loop from them."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy

from pipeline import augment, models, runs
from pipeline.core import device
from pipeline.core.errors import PipelineError
from pipeline.core.settings import ModelSettings, Settings
from pipeline.data.dataset import SPLITS
from pipeline.train import cluster, optimizers
from pipeline.train.loop import SINGLE, Loop

FEW_VALIDATION_IMAGES = 100


def resolve(settings: Settings) -> Settings:
    """Replace the settings that depend on the machine or the time by their values.

    This replaces ``auto`` in precision, XLA and communication, names the run, and makes the dataset's folder absolute.
    All other functions in this package expect resolved settings.

    Raises:
        PipelineError: The XLA setting is not supported here, or several training processes have no ``name``.
    """
    name, data_dir = settings.name, settings.dataset.data_dir
    if name is None and settings.cluster != "none":
        raise PipelineError("Several training processes need name=…, so that all of them use one run folder.")
    if name is None:
        name = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{settings.dataset.name}-{settings.model.name}"
    precision = resolve_precision(settings.precision)
    communication = settings.communication
    if communication == "auto":
        communication = "nccl" if device.has_gpu() else "ring"
    if data_dir is not None:
        data_dir = str(Path(data_dir).expanduser().resolve())
    return settings.model_copy(
        update={
            "name": name,
            "precision": precision,
            "communication": communication,
            "xla": resolve_xla(settings.xla, precision, settings.model, settings.cluster != "none" and communication),
            "dataset": settings.dataset.model_copy(update={"data_dir": data_dir}),
        }
    )


def resolve_precision(precision: str) -> str:
    """Replace ``auto``: mixed_float16 on a GPU with tensor cores (Volta and later), otherwise float32.

    It is never mixed_bfloat16, with which XLA of TensorFlow 2.17 makes the cnn's loss NaN on an H200; mixed_float16 is
    also faster there.
    """
    if precision != "auto":
        return precision
    capability = device.compute_capability()
    return "float32" if capability is None or capability < (7, 0) else "mixed_float16"


def resolve_xla(xla: bool | str, precision: str, model: ModelSettings, communication: str | bool = False) -> bool | str:
    """What XLA compiles of a network's graphs: True (all), "clusters" or False (nothing).

    On a GPU ``auto`` is True, with two exceptions, and on a CPU it is False. With ``model.operations=custom`` it is
    "clusters", because XLA cannot compile custom operations. With mixed_bfloat16 it is False, because XLA of TensorFlow
    2.17 makes the cnn's loss NaN on an H200; the other networks train well with ``xla=true``. With
    ``communication=ring`` it is False, because XLA can compile only sums by NCCL.

    Raises:
        PipelineError: ``xla=true`` with custom operations or ``communication=ring``, or ``xla=clusters`` without a GPU.
    """
    custom = model.options.get("operations") == "custom"
    if xla is True and custom:
        raise PipelineError("XLA cannot compile a custom operation; set xla=clusters or model.operations=auto.")
    if xla is True and communication == "ring":
        raise PipelineError("XLA cannot compile communication=ring; set xla=false or communication=nccl.")
    if xla == "clusters" and not device.has_gpu():
        raise PipelineError("xla=clusters needs a GPU, and none was found; set xla=false.")
    if xla == "auto":
        if not device.has_gpu() or precision == "mixed_bfloat16" or communication == "ring":
            return False
        return "clusters" if custom else True
    return xla


def scale_learning_rate(settings: Settings, workers: cluster.Cluster) -> Settings:
    """Replace the learning rate of one process by that of all `workers`, whose batch is larger.

    ``linear`` multiplies it by the number of processes (Goyal et al., 2017), ``sqrt`` by its square root (Krizhevsky,
    2014). The result contains ``none``, so that a resumed training keeps its rate with any number of processes.
    """
    scaling = settings.learning_rate_scaling
    exponent = {"none": 0.0, "sqrt": 0.5, "linear": 1.0, "auto": 1.0}[scaling]
    rate = settings.optimizer.learning_rate * workers.count**exponent
    if workers.is_chief and rate != settings.optimizer.learning_rate:
        print(f"note: the learning rate is {rate:.3g} with {workers.count} processes (learning_rate_scaling={scaling})")
    optimizer = settings.optimizer.model_copy(update={"learning_rate": rate})
    return settings.model_copy(update={"optimizer": optimizer, "learning_rate_scaling": "none"})


def check(settings: Settings, dataset: Any) -> list[str]:
    """Return notes about settings that do not suit the dataset or the device.

    Raises:
        PipelineError: A split is empty.
    """
    for split in SPLITS:
        if len(getattr(dataset, split).labels) == 0:
            raise PipelineError(
                f"The {split} split is empty; add images, or set dataset.validation_fraction and "
                "dataset.test_fraction above 0."
            )
    notes = []
    train_images, validation_images = len(dataset.train.labels), len(dataset.validation.labels)
    if settings.batch_size > train_images:
        notes.append(
            f"batch_size={settings.batch_size} is larger than the {train_images} training images, so each epoch has "
            "only one step; set a smaller batch_size"
        )
    if validation_images < FEW_VALIDATION_IMAGES:
        notes.append(f"val_accuracy is measured on only {validation_images} images (dataset.validation_fraction)")
    if settings.precision == "mixed_float16" and not device.has_gpu():
        notes.append("without a GPU mixed_float16 is many times slower than precision=float32")
    return notes


def build_loop(settings: Settings, dataset: Any, workers: cluster.Cluster = SINGLE) -> Loop:
    """Build the network, its optimizer and the loop that trains it on a dataset."""
    with precision_policy(settings.precision):
        model = settings.model
        network = models.build(model.name, dataset.image_shape, dataset.num_classes, **model.options)
        images = len(dataset.train.labels)
        optimizer = optimizers.build(
            settings.optimizer,
            schedule=settings.schedule,
            warmup=settings.warmup,
            total_steps=settings.epochs * (images // min(settings.batch_size, images)),
        )
    if settings.optimizer.backbone_factor != 1.0 and model.name != "pretrained":
        raise PipelineError(f"optimizer.backbone_factor needs model=pretrained, got model={model.name}.")
    if settings.init is not None:
        source = runs.find(settings.init)
        same = source.card.class_names == dataset.class_names
        models.init_from(network, source.load_model().get_layer("network"), head=same)
    network.compile(optimizer=optimizer, auto_scale_loss=False)  # Keras callbacks look for model.optimizer
    mean, std = models.normalisation(model.name, model.options, dataset.image_shape[2]) or (dataset.mean, dataset.std)
    return Loop(
        network,
        optimizer,
        augment.load_policy(settings.augment),
        mean,
        std,
        batch_size=settings.batch_size,
        seed=settings.seed,
        label_smoothing=settings.label_smoothing,
        class_weights=balanced(dataset) if settings.class_weights == "balanced" else None,
        backbone_factor=settings.optimizer.backbone_factor,
        precision=settings.precision,
        xla=settings.xla,
        workers=workers,
    )


def has_new_head(settings: Settings, dataset: Any) -> bool:
    """Whether the network starts with pretrained features and an untrained last layer."""
    if settings.model.name != "pretrained":
        return False
    if settings.init is None:
        return settings.model.options.get("weights", "imagenet") is not None
    return runs.find(settings.init).card.class_names != dataset.class_names


def balanced(dataset: Any) -> list[float]:
    """Class weights inversely proportional to the numbers of training images; their mean over the images is 1."""
    labels = device.to_numpy(dataset.train.labels)
    counts = numpy.bincount(labels, minlength=dataset.num_classes)
    present = numpy.count_nonzero(counts)
    return [float(len(labels) / (present * count)) if count else 0.0 for count in counts]


def build_deployable(loop: Loop, settings: Settings, dataset: Any) -> Any:
    """Build the deployable model of a trained network, in float32 and with TensorFlow's operations.

    Returns:
        A `keras.Model`: uint8 [N, H, W, C] to float32 probabilities [N, K].
    """
    model = settings.model
    if "operations" in model.options:  # all export formats support TensorFlow's operations
        model = ModelSettings.parse({**model.plain(), "operations": "tensorflow"})
    with precision_policy("float32"):
        network = models.build(model.name, dataset.image_shape, dataset.num_classes, **model.options)
        network.set_weights(loop.network.get_weights())
        return models.deployable(network, loop.mean, loop.std)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and TensorFlow; on a CPU, also make TensorFlow's operations deterministic."""
    tf = device.tensorflow()
    import keras

    keras.utils.set_random_seed(seed)
    if not device.has_gpu():
        tf.config.experimental.enable_op_determinism()


@contextlib.contextmanager
def precision_policy(name: str) -> Iterator[None]:
    """Set Keras's dtype policy inside the block, and restore the previous one after it."""
    device.tensorflow()
    import keras

    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
