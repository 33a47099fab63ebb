"""TFLite files of a run: float32, float16 and full-integer INT8, each measured against the Keras model.

    python -m export.tflite --run runs/latest

INT8 follows "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference" (Jacob et
al., CVPR 2018): int8 weights per channel, activations calibrated on training images, uint8 in and out.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

from export import artifacts, labels, saved_model
from pipeline import runs
from pipeline.core import device, files
from pipeline.core.errors import PipelineError, first_line
from pipeline.evaluate import exports

PRECISIONS = ("float32", "float16", "int8")


CALIBRATION_IMAGES = 512


def export(run: runs.Run, dataset: Any = None) -> dict[str, Path]:
    """Write and measure the three TFLite files of a run, and put their measurements into `export.json`.

    Args:
        run: A finished run.
        dataset: The `pipeline.datasets.Dataset` to calibrate and measure with; the run's own by default.

    Returns:
        Precision ("float32", "float16", "int8") to file, each uint8 [N, H, W, C] in for any N, probabilities out:
        float32 [N, K], or uint8 [N, K] in steps of 1/256 in the INT8 file, which computes in integers throughout.

    Raises:
        PipelineError: No such data, a data set of other classes, a network TFLite cannot express, or no room.
    """
    from export.predict import Predictor

    dataset = dataset if dataset is not None else run.load_dataset()
    sample = artifacts.test_sample(run, dataset)
    model = run.load_model()
    paths = {}
    for precision in PRECISIONS:
        calibration = artifacts.calibration_images(dataset, CALIBRATION_IMAGES) if precision == "int8" else None
        path = run.make_export_dir() / f"model_{precision}.tflite"
        files.write(path, labels.with_labels(convert(model, precision, calibration), run.card))
        exports.record(run, path, artifacts.measure(Predictor.load(path), sample))
        paths[precision] = path
    return paths


def convert(model: Any, precision: str, calibration: Any = None) -> bytes:
    """Convert a deployable Keras model to a TFLite flatbuffer.

    Args:
        model: uint8 [N, H, W, C] to float32 probabilities [N, K].
        precision: "float32", "float16" (weights; arithmetic stays float32 on a CPU) or "int8".
        calibration: uint8 [M, H, W, C] NumPy training images whose activations set the integer ranges; INT8 only.

    Raises:
        PipelineError: An unknown precision, INT8 without calibration images, or an operation TFLite does not have.
    """
    if precision not in PRECISIONS:
        raise PipelineError(f"There is no TFLite precision {precision!r}; known ones: {', '.join(PRECISIONS)}.")
    integer = precision == "int8"
    if integer and (calibration is None or len(calibration) == 0):
        raise PipelineError("INT8 needs training images for its calibration and got none.")
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
            # Two pixels of one image pin the range of the pixels to 0..255, whatever the images hold.
            pinned = calibration[0].copy()
            pinned[0, 0], pinned[-1, -1] = 0, 255
            converter.representative_dataset = lambda: ([i[None].astype("float32")] for i in (pinned, *calibration))
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
            converter.inference_input_type = converter.inference_output_type = tf.uint8
        try:
            return _converted(converter)
        except _Refused as error:
            raise PipelineError(
                f"TFLite cannot express {find_unsupported_layer(model)} in {precision} ({error}).", 1
            ) from None


class _Refused(Exception):
    """What the converter says of a graph that TFLite cannot express, in one line."""


def _converted(converter: Any) -> bytes:
    try:
        return converter.convert()
    except Exception as error:  # the converter raises its own ConverterError, RuntimeError or ValueError
        raise _Refused(first_line(error)) from None


def find_unsupported_layer(model: Any) -> str:
    """What of a deployable model TFLite cannot express: the first of the network's layers that it refuses alone."""
    tf = device.tensorflow()
    import keras

    layers = (layer for layer in model.get_layer("network").layers if not isinstance(layer, keras.layers.InputLayer))
    for layer in layers:
        with tempfile.TemporaryDirectory() as folder:
            saved_model.write(_alone(layer), Path(folder))
            try:
                _converted(tf.lite.TFLiteConverter.from_saved_model(folder))
            except _Refused:
                return f"the layer {layer.name!r} ({type(layer).__name__}) of this network"
    return "this network"


def _alone(layer: Any) -> Any:
    """A model of one layer of a functional model, called as it is called there."""
    import keras

    call = layer._inbound_nodes[0].arguments
    inputs = {id(tensor): keras.Input(tensor.shape[1:], dtype=tensor.dtype) for tensor in call.keras_tensors}
    args, kwargs = keras.tree.map_structure(lambda value: inputs.get(id(value), value), (call.args, call.kwargs))
    return keras.Model(list(inputs.values()), layer(*args, **kwargs))


def _for_integers(model: Any) -> Any:
    """The deployable graph in a form that loses little in integers: float32 pixels in 0..255 to probabilities.

    Float pixels, so that their quantisation is scale 1 and zero point 0 and no cast is left in front of it. Rescaling
    and normalisation as one 1×1 depthwise convolution, so that pixels are rounded once and not after each of three
    operations: on CIFAR-10 that was worth 0.8 points of agreement with the Keras model.
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
