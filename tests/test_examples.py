"""The fine-tuning example: its data, and its quick mode."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from processes import ROOT, environment

sys.path.insert(0, str(ROOT / "examples"))

from stdlib_texts import PACKAGES, PARTS, docstrings, manual

NEEDED = ("transformers", "tokenizers", "matplotlib", "rich", "tqdm")


def test_the_parts_share_no_text_and_hold_every_package() -> None:
    parts = docstrings(20)
    texts = [text for part in PARTS for text, _ in parts[part]]
    assert len(set(texts)) == len(texts)
    assert all(len(text) >= 30 for text in texts)
    for part in PARTS:
        assert {label for _, label in parts[part]} == set(range(len(PACKAGES)))
    assert [sum(label == k for _, label in parts["train"]) for k in range(len(PACKAGES))] == [20] * len(PACKAGES)
    assert len(parts["test"]) > len(parts["validation"]) > 100
    assert docstrings(20) == parts


def test_no_file_is_in_two_parts(monkeypatch) -> None:
    import stdlib_texts

    def named(path: Path) -> list[str]:
        return [f"{path} {n}" for n in range(5)]

    monkeypatch.setattr(stdlib_texts, "_docstrings_of", named)
    files = {part: {text.split()[0] for text, _ in samples} for part, samples in docstrings(10_000).items()}
    assert sum(map(len, files.values())) == len(set().union(*files.values())) > 50
    assert all(files.values())


def test_what_is_held_out_of_the_manual() -> None:
    learned, held_out = manual()
    assert not set(learned) & set(held_out)
    assert sum(map(len, learned)) > 5 * sum(map(len, held_out)) > 50_000


@pytest.mark.skipif(not all(map(importlib.util.find_spec, NEEDED)), reason="the example needs pip install 'fastcl[examples]'")
def test_quick(tmp_path) -> None:
    command = [sys.executable, str(ROOT / "examples/finetune_bert.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment(ROOT), capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("vanilla", "Child-Tuning F", "Child-Tuning D"):
        assert name in done.stdout
    result = json.loads((tmp_path / "results.json").read_text())
    assert [(r["method"], r["seed"]) for r in result["runs"]] == [
        (method, seed) for seed in (0, 1) for method in ("vanilla", "Child-Tuning F", "Child-Tuning D")
    ]
    for r in result["runs"]:
        assert r["forgetting"] == r["loss_after"] - r["loss_before"] != 0
        assert 0 <= r["accuracy"] <= 1
    assert len({r["loss_before"] for r in result["runs"]}) == 1, "all start from the same language model"
    assert len({r["loss_after"] for r in result["runs"]}) == 6
    assert (tmp_path / "results.png").stat().st_size > 10_000


@pytest.mark.skipif(not all(map(importlib.util.find_spec, NEEDED)), reason="the example needs pip install 'fastcl[examples]'")
def test_the_tuning_seed_is_not_reported(tmp_path) -> None:
    command = [sys.executable, str(ROOT / "examples/finetune_bert.py"), "--quick", "--seeds", "1", "100", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment(ROOT), capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 2
    assert "must differ from each other and from 100" in done.stderr
