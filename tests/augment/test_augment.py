import json

import numpy as np
import pytest
from scipy import stats

from pipeline import augment
from pipeline.augment import gallery, pixel
from pipeline.core import device
from pipeline.core.errors import PipelineError
from tests.augment import reference

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
EACH = {
    "flip": {"flip": {"probability": 0.5}},
    "vertical_flip": {"vertical_flip": {"probability": 0.5}},
    "zoom": {"zoom": {"area": [0.2, 0.9], "aspect": [0.5, 2], "probability": 0.7}},
    "rotate": {"rotate": {"degrees": 30, "probability": 0.7}},
    "translate": {"translate": {"pixels": 3}},
    "brightness": {"brightness": {"delta": 0.3}},
    "contrast": {"contrast": {"amount": 0.6, "probability": 0.6}},
    "saturation": {"saturation": {"amount": 0.8}},
    "hue": {"hue": {"turns": 0.5}},
    "noise": {"noise": {"stddev": [0.02, 0.2]}},
    "salt_and_pepper": {"salt_and_pepper": {"rate": [0.05, 0.3], "probability": 0.8}},
    "cutout": {"cutout": {"side": 5, "probability": 0.8}},
}
EVERYTHING = {name: settings[name] for name, settings in EACH.items()}


def random_images(count, height, width, channels, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def augmented(images, policy, mean=None, std=None, **arguments):
    channels = images.shape[3]
    arguments = {"seed": 7, "epoch": 3, **arguments}
    result = augment.apply(
        images, policy, MEAN[:channels] if mean is None else mean, STD[:channels] if std is None else std, **arguments
    )
    return device.to_numpy(result)


def expected(images, policy, indices=None, seed=7, epoch=3):
    indices = range(len(images)) if indices is None else indices
    channels = images.shape[3]
    return np.stack(
        [reference.augment(images[i], i, policy, MEAN[:channels], STD[:channels], seed, epoch) for i in indices]
    )


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # published with Salmon et al.: philox4x32 with 7 rounds
        ((0,) * 4, (0,) * 2, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ],
)
def test_philox_equals_published_vectors(counter, key, words):
    assert reference.philox(counter, key) == words
    assert tuple(int(word) for word in pixel.philox(*counter, *key)) == words


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("shape", [(9, 12, 3), (8, 8, 1)])
def test_each_operation_equals_numpy_and_scipy(name, shape):
    images = random_images(24, *shape)
    np.testing.assert_allclose(augmented(images, EACH[name]), expected(images, EACH[name]), atol=1e-4)


@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 8, 3), (28, 28, 1), (13, 17, 3), (32, 32, 3), (96, 64, 3)])
def test_all_operations_together(shape):
    images = random_images(6, *shape)
    np.testing.assert_allclose(augmented(images, EVERYTHING), expected(images, EVERYTHING), atol=2e-4)


def test_large_images():
    images = random_images(2, 224, 224, 3)
    np.testing.assert_allclose(augmented(images, EVERYTHING), expected(images, EVERYTHING), atol=1e-3)


@pytest.mark.parametrize("shape", [(8, 40, 3), (40, 8, 1), (1, 9, 3)])
def test_zoom_of_an_image_without_a_part_of_the_allowed_aspect_ratio(shape):
    """Like torchvision, it shows the largest centred part after ten attempts."""
    images, policy = random_images(12, *shape), {"zoom": {"area": [0.8, 1]}}
    np.testing.assert_allclose(augmented(images, policy), expected(images, policy), atol=1e-4)


def test_a_quarter_turn_is_exact():
    images = random_images(300, 10, 10, 3)
    turned = augmented(images, {"rotate": {"degrees": 180}}, (0, 0, 0), (1, 1, 1)) * 255
    angles = [360 * reference.draws(i, reference.ROTATE, 7, 3)[1] - 180 for i in range(300)]
    nearest = int(np.argmin(np.abs(np.array(angles) - 90)))
    assert abs(angles[nearest] - 90) < 2
    # np.rot90 rotates anticlockwise, like a positive angle here; two degrees hardly change the centre.
    difference = np.abs(turned[nearest] - np.rot90(images[nearest]).astype(float))[3:7, 3:7]
    assert difference.max() < 40
    cosine, sine = pixel.cosine_and_sine(np.float32(0.25))
    assert (float(cosine), float(sine)) == (0, 1)


def test_none_only_normalises():
    images = random_images(5, 16, 16, 3)
    np.testing.assert_allclose(
        augmented(images, "none"), (images / 255 - np.array(MEAN)) / np.array(STD), rtol=0, atol=2e-6
    )


