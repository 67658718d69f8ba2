"""The command line: what it prints, what it refuses in one line, and what a killed or interrupted process leaves."""

from __future__ import annotations

import csv
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

pytest.importorskip("typer", reason="the command line needs pip install 'fastcl[cli]'")
pytest.importorskip("tqdm", reason="the command line needs pip install 'fastcl[cli]'")
pytest.importorskip("sklearn", reason="the digits streams need scikit-learn")
pytest.importorskip("matplotlib", reason="the plots need pip install 'fastcl[cli]'")

from fastcl import cli
from fastcl.data import STREAMS
from fastcl.experiment import METHODS, Config, load_run, run
from fastcl.experiment.compare import told_apart
from fastcl.experiment.config import FIELDS
from fastcl.experiment.folder import read_config
from fastcl.experiment.training import Training
from processes import ROOT, environment, package_copy, python

SMALL = ["--epochs", "1", "--width", "16", "--depth", "1", "--tasks", "2"]


def fastcl(capsys, *arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a call in this process."""
    try:
        cli.main([str(a) for a in arguments])
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


class TestRun:
    def test_a_run_and_its_table(self, capsys, tmp_path) -> None:
        options = ["--stream", "split-digits", "--scenario", "class", "--method", "agem", "--buffer", "20", "--seeds", "2"]
        status, out, err = fastcl(capsys, "run", *options, "--epochs", "1", "--width", "16", "--tasks", "2", "--out", tmp_path / "x")
        assert (status, err) == (0, "")
        assert "split-digits, class-incremental, 2 tasks" in out
        assert "Forgetting (Chaudhry et al. 2018)" in out
        assert "FWT (the same): mean of R[j - 1, j]" in " ".join(out.split())
        config = read_config(tmp_path / "x/config.json")
        assert config == Config.of(method="agem", buffer=20, seeds=2, epochs=1, width=16, tasks=2)
        loaded = load_run(tmp_path / "x")
        assert len(loaded.results) == 2
        assert f"{100 * sum(m.acc() for m in loaded.matrices) / 2:.1f} ±" in out

    def test_every_setting_is_an_option(self, capsys, tmp_path) -> None:
        given = {
            "stream": "permuted-digits",
            "scenario": "task",
            "method": "gem",
            "tasks": 2,
            "epochs": 2,
            "batch_size": 64,
            "lr": 0.1,
            "width": 8,
            "depth": 3,
            "seeds": 1,
            "first_seed": 7,
            "validation": True,
            "device": "cpu",
            "threads": 2,
            "buffer": 10,
            "keep": "reservoir",
            "memory_batch": 4,
            "margin": 0.25,
            "ridge": 0.01,
        }
        options = [part for n, v in given.items() for part in ([f"--{n.replace('_', '-')}"] + ([] if v is True else [str(v)]))]
        assert fastcl(capsys, "run", *options, "--out", tmp_path)[0] == 0
        assert read_config(tmp_path / "config.json") == Config.of(**given)
        assert FIELDS.keys() - given.keys() == {
            "shuffle_classes",
            "root",
            "weight",
            "strength",
            "gamma",
            "child",
            "alpha",
            "momentum",
            "radius",
        }
        help_ = fastcl(capsys, "run", "--help")[1]
        assert [n for n in FIELDS if f"--{n.replace('_', '-')} " not in help_ + " "] == []

    def test_settings_of_other_methods_are_left_out_and_said(self, capsys, tmp_path) -> None:
        status, _, err = fastcl(capsys, "run", *SMALL, "--buffer", "20", "--margin", "1", "--out", tmp_path)
        assert (status, err) == (0, "naive has no --buffer, --margin: left out\n")
        assert read_config(tmp_path / "config.json").buffer is None

    def test_the_same_command_again_says_complete(self, capsys, tmp_path) -> None:
        first = fastcl(capsys, "run", *SMALL, "--out", tmp_path)
        again = fastcl(capsys, "run", *SMALL, "--out", tmp_path)
        assert again == (0, first[1], f"{tmp_path} is complete; nothing was trained. --force trains anew\n")
        assert fastcl(capsys, "run", *SMALL, "--force", "--out", tmp_path)[2] == ""

    def test_another_configuration_is_refused(self, capsys, tmp_path) -> None:
        fastcl(capsys, "run", *SMALL, "--out", tmp_path)
        status, out, err = fastcl(capsys, "run", *SMALL, "--method", "spg", "--lr", "1", "--out", tmp_path)
        assert (status, out) == (2, "")
        named = "(there, now: method: 'naive', 'spg'; lr: 0.05, 1.0; strength: None, 1.0)"
        assert err == f"fastcl run: --out holds a run with another configuration: {tmp_path} {named}; give another folder, or --force\n"

    def test_a_run_is_repeated_from_its_config(self, capsys, tmp_path) -> None:
        fastcl(capsys, "run", *SMALL, "--method", "replay", "--out", tmp_path / "a")
        assert fastcl(capsys, "run", "--config", tmp_path / "a/config.json", "--out", tmp_path / "b")[0] == 0
        a, b = load_run(tmp_path / "a"), load_run(tmp_path / "b")
        assert (a.config, a.results[0].matrix) == (b.config, b.results[0].matrix)
        fastcl(capsys, "run", "--config", tmp_path / "a/config.json", "--method", "spg", "--out", tmp_path / "c")
        assert load_run(tmp_path / "c").config == Config.of(method="spg", epochs=1, width=16, depth=1, tasks=2)
        # A stream brings its own scenario and number of tasks.
        rotated = ["--stream", "rotated-digits", "--config", tmp_path / "a/config.json"]
        fastcl(capsys, "run", *rotated, "--out", tmp_path / "d")
        found = load_run(tmp_path / "d").config
        assert (found.scenario, found.tasks, found.method, found.width) == ("domain", 5, "replay", 16)

    def test_another_method_brings_its_own_defaults(self, capsys, tmp_path) -> None:
        fastcl(capsys, "run", *SMALL, "--method", "gem", "--buffer", "30", "--out", tmp_path / "a")
        assert fastcl(capsys, "run", "--config", tmp_path / "a/config.json", "--method", "agem", "--out", tmp_path / "b")[0] == 0
        assert load_run(tmp_path / "b").config == Config.of(method="agem", buffer=30, epochs=1, width=16, depth=1, tasks=2)

    def test_flags_can_be_taken_back(self, capsys, tmp_path) -> None:
        fastcl(capsys, "run", *SMALL, "--validation", "--out", tmp_path / "a")
        again = ["--config", tmp_path / "a/config.json", "--out", tmp_path / "b"]
        assert read_config(tmp_path / "a/config.json").validation is True
        assert fastcl(capsys, "run", *again, "--no-validation")[0] == 0
        assert read_config(tmp_path / "b/config.json").validation is False

    @pytest.mark.parametrize(("more", "again"), [([], "the same command"), (["--force"], "the same command without --force")])
    def test_interrupted(self, capsys, tmp_path, monkeypatch, more, again) -> None:
        monkeypatch.setattr(Training, "stage", Mock(side_effect=KeyboardInterrupt))
        status, _, err = fastcl(capsys, "run", *SMALL, *more, "--out", tmp_path)
        assert (status, err.splitlines()[-1]) == (130, f"fastcl run: interrupted; {again} goes on after the last task that ended")

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--method", "sgd"], f"--method must be one of {', '.join(METHODS)}; got 'sgd'"),
            (["--stream", "mnist"], f"--stream must be one of {', '.join(STREAMS)}; got 'mnist'"),
            (
                ["--stream", "permuted-digits", "--scenario", "class"],
                "--scenario of permuted-digits must be one of domain, task; got 'class'",
            ),
            (["--tasks", "3"], "--tasks must divide the 10 classes, so be one of [1, 2, 5, 10]; got 3"),
            (["--epochs", "0"], "--epochs must be a whole number from 1 to 2147483647; got 0"),
            (["--lr", "nan"], "--lr must be a finite number above 0; got nan"),
            (["--batch-size", "-4"], "--batch-size must be a whole number from 1 to 2147483647; got -4"),
            (["--method", "agem", "--buffer", "3"], "--buffer must be at least 5, a sample for each task, with keep=task; got 3"),
            (["--method", "spg", "--strength", "2"], "--strength must be a number in [0, 1] for spg; got 2.0"),
            (["--method", "child-tuning-d", "--child", "0"], "--child must be a number in (0, 1]; got 0.0"),
            (["--device", "cuda:99"], "--device must be a device that torch sees here: cpu, cuda or cuda:N; got 'cuda:99'"),
            (["--root", "/x"], "--root is for data sets on disk; the digits come with scikit-learn. Got '/x'"),
            (["--stream", "permuted-digits", "--shuffle-classes"], "shuffle_classes is for split streams"),
            (["--config", "/nowhere.json"], "--config must be the config.json of a run: "),
            (["--epochs", "many"], "'--epochs'"),
            (["--epoch", "3"], "No such option: --epoch"),
            (["stray"], "stray"),
        ],
    )
    def test_a_mistake_is_one_line_that_names_the_option(self, capsys, tmp_path, options, said) -> None:
        status, out, err = fastcl(capsys, "run", *options, "--out", tmp_path / "new")
        assert (status, out) == (2, "")
        assert err.startswith("fastcl run: ")
        assert err.count("\n") == 1
        assert said.replace("shuffle_classes", "--shuffle-classes") in err
        assert list(tmp_path.iterdir()) == []

    def test_out(self, capsys, tmp_path) -> None:
        (tmp_path / "file").write_text("mine")
        for out, said in [
            (tmp_path / "file", "--out is a file, and it must be a folder"),
            (tmp_path / "file/below", "--out cannot be written"),
            (tmp_path, "--out holds other things and no config.json of a run"),
        ]:
            status, _, err = fastcl(capsys, "run", *SMALL, "--out", out)
            assert (status, err.count("\n")) == (2, 1)
            assert err.startswith(f"fastcl run: {said}: {out}")
        status, _, err = fastcl(capsys, "run", *SMALL)
        assert (status, err) == (2, "fastcl run: Missing option '--out'.\n")
        assert [p.name for p in tmp_path.iterdir()] == ["file"]

    @pytest.mark.parametrize(
        ("backend", "said"),
        [
            ("cuda", "FASTCL_BACKEND: the backend 'cuda' was asked for and cannot serve"),
            ("bogus", "FASTCL_BACKEND is 'bogus'; accepted are"),
        ],
    )
    def test_a_backend_that_cannot_serve(self, capsys, tmp_path, monkeypatch, backend, said) -> None:
        monkeypatch.setenv("FASTCL_BACKEND", backend)
        status, out, err = fastcl(capsys, "run", *SMALL, "--device", "cpu", "--out", tmp_path / "new")
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"fastcl run: {said}")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("options", "where", "hint"),
        [
            (["--method", "ewc", "--strength", "1e30"], "ewc, seed 3, task 1: the logits have a NaN", "Try a smaller --strength or --lr"),
            (["--method", "child-tuning-d", "--lr", "1e30"], "child-tuning-d, seed 3, task 1: the gradient of", "Try a smaller --lr"),
        ],
    )
    def test_a_diverged_training_is_no_usage_error(self, capsys, tmp_path, options, where, hint) -> None:
        status, out, err = fastcl(capsys, "run", *SMALL, *options, "--first-seed", "3", "--out", tmp_path / "x")
        assert (status, out) == (1, "")
        lines = [line for line in err.splitlines() if line.startswith("fastcl run: ")]
        assert len(lines) == 1
        assert lines[0].startswith(f"fastcl run: {where}")
        assert lines[0].endswith(hint)
        assert (tmp_path / "x/seed3/checkpoint.pt").exists()

    def test_data_that_is_not_there(self, capsys, tmp_path) -> None:
        options = ["--stream", "split-mnist", "--root", tmp_path / "none"]
        status, _, err = fastcl(capsys, "run", *options, "--out", tmp_path / "x")
        assert status == 1
        assert "MNIST" in err
        assert str(tmp_path / "none") in err
        assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    small = {"epochs": 1, "width": 16, "depth": 1}
    run(Config.of(**small), folder / "naive")
    run(Config.of(**small, method="agem"), folder / "agem")
    run(Config.of(**small, method="joint"), folder / "joint")
    run(Config.of(**small, stream="permuted-digits", tasks=2), folder / "permuted")
    return folder


class TestCompare:
    def test_a_table_for_each_stream_and_scenario(self, capsys, runs, tmp_path) -> None:
        folders = [runs / name for name in ("naive", "permuted", "agem", "joint")]
        status, out, err = fastcl(capsys, "compare", *folders, "--out", tmp_path / "c")
        assert (status, err) == (0, "")
        split, permuted = out.index("split-digits, class-incremental, 5 tasks"), out.index("permuted-digits, domain-incremental, 2 tasks")
        assert split < out.index("agem") < permuted
        assert "over naive" in out
        assert "+0 %" in out
        assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
            "comparison.csv",
            "permuted-digits-domain-2-curves.png",
            "permuted-digits-domain-2-matrices.png",
            "split-digits-class-5-curves.png",
            "split-digits-class-5-matrices.png",
        ]
        assert out.endswith(f"written to {tmp_path / 'c'}\n")

    def test_methods_without_a_memory(self, capsys, runs, tmp_path) -> None:
        small, folders = ["--epochs", "1", "--width", "16", "--depth", "1"], [runs / "naive"]
        for method in ("ewc", "ewc-online", "child-tuning-f", "child-tuning-d", "kfac-ewc", "owm", "ncl"):
            folders.append(tmp_path / method)
            status, out, err = fastcl(capsys, "run", *small, "--method", method, "--out", folders[-1])
            assert (status, err) == (0, "")
        status, out, err = fastcl(capsys, "compare", *folders, "--out", tmp_path / "c")
        assert (status, err) == (0, "")
        table = [line for line in out.splitlines() if line.count("│") > 3]
        assert [line.split("│")[1].strip() for line in table] == ["naive", *(folder.name for folder in folders[1:])]

    def test_a_glob_over_its_own_output(self, capsys, runs) -> None:
        """As `fastcl compare runs/*` called twice: the folder it wrote lies among the runs."""
        for _ in range(2):
            folders = sorted(runs.iterdir())
            status, _, err = fastcl(capsys, "compare", *folders)
            assert status == 0
        assert err == f"{runs / 'comparison'}: passed over, it has no config.json\n"

    def test_unfinished_runs(self, capsys, runs, tmp_path) -> None:
        config = Config.of(epochs=1, width=16, depth=1, tasks=1, seeds=2)
        run(config, tmp_path / "half")
        (tmp_path / "half/seed1/result.json").unlink()
        status, out, _ = fastcl(capsys, "compare", tmp_path / "half", "--out", tmp_path / "c")
        assert status == 0
        assert "1 of 2" in out
        (tmp_path / "half/seed0/result.json").unlink()
        status, _, err = fastcl(capsys, "compare", tmp_path / "half", runs / "naive", "--out", tmp_path / "c")
        assert (status, err) == (0, "half: passed over, no seed is complete\n")
        status, _, err = fastcl(capsys, "compare", tmp_path / "half", "--out", tmp_path / "c")
        assert status == 1
        assert err.endswith("fastcl compare: none of the given runs has a complete seed\n")

    def test_folders_of_one_name_are_told_apart(self, capsys, runs, tmp_path) -> None:
        for above, method in (("a", "naive"), ("b", "agem")):
            shutil.copytree(runs / method, tmp_path / above / "x")
        given = [tmp_path / "a/x", tmp_path / "b/x", tmp_path / "b/../b/x"]
        status, out, _ = fastcl(capsys, "compare", *given, "--out", tmp_path / "c")
        assert status == 0
        with (tmp_path / "c/comparison.csv").open() as file:
            assert [row["run"] for row in csv.DictReader(file)] == ["a/x", "b/x"]
        assert out.count("b/x") == 1
        assert told_apart([Path("/r/x"), Path("/r/y/x"), Path("/r/z")]) == ["r/x", "y/x", "z"]
        assert told_apart([Path("/x"), Path("/r/x")]) == ["//x", "r/x"]

    def test_names_are_shown_as_they_are(self, capsys, runs, tmp_path) -> None:
        """Neither rich's markup nor TeX: this one would be an error in both."""
        folder = tmp_path / "_[bold]x[" / "bold] $\\frac{$"  # with its parent's name: a closing tag
        for name, at in (("naive", folder), ("agem", tmp_path / folder.name)):
            shutil.copytree(runs / name, at)
        status, out, err = fastcl(capsys, "compare", folder, tmp_path / folder.name, "--out", tmp_path / "c")
        assert (status, err) == (0, "")
        assert "[bold]x[/bold] $\\frac{$" in "".join(line.split("│")[1].strip() for line in out.splitlines() if line.count("│") > 3)

    def test_in_a_run_the_comparison_lies_beside_it(self, capsys, runs, tmp_path, monkeypatch) -> None:
        shutil.copytree(runs / "naive", tmp_path / "x")
        monkeypatch.chdir(tmp_path / "x")
        status, out, _ = fastcl(capsys, "compare", ".")
        assert status == 0
        assert out.endswith(f"written to {tmp_path / 'comparison'}\n")
        assert not (tmp_path / "x/comparison").exists()

    @pytest.mark.parametrize(
        ("damage", "said"),
        [
            ({"steps": 0}, "steps"),
            ({"seconds": None}, "seconds"),
            ({"seconds": 10**400}, "seconds"),
            ({"matrix": [[0.5]]}, "matrix"),
            ({"matrix": [[None] * 5] * 5}, "matrix"),
            ({"baseline": [0.1]}, "baseline"),
            ({"environments": []}, "environments"),
            ({"seed": 4}, "seed"),
        ],
    )
    def test_damaged_results_are_passed_over(self, capsys, runs, tmp_path, damage, said) -> None:
        shutil.copytree(runs / "agem", tmp_path / "damaged")
        file = tmp_path / "damaged/seed0/result.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | damage))
        status, out, err = fastcl(capsys, "compare", tmp_path / "damaged", runs / "naive", "--out", tmp_path / "c")
        assert (status, err.count("\n")) == (0, 1)
        assert err.startswith(f"damaged: passed over, {file} ")
        assert said in err
        assert "agem" not in out

    def test_what_nests_too_deeply_is_passed_over(self, capsys, runs, tmp_path) -> None:
        shutil.copytree(runs / "agem", tmp_path / "deep")
        (tmp_path / "deep/seed0/result.json").write_text("[" * 100_000)
        status, _, err = fastcl(capsys, "compare", tmp_path / "deep", runs / "naive", "--out", tmp_path / "c")
        assert (status, err.count("\n")) == (0, 1)
        assert "result.json is damaged: nested too deeply" in err

    def test_mistakes(self, capsys, runs, tmp_path) -> None:
        status, _, err = fastcl(capsys, "compare", tmp_path)
        assert (status, err.splitlines()[-1]) == (2, "fastcl compare: none of the given folders holds a run")
        (tmp_path / "config.json").write_text("{}")
        status, _, err = fastcl(capsys, "compare", tmp_path)
        assert status == 1
        assert f"{tmp_path / 'config.json'} has the format None" in err
        status, _, err = fastcl(capsys, "compare", runs / "naive", "--out", tmp_path / "config.json")
        assert (status, err.count("\n")) == (1, 1)
        assert f"--out cannot be written: {tmp_path / 'config.json'} (File exists)" in err


class TestSupport:
    def test_bare_support_and_options(self, capsys) -> None:
        bare = fastcl(capsys)
        assert bare[0] == 0
        assert bare[1].startswith("fastcl ")
        assert fastcl(capsys, "support") == bare
        assert json.loads(fastcl(capsys, "support", "--json")[1]) == json.loads(fastcl(capsys, "--json")[1])

    def test_help_and_unknown_commands(self, capsys) -> None:
        status, out, _ = fastcl(capsys, "--help")
        assert status == 0
        for name in ("run", "compare", "support"):
            assert f"\n  {name} " in out
        assert fastcl(capsys, "train") == (2, "", "fastcl train: No such command 'train'.\n")


@pytest.fixture(scope="module")
def without_typer(tmp_path_factory) -> Path:
    """fastcl, beside a typer that cannot be imported."""
    folder = package_copy(tmp_path_factory.mktemp("copy"))
    (folder / "typer.py").write_text("raise ModuleNotFoundError(\"No module named 'typer'\", name='typer')\n")
    return folder


def test_without_typer(without_typer) -> None:
    code = """
import contextlib, io, sys
from fastcl import cli
def call(*arguments):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            cli.main(arguments)
            status = 0
        except SystemExit as end:
            status = end.code
    print(repr((status, out.getvalue()[:7], out.getvalue()[-80:])))
for arguments in ((), ("support",), ("run", "--out", "x"), ("compare",), ("--help",)):
    call(*arguments)
"""
    bare, support, run_, compare_, help_ = map(eval, python("-c", code, path=without_typer).stdout.splitlines())
    assert bare == support
    assert bare[:2] == (0, "fastcl ")
    assert run_[0] == f"fastcl run: needs typer, which is not installed; {cli.INSTALL}"
    assert compare_[0] == f"fastcl compare: needs typer, which is not installed; {cli.INSTALL}"
    assert help_[0] == 0
    assert "'.[cli]' in a checkout" in " ".join(help_[2].split())


def test_interrupted_while_it_is_imported(capsys, monkeypatch) -> None:
    monkeypatch.setattr(cli, "_main", Mock(side_effect=KeyboardInterrupt))
    assert fastcl(capsys, "compare", "x") == (130, "", "fastcl: interrupted\n")


def test_the_script_is_declared() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert '\n[project.scripts]\nfastcl = "fastcl.cli:main"\n' in text
    assert '\ncli = ["typer' in text


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "Ctrl-C"])
def test_a_stopped_process_leaves_a_folder_that_goes_on(capsys, tmp_path, number) -> None:
    options = ["--method", "agem", "--epochs", "30", "--width", "32"]
    command = [sys.executable, "-m", "fastcl", "run", *options, "--out", str(tmp_path / "stopped")]
    checkpoint = tmp_path / "stopped/seed0/checkpoint.pt"
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # jobs in the background of a shell ignore it
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment(ROOT), preexec_fn=heard, **streams) as process:
        limit = time.monotonic() + 120
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.005)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert err.splitlines()[-1] == ("python -m fastcl run: interrupted; the same command goes on after the last task that ended")
    else:
        assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "stopped/seed0/result.json").exists(), "it ended before it was stopped"
    status, _, err = fastcl(capsys, "run", *options, "--out", tmp_path / "stopped")
    assert status == 0
    assert "seed 0: goes on after " in err
    assert fastcl(capsys, "run", *options, "--out", tmp_path / "whole")[0] == 0
    stopped, whole = (torch.tensor(load_run(tmp_path / n).results[0].matrix) for n in ("stopped", "whole"))
    assert torch.equal(stopped, whole)
