"""`Predictor`: every format, every form of input, and error messages."""

import io
import json
import shutil
import threading

import numpy as np
import pytest
from PIL import Image

from export import predict
from export.predict import Predictor
from pipeline import runs
from pipeline.core import device
from pipeline.core.errors import PipelineError

ARTIFACTS = ["model.keras", "export/saved_model", *(f"export/model_{p}.tflite" for p in ("float32", "float16", "int8"))]


@pytest.fixture(scope="module")
def predictor(exported_run):
    return Predictor.load(exported_run.export_dir / "model_float32.tflite")


def png(pixels, mode=None):
    content = io.BytesIO()
    Image.fromarray(pixels.squeeze(), mode).save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize("artifact", ARTIFACTS)
def test_every_format_gives_the_same_kind_of_prediction(exported_run, digit_images, artifact):
    images, labels = digit_images
    predictor = Predictor.load(exported_run.path / artifact)
    assert predictor.input_shape == (16, 16, 3)
    predictions = predictor.predict(images[:100])
    assert np.mean([p.index for p in predictions] == labels[:100]) > 0.9
    for prediction in predictions[:20]:
        assert prediction.probabilities.dtype == np.float32
        assert prediction.probabilities.shape == (10,)
        assert prediction.index == prediction.probabilities.argmax()
        assert prediction.probability == pytest.approx(prediction.probabilities.max())
        assert prediction.label == predictor.class_names[prediction.index]


@pytest.mark.parametrize("artifact", ["model.keras", "export/model_int8.tflite"])
def test_arrays_paths_and_bytes_mixed_keep_their_order(exported_run, digit_images, tmp_path, artifact):
    images, _ = digit_images
    path = tmp_path / "digit [1].png"
    path.write_bytes(png(images[1]))
    mixed = [images[0], path, str(path), png(images[2]), images[3][..., :1], images[4][..., 0]]
    predictor = Predictor.load(exported_run.path / artifact)
    answers = np.stack([p.probabilities for p in predictor.predict(mixed)])
    # The digits are grey, so one of the three channels is the same image.
    expected = predictor.probabilities(images[[0, 1, 1, 2, 3, 4]])
    np.testing.assert_allclose(answers, expected, atol=1e-4)
    np.testing.assert_allclose(
        np.stack([p.probabilities for p in predictor.predict(iter(mixed))]), expected, atol=1e-4, err_msg="a generator"
    )


def test_one_image_in_each_form(predictor, digit_images, tmp_path):
    image = digit_images[0][0]
    (tmp_path / "one.png").write_bytes(png(image))
    expected = predictor.probabilities(image[None])[0]
    for single in (image, image[None], image[..., 0], tmp_path / "one.png", str(tmp_path / "one.png"), png(image)):
        (prediction,) = predictor.predict(single)
        np.testing.assert_allclose(prediction.probabilities, expected, atol=1e-5)


def test_other_sizes_are_resized_as_in_training(predictor, digit_images):
    """Larger images are cropped around the centre and resized as by Pillow."""
    image = digit_images[0][0]
    doubled = image.repeat(2, 0).repeat(2, 1)
    wide = np.pad(doubled, ((0, 0), (20, 20), (0, 0)))
    reference = np.asarray(Image.fromarray(doubled).resize((16, 16), Image.Resampling.BILINEAR))
    expected = predictor.probabilities(reference[None])
    answers = [p.probabilities for p in predictor.predict([doubled, wide])]
    np.testing.assert_allclose(answers, expected.repeat(2, 0), atol=0.02)
    batch = predictor.predict(np.stack([doubled, doubled]))
    np.testing.assert_allclose([p.probabilities for p in batch], expected.repeat(2, 0), atol=0.02)


