"""Fixtures of a small finished run and of its exported files, made once for all test modules."""

import shutil

import pytest

from export import saved_model, tflite
from pipeline import runs
from pipeline.core import device
from tests.small_run import digits, write_run


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    """A run with nothing exported. Do not write into it: copy it."""
    return write_run(tmp_path_factory.mktemp("trained") / "runs" / "small")


@pytest.fixture(scope="session")
def exported_run(trained_run, tmp_path_factory):
    """A copy of `trained_run` with its SavedModel and TFLite files."""
    run = runs.Run(tmp_path_factory.mktemp("exported") / "runs" / "small")
    shutil.copytree(trained_run.path, run.path)
    saved_model.save(run)
    tflite.export(run, digits())
    return run


@pytest.fixture(scope="session")
def digit_images():
    """The digits' test split on the host: uint8 [N, 16, 16, 3] and int32 [N]."""
    dataset = digits()
    return device.to_numpy(dataset.test.images), device.to_numpy(dataset.test.labels)
