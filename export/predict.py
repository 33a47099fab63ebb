"""One way to predict with any artifact of a run.

    predictor = Predictor.load("runs/latest/export/model_int8.tflite")    # or .keras, a SavedModel, a TF-TRT folder
    for prediction in predictor.predict(["cat.jpg", open("dog.png", "rb").read(), pixels]):
        print(prediction.label, prediction.probability)

Every artifact answers in the same form, and every image is decoded and resized as the training images were.
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

CHUNK = 1024
CHUNK_PIXELS = 1 << 22


@dataclass(frozen=True, eq=False)
class Prediction:
    """What an artifact says about one image.

    Attributes:
        label: Name of the most probable class.
        index: Its index.
        probability: Its probability.
        probabilities: float32 [K], of every class, on the host.
    """

    label: str
    index: int
    probability: float
    probabilities: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class _Graph:
    """A loaded artifact: uint8 [n, H, W, C] to float32 [n, K] on the host, and the shapes of both ends."""

    forward: Callable[[Any], np.ndarray]
    input_shape: tuple[int, int, int]
    num_classes: int
    chunk: int


class Predictor:
    """A loaded artifact; made by `Predictor.load`. Safe to call from several threads.

    Attributes:
        path: The file or folder it was loaded from.
        kind: "keras", "saved_model", "tflite" or "tftrt".
        class_names: K names, in the order of the probabilities.
        input_shape: (H, W, C) of the pixels the artifact takes; other images are resized to it.
    """

    def __init__(self, path: Path, kind: str, graph: _Graph, class_names: list[str]):
        self.path = path
        self.kind = kind
        self.class_names = class_names
        self.input_shape = graph.input_shape
        self._graph = graph

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None) -> Predictor:
        """Load an artifact; what it is shows from the path.

        Args:
            path: A run's folder or name (its Keras model; ``runs/latest`` by default), a `.keras` or `.tflite` file, a
                SavedModel folder or a TF-TRT folder. Class names come from inside the artifact or from the run around
                it; an artifact without either gets "class 0", "class 1", … and a warning.

        Raises:
            PipelineError: There is no such artifact, it is damaged, it takes no uint8 images, or it needs a GPU or
                TensorRT that are not here.
        """
        kind, path = _identify(path)
        graph = {"keras": _keras, "saved_model": _saved_model, "tflite": _tflite, "tftrt": _tftrt}[kind](path)
        class_names = labels.read_class_names(path)
        if class_names is None:
            warnings.warn(
                f'{path} has no class names with it (no model_card.json beside it); its classes are "class 0" to '
                f'"class {graph.num_classes - 1}".',
                stacklevel=2,
            )
            class_names = [f"class {index}" for index in range(graph.num_classes)]
        if len(class_names) != graph.num_classes:
            raise PipelineError(
                f"{path} answers with {graph.num_classes} classes, but {len(class_names)} class names lie beside it; "
                f"keep an artifact with its own run."
            )
        return cls(path, kind, graph, class_names)

    def predict(self, images: Any) -> list[Prediction]:
        """Classify images, in the order given.

        Args:
            images: uint8 pixels (NumPy or CuPy) [N, H, W, C], or one image [H, W, C] or [H, W], with 1 or 3 channels
                in RGB order; or a path; or the bytes of an image file; or any iterable of such single images, mixed.

        Returns:
            One `Prediction` an image; an empty list for no images.

        Raises:
            PipelineError: An image cannot be read, is a folder, has another dtype than uint8 or other channels.
        """
        predictions = []
        for pixels in self._chunks(images):
            for row in self.probabilities(pixels):
                index = int(row.argmax())
                predictions.append(Prediction(self.class_names[index], index, float(row[index]), row))
        return predictions

    def probabilities(self, images: Any) -> np.ndarray:
        """The artifact's answers as one array; the fast road for pixels of the right shape.

        Args:
            images: uint8 [N, H, W, C] of exactly `input_shape`, NumPy or CuPy, any N; taken in chunks of at most 1,024.

        Returns:
            float32 [N, K] on the host.

        Raises:
            PipelineError: Another dtype or shape.
        """
        if images.dtype != np.uint8 or tuple(images.shape[1:]) != self.input_shape:
            raise PipelineError(
                f"{self.path.name} takes uint8 images of shape {self.input_shape}, got {images.dtype} "
                f"{tuple(images.shape)}; predict() resizes."
            )
        chunk = self._graph.chunk
        answers = [self._graph.forward(images[start : start + chunk]) for start in range(0, len(images), chunk)]
        return np.concatenate(answers) if answers else np.empty((0, self._graph.num_classes), np.float32)

    def read(self, image: Any) -> np.ndarray:
        """One image, as `predict` takes it, to the uint8 [H, W, C] pixels the artifact takes; NumPy, on the host.

        Raises:
            PipelineError: It cannot be read, is a folder, or is no uint8 image of 1 or 3 channels.
        """
        if isinstance(image, (str, os.PathLike)) and Path(image).is_dir():
            raise PipelineError(f"{os.fspath(image)} is a folder; pass the images in it.")
        if isinstance(image, (str, os.PathLike, bytes, bytearray, memoryview)):
            return resize_and_center_crop(decode_image(image), self.input_shape)
        _check_pixels(image, dimensions=(2, 3))
        pixels = device.to_numpy(image)
        return resize_and_center_crop(pixels if pixels.ndim == 3 else pixels[..., None], self.input_shape)

    def top(self, prediction: Prediction, count: int) -> list[tuple[str, float]]:
        """The `count` most probable classes of a prediction with their probabilities, most probable first."""
        order = np.argsort(-prediction.probabilities, kind="stable")[:count]
        return [(self.class_names[index], float(prediction.probabilities[index])) for index in order]

    def _chunks(self, images: Any) -> Iterator[Any]:
        """uint8 [n, H, W, C] arrays of the right shape, n at most a chunk, from whatever `predict` was given."""
        if isinstance(images, (str, os.PathLike, bytes, bytearray, memoryview)):
            images = [images]
        elif hasattr(images, "dtype"):
            _check_pixels(images, dimensions=(2, 3, 4))
            if images.ndim < 4:
                images = [images]
            elif tuple(images.shape[1:]) == self.input_shape:
                yield images
                return
        elif not isinstance(images, Iterable):
            raise PipelineError(f"predict() takes pixels, paths or bytes, got {type(images).__name__}.")
        remaining = iter(images)
        while chunk := list(itertools.islice(remaining, self._graph.chunk)):
            yield np.stack([self.read(image) for image in chunk])


def _check_pixels(images: Any, dimensions: tuple[int, ...]) -> None:
    if not hasattr(images, "dtype") or not hasattr(images, "shape"):
        raise PipelineError(f"An image is a uint8 array, a path or bytes, got {type(images).__name__}.")
    shape = tuple(images.shape)
    if images.dtype != np.uint8:
        raise PipelineError(
            f"Images are uint8 pixels in 0..255, got {images.dtype} {shape}; normalisation happens inside the model, "
            f"so convert back: (images * 255).round().astype('uint8') for values in 0..1."
        )
    if len(shape) not in dimensions or (len(shape) > 2 and shape[-1] not in (1, 3)):
        raise PipelineError(
            f"Images have the shape [H, W, C], or [N, H, W, C] for several, with 1 (grey) or 3 (RGB) channels last, "
            f"got {shape}."
        )


# --- what a path is ------------------------------------------------------------------------------------------------


def _identify(path: str | os.PathLike[str] | None) -> tuple[str, Path]:
    """The kind of artifact at a path, and its file or folder (a run's is its `model.keras`)."""
    if path is not None:
        given = Path(path)
        if given.suffix in (".keras", ".tflite"):
            if not given.is_file():
                raise PipelineError(f"There is no file {given}.")
            return given.suffix[1:], given
        if (given / "saved_model.pb").is_file():
            return "tftrt" if (given / tensorrt_library.MANIFEST).is_file() else "saved_model", given
        if given.is_file() or (given.is_dir() and not (given / "model.keras").is_file()):
            raise PipelineError(
                f"{given} is no artifact; pass a run, a .keras or .tflite file, or a folder with a saved_model.pb."
            )
    return "keras", runs.find(path).model_path


# --- one loader a kind ---------------------------------------------------------------------------------------------


def _chunk(input_shape: tuple[int, int, int]) -> int:
    """Images a call: 1,024, or fewer where they are large, so that activations fit into memory."""
    return max(1, min(CHUNK, CHUNK_PIXELS // (input_shape[0] * input_shape[1])))


def _check_ends(path: Path, dtype: Any, shape: Any, classes: Any) -> tuple[tuple[int, int, int], int]:
    shape = tuple(shape)
    if np.dtype(dtype) != np.uint8 or len(shape) != 3 or shape[2] not in (1, 3) or None in shape or not classes:
        raise PipelineError(
            f"{path} takes {np.dtype(dtype).name} of shape {shape}; an artifact of this pipeline takes uint8 images "
            f"(H, W, 1 or 3) and holds its own normalisation."
        )
    return shape, int(classes)


def _keras(path: Path) -> _Graph:
    from pipeline import models

    tf = device.tensorflow()
    model = models.load(path)
    shape, classes = _check_ends(path, model.inputs[0].dtype, model.input_shape[1:], model.output_shape[-1])

    @tf.function(input_signature=[tf.TensorSpec([None, *shape], tf.uint8)])
    def forward(images: Any) -> Any:
        return model(images, training=False)

    return _Graph(lambda images: forward(_tensor(images)).numpy(), shape, classes, _chunk(shape))


def _saved_model(path: Path) -> _Graph:
    tf = device.tensorflow()
    try:
        loaded = tf.saved_model.load(str(path))
        signature = loaded.signatures["serving_default"]
        ((name, pixels),) = signature.structured_input_signature[1].items()
        ((output, probabilities),) = signature.structured_outputs.items()
    except Exception as error:  # TensorFlow raises whatever its protobuf and file readers raise
        raise PipelineError(f"{path} is no readable SavedModel of a classifier ({first_line(error)}).") from None
    shape, classes = _check_ends(path, pixels.dtype.as_numpy_dtype, pixels.shape[1:], probabilities.shape[-1])

    def forward(images: Any) -> np.ndarray:
        # `loaded` owns the variables and engines: a signature alone does not keep them.
        return loaded.signatures["serving_default"](**{name: _tensor(images)})[output].numpy()

    return _Graph(forward, shape, classes, _chunk(shape))


def _tftrt(path: Path) -> _Graph:
    tensorrt_library.require(path)
    return _saved_model(path)


def _tflite(path: Path) -> _Graph:
    tf = device.tensorflow()
    content = path.read_bytes()
    try:
        _check_flatbuffer(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            interpreter = tf.lite.Interpreter(model_content=content, num_threads=_threads())
        interpreter.allocate_tensors()
        pixels, output = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
        scale, zero_point = output["quantization"]
    except (ValueError, RuntimeError, IndexError, KeyError) as error:
        raise PipelineError(
            f"{path} is no readable TFLite file ({first_line(error)}); make it again: python -m export.tflite"
        ) from None
    shape, classes = _check_ends(path, pixels["dtype"], pixels["shape"][1:].tolist(), output["shape"][-1])
    lock = threading.Lock()  # an interpreter holds one set of tensors: one call at a time

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

    return _Graph(forward, shape, classes, min(64, _chunk(shape)))


def _check_flatbuffer(content: bytes) -> None:
    """Walk through a TFLite file once: the interpreter follows offsets unchecked, and crashes on a truncated file."""
    from tensorflow.lite.python import schema_py_generated as schema

    if content[4:8] != b"TFL3":
        raise ValueError("it does not begin as one")
    try:
        schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    except Exception as error:  # struct.error, ValueError, IndexError, TypeError: whatever the wrong offset leads to
        raise ValueError("truncated or damaged") from error


def _tensor(images: Any) -> Any:
    """uint8 pixels as a TensorFlow tensor, without a copy where they are on the GPU."""
    return device.to_tensorflow(images if images.flags.c_contiguous else device.xp().ascontiguousarray(images))


def _threads() -> int:
    """Half the cores this process may use: the interpreter's threads spin, and one too many makes all of them wait."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // 2)