def test_values_are_clipped_to_the_range_of_a_pixel():
    images = random_images(50, 8, 8, 3)
    values = augmented(images, {"brightness": {"delta": 1}, "contrast": {"amount": 1}}, (0, 0, 0), (1, 1, 1))
    assert values.min() == 0
    assert values.max() == 1


def test_float16_is_the_float32_result_rounded():
    images = random_images(5, 12, 12, 3)
    half = augmented(images, "strong", dtype="float16")
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, augmented(images, "strong"), atol=2e-3)


def test_same_seed_and_epoch_same_pixels_and_others_differ():
    images = random_images(20, 16, 16, 3)
    first = augmented(images, "strong")
    np.testing.assert_array_equal(first, augmented(images, "strong"))
    assert not np.array_equal(first, augmented(images, "strong", seed=8))
    assert not np.array_equal(first, augmented(images, "strong", epoch=4))


def test_the_result_does_not_depend_on_order_or_batch():
    images = random_images(40, 16, 16, 3)
    whole = augmented(images, "strong")
    order = np.random.default_rng(1).permutation(40)
    np.testing.assert_array_equal(augmented(images, "strong", indices=order), whole[order])
    np.testing.assert_array_equal(augmented(images, "strong", indices=[39, 0, 39]), whole[[39, 0, 39]])
    np.testing.assert_array_equal(
        augmented(images, "strong", indices=np.arange(7, dtype=np.int32), dtype="float16"), whole[:7].astype(np.float16)
    )


def test_batches_of_none_and_one():
    images = random_images(1, 16, 16, 3)
    assert augmented(images[:0], "standard").shape == (0, 16, 16, 3)
    assert augmented(images, "standard", indices=[], dtype="float16").shape == (0, 16, 16, 3)
    assert augmented(images, "standard", indices=np.empty(0, np.int32)).dtype == np.float32
    np.testing.assert_allclose(augmented(images, EVERYTHING), expected(images, EVERYTHING), atol=2e-4)


def test_images_that_are_not_contiguous():
    images = random_images(12, 20, 18, 3)
    views = [images[::3], images[:, 2:15, ::2], images[..., ::-1], np.asfortranarray(images)]
    for view in views:
        assert not view.flags.c_contiguous
        np.testing.assert_array_equal(augmented(view, "strong"), augmented(view.copy(order="C"), "strong"))


def test_the_result_is_written_to_out():
    images = random_images(4, 8, 8, 3)
    xp = device.xp()
    buffer = xp.full((6, 8, 8, 3), 9, xp.float32)
    result = augment.apply(images, "standard", MEAN, STD, seed=7, epoch=3, out=buffer[1:5])
    assert result.base is buffer
    buffer = device.to_numpy(buffer)
    np.testing.assert_array_equal(buffer[1:5], augmented(images, "standard"))
    assert (buffer[[0, 5]] == 9).all()


def test_input_is_not_changed():
    images = random_images(4, 8, 8, 3)
    before = images.copy()
    augmented(images, "strong")
    np.testing.assert_array_equal(images, before)


def plausible(observed, probabilities):
    """Whether counts could come from these probabilities (chi-square test at 1e-4)."""
    observed = np.asarray(observed)
    return stats.chisquare(observed, observed.sum() * np.asarray(probabilities)).pvalue > 1e-4


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_frequency_of_flips(probability):
    ramp = np.broadcast_to(np.arange(8, dtype=np.uint8)[:, None], (20_000, 8, 8, 1))
    flipped = augmented(ramp, {"flip": {"probability": probability}}, [0], [1])[:, 0, 0, 0] > 0
    if probability in (0.0, 1.0):
        assert flipped.mean() == probability
    else:
        assert plausible([flipped.sum(), (~flipped).sum()], [probability, 1 - probability])


def test_offsets_are_uniform_and_independent_of_each_other():
    size, reach = 16, 4
    position = np.arange(size * size, dtype=np.uint8).reshape(1, size, size, 1)
    images = np.repeat(position, 20_000, axis=0)
    centre = augmented(images, {"translate": {"pixels": reach}}, [0], [1])[:, 8, 8, 0] * 255
    row, column = np.divmod(np.rint(centre).astype(int), size)
    counts = np.zeros((2 * reach + 1, 2 * reach + 1), int)
    np.add.at(counts, (8 - row + reach, 8 - column + reach), 1)
    assert counts.sum() == 20_000
    assert plausible(counts.ravel(), np.full(81, 1 / 81))


