"""TF-TRT: the SavedModel of a run with its network replaced by TensorRT engines, built, calibrated and saved.

python -m export.tftrt --run runs/latest --precision INT8

The engines run on the kind of GPU they were built on, with TensorFlow 2.17, the last release with TF-TRT.
"""

from __future__ import annotations

import collections
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from export import artifacts, labels, saved_model, tensorrt_library
from pipeline import runs
from pipeline.core import device, files
from pipeline.core.errors import PipelineError
from pipeline.evaluate import exports

PRECISIONS = ("INT8", "FP16", "FP32")


CALIBRATION_IMAGES = 512


CALIBRATION_BATCH = 64  # every batch of a calibration has one shape


PROFILE_BATCHES = (1, 64, 1024)  # the smallest and largest bound the engines' one profile


def export(run: runs.Run, dataset: Any = None, precision: str = "INT8") -> Path:
    """Convert, build, save and measure one TF-TRT artifact of a run, and put its measurements into `export.json`.

    Args:
        run: A finished run.
        dataset: The `pipeline.datasets.Dataset` to calibrate and measure with; the run's own by default.
        precision: "INT8" (calibrated on 512 training images), "FP16" or "FP32".

    Returns:
        `export/tftrt_int8` (or `_fp16`, `_fp32`): a SavedModel, uint8 [N, H, W, C] to float32 [N, K] for N from 1 to
        1,024 in the engines and above that in TensorFlow, with `tftrt.json` (precision, engines, converted nodes, GPU,
        versions) and `labels.json` beside it.

    Raises:
        PipelineError: No NVIDIA GPU or TensorRT, an unknown precision, data of other classes, a network of which
            nothing could be converted, or no room.
    """
    from export.predict import Predictor

    if precision.upper() not in PRECISIONS:
        raise PipelineError(f"There is no TF-TRT precision {precision!r}; known ones: {', '.join(PRECISIONS)}.")
    precision = precision.upper()
    version = tensorrt_library.require()
    dataset = dataset if dataset is not None else run.load_dataset()
    sample = artifacts.test_sample(run, dataset)
    images = artifacts.calibration_images(dataset, CALIBRATION_IMAGES)
    path = run.export_dir / f"tftrt_{precision.lower()}"
    source = saved_model.save(run)
    with files.atomic_write(path) as temporary:
        manifest = _convert(source, temporary, precision, images)
        manifest |= {
            "tensorrt": ".".join(map(str, version)),
            "compute_capability": device.compute_capability(),
            "machine": device.describe(),
        }
        (temporary / labels.LABELS).write_bytes(labels.labels_json(run.card))
        files.write_json(temporary / tensorrt_library.MANIFEST, manifest)
    measured = artifacts.measure(Predictor.load(path), sample)
    conversion = {key: manifest[key] for key in ("engines", "nodes_converted", "nodes")}
    exports.record(run, path, measured | conversion)
    return path


def _convert(source: Path, target: Path, precision: str, images: np.ndarray) -> dict[str, Any]:
    """Convert the SavedModel in `source` to `target`.

    Args:
        images: uint8 [M, H, W, C] training images on the host, at least one; repeated to fill the profile's batches.

    Returns:
        What `count_nodes` found, with the precision, the profile's batches and the number of calibration images.
    """
    tf = device.tensorflow()
    calibrated = precision == "INT8"

    def filled(start: int, count: int) -> tuple[Any]:
        return (tf.constant(images[np.arange(start, start + count) % len(images)]),)

    def calibration_batches() -> Any:
        return (filled(start, CALIBRATION_BATCH) for start in range(0, len(images), CALIBRATION_BATCH))

    def profile_batches() -> Any:
        return (filled(0, count) for count in PROFILE_BATCHES)

    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as scratch:
        warnings.simplefilter("ignore")
        try:
            converter = tf.experimental.tensorrt.Converter(
                input_saved_model_dir=str(source),
                precision_mode=precision,
                use_calibration=calibrated,
                use_dynamic_shape=True,
                dynamic_shape_profile_strategy="Range",
            )
        except RuntimeError as error:  # TensorFlow compares the versions here
            raise PipelineError(
                f"TensorFlow {tf.__version__} refuses the TensorRT that is loaded ({error}); it wants "
                f"{tensorrt_library.VERSION} or a later 8.x: pip install -r requirements-tensorrt.txt"
            ) from None
        converted = converter.convert(calibration_input_fn=calibration_batches if calibrated else None)
        graph = converted.graph.as_graph_def()
        manifest = count_nodes(graph)
        if manifest["engines"] == 0:
            raise PipelineError(
                f"TF-TRT could convert nothing of this network: it left {', '.join(unconverted_ops(graph))} "
                "(logs/tensorflow.log says why); use export.tflite",
                exit_code=1,
            )
        converter.build(input_fn=profile_batches)
        # The converter leaves a copy of its engines in the temporary folder for good.
        default, tempfile.tempdir = tempfile.tempdir, scratch
        try:
            converter.save(str(target), save_gpu_specific_engines=True)
        finally:
            tempfile.tempdir = default
    if not list((target / "assets").glob("trt-serialized-engine.*")):
        raise PipelineError("TensorRT built no engine; see logs/tensorflow.log for its reason.", exit_code=1)
    return manifest | {
        "precision": precision,
        "profile_batches": list(PROFILE_BATCHES),
        "calibration_images": len(images) if calibrated else 0,
    }


def count_nodes(graph: Any) -> dict[str, Any]:
    """Count what TF-TRT converted in a `GraphDef`.

    Returns:
        A dictionary with ``engines``, ``nodes_converted`` (nodes inside the engines), ``nodes`` (those and the ones
        left to TensorFlow, without the engines) and ``nodes_left`` (operation to count).
    """
    engines = [node.name for node in graph.node if node.op == "TRTEngineOp"]
    segments = {function.signature.name: len(function.node_def) for function in graph.library.function}
    converted = sum(segments.get(f"{name}_native_segment", 0) for name in engines)
    left = collections.Counter(node.op for node in graph.node if node.op != "TRTEngineOp")
    return {
        "engines": len(engines),
        "nodes_converted": converted,
        "nodes": converted + left.total(),
        "nodes_left": dict(left),
    }


def unconverted_ops(graph: Any, count: int = 5) -> list[str]:
    """The first operations that TF-TRT left to TensorFlow, each with the layer it is in: ``Lgamma in layer odd``."""
    found = []
    for node in graph.node:
        layer = next((part for part in reversed(node.name.split("/")[:-1]) if part), None)
        if layer is not None and node.op not in ("TRTEngineOp", "Const", "Identity", "ReadVariableOp"):
            found.append(f"{node.op} in layer {layer}")
    return list(dict.fromkeys(found))[:count] or ["everything"]
