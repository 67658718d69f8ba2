"""Configurations, and the runner: the same bits whether it was killed or not."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the digits streams need scikit-learn")

from fastcl.data import STREAMS, stream
from fastcl.experiment import METHODS, Config, Progress, compare, load_run, run
from fastcl.experiment.compare import mean_matrix, write_csv
from fastcl.experiment.files import load_state, read_json, save_state, write_json
from fastcl.experiment.folder import FolderError, read_config
from fastcl.experiment.runner import read_result
from fastcl.experiment.training import Training
from fastcl.metrics import AccuracyMatrix, acc
from processes import ROOT, environment

SMALL = {"epochs": 1, "width": 16, "depth": 1, "lr": 0.2}
CPU = torch.device("cpu")


def small(**given) -> Config:
    return Config.of(**{**SMALL, **given})


def final_state(folder: Path, seed: int = 0) -> dict:
    return load_state(folder / f"seed{seed}" / "checkpoint.pt", CPU)["training"]


def assert_same_bits(a, b, path="state") -> None:
    """Nested states, clocks aside."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a.keys() - {"seconds", "seconds_at_ends"}:
            assert_same_bits(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a.nan_to_num(nan=-1.0), b.nan_to_num(nan=-1.0)), path
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for n, pair in enumerate(zip(a, b, strict=True)):
            assert_same_bits(*pair, f"{path}[{n}]")
    else:
        assert a == b, path