@pytest.mark.parametrize("rate", [0.002, 0.05, 1.0])
def test_rate_of_salt_and_pepper(rate):
    grey = np.full((200, 32, 32, 3), 128, np.uint8)
    values = augmented(grey, {"salt_and_pepper": {"rate": rate}}, (0, 0, 0), (1, 1, 1))
    salt, pepper = (values == 1).all(-1), (values == 0).all(-1)
    assert ((values != values[..., :1]).sum()) == 0  # all channels of a pixel alike
    rest = salt.size - salt.sum() - pepper.sum()
    if rate == 1.0:
        assert rest == 0
        assert plausible([salt.sum(), pepper.sum()], [0.5, 0.5])
    else:
        assert plausible([salt.sum(), pepper.sum(), rest], [rate / 2, rate / 2, 1 - rate])


def test_noise_is_normal_and_differs_between_pixels_channels_and_images():
    grey = np.full((100, 16, 16, 3), 128, np.uint8)
    noise = (augmented(grey, {"noise": {"stddev": 0.05}}, (0, 0, 0), (1, 1, 1)) - 128 / 255) / 0.05
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    assert np.unique(noise).size > 0.98 * noise.size  # float32 rounds some to the same value
    across = noise.reshape(-1, 3)
    assert np.abs(np.corrcoef(across.T) - np.eye(3)).max() < 0.03
    neighbours = noise.reshape(100, -1)
    assert abs(np.corrcoef(neighbours[:, :-1].ravel(), neighbours[:, 1:].ravel())[0, 1]) < 0.02


def test_operations_of_an_image_are_drawn_independently():
    ramp = np.broadcast_to(np.arange(40, 48, dtype=np.uint8)[:, None], (20_000, 8, 8, 1))
    policy = {"flip": {"probability": 0.5}, "brightness": {"delta": 0.1}}
    values = augmented(ramp, policy, [0], [1])
    flipped = values[:, 0, 0, 0] > values[:, 0, 7, 0]
    brighter = values[:, 0].sum((1, 2)) > np.arange(40, 48).sum() / 255
    table = [[(flipped & brighter).sum(), (flipped & ~brighter).sum()]]
    table += [[(~flipped & brighter).sum(), (~flipped & ~brighter).sum()]]
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_policies_by_name():
    assert [name for name in augment.names() if name in ("strong", "standard", "light", "none")] == [
        "none",
        "light",
        "standard",
        "strong",
    ]
    assert augment.load_policy("none").operations == ()
    assert augment.load_policy("photos").operations == ("flip", "zoom", "brightness", "contrast", "saturation")
    standard = augment.load_policy("standard")
    assert standard.name == "standard"
    assert augment.load_policy(standard) is standard
    assert standard.flip.probability == 0.5
    assert standard.max_shift == 4


def test_hydra_gives_the_same_policy_as_the_name():
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from pipeline.augment.policy import FOLDER

    with initialize_config_dir(str(FOLDER.parent), version_base=None):
        for name in augment.names():
            group = compose("config", overrides=[f"augment={name}"])["augment"]
            assert augment.load_policy(OmegaConf.to_container(group)) == augment.load_policy(name)
        group = compose("config", overrides=["augment=standard", "augment.flip=null", "augment.translate.pixels=2"])
    policy = augment.load_policy(OmegaConf.to_container(group["augment"]))
    assert "flip" not in policy.operations
    assert policy.max_shift == 2


def test_each_operation_has_an_example_and_its_own_number():
    numbers = {name: operation.number for name, operation in augment.OPERATIONS.items()}
    assert numbers == {name: getattr(reference, name.upper()) for name in EACH}


def test_a_number_is_a_range_of_one_value():
    assert augment.load_policy({"noise": {"stddev": 0.1}}) == augment.load_policy({"noise": {"stddev": [0.1, 0.1]}})


@pytest.mark.parametrize("noise", [{"deviation": 0.1}, {"stddev": [0.0, 0.05], "deviation": 0.1}])
def test_the_old_name_of_stddev_is_accepted(noise):
    """`config.yaml` of older runs has it, and an experiment file may add it to a policy that already has `stddev`."""
    assert augment.load_policy({"noise": noise}) == augment.load_policy({"noise": {"stddev": 0.1}})


