"""bench.remember: how hyper-parameters are chosen, and what is said of the paper's findings."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import remember, remember_report


class Trained:
    def __init__(self, value):
        self.matrix, self.seconds_per_step = [[value, 0.0], [value, value]], 0.001

    @property
    def accuracy(self):
        return self

    def acc(self):
        return self.matrix[1][0]


@pytest.fixture
def trained(monkeypatch):
    """Nothing is trained: an accuracy by the configuration, and what was asked for."""
    asked = []

    def train(config):
        asked.append(config)
        if config.method == "kfac-ewc":
            return None if config.strength > 4 else Trained({0.1: 0.3, 0.3: 0.4, 1.0: 0.5, 3.0: 0.6}[config.strength])
        return Trained({"ncl": 0.9, "owm": 0.55}.get(config.method, 0.2))

    monkeypatch.setattr(remember, "train", train)
    return asked


NAMES = ["naive", "kfac-ewc, strength 1", "kfac-ewc", "owm", "ncl"]


def test_the_best_on_other_seeds_and_images_is_chosen_and_measured(trained, tmp_path, capsys):
    arguments = [part for name in NAMES for part in ("--contender", name)] + ["--out", str(tmp_path)]
    assert remember.main(["--tune", *arguments]) == 0
    assert {c.first_seed for c in trained} == set(remember.TUNING_SEEDS)
    assert all(c.validation for c in trained)
    assert not set(remember.TUNING_SEEDS) & set(remember.SEEDS)
    tuned = json.loads((tmp_path / "settings.json").read_text())
    chosen = {(r["stream"], r["scenario"], r["contender"]): r["chosen"] for r in tuned["rows"]}
    assert len(chosen) == 3 * len(NAMES)
    assert {chosen[(*key, "kfac-ewc")] for key in remember.STREAMS} == {3.0}, "runs that diverge count as 0"
    assert {chosen[(*key, "naive")] for key in remember.STREAMS} == {0.02}, "the first of equals"
    trained.clear()
    assert remember.main(arguments) == 0
    assert [c.first_seed for c in trained[: 3 * len(NAMES)]] == [0] * 3 * len(NAMES), "all contenders before the next seed"
    assert not any(c.validation for c in trained)
    assert {c.strength for c in trained if c.method == "kfac-ewc"} == {1.0, 3.0}
    shown = capsys.readouterr().out
    assert "| NCL | weight 1 | 90.0 ± 0.0 |" in shown
    assert "* NCL above KFAC-EWC, lambda = 1: holds (90.0 against 50.0)." in shown
    assert "* KFAC-EWC above KFAC-EWC, lambda = 1: holds (60.0 against 50.0)." in shown
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == 3 * len(NAMES)


def test_a_finding_that_does_not_hold_is_said():
    def row(*values):
        return {"matrices": [None if v is None else [[v, 0.0], [v, v]] for v in values]}

    said = remember_report.findings({"ncl": row(0.9, None), "kfac-ewc, strength 1": row(0.5, 0.5)})
    assert said == ["NCL above KFAC-EWC, lambda = 1: **does not hold** (45.0 against 50.0)"]


def test_without_settings_nothing_is_measured(tmp_path, capsys):
    assert remember.main(["--out", str(tmp_path)]) == 1
    assert "settings.json is missing; run with --tune first" in capsys.readouterr().err


def test_every_candidate_is_a_setting_of_its_method():
    for name, contender in remember.CONTENDERS.items():
        for stream, scenario in remember.STREAMS:
            for value in contender.candidates:
                config = remember.configuration(stream, scenario, name, value, 0, remember.SETTINGS)
                assert getattr(config, contender.setting) == value