def test_no_images_no_predictions(predictor):
    assert predictor.predict([]) == []
    assert predictor.predict(np.empty((0, 16, 16, 3), np.uint8)) == []
    assert predictor.predict(np.empty((0, 20, 20, 1), np.uint8)) == []
    assert predictor.probabilities(np.empty((0, 16, 16, 3), np.uint8)).shape == (0, 10)


def test_many_images_are_sent_in_batches(exported_run, digit_images):
    count = len(digit_images[0])
    images = np.concatenate([digit_images[0]] * 7)
    predictor = Predictor.load(exported_run.model_path)
    seen = []
    forward = predictor._graph.forward
    logged = predict._Graph(lambda x: seen.append(len(x)) or forward(x), np.uint8, (16, 16, 3), 10)
    answers = Predictor(predictor.path, "keras", logged, predictor.class_names).predict(images)
    assert seen == [1024, 1024, len(images) - 2048]
    assert [p.index for p in answers[:count]] == [p.index for p in answers[count : 2 * count]]


def test_not_contiguous_pixels(predictor, digit_images):
    images = digit_images[0][:40]
    every_other = predictor.probabilities(images[::2])
    np.testing.assert_allclose(every_other, predictor.probabilities(np.ascontiguousarray(images[::2])), atol=1e-6)
    keras = Predictor.load(predictor.path.parent.parent)
    np.testing.assert_allclose(keras.probabilities(images[::-1])[::-1], keras.probabilities(images), atol=1e-5)


@pytest.mark.parametrize(
    ("images", "word"),
    [
        (np.zeros((2, 16, 16, 3), np.float32), "float32"),
        ([np.zeros((16, 16, 3), np.int64)], "int64"),
        (np.zeros((16, 16, 4), np.uint8), r"\[16, 16, 4\]"),
        (np.zeros((2, 3, 16, 16), np.uint8), r"\[3, 16, 16\]"),
        ([np.zeros((2, 16, 16, 3), np.uint8)], r"\[2, 16, 16, 3\]"),
        (np.zeros(7, np.uint8), r"\[7\]"),
        (3.5, "float"),
        ([None], "NoneType"),
        (b"no image", "PNG"),
        (["missing.png"], r"missing\.png"),
        (".", "image"),
    ],
)
def test_images_that_cannot_be_used(predictor, images, word):
    with pytest.raises(PipelineError, match=word):
        predictor.predict(images)


def test_probabilities_takes_only_the_right_shape(predictor):
    with pytest.raises(PipelineError, match=r"\(1, 32, 32, 3\)"):
        predictor.probabilities(np.zeros((1, 32, 32, 3), np.uint8))


def test_top_classes_in_order(predictor, digit_images):
    (prediction,) = predictor.predict(digit_images[0][0])
    shares = dict(zip(predictor.class_names, prediction.probabilities.tolist(), strict=True))
    expected = sorted(shares.items(), key=lambda pair: -pair[1])
    assert predictor.top(prediction, 3) == expected[:3]
    assert predictor.top(prediction, 99) == expected


@pytest.mark.parametrize("artifact", ARTIFACTS)
def test_flip_averages_an_image_and_its_mirror_image(exported_run, digit_images, artifact):
    images = digit_images[0][:20]
    plain, flip = (Predictor.load(exported_run.path / artifact, tta=tta) for tta in ("none", "flip"))
    mirrored = np.ascontiguousarray(images[:, :, ::-1])
    expected = (plain.probabilities(images) + plain.probabilities(mirrored)) / 2
    np.testing.assert_allclose(flip.probabilities(images), expected, atol=1e-5)
    assert np.abs(expected - plain.probabilities(images)).max() > 0.01
    with pytest.raises(PipelineError, match="rotate"):
        Predictor.load(exported_run.path / artifact, tta="rotate")


