"""Show why a network predicts what it does, and which labels may be wrong.

name, maps = heat_maps(model, images, predictions)   # "Grad-CAM" or "attention", one map for each image
explain_run(run, dataset)                            # writes tables and figures into the run's folder evaluation/
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy

from pipeline import runs
from pipeline.core import device, files
from pipeline.evaluate import figures
from pipeline.evaluate.metrics import highest_losses, most_confident_mistakes
from pipeline.evaluate.run import predict_probabilities

EXPLAINED_MISTAKES = 12
COLUMNS = 6
IMAGE_INCHES = 1.8
FONT_POINTS = 10


def heat_maps(model: Any, images: Any, classes: Sequence[int]) -> tuple[str, numpy.ndarray] | None:
    """Maps of the image regions that matter for a class.

    Grad-CAM (Selvaraju et al., 2017) for convolutional networks: the last feature map, weighted by the gradient of the
    class's logit. For networks with attention, the attention rollout (Abnar and Zuidema, 2020), which is the same for
    all classes.

    Args:
        model: From `Run.load_model`: uint8 [N, H, W, C] to probabilities [N, K].
        images: uint8 [N, H, W, C], CuPy or NumPy; few enough for one batch.
        classes: The class to explain, for each image.

    Returns:
        The name of the method and float32 [N, H, W] from 0 to 1, on the host; None if the network has neither
        convolutions nor attention.
    """
    tf = device.tensorflow()
    network = model.get_layer("network")
    inputs = device.to_tensorflow(device.xp().ascontiguousarray(images))
    for layer in model.layers[1 : model.layers.index(network)]:
        inputs = layer(inputs)
    last, attention = last_feature_map(network), _attention_layers(network)
    if attention:
        name, maps = "attention", _rollout(network, attention, inputs, last)
    elif last is not None:
        name, maps = "Grad-CAM", _grad_cam(network, last, inputs, classes)
    else:
        return None
    maps = tf.image.resize(maps[..., None], images.shape[1:3], method="bilinear").numpy()[..., 0]
    maps = maps - maps.min(axis=(1, 2), keepdims=True)
    return name, maps / numpy.maximum(maps.max(axis=(1, 2), keepdims=True), 1e-12)


def last_feature_map(network: Any) -> Any:
    """The last layer whose output is [N, h, w, C] with more than one position, also inside nested models.

    Returns:
        The layer, or None if the network contains no convolution.
    """
    layers = list(_layers(network))
    convolutions = [index for index, layer in enumerate(layers) if "Conv" in type(layer).__name__]
    if not convolutions:
        return None
    shapes = {layer: layer.output.shape for layer in layers[convolutions[0] :]}
    maps = [layer for layer, shape in shapes.items() if len(shape) == 4 and shape[1:3] != (1, 1)]
    return maps[-1] if maps else None


def _layers(network: Any) -> Iterator[Any]:
    """The layers of a network in the order of the computation, with the layers of nested models in their place."""
    import keras

    for layer in network.layers:
        if isinstance(layer, keras.Model):
            yield from _layers(layer)
        else:
            yield layer


def _attention_layers(network: Any) -> list[Any]:
    import keras

    return [layer for layer in _layers(network) if isinstance(layer, keras.layers.MultiHeadAttention)]


@contextlib.contextmanager
def _replaced_call(layer: Any, call: Callable[..., Any]) -> Iterator[None]:
    """Let a layer compute `call(original call, *arguments)`; this also reaches layers of nested models."""
    original = layer.call
    layer.call = lambda *arguments, **options: call(original, *arguments, **options)
    try:
        yield
    finally:
        layer.call = original


def _grad_cam(network: Any, layer: Any, inputs: Any, classes: Sequence[int]) -> Any:
    tf = device.tensorflow()
    with tf.GradientTape() as tape:
        recorded = []

        def record(original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
            output = original(*arguments, **options)
            tape.watch(output)
            recorded.append(output)
            return output

        with _replaced_call(layer, record):
            logits = network(inputs, training=False)
        score = tf.reduce_sum(tf.gather(logits, tf.constant(classes, tf.int32), axis=1, batch_dims=1))
    (features,) = recorded
    weights = tf.reduce_mean(tape.gradient(score, features), axis=(1, 2), keepdims=True)
    return tf.nn.relu(tf.reduce_sum(weights * features, axis=-1))


def _rollout(network: Any, attention: Sequence[Any], inputs: Any, patches: Any) -> Any:
    tf = device.tensorflow()
    scores = []

    def record(original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        output, weights = original(*arguments, **{**options, "return_attention_scores": True})
        scores.append(tf.cast(tf.reduce_mean(weights, axis=1), tf.float32))
        return output

    with contextlib.ExitStack() as stack:
        for layer in attention:
            stack.enter_context(_replaced_call(layer, record))
        network(inputs, training=False)
    tokens = scores[0].shape[-1]
    rollout = tf.eye(tokens, batch_shape=[inputs.shape[0]])
    for block in scores:  # the identity is the skip connection
        rollout = (block + tf.eye(tokens)) / 2 @ rollout
    height, width = patches.output.shape[1:3]
    has_class_token = tokens == height * width + 1
    received = rollout[:, 0, 1:] if has_class_token else tf.reduce_mean(rollout, axis=1)
    return tf.reshape(received, (-1, height, width))


def overlay(images: numpy.ndarray, maps: numpy.ndarray) -> numpy.ndarray:
    """Draw heat maps over grey versions of images.

    Args:
        images: uint8 [N, H, W, C] on the host.
        maps: float [N, H, W] from 0 to 1 on the host.

    Returns:
        uint8 [N, H, W, 3] on the host.
    """
    from matplotlib import colormaps

    grey = images.mean(axis=-1, keepdims=True) / 255
    strength = 0.6 * maps[..., None]
    colours = colormaps["inferno"](maps)[..., :3]
    return numpy.rint(255 * ((1 - strength) * grey + strength * colours)).astype(numpy.uint8)


def explained_mistakes(
    model: Any, probabilities: numpy.ndarray, labels: numpy.ndarray, images: Any, class_names: Sequence[str]
) -> Any:
    """The most confident mistakes, each next to the heat map of the predicted class.

    Args:
        model: From `Run.load_model`.
        probabilities: float32 [N, K] on the host.
        labels: int [N] on the host.
        images: uint8 [N, H, W, C], on the GPU or the host.
        class_names: K names.

    Returns:
        A matplotlib figure, or None if there is no mistake or no heat map for this network.
    """
    indices = most_confident_mistakes(probabilities, labels, EXPLAINED_MISTAKES)
    if len(indices) == 0:
        return None
    shown, predictions = images[device.xp().asarray(indices)], probabilities[indices].argmax(axis=1)
    found = heat_maps(model, shown, predictions)
    if found is None:
        return None
    name, maps = found
    pixels = device.to_numpy(shown)
    pixels = numpy.broadcast_to(pixels, (*pixels.shape[:-1], 3))
    pairs = numpy.stack([pixels, overlay(pixels, maps)], axis=1).reshape(-1, *pixels.shape[1:])
    titles = []
    for index, predicted in zip(indices, predictions, strict=True):
        heading = f"{class_names[predicted]} {probabilities[index, predicted]:.0%}"
        titles += [f"{heading}\nis {class_names[labels[index]]}", name]
    return figures.image_grid(pairs, titles, columns=COLUMNS, size=IMAGE_INCHES, fontsize=FONT_POINTS)


def suspicious_labels(probabilities: numpy.ndarray, split: Any, class_names: Sequence[str]) -> Any:
    """The images of a split with the highest loss, highest first; a wrong label is one of the reasons.

    Args:
        probabilities: float32 [N, K] on the host.
        split: A `pipeline.data.dataset.Split` of N images.
        class_names: K names.

    Returns:
        A pandas dataframe with the columns ``loss`` (nats), ``label``, ``predicted``, ``probability`` (of the predicted
        class) and ``source``; its index contains the positions of the images in the split.
    """
    import pandas

    labels = device.to_numpy(split.labels)
    indices = highest_losses(probabilities, labels)
    rows, labels = probabilities[indices], labels[indices]
    sources = split.sources.iloc[indices]
    return pandas.DataFrame(
        {
            "loss": -numpy.log(numpy.clip(rows[numpy.arange(len(rows)), labels], 1e-12, 1)),
            "label": [class_names[label] for label in labels],
            "predicted": [class_names[predicted] for predicted in rows.argmax(axis=1)],
            "probability": rows.max(axis=1),
            "source": sources.to_pandas().to_list() if hasattr(sources, "to_pandas") else sources.to_list(),
        },
        index=indices,
    )


def explain_run(run: runs.Run, dataset: Any, split: str = "test") -> Any:
    """Explain the mistakes of a run in a split, and list the training images with the highest loss.

    It writes ``SPLIT_explained_mistakes.png`` (if the network has convolutions or attention, and makes mistakes),
    ``train_highest_loss.csv`` and ``train_highest_loss.png`` into the run's folder `evaluation/`.

    Args:
        run: The run.
        dataset: A `pipeline.data.dataset.Dataset` with the run's classes and image shape.
        split: The split whose mistakes are explained.

    Returns:
        The dataframe of `suspicious_labels` for the training split.
    """
    run.check_dataset(dataset)
    model, class_names, folder = run.load_model(), run.card.class_names, run.path / "evaluation"
    part = getattr(dataset, split)
    probabilities = predict_probabilities(model, part.images)
    figure = explained_mistakes(model, probabilities, device.to_numpy(part.labels), part.images, class_names)
    if figure is not None:
        figures.save_figure(folder / f"{split}_explained_mistakes.png", figure)
    train = dataset.train
    table = suspicious_labels(predict_probabilities(model, train.images), train, class_names)
    files.write_bytes(folder / "train_highest_loss.csv", table.to_csv(index_label="index").encode())
    titles = [f"label {row.label}\n{row.predicted} {row.probability:.0%}" for row in table.itertuples()]
    images = train.images[device.xp().asarray(table.index.to_numpy())]
    figures.save_figure(
        folder / "train_highest_loss.png",
        figures.image_grid(images, titles, columns=COLUMNS, size=IMAGE_INCHES, fontsize=FONT_POINTS),
    )
    return table
