"""Measure the training speed, augmentation included: ``python -m benchmarks.train``

Trains the cnn with the project's loop and with Keras `fit`, in one process and with the same network, optimizer,
clipping, loss scaling and precision. Keras runs twice: with a typical tf.data pipeline (flip, crop, brightness), and
with plain arrays and no augmentation. Each figure is the median of whole epochs after one that compiles. On a GPU,
CUDA's profiler also counts the bytes copied from the host to the device during one epoch.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy

from benchmarks import results
from benchmarks.timing import timed_epochs
from pipeline.core import cli, config, device
from pipeline.core.settings import Settings
from pipeline.data.load import load_dataset
from pipeline.train import setup


def own_loop(settings: Settings, dataset: Any, epochs: int) -> dict[str, Any]:
    """Measure images/s of the project's loop, and the bytes copied from the host in another epoch."""
    loop = setup.build_loop(settings, dataset)
    figures, _ = timed_epochs(loop, dataset, epochs)
    if device.has_gpu():
        figures["host_to_device"] = host_to_device(lambda: loop.train_epoch(dataset.train, epochs + 1))
        figures["permutation_bytes"] = 4 * len(dataset.train.labels)
    return figures


def keras_fit(settings: Settings, dataset: Any, epochs: int, augmented: bool) -> dict[str, Any]:
    """Measure images/s of Keras `fit` with images in host memory; tf.data augments them if `augmented`."""
    tf = device.tensorflow()
    import keras

    loop = setup.build_loop(settings, dataset)
    network, optimizer = loop.network, loop.optimizer
    optimizer.global_clipnorm = settings.optimizer.global_clipnorm  # the loop clips the gradients itself
    batch_size = settings.batch_size
    images, labels = device.to_numpy(dataset.train.images), device.to_numpy(dataset.train.labels)
    mean, deviation = (numpy.array(values, numpy.float32) * 255 for values in (dataset.mean, dataset.std))
    height, width, channels = dataset.image_shape

    def augment(image: Any, label: Any) -> Any:
        image = tf.image.random_flip_left_right(tf.cast(image, tf.float32))
        image = tf.pad(image, [[4, 4], [4, 4], [0, 0]], mode="REFLECT")
        image = tf.image.random_brightness(tf.image.random_crop(image, (height, width, channels)), 25.5)
        return (tf.clip_by_value(image, 0, 255) - mean) / deviation, label

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"])
    if augmented:
        data = tf.data.Dataset.from_tensor_slices((images, labels)).shuffle(len(labels), seed=0)
        data = data.map(augment, num_parallel_calls=tf.data.AUTOTUNE)
        source = {"x": data.batch(batch_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)}
    else:
        whole = len(labels) - len(labels) % batch_size
        source = {"x": ((images - mean) / deviation)[:whole], "y": labels[:whole], "batch_size": batch_size}
    speeds = []
    warnings.filterwarnings("ignore", "`shuffle=True` was passed", UserWarning)  # Keras's default; the dataset shuffles
    for _ in range(epochs + 1):
        started = time.perf_counter()
        network.fit(**source, epochs=1, verbose=0)
        device.synchronize()
        speeds.append((len(labels) - len(labels) % batch_size) / (time.perf_counter() - started))
    return {"images_per_second": statistics.median(speeds[1:]), "epochs": speeds[1:]}


def host_to_device(work: Any) -> dict[str, int]:
    """Run `work` and count the host-to-device ``copies`` and ``bytes`` of all libraries."""
    tf = device.tensorflow()
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        work()
        device.synchronize()
        tf.profiler.experimental.stop()
        space = xplane_pb2.XSpace()
        for path in Path(folder).rglob("*.xplane.pb"):
            space.MergeFromString(path.read_bytes())
    sizes = []
    for plane in space.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            for event in line.events:
                if "MemcpyH2D" not in plane.event_metadata[event.metadata_id].name:
                    continue
                details = " ".join(
                    stat.str_value or plane.stat_metadata[stat.ref_value].name
                    for stat in event.stats
                    if plane.stat_metadata[stat.metadata_id].name == "memcpy_details"
                )
                sizes += [int(size) for size in re.findall(r"size:(\d+)", details)]
    return {"copies": len(sizes), "bytes": sum(sizes)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__.split(":")[0])
    parser.add_argument("--dataset", default="cifar10", help="(default: %(default)s)")
    parser.add_argument("--data-dir", default=None, help="folder of the dataset, or of its download")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[128, 512], help="(default: 128 512)")
    parser.add_argument("--epochs", type=int, default=5, help="epochs after one that compiles (default: %(default)s)")
    parser.add_argument("--limit-per-class", type=int, default=None, help="maximum number of images per class")
    arguments = parser.parse_args()
    dataset = load_dataset(
        arguments.dataset, arguments.data_dir, limit_per_class=arguments.limit_per_class, validation_fraction=0.1
    )
    figures: dict[str, Any] = {"dataset": dataset.name, "train_images": len(dataset.train.labels), "runs": []}
    print(f"{'batch':>6} {'loop':>14} {'fit + tf.data':>14} {'fit, no augm.':>14}   ratio to fit + tf.data")
    for batch_size in arguments.batch_sizes:
        settings = setup.resolve(config.compose([f"batch_size={batch_size}", "model=cnn", "augment=standard"]))
        own = own_loop(settings, dataset, arguments.epochs)
        augmented = keras_fit(settings, dataset, min(arguments.epochs, 3), augmented=True)
        plain = keras_fit(settings, dataset, min(arguments.epochs, 3), augmented=False)
        ratio = own["images_per_second"] / augmented["images_per_second"]
        figures["precision"] = settings.precision
        figures["runs"].append(
            {"batch_size": batch_size, "loop": own, "keras_fit": augmented, "keras_fit_no_augmentation": plain,
             "times_keras_fit": ratio,
             "times_keras_fit_no_augmentation": own["images_per_second"] / plain["images_per_second"]}
        )  # fmt: skip
        print(
            f"{batch_size:>6} {own['images_per_second']:>12,.0f}/s {augmented['images_per_second']:>12,.0f}/s "
            f"{plain['images_per_second']:>12,.0f}/s   {ratio:.1f}×"
        )
        if "host_to_device" in own:
            print(
                f"       host to device in one epoch: {own['host_to_device']['bytes']:,} bytes in "
                f"{own['host_to_device']['copies']} copies; the permutation is {own['permutation_bytes']:,}"
            )
    print(f"written to {results.save('train', figures)}")


if __name__ == "__main__":
    cli.run(main)
