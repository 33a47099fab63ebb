"""Shared fixtures: a private cache and log, the real data if it exists, and skipped GPU tests without a GPU."""

import os
from pathlib import Path

import pytest

from pipeline.core import device
from pipeline.core.errors import PipelineError

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items):
    try:
        missing = any("gpu" in item.keywords for item in items) and not device.has_gpu()
    except PipelineError as error:  # make test-gpu requires a GPU
        pytest.exit(str(error), returncode=error.exit_code)
    if missing:
        skip = pytest.mark.skip(reason="no NVIDIA GPU with CuPy on this machine")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def private_folders(tmp_path_factory):
    """Caches and native logs of the tests go to a temporary folder, never to the user's."""
    folder = tmp_path_factory.mktemp("private")
    os.environ["PIPELINE_CACHE"] = str(folder / "cache")
    os.environ.setdefault("PIPELINE_LOG", str(folder / "tensorflow.log"))


@pytest.fixture(scope="session")
def real_data():
    """The folder of the real datasets (cifar10/, tiny-imagenet/): PIPELINE_TEST_DATA, or ../shared/data."""
    folder = Path(os.environ.get("PIPELINE_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}; set PIPELINE_TEST_DATA to a folder with cifar10/train.parquet")
    return folder
