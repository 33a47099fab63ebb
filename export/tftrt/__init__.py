"""Export a run with TF-TRT: a SavedModel in which TensorRT engines compute the network.

    path = tftrt.export(runs.find(), precision="INT8")       # writes runs/NAME/export/tftrt_int8

The engines run only on GPUs with the compute capability of the GPU that built them. TensorFlow 2.17 is the last release
with TF-TRT.
"""

from __future__ import annotations

import collections
import tempfile
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from export import artifacts, labels, saved_model, tensorrt_library
from export.predict import Predictor, max_batch
from pipeline import runs
from pipeline.core import device, files
from pipeline.core.errors import PipelineError
from pipeline.evaluate import exports

PRECISIONS = ("INT8", "FP16", "FP32")
CALIBRATION_BATCH = 64  # TF-TRT needs batches of equal size for the calibration


def export(run: runs.Run, dataset: Any = None, precision: str = "INT8") -> Path:
    """Convert, build, save and measure the TF-TRT engines of a run; the measurements are added to `export.json`.

    Args:
        run: A finished run.
        dataset: The `Dataset` to calibrate and measure with; the run's dataset by default.
        precision: "INT8" (calibrated on 512 training images), "FP16" or "FP32".

    Returns:
        `export/tftrt_int8` (or `_fp16`, `_fp32`): a SavedModel from uint8 [N, H, W, C] to float32 [N, K], with
        `tftrt.json` (precision, engines, converted nodes, GPU, versions) and `labels.json`. The engines take batches
        of up to `predict.max_batch` images, which is also the largest batch that a `Predictor` sends.

    Raises:
        PipelineError: There is no NVIDIA GPU or TensorRT, the precision is unknown, the dataset has other classes,
            TF-TRT cannot convert any part of the network, or the disk is full.
    """
    if precision.upper() not in PRECISIONS:
        raise PipelineError(f"Expected precision to be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    precision = precision.upper()
    version = tensorrt_library.require()
    dataset = dataset if dataset is not None else run.load_dataset()
    sample = artifacts.test_sample(run, dataset)
    images = artifacts.calibration_images(dataset)
    path = run.export_dir / f"tftrt_{precision.lower()}"
    source = saved_model.save(run)
    with files.atomic_write(path) as temporary:
        manifest = _convert(source, temporary, precision, images) | {
            "tensorrt": ".".join(map(str, version)),
            "compute_capability": device.compute_capability(),
            "machine": device.describe(),
        }
        (temporary / labels.LABELS).write_bytes(labels.labels_json(run.card))
        files.write_json(temporary / tensorrt_library.MANIFEST, manifest)
    measured = artifacts.measure(Predictor.load(path), sample)
    exports.record(run, path, measured | {key: manifest[key] for key in ("engines", "nodes_converted", "nodes")})
    return path


def _convert(source: Path, target: Path, precision: str, images: np.ndarray) -> dict[str, Any]:
    """Convert the SavedModel in `source` to `target`.

    Args:
        images: uint8 [M, H, W, C] training images on the host, at least one; repeated to fill the profile's batches.

    Returns:
        The result of `count_nodes`, the precision, the profile's batches and the number of calibration images.
    """
    tf = device.tensorflow()
    calibrated = precision == "INT8"
    largest = max_batch(images.shape[1:])
    batches = sorted({1, min(64, largest), largest})  # the first and the last bound the profile

    def batch(start: int, count: int) -> tuple[Any]:
        return (tf.constant(images[np.arange(start, start + count) % len(images)]),)

    def calibration_input() -> Any:
        return (batch(start, CALIBRATION_BATCH) for start in range(0, len(images), CALIBRATION_BATCH))

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
                f"TensorFlow {tf.__version__} does not accept the installed TensorRT ({error}); it needs "
                f"{tensorrt_library.VERSION} or a later 8.x: pip install -r requirements-tensorrt.txt"
            ) from error
        converted = converter.convert(calibration_input_fn=calibration_input if calibrated else None)
        manifest = count_nodes(converted.graph.as_graph_def())
        if manifest["engines"] == 0:
            raise PipelineError(
                f"TF-TRT cannot convert any part of this network (operations: {', '.join(manifest['nodes_left'])}; "
                f"reasons: {device.native_log() or 'above'}); use export.tflite instead.",
                exit_code=1,
            )
        converter.build(input_fn=lambda: (batch(0, count) for count in batches))
        # The converter leaves a copy of its engines in the temporary folder.
        with mock.patch.object(tempfile, "tempdir", scratch):
            converter.save(str(target), save_gpu_specific_engines=True)
    if not list((target / "assets").glob("trt-serialized-engine.*")):
        raise PipelineError(f"TensorRT built no engine (reason: {device.native_log() or 'above'}).", exit_code=1)
    return manifest | {
        "precision": precision,
        "profile_batches": batches,
        "calibration_images": len(images) if calibrated else 0,
    }


def count_nodes(graph: Any) -> dict[str, Any]:
    """Count the nodes that TF-TRT converted in a `GraphDef`.

    Returns:
        A dictionary with ``engines``, ``nodes_converted`` (nodes inside the engines), ``nodes`` (converted
        and unconverted nodes, not the engines) and ``nodes_left`` (counts of the unconverted nodes by operation).
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
