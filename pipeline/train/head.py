"""Fit the last layer of a pretrained network to a dataset, before the first epoch."""

from __future__ import annotations

from typing import Any

import numpy

from pipeline.core import device
from pipeline.core.settings import Settings
from pipeline.train import setup
from pipeline.train.loop import Loop

MAX_IMAGES = 20_000  # more images change the classifier little and take minutes
REGULARISATION = 0.003  # scikit-learn's C for standardised features


def fit_new_head(loop: Loop, settings: Settings, dataset: Any) -> None:
    """Call `fit_head` with the training split if the settings give the network an untrained last layer."""
    if setup.has_new_head(settings, dataset):
        fit_head(loop, dataset.train, balanced=settings.class_weights == "balanced")


def fit_head(loop: Loop, split: Any, *, balanced: bool = False) -> None:
    """Set the weights of the layer ``head`` by logistic regression on the outputs of the layer ``features``.

    Training then starts from a good classifier, so that its first steps do not destroy the pretrained features (Kumar
    et al., Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution, 2022).

    Args:
        loop: Its network has the layers ``features`` (outputs [N, D]) and ``head`` (a Dense layer with K units).
        split: The training split; of more than `MAX_IMAGES` images, an evenly spaced part is used.
        balanced: Give all classes equal weights.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    chosen = numpy.linspace(0, len(split) - 1, min(len(split), MAX_IMAGES)).astype(numpy.int64)
    part = split.take(device.xp().asarray(chosen))
    labels, scaler = device.to_numpy(part.labels), StandardScaler()
    features = scaler.fit_transform(loop.features(part))
    if len(numpy.unique(labels)) < 2:
        return
    weights = "balanced" if balanced else None
    classifier = LogisticRegression(C=REGULARISATION, max_iter=300, class_weight=weights).fit(features, labels)
    coefficients, intercepts = classifier.coef_, classifier.intercept_
    if len(coefficients) == 1:  # of two classes, only the difference is fitted
        coefficients, intercepts = [numpy.concatenate([-values, values]) / 2 for values in (coefficients, intercepts)]
    head = loop.network.get_layer("head")
    kernel, bias = (numpy.zeros_like(values) for values in head.get_weights())
    kernel[:, classifier.classes_] = (coefficients / scaler.scale_).T
    bias[classifier.classes_] = intercepts - coefficients @ (scaler.mean_ / scaler.scale_)
    head.set_weights([kernel, bias])
