"""Settings as they are typed: paths in any spelling, several runs at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import config

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDERS = [
    "my pictures", "Photos (2024)", "a,b", "a=b", "[x]", "~/pictures", "it's", "it\\'s", "a{b}", "Müller/Bücher",
    "C:\\x\\", "$x", 'the "best"', "2024", "true", "a: b", "100%", "写真",
]  # fmt: skip


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_taken_as_it_is_typed(folder):
    assert config.compose([f"data_dir={folder}"])["data_dir"] == folder
    assert config.compose([f"data_dir={folder}"])["dataset"]["data_dir"] == folder
    assert config.compose(config.overrides(data_dir=folder, epochs=None))["data_dir"] == folder


def test_nothing_and_what_is_quoted_already_stay():
    assert config.compose(["data_dir=null"])["data_dir"] is None
    assert config.compose(["data_dir='a, b'"])["data_dir"] == "a, b"
    assert config.compose(['data_dir="a, b"'])["data_dir"] == "a, b"
    assert config.overrides(epochs=3, name=None, augment="none") == ["epochs=3", "augment=none"]


def test_the_command_takes_such_a_folder_too(tmp_path):
    answer = subprocess.run(
        [sys.executable, "-m", "pipeline.train", "dataset=image_folder", "data_dir=Fotos (Müller, 2024)"],
        capture_output=True, text=True, timeout=300, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert answer.returncode == 2
    assert answer.stderr.startswith(f"error: There is no folder {tmp_path}/Fotos (Müller, 2024); set data_dir")
    assert answer.stderr.count("\n") == 1
