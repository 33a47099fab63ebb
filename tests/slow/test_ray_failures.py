"""Ray starts a training again from its newest checkpoint after a worker was killed, but not with invalid settings."""

import csv
import re
import time

from tests.train.test_ray import needs_ray, ray_training

EPOCHS = 40


def worker(processes, index):
    """The Ray worker that runs the training process with this index."""
    for process in processes():
        if "pipeline.train" in process.cmdline() and f'"index": {index}' in process.environ().get("TF_CONFIG", ""):
            return process.parent()
    raise AssertionError("the training process does not run")


@needs_ray
def test_a_killed_worker_is_started_again_from_the_newest_checkpoint(tmp_path):
    with ray_training(tmp_path, f"epochs={EPOCHS}") as (command, processes):
        while not list(tmp_path.glob("runs/pair/checkpoints/epoch-*.npz")):
            assert command.poll() is None, command.communicate()
            time.sleep(0.1)
        worker(processes, 1).kill()
        output, _ = command.communicate(timeout=500)
        assert command.returncode == 0, output
    _, _, after = output.split("Started training worker group")
    epochs = [int(epoch) for epoch in re.findall(r"epoch +(\d+)/", after)]
    assert epochs == list(range(epochs[0], EPOCHS + 1)) and epochs[0] > 1
    history = list(csv.DictReader((tmp_path / "runs/pair/history.csv").open(encoding="utf-8")))
    assert [int(row["epoch"]) for row in history] == list(range(1, EPOCHS + 1))
    assert (tmp_path / "runs/pair/model.keras").is_file()


@needs_ray
def test_an_invalid_setting_is_not_tried_again(tmp_path):
    with ray_training(tmp_path, "dataset=image_folder", "data_dir=missing") as (command, _):
        output, _ = command.communicate(timeout=500)
        assert command.returncode == 2, output
    assert "image_folder" in output
    assert output.count("Started training worker group") == 1