@pytest.mark.parametrize(
    ("policy", "word"),
    [
        ("../dataset/digits", "'../dataset/digits'"),
        ("fancy", "'fancy'"),
        ({"blur": {}}, "augment.blur"),
        ({"flip": {"chance": 1}}, "augment.flip.chance"),
        ({"flip": 0.5}, "0.5"),
        ({"flip": {"probability": 1.5}}, "1.5"),
        ({"flip": {"probability": float("nan")}}, "nan"),
        ({"flip": {"probability": "half"}}, "'half'"),
        ({"rotate": {}}, "rotate.degrees"),
        ({"rotate": {"degrees": 200}}, "200"),
        ({"rotate": {"degrees": [1, 2]}}, "[1, 2]"),
        ({"translate": {"pixels": 1.5}}, "1.5"),
        ({"translate": {"pixels": True}}, "True"),
        ({"noise": {"stddev": [0.2, 0.1]}}, "[0.2, 0.1]"),
        ({"noise": {"stddev": [1, 2, 3]}}, "augment.noise.stddev"),
        ({"salt_and_pepper": {"rate": -0.1}}, "-0.1"),
        ({"cutout": {"side": 0}}, "cutout.side"),
        ({"zoom": {"area": [0, 1]}}, "zoom.area"),
        ({"zoom": {"area": 0.5, "aspect": [2, 1]}}, "[2, 1]"),
        ({"hue": {"turns": 0.6}}, "0.6"),
        ({"mixup": -1}, "mixup"),
    ],
)
def test_invalid_policies_raise(policy, word):
    with pytest.raises(PipelineError) as caught:
        augment.load_policy(policy)
    assert word in str(caught.value)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"images": np.zeros((2, 8, 8, 3), np.float32)}, "float32"),
        ({"images": np.zeros((2, 8, 8), np.uint8)}, "(2, 8, 8)"),
        ({"images": np.zeros((2, 8, 8, 4), np.uint8)}, "(2, 8, 8, 4)"),
        ({"images": [[1]]}, "list"),
        ({"images": np.zeros((2, 4, 8, 3), np.uint8)}, "translate.pixels"),
        ({"mean": (0.5,)}, "[0.5]"),
        ({"std": (1, 0, 1)}, "[1.0, 0.0, 1.0]"),
        ({"dtype": "float64"}, "'float64'"),
        ({"indices": [0, 2]}, "indices"),
        ({"indices": [-1]}, "-1"),
        ({"indices": [0.5]}, "float64"),
        ({"indices": [[0]]}, "(1, 1)"),
        ({"out": np.zeros((2, 8, 8, 3), np.float16)}, "float16"),
        ({"out": np.zeros((1, 8, 8, 3), np.float32)}, "(1, 8, 8, 3)"),
        ({"out": np.zeros((2, 8, 3, 8), np.float32).transpose(0, 1, 3, 2)}, "contiguous"),
    ],
)
def test_invalid_arguments_raise(change, word):
    arguments = {"images": np.zeros((2, 8, 8, 3), np.uint8), "mean": MEAN, "std": STD, "seed": 0, "epoch": 0}
    arguments.update(change)
    with pytest.raises(PipelineError) as caught:
        augment.apply(arguments.pop("images"), "standard", arguments.pop("mean"), arguments.pop("std"), **arguments)
    assert word in str(caught.value)


@pytest.mark.parametrize("channels", [1, 3])
def test_gallery_grid(channels):
    images = device.to_device(random_images(3, 16, 16, channels))
    mean, std = MEAN[:channels], STD[:channels]
    grid = gallery.policy_grid(images, "standard", mean, std, seed=1)
    cell = 64 + 2 * gallery.MARGIN
    assert grid.shape == (3 * cell, (1 + gallery.DRAWS) * cell, 3)
    assert grid.dtype == np.uint8
    first = np.broadcast_to(device.to_numpy(images)[0].repeat(4, 0).repeat(4, 1), (64, 64, 3))
    np.testing.assert_array_equal(grid[2:66, 2:66], first)
    unchanged = gallery.policy_grid(images, "none", mean, std)
    np.testing.assert_array_equal(unchanged[:, :cell], unchanged[:, -cell:])


def test_the_gallery_has_a_visible_example_of_each_operation():
    image = random_images(1, 32, 32, 3)[0] // 2 + 60
    policies = gallery.example_policies(32, 32)
    assert list(policies) == list(augment.OPERATIONS)
    for policy in policies.values():
        found = gallery.draws(image, policy, MEAN, STD)
        assert found.shape == (1 + gallery.DRAWS, 32, 32, 3)
        np.testing.assert_array_equal(found[0], image)
        assert (found[1:] != image).any(axis=(1, 2, 3)).all()


def test_benchmark_results_include_the_machine(tmp_path, monkeypatch):
    import benchmarks.augment
    from benchmarks import results

    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    figures = benchmarks.augment.measure(64, (8, 8, 3), 2)
    monkeypatch.setattr("sys.argv", ["benchmarks.augment"])
    path = results.save("augment", figures, "python -m benchmarks.augment --images 64")
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert path.name == f"augment-{device.describe()['device']}.json"
    assert saved["command"] == "python -m benchmarks.augment --images 64"
    assert saved["machine"]["packages"]["numba"]
    for row in saved["figures"]["launches"]:
        assert row["images_per_second"] == pytest.approx(64 / row["milliseconds"] * 1000)
        value_bytes = 2 if row["dtype"] == "float16" else 4
        assert row["terabytes_per_second"] == pytest.approx(row["images_per_second"] * 192 * (1 + value_bytes) / 1e12)
