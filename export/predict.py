"""One `Predictor` runs every exported format: Keras, SavedModel, TFLite and TF-TRT.

predictor = Predictor.load("runs/latest/export/model_int8.tflite")    # or .keras, a SavedModel, a TF-TRT folder
for prediction in predictor.predict(["cat.jpg", open("dog.png", "rb").read(), pixels]):
    print(prediction.label, prediction.probability)
"""

from __future__ import annotations

import itertools
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from export import labels, tensorrt_library
from pipeline import runs
from pipeline.core import device
from pipeline.core.errors import PipelineError, first_line
from pipeline.data.images import decode_image, resize_and_center_crop
from pipeline.evaluate.run import average_mirrored, check_augmentation

MAX_BATCH = 1024
MAX_BATCH_PIXELS = 1 << 22
ENCODED = (str, os.PathLike, bytes, bytearray, memoryview)


def max_batch(input_shape: tuple[int, int, int]) -> int:
    """The largest batch that a `Predictor` sends to a model for images of (H, W, C), limited by activation memory.

    At most 1,024 images and 4,194,304 pixels: 1,024 up to 64×64, 83 at 224×224. TF-TRT engines are built for the same
    limit.
    """
    return max(1, min(MAX_BATCH, MAX_BATCH_PIXELS // (input_shape[0] * input_shape[1])))


@dataclass(frozen=True, eq=False)
class Prediction:
    """The prediction for one image.

    Attributes:
        label: Name of the most probable class.
        index: Index of that class.
        probability: Probability of that class.
        probabilities: float32 [K] on the host: the probability of every class.
    """

    label: str
    index: int
    probability: float
    probabilities: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class _Graph:
    """A loaded model: uint8 [N, H, W, C] to float32 [N, K] on the host, for N up to `limit` and `max_batch`."""

    forward: Callable[[Any], np.ndarray]
    dtype: np.dtype[Any]
    input_shape: tuple[int, int, int]
    num_classes: int
    limit: int = MAX_BATCH


class Predictor:
    """A loaded model, created by `Predictor.load`. Several threads may use it at the same time.

    Attributes:
        path: The file or folder it was loaded from.
        kind: "keras", "saved_model", "tflite" or "tftrt".
        class_names: K names, in the order of the probabilities.
        input_shape: (H, W, C) of the model's input; `predict` resizes images of other sizes.
        max_batch: The largest batch that is sent to the model; more images are sent in several batches.
        tta: Test-time augmentation, "none" or "flip".
    """

    def __init__(self, path: Path, kind: str, graph: _Graph, class_names: list[str], tta: str = "none"):
        self.path = path
        self.kind = kind
        self.class_names = class_names
        self.tta = tta
        self.input_shape = graph.input_shape
        self.max_batch = min(graph.limit, max_batch(graph.input_shape))
        self._graph = graph

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None, tta: str = "none") -> Predictor:
        """Load a model; the path determines the format.

        Args:
            path: A run's folder or name (its Keras model; ``runs/latest`` by default), a `.keras` or `.tflite` file, a
                SavedModel folder or a TF-TRT folder. Class names are read from the exported file or from the run that
                contains it. If there are none, the classes are called "class 0", "class 1", … and a warning is issued.
            tta: Test-time augmentation: ``flip`` averages the probabilities of each image and its mirror image, which
                doubles the time.

        Raises:
            PipelineError: `tta` is unknown, the path does not exist, the model is damaged or does not take uint8
                images, or it needs a GPU or TensorRT and this machine has none.
        """
        check_augmentation(tta)
        kind, path = _identify(path)
        graph = LOADERS[kind](path)
        if graph.dtype != np.uint8 or len(graph.input_shape) != 3 or None in graph.input_shape:
            raise PipelineError(
                f"{path} takes {graph.dtype} of shape {graph.input_shape}; expected a model of this project, which "
                "takes uint8 images (H, W, 1 or 3) and contains the normalisation."
            )
        class_names = labels.read_class_names(path)
        if class_names is None:
            class_names = [f"class {index}" for index in range(graph.num_classes)]
            warnings.warn(f'{path} has no class names; using "class 0" to "{class_names[-1]}".', stacklevel=2)
        if len(class_names) != graph.num_classes:
            raise PipelineError(
                f"{path} has {graph.num_classes} outputs but {len(class_names)} class names; move it back to "
                "the folder of its run."
            )
        return cls(path, kind, graph, class_names, tta)

    def predict(self, images: Any) -> list[Prediction]:
        """Classify images, in the order given.

        Args:
            images: A uint8 array (NumPy or CuPy) [N, H, W, C], [H, W, C] or [H, W], with 1 or 3 channels in RGB order;
                a path; the bytes of an image file; or an iterable of single images in any of these forms.

        Returns:
            One `Prediction` for each image.

        Raises:
            PipelineError: An image cannot be read, or its dtype is not uint8, or it has neither 1 nor 3 channels.
        """
        predictions = []
        for pixels in self._batches(images):
            for row in self.probabilities(pixels):
                index = int(row.argmax())
                predictions.append(Prediction(self.class_names[index], index, float(row[index]), row))
        return predictions

    def probabilities(self, images: Any) -> np.ndarray:
        """The probabilities of all classes for a batch that already has the model's input shape.

        Args:
            images: uint8 [N, H, W, C] with (H, W, C) equal to `input_shape`, NumPy or CuPy, any N.

        Returns:
            float32 [N, K] on the host.

        Raises:
            PipelineError: The dtype or the shape differs.
        """
        if images.dtype != np.uint8 or tuple(images.shape[1:]) != self.input_shape:
            raise PipelineError(
                f"Expected uint8 images of shape {self.input_shape} for {self.path.name}, got {images.dtype} "
                f"{tuple(images.shape)}; predict() resizes images."
            )
        starts = range(0, len(images), self.max_batch)
        answers = [self._forward(images[start : start + self.max_batch]) for start in starts]
        return np.concatenate(answers) if answers else np.empty((0, self._graph.num_classes), np.float32)

    def _forward(self, images: Any) -> np.ndarray:
        if self.tta == "none":
            return self._graph.forward(images)
        contiguous = device.xp().ascontiguousarray
        return average_mirrored(lambda part: self._graph.forward(contiguous(part)), images)

    def read(self, image: Any) -> np.ndarray:
        """Read and resize one image, in any form that `predict` accepts; returns uint8 [H, W, C] (NumPy, on the host).

        Raises:
            PipelineError: The image cannot be read, or is not a uint8 array with 1 or 3 channels.
        """
        if isinstance(image, ENCODED):
            return resize_and_center_crop(decode_image(image, self.input_shape[:2]), self.input_shape)
        if getattr(image, "dtype", None) != np.uint8:
            raise PipelineError(
                f"Expected uint8 pixels from 0 to 255, a path or bytes, got {getattr(image, 'dtype', type(image))}; "
                "convert values from 0 to 1 with (images * 255).round().astype('uint8')."
            )
        pixels = device.to_numpy(image)
        return resize_and_center_crop(pixels[..., None] if pixels.ndim == 2 else pixels, self.input_shape)

    def top(self, prediction: Prediction, count: int) -> list[tuple[str, float]]:
        """The `count` most probable classes of a prediction with their probabilities, most probable first."""
        order = np.argsort(-prediction.probabilities, kind="stable")[:count]
        return [(self.class_names[index], float(prediction.probabilities[index])) for index in order]

    def _batches(self, images: Any) -> Iterator[Any]:
        """Yield batches of the model's input shape from the argument of `predict`."""
        dimensions = getattr(images, "ndim", 0)
        if dimensions == 4 and tuple(images.shape[1:]) == self.input_shape:
            yield images
            return
        if isinstance(images, ENCODED) or 0 < dimensions < 4 or not isinstance(images, Iterable):
            images = [images]
        remaining = iter(images)
        while batch := list(itertools.islice(remaining, self.max_batch)):
            yield np.stack([self.read(image) for image in batch])


# --- loading -------------------------------------------------------------------------------------------------------


def _identify(path: str | os.PathLike[str] | None) -> tuple[str, Path]:
    """The format at a path (a key of `LOADERS`), and its file or folder (for a run: its `model.keras`)."""
    given = Path(path) if path is not None else runs.LATEST
    if given.suffix in (".keras", ".tflite"):
        if not given.is_file():
            raise PipelineError(f"There is no file {given}.")
        return given.suffix[1:], given
    if (given / "saved_model.pb").is_file():
        return "tftrt" if (given / tensorrt_library.MANIFEST).is_file() else "saved_model", given
    if path is not None and given.exists() and not (given / "model.keras").is_file():
        raise PipelineError(
            f"{given} is not a model; pass a run, a .keras or .tflite file, or a folder that contains saved_model.pb."
        )
    return "keras", runs.find(path).model_path


def _keras(path: Path) -> _Graph:
    from pipeline import models

    tf = device.tensorflow()
    model = models.load(path)

    @tf.function(input_signature=[tf.TensorSpec(model.input_shape, tf.uint8)])
    def forward(images: Any) -> Any:
        return model(images, training=False)

    return _Graph(
        lambda images: forward(_tensor(images)).numpy(),
        np.dtype(model.inputs[0].dtype),
        model.input_shape[1:],
        model.output_shape[-1],
    )


def _saved_model(path: Path) -> _Graph:
    tf = device.tensorflow()
    try:
        loaded = tf.saved_model.load(str(path))
        signature = loaded.signatures["serving_default"]
        ((name, pixels),) = signature.structured_input_signature[1].items()
        ((output, probabilities),) = signature.structured_outputs.items()
    except Exception as error:  # TensorFlow's protobuf and file readers raise many types
        raise PipelineError(f"{path} is not a readable SavedModel of a classifier ({first_line(error)}).") from error

    def forward(images: Any) -> np.ndarray:
        # `loaded` owns the variables and engines: a signature alone does not keep them alive.
        return loaded.signatures["serving_default"](**{name: _tensor(images)})[output].numpy()

    return _Graph(forward, np.dtype(pixels.dtype.as_numpy_dtype), tuple(pixels.shape[1:]), probabilities.shape[-1])


def _tftrt(path: Path) -> _Graph:
    tensorrt_library.require(path)
    return _saved_model(path)


def _tflite(path: Path) -> _Graph:
    tf = device.tensorflow()
    from tensorflow.lite.python import schema_py_generated as schema

    content = path.read_bytes()
    try:
        # The interpreter does not check offsets and crashes on a truncated file: parse the whole file first.
        schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # TFLite's threads spin while they wait: with a thread for every core, one busy core delays all of them.
            interpreter = tf.lite.Interpreter(model_content=content, num_threads=max(1, device.usable_cores() // 2))
        interpreter.allocate_tensors()
    except Exception as error:  # flatbuffers raises struct.error, ValueError, IndexError, TypeError for a wrong offset
        raise PipelineError(
            f"{path} is not a readable TFLite file ({first_line(error)}); export it again: python -m export.tflite"
        ) from error
    pixels, output = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    scale, zero_point = output["quantization"]
    lock = threading.Lock()  # an interpreter is not thread-safe

    def forward(images: Any) -> np.ndarray:
        images = device.to_numpy(images)
        with lock:
            if tuple(interpreter.get_input_details()[0]["shape"]) != images.shape:
                interpreter.resize_tensor_input(pixels["index"], images.shape)
                interpreter.allocate_tensors()
            interpreter.set_tensor(pixels["index"], images)
            interpreter.invoke()
            answer = interpreter.get_tensor(output["index"])
        if answer.dtype == np.float32:
            return answer
        return (answer.astype(np.float32) - np.float32(zero_point)) * np.float32(scale)

    shape, classes = tuple(pixels["shape"][1:].tolist()), int(output["shape"][-1])
    return _Graph(forward, np.dtype(pixels["dtype"]), shape, classes, limit=64)


def _tensor(images: Any) -> Any:
    """uint8 pixels as a TensorFlow tensor, without a copy if they are on the GPU."""
    return device.to_tensorflow(images if images.flags.c_contiguous else device.xp().ascontiguousarray(images))


LOADERS = {"keras": _keras, "saved_model": _saved_model, "tflite": _tflite, "tftrt": _tftrt}
