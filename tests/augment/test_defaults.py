"""The default augmentation depends on the dataset; presets and the command line have priority."""

import pytest

from pipeline import augment
from pipeline.core import config


def policy(*overrides):
    return augment.load_policy(config.compose(overrides).augment)


def test_digits_are_not_flipped_by_default():
    """Flipping digits lowered the test accuracy after three epochs from 96.7 % to 85.8 %."""
    assert policy().flip is None
    assert policy("dataset=digits") == augment.load_policy("digits")


@pytest.mark.parametrize("dataset", ["cifar10", "fashion_mnist", "tiny_imagenet", "image_folder", "parquet"])
def test_other_datasets_use_the_standard_policy(dataset):
    assert policy(f"dataset={dataset}") == augment.load_policy("standard")


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["augment=standard"], "standard"),
        (["augment=strong", "dataset=digits"], "strong"),
        (["experiment=hybrid_resnet18"], "hybrid"),
        (["experiment=hybrid_resnet18", "dataset=digits"], "hybrid"),
        (["experiment=highperf_cnn", "augment=light"], "light"),
    ],
)
def test_presets_and_the_command_line_have_priority(overrides, name):
    assert policy(*overrides) == augment.load_policy(name)


def test_an_operation_of_the_default_policy_can_be_changed():
    assert policy("augment.translate.pixels=2").max_shift == 2
    assert policy("+augment.rotate.degrees=5").rotate.degrees == 5