class TestConfig:
    def test_defaults_come_from_stream_and_method(self) -> None:
        config = Config.of()
        assert (config.stream, config.scenario, config.tasks, config.method) == ("split-digits", "class", 5, "naive")
        assert (config.buffer, config.margin, config.strength) == (None, None, None)
        gem = Config.of(stream="permuted-digits", method="gem", buffer=50)
        assert (gem.scenario, gem.buffer, gem.keep, gem.memory_batch, gem.margin, gem.ridge) == ("domain", 50, "task", 0, 0.5, 1e-3)
        assert gem.strength is None

    @pytest.mark.parametrize("method", METHODS)
    def test_json_and_back(self, method) -> None:
        config = Config.of(method=method, seeds=3, lr=1e-3)
        assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"stream": "mnist"}, "stream must be one of split-digits, permuted-digits, .*; got 'mnist'"),
            (
                {"method": "sgd"},
                "method must be one of naive, agem, gem, replay, spg, ewc, ewc-online, child-tuning-f, child-tuning-d, "
                "kfac-ewc, owm, ncl, joint; got 'sgd'",
            ),
            ({"scenario": "none"}, "scenario must be one of class, task, domain; got 'none'"),
            ({"stream": "permuted-digits", "scenario": "class"}, "scenario of permuted-digits must be one of domain, task; got 'class'"),
            ({"epochs": 0}, "epochs must be a whole number from 1 to 2147483647; got 0"),
            ({"epochs": 2.5}, "epochs must be a whole number from 1 to 2147483647; got 2.5"),
            ({"epochs": True}, "epochs must be a whole number from 1 to 2147483647; got True"),
            ({"lr": math.nan}, "lr must be a finite number above 0; got nan"),
            ({"lr": "0.1"}, "lr must be a finite number above 0; got '0.1'"),
            ({"method": "gem", "margin": -1}, "margin must be a finite number from 0; got -1"),
            ({"method": "spg", "strength": 1.5}, r"strength must be a number in \[0, 1\] for spg; got 1.5"),
            ({"method": "ewc", "strength": -1}, "strength must be a finite number from 0; got -1"),
            ({"method": "ewc", "gamma": 0.5}, "gamma is no setting of the method ewc; got 0.5"),
            ({"method": "ewc-online", "gamma": 1.5}, r"gamma must be a number in \[0, 1\]; got 1.5"),
            ({"method": "ncl", "momentum": 1.0}, r"momentum must be a number in \[0, 1\); got 1.0"),
            ({"method": "ncl", "radius": 0.0}, "radius must be a finite number above 0; got 0.0"),
            ({"method": "ncl", "weight": 0}, "weight must be a finite number above 0; got 0"),
            ({"method": "owm", "alpha": math.nan}, "alpha must be a finite number above 0; got nan"),
            ({"method": "kfac-ewc", "strength": -1}, "strength must be a finite number from 0; got -1"),
            ({"method": "kfac-ewc", "momentum": 0.9}, "momentum is no setting of the method kfac-ewc; got 0.9"),
            ({"method": "child-tuning-f", "child": 0}, r"child must be a number in \(0, 1\]; got 0"),
            ({"method": "child-tuning-d", "child": "0.3"}, r"child must be a number in \(0, 1\]; got '0.3'"),
            ({"method": "naive", "buffer": 100}, "buffer is no setting of the method naive; got 100"),
            ({"method": "agem", "memory_batch": 0}, "memory_batch must be a whole number from 1 for agem; got 0"),
            ({"method": "replay", "keep": "all"}, "keep must be one of task, class, reservoir; got 'all'"),
            ({"device": "tpu"}, "device must be a device that torch sees here: cpu, cuda or cuda:N; got 'tpu'"),
            ({"device": "cuda:99"}, "device must be a device"),
            ({"first_seed": -1}, r"first_seed must be a whole number from 0 to 2\*\*63 - 1; got -1"),
            ({"validation": 1}, "validation must be true or false; got 1"),
        ],
    )
    def test_bad_settings(self, given, message) -> None:
        with pytest.raises(ValueError, match=message):
            Config.of(**given)

    @pytest.mark.parametrize(
        ("name", "most"),
        [
            ("epochs", 2**31 - 1),
            ("batch_size", 2**31 - 1),
            ("width", 65536),
            ("depth", 100),
            ("seeds", 2**31 - 1),
            ("first_seed", 2**63 - 1),
            ("threads", 1024),
            ("tasks", 10_000),
            ("buffer", 2**31 - 1),
            ("memory_batch", 2**31 - 1),
        ],
    )
    def test_what_torch_cannot_take_is_refused(self, tmp_path, name, most) -> None:
        assert getattr(Config.of(method="agem", **{name: most}), name) == most
        with pytest.raises(ValueError, match=rf"^{name} must be a whole number from [01] to .*; got {most + 1}$"):
            run(Config.of(method="agem", **{name: most + 1}), tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_numbers_beyond_all_bounds(self) -> None:
        with pytest.raises(ValueError, match=r"first_seed must leave 2 seeds below 2\*\*63; got 9223372036854775807"):
            Config.of(first_seed=2**63 - 1, seeds=2)
        with pytest.raises(ValueError, match="lr must be a finite number above 0"):
            Config.of(lr=10**400)

    def test_unknown_and_missing_names(self) -> None:
        with pytest.raises(TypeError, match="learning_rate is no setting; the settings are stream, scenario"):
            Config.of(learning_rate=1)
        stated = Config.of().to_json()
        with pytest.raises(ValueError, match="nesterov is no setting of this version"):
            Config.from_json(stated | {"nesterov": True})
        del stated["lr"]
        with pytest.raises(ValueError, match="lr is missing"):
            Config.from_json(stated)

    def test_differences(self) -> None:
        a = Config.of(epochs=2, root="/here")
        assert a.differences(dataclasses.replace(a, root="/there")) == []
        assert a.differences(Config.of(epochs=3, method="spg")) == ["method: 'naive', 'spg'", "epochs: 2, 3", "strength: None, 1.0"]


class TestTraining:
    @pytest.mark.parametrize("scenario", ["class", "task", "domain"])
    @pytest.mark.parametrize("method", METHODS)
    def test_every_method_in_every_scenario(self, tmp_path, method, scenario) -> None:
        own = {"owm": {"alpha": 100.0}, "ncl": {"weight": 0.01}}.get(method, {})  # so little training is not to be held back
        own |= {"buffer": 20} if "buffer" in METHODS[method].options else {}
        config = small(method=method, scenario=scenario, epochs=3, width=32, **own)
        (result,) = run(config, tmp_path / "run")
        rows = 1 if METHODS[method].at_once else 5
        assert [sum(v is not None for v in row) for row in result.matrix] == [0] * (5 - rows) + [5] * rows
        # Two classes of the digits are easy, and nothing has overwritten the last task.
        assert result.matrix[4][4] > 0.7
        steps = sum(math.ceil(len(t.train_y) / 32) for t in stream("split-digits", scenario))
        joined = math.ceil(sum(len(t.train_y) for t in stream("split-digits", scenario)) / 32)
        assert result.steps == 3 * (joined if METHODS[method].at_once and scenario != "task" else steps)
        assert 0 < result.seconds < 60
        assert load_run(tmp_path / "run").results == [result]

    @pytest.mark.parametrize("keep", ["class", "reservoir"])
    def test_other_memories(self, tmp_path, keep) -> None:
        run(small(method="agem", keep=keep, buffer=30), tmp_path)
        held = final_state(tmp_path)["method"]["buffer"]
        assert len(held["x"]) == 30
        counts = held["y"].bincount(minlength=10)
        assert (counts.tolist() == [3] * 10) == (keep == "class")

    def test_classes_of_task_local_targets_are_told_apart_by_task(self, tmp_path) -> None:
        run(small(method="replay", scenario="task", keep="class", buffer=30), tmp_path)
        held = final_state(tmp_path)["method"]["buffer"]
        assert (2 * held["task"] + held["y"]).bincount().tolist() == [3] * 10

    def test_the_methods_are_what_differs(self, tmp_path) -> None:
        """The model, the data and the order of the batches are the same for all methods of a seed."""
        results = {m: run(small(method=m, tasks=2), tmp_path / m)[0] for m in METHODS if m != "joint"}
        assert len({json.dumps(r.baseline) for r in results.values()}) == 1
        # NCL's prior is a weight decay; small steps at the very beginning give the same accuracies all the same.
        assert len({json.dumps(r.matrix[0]) for r in results.values()}) == 1, "the first task is plain training for all of these"
        assert len({json.dumps(r.matrix[1]) for r in results.values()}) > 1

    def test_a_task_is_begun_with_its_own_data_before_it_is_trained(self, tmp_path, monkeypatch) -> None:
        told: list = []

        def start(learner, loader):
            told.append(("start", learner.tasks_seen, torch.cat([y for _, y in loader]).unique().tolist()))

        row = METHODS["child-tuning-f"]
        end = row._replace(start_task=start, end_task=lambda learner, loader: (told.append("end"), row.end_task(learner, loader)))
        monkeypatch.setitem(METHODS, "child-tuning-f", end)
        run(small(method="child-tuning-f", tasks=2), tmp_path)
        assert told == [("start", 0, [0, 1, 2, 3, 4]), "end", ("start", 1, [5, 6, 7, 8, 9]), "end"]

    @pytest.mark.parametrize("method", ["child-tuning-f", "child-tuning-d"])
    def test_only_a_child_network_moves_from_the_second_task_on(self, tmp_path, monkeypatch, method) -> None:
        moved: list = []
        backward = Training.stage

        def stage(self, after_epoch):
            before = [p.detach().clone() for p in self.net.parameters()]
            result = backward(self, after_epoch)
            moved.append([float((p != old).double().mean()) for p, old in zip(self.net.parameters(), before, strict=True)])
            return result

        monkeypatch.setattr(Training, "stage", stage)
        config = small(method=method, tasks=2, stream="permuted-digits", batch_size=10_000, child=0.25)  # a step for each task
        run(config, tmp_path)
        naive = tmp_path / "naive"
        first, second = moved
        run(small(method="naive", tasks=2, stream="permuted-digits", batch_size=10_000), naive)
        assert first == moved[2], "the first task is plain"
        assert second[0] < 0.5 * moved[3][0]
        if method == "child-tuning-d":
            assert second[-2:] == moved[3][-2:], "the head is always trained"
        else:
            assert second[-2] < 0.5 * moved[3][-2]

    def test_seeds_differ_and_repeat(self, tmp_path) -> None:
        config = small(seeds=2, stream="permuted-digits", tasks=2)
        first, again = run(config, tmp_path / "a"), run(config, tmp_path / "b")
        assert [r.matrix for r in first] == [r.matrix for r in again]
        assert first[0].matrix != first[1].matrix
        assert [r.seed for r in first] == [0, 1]
        (alone,) = run(small(first_seed=1, stream="permuted-digits", tasks=2), tmp_path / "c")
        assert alone.matrix == first[1].matrix

    def test_the_callers_torch_is_left_alone(self, tmp_path) -> None:
        threads = torch.get_num_threads()
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        run(small(tasks=1, threads=threads + 1), tmp_path)
        assert torch.equal(torch.rand(3), expected)
        assert torch.get_num_threads() == threads

    def test_the_clock_leaves_evaluation_out(self, tmp_path, monkeypatch) -> None:
        """A clock that moves only while a model trains or is evaluated: a second per batch."""
        now = [0.0]
        monkeypatch.setattr(Training, "_now", lambda self: now[0])
        forward = torch.nn.Module.__call__

        def ticking(self, *args):
            now[0] += 1.0 if type(self).__name__ == "Net" else 0.0
            return forward(self, *args)

        monkeypatch.setattr(torch.nn.Module, "__call__", ticking)
        (result,) = run(small(tasks=2, epochs=2), tmp_path)
        assert result.seconds == result.steps
        assert result.seconds_at_ends == 0

    @pytest.mark.parametrize(("keep", "buffer", "least"), [("task", 4, 5), ("class", 9, 10)])
    def test_a_memory_that_is_too_small_is_refused_before_anything_is_written(self, tmp_path, keep, buffer, least) -> None:
        with pytest.raises(ValueError, match=f"buffer must be at least {least}, a sample for each {keep}, with keep={keep}; got {buffer}"):
            run(small(method="agem", keep=keep, buffer=buffer), tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_progress_is_told(self, tmp_path) -> None:
        told: list = []

        class Told(Progress):
            def begin(self, config, seed, stages, done):
                told.append((seed, stages, done))

            def epoch(self):
                told.append("epoch")

            def task(self, number, accuracies):
                assert (tmp_path / "seed0/checkpoint.pt").exists()
                told.append((number, len(accuracies)))

        run(small(tasks=2, epochs=2), tmp_path, progress=Told())
        assert told == [(0, 2, 0), "epoch", "epoch", (0, 2), "epoch", "epoch", (1, 2)]


# Imports once; then for every line on stdin a process of its own, which ends itself with SIGKILL, that nothing can catch, at the moment
# that the line names. Nothing of torch has run before a fork.
KILLED = """
import json, os, signal, sys
from pathlib import Path
import sklearn.datasets, sklearn.model_selection
from fastcl.experiment import Config, Progress, run
import fastcl.experiment.files as files

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def work(folder, settings, moment):
    kind, number = moment.split()

    class Killing(Progress):
        epochs = 0
        def epoch(self):
            self.epochs += 1
            if kind == "epoch" and self.epochs == int(number):
                kill()
        def task(self, done, accuracies):
            if kind == "task" and done == int(number):
                kill()

    def half_opened():
        opened = Path.open
        class Half:
            def __init__(self, file):
                self.file = file
            def __enter__(self):
                return self
            def __exit__(self, *_):
                raise RuntimeError("the write was to end it")
            def write(self, content):
                self.file.write(content[: len(content) // 2])
                self.file.flush()
                kill()
        Path.open = lambda path, *mode: Half(opened(path, *mode))

    writes, write = [0], files.write_bytes
    def counted(path, content):
        writes[0] += 1
        if kind == "half" and writes[0] == int(number):
            half_opened()
        if kind == "unnamed" and writes[0] == int(number):
            Path.replace = lambda *_: kill()
        write(path, content)
    files.write_bytes = counted
    run(Config.of(**settings), folder, progress=Killing())

for line in sys.stdin:
    child = os.fork()
    if not child:
        work(*json.loads(line))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def killed():
    """Runs a configuration in a process that is killed at a moment."""
    command = [sys.executable, "-c", KILLED]
    with subprocess.Popen(command, env=environment(ROOT), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def call(folder: Path, settings: dict, moment: str) -> None:
            server.stdin.write(json.dumps([str(folder), settings, moment]) + "\n")
            server.stdin.flush()
            assert int(server.stdout.readline()) == -signal.SIGKILL

        yield call
        server.stdin.close()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
class TestKilled:
    SETTINGS = SMALL | {"epochs": 2, "tasks": 5, "seeds": 2}

    def check(self, killed, tmp_path: Path, settings: dict, *moments: str) -> None:
        whole = run(Config.of(**settings), tmp_path / "whole")
        for moment in moments:
            killed(tmp_path / "killed", settings, moment)
        resumed = run(Config.of(**settings), tmp_path / "killed")
        clocks = {"seconds": 0.0, "seconds_at_ends": 0.0}
        assert [dataclasses.replace(r, **clocks) for r in resumed] == [dataclasses.replace(r, **clocks) for r in whole]
        for r in whole:
            assert_same_bits(final_state(tmp_path / "killed", r.seed), final_state(tmp_path / "whole", r.seed))

    @pytest.mark.parametrize(
        ("method", "moments"),
        [
            ("agem", ["task 1", "epoch 3"]),  # between tasks; then within the fourth, which had begun anew
            ("replay", ["epoch 5"]),
            ("gem", ["task 2"]),
            ("spg", ["epoch 4"]),
            ("ewc-online", ["epoch 4", "task 2"]),
            ("child-tuning-f", ["epoch 4"]),
            ("child-tuning-d", ["task 1", "epoch 3"]),  # its mask is chosen anew
            ("kfac-ewc", ["epoch 4"]),
            ("owm", ["task 1", "epoch 3"]),
            ("joint", ["epoch 1"]),
        ],
    )
    def test_between_and_inside_tasks(self, killed, tmp_path, method, moments) -> None:
        self.check(killed, tmp_path, self.SETTINGS | {"method": method}, *moments)

    @pytest.mark.parametrize("radius", [None, 0.05])
    @pytest.mark.parametrize("scenario", ["task", "domain"])
    def test_an_optimizer_of_the_methods_own(self, killed, tmp_path, scenario, radius) -> None:
        own = {"method": "ncl", "scenario": scenario, "momentum": 0.9, "lr": 0.05, "radius": radius}
        self.check(killed, tmp_path, self.SETTINGS | own, "task 2", "epoch 3")
        assert final_state(tmp_path / "whole")["optimizer"]["state"][0].keys() == {"dual_momentum", "pull"}

    @pytest.mark.parametrize(
        "moments",
        [
            ["half 1"],  # config.json half written
            ["half 3", "unnamed 1"],  # the second checkpoint; the one that is written in its place
            ["unnamed 7"],  # the first seed's result
        ],
    )
    def test_while_a_file_is_written(self, killed, tmp_path, moments) -> None:
        self.check(killed, tmp_path, self.SETTINGS | {"method": "replay", "scenario": "task"}, *moments)


class TestFolder:
    def test_a_complete_run_is_not_trained_again(self, tmp_path, monkeypatch) -> None:
        config = small(tasks=2)
        first = run(config, tmp_path)
        monkeypatch.setattr(Training, "stage", lambda *_: pytest.fail("it trained"))
        assert run(config, tmp_path) == first

    def test_another_configuration_is_refused_by_name_and_nothing_changes(self, tmp_path) -> None:
        run(small(tasks=2), tmp_path)
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        with pytest.raises(FolderError, match=r"out holds a run with another configuration.*\(there, now: epochs: 1, 3; lr: 0.2, 0.1\)"):
            run(small(tasks=2, epochs=3, lr=0.1), tmp_path)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before

    def test_force_trains_anew_and_leaves_what_is_not_the_runs(self, tmp_path) -> None:
        run(small(tasks=2, seeds=2), tmp_path)
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / "seed-list").mkdir()
        (result,) = run(small(tasks=1), tmp_path, force=True)
        assert len(result.matrix) == 1
        assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "config.json", "notes.txt", "seed-list", "seed0"]
        assert read_config(tmp_path / "config.json") == small(tasks=1)

    @pytest.mark.parametrize("content", ["{}", '{"format": "another", "version": 1}', "[]", "{", "[" * 100_000], ids=str.__len__)
    @pytest.mark.parametrize("force", [False, True])
    def test_a_config_of_something_else_keeps_its_folder(self, tmp_path, content, force) -> None:
        (tmp_path / "config.json").write_text(content)
        (tmp_path / "seed0").mkdir()
        (tmp_path / "seed0/mine").write_text("x")
        with pytest.raises(FolderError, match=r"out is not the folder of a run: .*config\.json (has the format|is damaged)"):
            run(small(tasks=1), tmp_path, force=force)
        assert sorted(p.name for p in tmp_path.rglob("*")) == ["config.json", "mine", "seed0"]

    def test_what_is_no_run_is_refused(self, tmp_path) -> None:
        (tmp_path / "file").write_text("x")
        for out, message in [
            (tmp_path / "file", "out is a file, and it must be a folder"),
            (tmp_path, "out holds other things and no config.json of a run"),
            (tmp_path / "file" / "below", "out cannot be written: .*Not a directory"),
        ]:
            with pytest.raises(FolderError, match=message):
                run(small(tasks=1), out, force=True)
        assert [p.name for p in tmp_path.iterdir()] == ["file"]

    @pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
    def test_a_folder_without_permission(self, tmp_path) -> None:
        tmp_path.chmod(0o500)
        with pytest.raises(FolderError, match=r"out cannot be written: .*Permission denied"):
            run(small(tasks=1), tmp_path / "new")

    def test_one_process_at_a_time(self, tmp_path) -> None:
        pytest.importorskip("fcntl")
        busy: list[str] = []

        class Second(Progress):
            def task(self, number, accuracies):
                with pytest.raises(FolderError, match="out is in use by another process"):
                    run(small(tasks=1), tmp_path)
                busy.append("refused")

        run(small(tasks=1), tmp_path, progress=Second())
        assert busy == ["refused"]

    def test_damaged_files_are_named(self, tmp_path) -> None:
        config = small(tasks=2)
        run(config, tmp_path)
        checkpoint, result = tmp_path / "seed0/checkpoint.pt", tmp_path / "seed0/result.json"
        content = bytearray(checkpoint.read_bytes())
        content[len(content) // 2] ^= 1
        checkpoint.write_bytes(content)
        assert run(config, tmp_path)[0] == read_result(result, config, 0), "a complete seed needs no checkpoint"
        result.unlink()
        with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged: its content does not have the checksum"):
            run(config, tmp_path)
        checkpoint.write_bytes(b"something else")
        with pytest.raises(ValueError, match=r"checkpoint\.pt is no checkpoint of fastcl"):
            run(config, tmp_path)
        result.write_text("{")
        with pytest.raises(ValueError, match=r"result\.json is damaged"):
            run(config, tmp_path)
        (tmp_path / "config.json").write_text("[]")
        with pytest.raises(ValueError, match=r"config\.json has the format None, version None; accepted is 'fastcl.run', 1"):
            run(config, tmp_path)

    def test_files_of_another_run_or_seed_are_refused(self, tmp_path) -> None:
        config = small(tasks=2, seeds=2)
        run(config, tmp_path / "a")
        run(small(tasks=2, lr=0.1, seeds=2), tmp_path / "b")
        for name in ("result.json", "checkpoint.pt"):
            (tmp_path / "a/seed0/result.json").unlink()
            (tmp_path / "a/seed0" / name).write_bytes((tmp_path / "b/seed0" / name).read_bytes())
            with pytest.raises(FolderError, match=rf"{name} is of another run \(there, here: lr: 0.1, 0.2\); give a new folder"):
                run(config, tmp_path / "a")
            (tmp_path / "a/seed0" / name).write_bytes((tmp_path / "a/seed1" / name).read_bytes())
            with pytest.raises(FolderError, match=rf"{name} is of another run \(there, here: seed: 1, 0\)"):
                run(config, tmp_path / "a")
            (tmp_path / "a/seed0/result.json").touch()

    def test_the_environment_is_recorded_and_a_change_is_told(self, tmp_path) -> None:
        config = small(tasks=2)
        (whole,) = run(config, tmp_path)
        assert read_json(tmp_path / "config.json", "fastcl.run", 1)["environment"] == whole.environments[0]
        assert whole.environments[0]["torch"] == torch.__version__
        checkpoint = tmp_path / "seed0/checkpoint.pt"
        state = load_state(checkpoint, CPU)
        state["environments"][0]["torch"] = "2.99.0"
        save_state(checkpoint, state)
        (tmp_path / "seed0/result.json").unlink()
        notes: list[str] = []

        class Notes(Progress):
            def note(self, text):
                notes.append(text)

        (resumed,) = run(config, tmp_path, progress=Notes())
        assert [e["torch"] for e in resumed.environments] == ["2.99.0", torch.__version__]
        assert notes == [f"seed 0 began elsewhere (torch 2.99.0, now {torch.__version__}): the last bits may differ"]

    def test_states_hold_no_code(self, tmp_path) -> None:
        class Evil:
            def __reduce__(self):
                return (print, ("ran",))

        save_state(tmp_path / "x", {"evil": Evil()})
        with pytest.raises(Exception, match="Weights only load failed"):
            load_state(tmp_path / "x", CPU)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    plan = {
        "naive": {"seeds": 2},
        "agem": {"method": "agem", "seeds": 2},
        "agem small": {"method": "agem", "buffer": 20},
        "joint": {"method": "joint"},
        "naive lr": {"lr": 0.1},
        "permuted": {"stream": "permuted-digits", "tasks": 2},
    }
    for name, given in plan.items():
        run(small(**given), folder / name)
    return {name: folder / name for name in plan}


class TestCompare:
    def test_streams_are_kept_apart(self, runs) -> None:
        groups = compare(load_run(folder) for folder in runs.values())
        assert [(g.title, [row.run.name for row in g.rows]) for g in groups] == [
            ("split-digits, class-incremental, 5 tasks", ["naive", "agem", "agem small", "joint", "naive lr"]),
            ("permuted-digits, domain-incremental, 2 tasks", ["permuted"]),
        ]
        assert len({g.slug for g in groups}) == 2

    def test_measures(self, runs) -> None:
        row = compare([load_run(runs["agem"])])[0].rows[0]
        loaded = load_run(runs["agem"])
        accs = [acc(r.accuracy.values) for r in loaded.results]
        assert row.acc == pytest.approx((sum(accs) / 2, abs(accs[0] - accs[1]) / math.sqrt(2)))
        transfers = [r.accuracy.fwt(r.baseline) for r in loaded.results]
        assert row.fwt is not None
        assert row.fwt[0] == pytest.approx(sum(transfers) / 2)
        assert row.bwt is not None
        assert row.forgetting is not None
        assert row.overhead is None, "there is no naive run among them"
        joint = compare([load_run(runs["joint"])])[0].rows[0]
        assert (joint.bwt, joint.fwt, joint.forgetting) == (None, None, None)
        assert math.isnan(joint.acc[1])

    def test_overhead_is_over_the_naive_run_of_the_same_configuration(self, runs) -> None:
        rows = {row.run.name: row for g in compare(load_run(f) for f in runs.values()) for row in g.rows}
        mean = lambda name: sum(load_run(runs[name]).seconds_per_step) / len(load_run(runs[name]).results)  # noqa: E731
        for name in ("agem", "agem small", "joint"):
            assert rows[name].overhead == pytest.approx(mean(name) / mean("naive") - 1)
        assert rows["naive"].overhead == 0
        assert rows["naive lr"].overhead == 0
        other = compare([load_run(runs["naive lr"]), load_run(runs["agem"])])[0].rows
        assert other[1].overhead is None, "another learning rate"

    def test_another_machine_gives_no_overhead(self, runs) -> None:
        naive, agem = load_run(runs["naive"]), load_run(runs["agem"])
        moved = [dataclasses.replace(r, environments=[r.environments[0] | {"processor": "another"}]) for r in naive.results]
        rows = compare([dataclasses.replace(naive, results=moved), agem])[0].rows
        assert rows[1].overhead is None

    def test_settings_that_differ_are_named(self, runs) -> None:
        rows = {row.run.name: row for row in compare(load_run(f) for f in runs.values())[0].rows}
        assert rows["agem small"].settings == "buffer=20, lr=0.2"
        assert rows["naive lr"].settings == "lr=0.1"
        assert compare([load_run(runs["agem"])])[0].rows[0].settings == ""

    def test_csv(self, runs, tmp_path) -> None:
        write_csv(tmp_path / "c.csv", compare(load_run(f) for f in runs.values()))
        lines = (tmp_path / "c.csv").read_text().splitlines()
        assert len(lines) == 1 + len(runs)
        assert lines[0].startswith("run,stream,scenario,method,tasks,")
        assert lines[4].startswith("joint,split-digits,class,joint,5,")
        assert ",,,,,," in lines[4], "what is not defined stays empty"

    def test_incomplete_and_nothing(self, runs) -> None:
        with pytest.raises(ValueError, match="runs is empty"):
            compare([])
        with pytest.raises(ValueError, match="naive has no complete seed"):
            compare([dataclasses.replace(load_run(runs["naive"]), results=[])])

    def test_plots(self, runs, tmp_path) -> None:
        pytest.importorskip("matplotlib")
        from fastcl.experiment.plots import curves, heat_maps

        loaded = [load_run(runs["naive"]), load_run(runs["agem"])]
        matrices = {f"{r.name} {n}": mean_matrix(r.matrices) for r in loaded for n in range(3)}  # more than one line of panels
        heat_maps(tmp_path / "m.png", "title", matrices)
        heat_maps(tmp_path / "one.png", "perfect", {"one": AccuracyMatrix.of([[1.0]]).values})
        curves(tmp_path / "c.png", "title", {r.name: r.matrices for r in loaded}, {"joint": load_run(runs["joint"]).matrices})
        curves(tmp_path / "bound.png", "title", {}, {"joint": load_run(runs["joint"]).matrices})
        assert all(p.stat().st_size > 8000 for p in tmp_path.glob("*.png"))


def test_json_holds_the_exact_numbers(tmp_path) -> None:
    values = torch.rand(50, dtype=torch.float64).tolist()
    write_json(tmp_path / "x.json", {"format": "f", "version": 1, "values": values})
    assert read_json(tmp_path / "x.json", "f", 1)["values"] == values


def test_the_streams_that_need_no_files_run_by_default() -> None:
    for name in STREAMS:
        assert Config.of(stream=name).tasks == STREAMS[name].tasks
