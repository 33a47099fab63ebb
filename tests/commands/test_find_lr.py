"""The learning-rate range test and its command."""

import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.commands import find_lr as command
from pipeline.core import config
from pipeline.core.errors import PipelineError
from pipeline.data.load import load_dataset
from pipeline.train import find_lr

SMALL = ["batch_size=32", "model.stages=[[8],[16]]", "dataset.limit_per_class=40", "augment=none"]


def test_the_suggestion_reaches_most_of_the_decrease_of_the_loss():
    rates = np.geomspace(1e-6, 1, 61)  # ten rates in each power of ten
    falling = np.interp(np.log10(rates), [-6, -4, -2, -1, 0], [4, 4, 2, 2, 9])
    assert find_lr.suggest(rates, falling) == 0.006  # 10 ** -2.2, where the loss is 2.2
    assert find_lr.suggest(rates * 10, falling) == 0.06
    with pytest.raises(PipelineError, match="labels"):
        find_lr.suggest(rates, rates)


def test_the_rate_rises_until_the_loss_diverges(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = find_lr.range_test(config.compose(SMALL), load_dataset("digits", limit_per_class=40), highest=1e3)
    assert result.rates[0] == pytest.approx(1e-6) and result.rates[-1] < 1e3
    np.testing.assert_allclose(result.rates[1:] / result.rates[:-1], 10 ** (9 / 119))
    assert 0.01 <= result.suggestion <= 1
    assert not list(tmp_path.iterdir())


def test_the_command_prints_a_setting_and_draws_the_loss(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["find_lr", *SMALL, "optimizer=adam"])
    command.main()
    printed = capsys.readouterr().out
    (setting,) = [word for word in printed.split() if word.startswith("optimizer.learning_rate=")]
    assert config.compose([setting]).optimizer.learning_rate > 0
    assert Path("runs/find_lr/digits-cnn-adam.png").stat().st_size > 5000
