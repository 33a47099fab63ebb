"""Export a run as TFLite files in float32, float16 and INT8, and compare each with the Keras model.

    paths = tflite.export(runs.find())       # {"float32": .../model_float32.tflite, ...}

INT8 follows "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference" (Jacob et
al., CVPR 2018): int8 weights per channel, activations calibrated on training images, uint8 in and out.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

from export import artifacts, labels, saved_model
from export.predict import Predictor
from pipeline import runs
from pipeline.core import device, files
from pipeline.core.errors import PipelineError, first_line
from pipeline.evaluate import exports

PRECISIONS = ("float32", "float16", "int8")


def export(run: runs.Run, dataset: Any = None) -> dict[str, Path]:
    """Write and measure the three TFLite files of a run; the measurements are added to `export.json`.

    Args:
        run: A finished run.
        dataset: The `Dataset` to calibrate and measure with; the run's dataset by default.

    Returns:
        Precision ("float32", "float16", "int8") to file. Each takes uint8 [N, H, W, C] for any N. The float files
        return float32 [N, K]; the INT8 file computes in integers only and returns uint8 [N, K] in steps of 1/256.

    Raises:
        PipelineError: The dataset is missing or has other classes, TFLite does not support an operation of the
            network, or the disk is full.
    """
    dataset = dataset if dataset is not None else run.load_dataset()
    sample = artifacts.test_sample(run, dataset)
    calibration = artifacts.calibration_images(dataset)
    model = run.load_model()
    paths = {}
    for precision in PRECISIONS:
        path = run.export_dir / f"model_{precision}.tflite"
        files.write_bytes(path, labels.with_labels(convert(model, precision, calibration), run.card))
        exports.record(run, path, artifacts.measure(Predictor.load(path), sample))
        paths[precision] = path
    return paths


def convert(model: Any, precision: str, calibration: Any = None) -> bytes:
    """Convert a deployable Keras model to a TFLite flatbuffer.

    Args:
        model: uint8 [N, H, W, C] to float32 probabilities [N, K].
        precision: "float32", "float16" (weights; arithmetic stays float32 on a CPU) or "int8".
        calibration: uint8 [M, H, W, C] NumPy training images that determine the integer ranges; needed for "int8".

    Raises:
        PipelineError: An unknown precision, or an operation that TFLite does not support.
    """
    if precision not in PRECISIONS:
        raise PipelineError(f"Expected precision to be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    integer = precision == "int8"
    tf = device.tensorflow()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copy = saved_model.float32_copy(model)
        saved_model.write(_for_integers(copy) if integer else copy, Path(folder))
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        if precision != "float32":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if precision == "float16":
            converter.target_spec.supported_types = [tf.float16]
        if integer:
            # A black and a white pixel in one image fix the input range to 0..255.
            pinned = calibration[0].copy()
            pinned[0, 0], pinned[-1, -1] = 0, 255
            converter.representative_dataset = lambda: ([i[None].astype("float32")] for i in (pinned, *calibration))
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
            converter.inference_input_type = converter.inference_output_type = tf.uint8
        try:
            return converter.convert()
        except Exception as error:  # the converter raises its own ConverterError, RuntimeError or ValueError
            raise PipelineError(
                f"TFLite does not support {find_unsupported_layer(model)} in {precision} ({first_line(error)}).", 1
            ) from error


def find_unsupported_layer(model: Any) -> str:
    """Name the first layer of a deployable model's network that TFLite cannot convert, or "this network"."""
    tf = device.tensorflow()
    import keras

    for layer in model.get_layer("network").layers:
        if isinstance(layer, keras.layers.InputLayer):
            continue
        with tempfile.TemporaryDirectory() as folder:
            saved_model.write(_single_layer_model(layer), Path(folder))
            try:
                tf.lite.TFLiteConverter.from_saved_model(folder).convert()
            except Exception:  # as in `convert`
                return f"the layer {layer.name!r} ({type(layer).__name__}) of this network"
    return "this network"


def _single_layer_model(layer: Any) -> Any:
    """A model with one layer of a functional model, called with the same arguments."""
    import keras

    call = layer._inbound_nodes[0].arguments
    inputs = {id(tensor): keras.Input(tensor.shape[1:], dtype=tensor.dtype) for tensor in call.keras_tensors}
    args, kwargs = keras.tree.map_structure(lambda value: inputs.get(id(value), value), (call.args, call.kwargs))
    return keras.Model(list(inputs.values()), layer(*args, **kwargs))


def _for_integers(model: Any) -> Any:
    """The deployable model rewritten for quantization: float32 pixels from 0 to 255 in, probabilities out.

    A float input is quantized with scale 1 and zero point 0 and needs no cast. Rescaling and
    normalisation become one 1×1 depthwise convolution, so that pixels are rounded once instead of after each of three
    operations: on CIFAR-10 this improved the agreement with the Keras model by 0.8 percentage points.
    """
    import keras

    height, width, channels = model.input_shape[1:]
    normalised = [
        model.get_layer("normalise")(model.get_layer("rescale")(keras.ops.full((1, 1, 1, channels), pixel)))
        for pixel in (0.0, 255.0)
    ]
    black, white = (keras.ops.convert_to_numpy(values) for values in normalised)
    normalise = keras.layers.DepthwiseConv2D(1, name="rescale_and_normalise")
    pixels = keras.Input((height, width, channels), name="pixels")
    logits = model.get_layer("network")(normalise(pixels))
    normalise.set_weights([((white - black) / 255).reshape(1, 1, channels, 1), black.reshape(channels)])
    return keras.Model(pixels, model.get_layer("probabilities")(logits))