def test_threads_share_one_interpreter(predictor, digit_images):
    images = digit_images[0][:60]
    expected = predictor.probabilities(images)
    answers = {}

    def call(count):
        answers[count] = [predictor.probabilities(images[:count]) for _ in range(5)]

    threads = [threading.Thread(target=call, args=(count,)) for count in (1, 7, 20, 60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for count, repeats in answers.items():
        for answer in repeats:
            np.testing.assert_allclose(answer, expected[:count], atol=1e-5)


# --- finding and loading ---------------------------------------------------------------------------------------------


def test_a_run_by_name_folder_or_default(exported_run, tmp_path, monkeypatch):
    monkeypatch.chdir(exported_run.path.parent.parent)
    runs.set_latest(exported_run.path)
    for path in (None, "small", "runs/small", "runs/latest", exported_run.path):
        assert Predictor.load(path).path == exported_run.model_path
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PipelineError, match=r"pipeline.train"):
        Predictor.load()


def test_files_that_are_not_models(tmp_path, exported_run):
    (tmp_path / "notes.txt").write_text("text", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.tflite").write_bytes(b"x" * 100)
    (tmp_path / "broken.keras").write_bytes(b"x" * 100)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "saved_model.pb").write_bytes(b"x" * 100)
    complete = (exported_run.export_dir / "model_float32.tflite").read_bytes()
    (tmp_path / "short.tflite").write_bytes(complete[: len(complete) // 2])
    (tmp_path / "zero.tflite").write_bytes(b"")
    for name, word in {
        "notes.txt": r"notes\.txt",
        "empty": r"saved_model\.pb",
        "missing.tflite": r"missing\.tflite",
        "missing": "missing",
        "broken.tflite": r"export.tflite",
        "zero.tflite": r"export.tflite",
        "short.tflite": r"export.tflite",
        "broken.keras": "Keras",
        "damaged": "SavedModel",
    }.items():
        with pytest.raises(PipelineError, match=word):
            Predictor.load(tmp_path / name)


def test_a_model_with_float_input_is_an_error(tmp_path):
    device.tensorflow()
    import keras

    pixels = keras.Input((8, 8, 3))
    keras.Model(pixels, keras.layers.Dense(2)(keras.layers.Flatten()(pixels))).save(tmp_path / "other.keras")
    with pytest.raises(PipelineError, match="float32"):
        Predictor.load(tmp_path / "other.keras")


def test_copied_files_contain_their_class_names(exported_run, tmp_path):
    shutil.copy(exported_run.export_dir / "model_float16.tflite", tmp_path / "copy.tflite")
    shutil.copytree(exported_run.export_dir / "saved_model", tmp_path / "copy")
    for name in ("copy.tflite", "copy"):
        assert Predictor.load(tmp_path / name).class_names[:3] == ["0", "1", "2"]


def test_a_model_without_class_names(exported_run, tmp_path, digit_images):
    shutil.copy(exported_run.model_path, tmp_path / "alone.keras")
    with pytest.warns(UserWarning, match="class 9"):
        predictor = Predictor.load(tmp_path / "alone.keras")
    (prediction,) = predictor.predict(digit_images[0][0])
    assert prediction.label == f"class {prediction.index}"


def test_a_wrong_number_of_class_names_is_an_error(exported_run, tmp_path):
    shutil.copytree(exported_run.export_dir / "saved_model", tmp_path / "copy")
    (tmp_path / "copy" / "labels.json").write_text(json.dumps({"class_names": ["cat", "dog"]}), encoding="utf-8")
    with pytest.raises(PipelineError, match=str(tmp_path / "copy")):
        Predictor.load(tmp_path / "copy")


def test_a_tftrt_folder_without_a_gpu(exported_run, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    shutil.copytree(exported_run.export_dir / "saved_model", tmp_path / "tftrt_int8")
    (tmp_path / "tftrt_int8" / "tftrt.json").write_text('{"compute_capability": [9, 0]}', encoding="utf-8")
    with pytest.raises(PipelineError, match=r"export.tflite_infer") as raised:
        Predictor.load(tmp_path / "tftrt_int8")
    assert raised.value.exit_code == 2
