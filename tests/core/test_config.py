"""Settings as they are typed: paths in any spelling, several runs at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import augment
from pipeline.core import config
from pipeline.core.errors import PipelineError
from pipeline.core.settings import Settings

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDERS = [
    "my pictures", "Photos (2024)", "a,b", "a=b", "[x]", "~/pictures", "it's", "it\\'s", "a{b}", "Müller/Bücher",
    "C:\\x\\", "$x", 'the "best"', "2024", "true", "a: b", "100%", "写真",
]  # fmt: skip


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_taken_as_it_is_typed(folder):
    assert config.compose([f"data_dir={folder}"]).data_dir == folder
    assert config.compose([f"data_dir={folder}"]).dataset.data_dir == folder
    assert config.compose(config.overrides(data_dir=folder, epochs=None)).data_dir == folder


def test_nothing_and_what_is_quoted_already_stay():
    assert config.compose(["data_dir=null"]).data_dir is None
    assert config.compose(["data_dir='a, b'"]).data_dir == "a, b"
    assert config.compose(['data_dir="a, b"']).data_dir == "a, b"
    assert config.overrides(epochs=3, name=None, augment="none") == ["epochs=3", "augment=none"]


def test_the_command_takes_such_a_folder_too(tmp_path):
    answer = subprocess.run(
        [sys.executable, "-m", "pipeline.train", "dataset=image_folder", "data_dir=Fotos (Müller, 2024)"],
        capture_output=True, text=True, timeout=300, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert answer.returncode == 2
    assert f"{tmp_path}/Fotos (Müller, 2024)" in answer.stderr and answer.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("model.dropot=0.2", r"model\.dropout"),
        ("augment.rotate.degrees=5", r"\+augment\.rotate\.degrees"),
        ("model.colour=1", "dropout"),
        ("mode=cnn", r"\bmodel\b"),
        ("zzz=1", "experiment"),
        ("augment=none,light", "--multirun"),
        ("model=18", "model"),
        ("optimizer=null", "optimizer"),
        ("~model", "model"),
        ("optimizer.weight_decay=abc", r"optimizer\.weight_decay"),
        ("~model.name", r"model\.name"),
        ("+dataset.classes=[chat,дом]", r"\[chat,дом\]"),
        ("~optimizer.learning_rate", r"optimizer\.learning_rate"),
        ("optimizer.global_clipnorm=0", "global_clipnorm"),
        ("optimizer.learning_rate=nan", r"\bnan\b"),
        ("optimizer.nesterov=abc", "nesterov"),
    ],
)
def test_a_mistyped_setting_is_one_sentence_with_the_way_out(override, word):
    with pytest.raises(PipelineError, match=word) as info:
        config.compose([override])
    assert "\n" not in str(info.value)


def test_a_damaged_policy_file_stops_only_those_who_ask_for_it(tmp_path, monkeypatch):
    from pipeline.augment import policy

    monkeypatch.setattr(policy, "FOLDER", tmp_path)
    (tmp_path / "good.yaml").write_text("flip: {probability: 0.5}\n", encoding="utf-8")
    (tmp_path / "broken.yaml").write_text("flip: {probability: [\n", encoding="utf-8")
    assert augment.load_policy("good").name == "good"
    with pytest.raises(PipelineError, match=r"broken\.yaml"):
        augment.load_policy("broken")
    with pytest.raises(PipelineError, match=r"\.\./good"):
        augment.load_policy("../good")


def test_a_network_chooses_its_optimizer_and_the_command_line_decides():
    """A Transformer hardly learns with what suits a convolutional network."""
    given = ([], ["model=vit_lite"], ["model=vit_lite", "optimizer=sgd"], ["experiment=highperf_cnn"])
    chosen = [config.compose(overrides).optimizer for overrides in given]
    rates = [(one.name, one.learning_rate) for one in chosen]
    assert rates == [("sgd", 0.3), ("adam", 1e-3), ("sgd", 0.3), ("sgd", 0.3)]


@pytest.mark.parametrize("value", [True, "5", 1.5, 0, None])
def test_settings_have_types_and_ranges(value):
    settings = config.compose().plain()
    with pytest.raises(PipelineError, match=rf"epochs.*{value!r}"):
        Settings.parse({**settings, "epochs": value})


def test_settings_can_be_written_and_read_again():
    given = ["dataset.classes=[1,2]", "dataset.image_size=[8,16]", "optimizer.weight_decay=null", "xla=clusters"]
    settings = config.compose(given)
    assert (settings.dataset.classes, settings.dataset.size) == (("1", "2"), (8, 16))
    assert Settings.parse(json.loads(json.dumps(settings.plain()))) == settings


def test_a_sweep_is_one_job_for_each_combination():
    jobs = config.sweep(["seed=1,2", "epochs=3", "data_dir=Fotos (a, b)", "model=cnn,resnet18"])
    assert list(jobs) == ["model=cnn,seed=1", "model=resnet18,seed=1", "model=cnn,seed=2", "model=resnet18,seed=2"]
    for name, overrides in jobs.items():
        settings = config.compose(overrides)
        assert (settings.epochs, settings.data_dir) == (3, "Fotos (a, b)")
        assert name == f"model={settings.model.name},seed={settings.seed}"
    assert list(config.sweep(["epochs=3"])) == ["default"]
    (first, *_) = config.sweep(["dataset.classes=" + ",".join(f"[a,{letter * 100}]" for letter in "bc")])
    assert len(first) < 150


def test_the_help_describes_the_command_without_importing_the_training():
    program = "import sys; sys.argv[1:] = ['--help']\nfrom pipeline.train.__main__ import main\n"
    program += "try: main()\nexcept SystemExit: print({'hydra', 'numpy', 'tensorflow'} & set(sys.modules))"
    answer = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert answer.stdout.startswith("usage: python -m pipeline.train")
    assert answer.stdout.endswith("set()\n")
    assert answer.stdout.count("  python -m pipeline.train ") == 4 and "``" not in answer.stdout
