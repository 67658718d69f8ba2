"""The benchmark tools: statistics, promises, the README's sections, the refusal. Nothing here depends on how fast the machine is."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # last: an installed fastcl stays the one that is tested

pytest.importorskip("rich", reason="the benchmarks need pip install 'fastcl[bench]'")
pytest.importorskip("matplotlib", reason="the benchmarks need pip install 'fastcl[bench]'")

from bench import bench_ncl, bench_optim, bench_step, compare, machine, measure, methods, methods_report, plots, report, targets, yardstick  # noqa: E402
from bench.cells import DTYPES, STEPPED, Cell, CompileTimeout, Workload, cells, deadline, providers  # noqa: E402
from fastcl.testing import CASES, SIZES, elements  # noqa: E402


def provider(ms: float, extra: int | None = None) -> dict:
    return {
        "median_ms": ms,
        "low_ms": ms * 0.9,
        "high_ms": ms * 1.1,
        "samples": 5,
        "gb_per_s": 12.5,
        "to_yardstick": None,
        "extra_bytes": extra,
    }


def record(op: str, size: str, dtype: str, not_run: dict | None = None, extra: int | None = 0, **ms: float) -> dict:
    shared = {
        "op": op,
        "size": size,
        "dtype": dtype,
        "tensors": len(SIZES[size]),
        "elements": elements(SIZES[size]),
        "bytes": 120,
        "rounds": 5,
    }
    return {**shared, "providers": {n.replace("_", " "): provider(v, extra) for n, v in ms.items()}, "not_run": not_run or {}}


def result(*records: dict, name: str = "cpu") -> dict:
    facts = {
        "name": name,
        "cpu": "A Processor",
        "threads": 2,
        "instructions": "AVX512",
        "torch": "2.13.0",
        "python": "3.12.0",
        "fastcl": "0.1.0",
        "backend": "cpp",
        "yardstick": "compiled",
        "date": "2026-01-02",
    }
    mask = {**provider(10.0), "overhead_percent": {"median": 1.5, "low": 1.0, "high": 2.0}, "peak_bytes_over_none": 0}
    step = {"model": "MLP", "parameters": 10_000_000, "rounds": 5, "method": "SPG's mask", "variants": {"none": mask, "fastcl": mask}}
    return {
        "format": 1,
        "machine": facts,
        "settings": {"memory": "how"},
        "cells": list(records),
        "optimizers": [],
        "precision": [],
        "steps": [step],
    }


GPT = record("soft_mask_", "gpt2-small", "fp32", official=90.0, eager=70.0, foreach=50.0, compile=35.0, fastcl=34.0, yardstick=33.0)


def test_spread_is_median_and_quartiles_in_milliseconds():
    s = measure.Spread.of([0.005, 0.001, 0.004, 0.002, 0.003])
    assert (s.low, s.median, s.high, s.samples) == pytest.approx((2.0, 3.0, 4.0, 5))
    one = measure.Spread.of([0.25])
    assert (one.low, one.median, one.high) == (250.0, 250.0, 250.0)
    with pytest.raises(ValueError, match="no samples"):
        measure.Spread.of([])


def test_paired_ratio_cancels_what_slows_a_whole_round():
    other = [[1.0], [2.0], [9.0], [1.5]]
    ratio = measure.paired_ratio([[2 * r[0]] for r in other], other)
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((2.0, 2.0, 2.0))


def test_every_provider_has_its_turn_in_every_round_on_restored_inputs():
    log: list[str] = []
    calls = {n: (lambda n=n: log.append(n)) for n in "abc"}

    def timed(call):
        assert log[-1] == "reset"
        call()
        return 0.0

    times = measure.interleave(calls, lambda: log.append("reset"), timed, seconds=0.0, rounds=(4, 9), burst=2)
    assert {n: [len(r) for r in by_round] for n, by_round in times.items()} == {n: [2] * 4 for n in "abc"}
    turns = [n for n in log if n != "reset"][6:]  # after the warm-up
    rounds = [turns[k : k + 6] for k in range(0, 24, 6)]
    assert all(sorted(r) == list("aabbcc") and r[0] == r[1] and r[2] == r[3] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1  # the order changes


def test_a_slow_provider_leaves_after_the_fewest_rounds():
    calls = {"slow": lambda: 9.0, "fast": lambda: 0.001}
    times = measure.interleave(calls, lambda: None, lambda call: call(), seconds=1.0, rounds=(3, 7))
    assert times == {"slow": [[9.0]] * 3, "fast": [[0.001]] * 7}
    assert measure.paired_ratio(times["slow"], times["fast"]).samples == 3


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="extra memory on the CPU is read from Linux's /proc")
def test_extra_memory_sees_temporaries_of_every_allocator():
    block = 64 << 20
    found = {
        "none": measure.extra_bytes(lambda: None, lambda: None),
        "torch": measure.extra_bytes(lambda: torch.ones(block // 4).sum(), lambda: None),
        "python": measure.extra_bytes(lambda: len(bytearray(block)), lambda: None),
        "many": measure.extra_bytes(lambda: [torch.ones(1 << 12) for _ in range(block >> 14)], lambda: None),
    }
    if None in found.values():
        pytest.skip("clear_refs cannot be written in this container")
    assert found["none"] < 2 << 20
    for name in ("torch", "python", "many"):
        assert 0.95 * block < found[name] < 1.2 * block, name


def test_working_in_place_shows_no_extra_memory_and_a_copy_shows():
    x, small = torch.ones(16 << 20), torch.ones(16 << 20, dtype=torch.uint8)
    in_place, copied = (measure.extra_bytes(call, lambda: None) for call in (lambda: x.mul_(1.0), lambda: x.mul_(1 - small.float())))
    if in_place is None or copied is None:
        pytest.skip("this system does not let a process reset its peak memory")
    assert in_place < 2 << 20 < 60 << 20 < copied


@pytest.mark.parametrize(
    ("kind", "ours", "other", "verdict"),
    [
        ("speed", 10.0, 21.0, "reached"),
        ("speed", 10.0, 15.0, "met"),
        ("speed", 10.0, 14.99, "missed"),
        ("time", 5.0, 10.0, "reached"),
        ("time", 15.0, 20.0, "met"),
        ("time", 15.01, 20.0, "missed"),
    ],
)
def test_verdicts(kind, ours, other, verdict):
    must, reach = (1.5, 2.0) if kind == "speed" else (0.75, 0.5)
    target = targets.Target("soft_mask_", "400x64", "fp32", kind, "foreach", must, reach)
    (outcome,) = targets.evaluate([record("soft_mask_", "400x64", "fp32", foreach=other, fastcl=ours)], targets=[target])
    assert outcome.verdict == verdict


def test_nan_is_a_miss():
    (outcome,) = targets.evaluate(
        [record("soft_mask_", "400x64", "fp32", foreach=1.0, fastcl=float("nan"))],
        targets=[targets.Target("soft_mask_", "400x64", "fp32", "speed", "foreach", 0.1, 0.2)],
    )
    assert outcome.verdict == "missed"


def test_memory_is_a_share_of_the_gradients_bytes():
    target = next(t for t in targets.TARGETS if t.kind == "memory" and t.op == "soft_mask_")
    size = 4 * elements(SIZES["gpt2-small"])
    for extra, verdict in ((0, "reached"), (size // 200, "met"), (size // 50, "missed"), (None, "not measured")):
        (outcome,) = targets.evaluate([record("soft_mask_", "gpt2-small", "fp32", extra=extra, fastcl=1.0)], targets=[target])
        assert outcome.verdict == verdict


def test_a_miss_is_shown_as_missed_and_a_gap_as_not_measured():
    slow = record("soft_mask_", "gpt2-small", "fp32", {"compile": "no compiler"}, eager=70.0, fastcl=40.0, yardstick=33.0)
    lines = report.targets_table(result(slow)).splitlines()
    assert len(lines) == 2 + len(targets.TARGETS) + len(targets.OPTIMIZERS) + len(targets.PRECISION)
    (against_yardstick,) = [x for x in lines if "soft_mask_` | gpt2-small | fp32 | speed, relative to yardstick" in x]
    assert against_yardstick.endswith("| 0.825 x | **missed** |")
    (against_compile,) = [x for x in lines if "soft_mask_" in x and "relative to compile" in x]
    assert against_compile.endswith("| - | **not measured** no compiler |")
    (absent,) = [x for x in lines if "| 400x64" in x]
    assert "**not measured** the cell is not in the run" in absent


def test_targets_name_cells_that_the_default_run_measures():
    default = {(c.op, c.size, c.dtype): c for c in cells()}
    assert {(t.op, t.size) for t in targets.TARGETS if t.kind == "overhead"} <= set(
        itertools.product(bench_step.METHODS, bench_step.MODELS)
    )
    for t in [t for t in targets.TARGETS if t.kind != "overhead"]:
        assert t.kind == "memory" or t.against in providers(default[(t.op, t.size, t.dtype)], "cpu"), t
    for t in targets.OPTIMIZERS:
        row = bench_optim.ROWS[t.op]
        assert (t.op, t.size, t.dtype) in [(name, size, row.dtype) for name, size in bench_optim.pairs()], t
        assert t.against in (bench_optim.BARE, *row.providers), t


def test_tables_hold_what_was_measured_and_what_was_not_run():
    tiny = record(
        "soft_mask_", "10000x64", "fp32", {"compile": "too long"}, official=9.0, eager=8.0, foreach=7.0, fastcl=1.234, yardstick=0.1
    )
    shown = report.cells_table(result(GPT, tiny))
    assert "| `soft_mask_` | gpt2-small | fp32 | 90.0 | 70.0 | 50.0 | 35.0 | **34.0** | 33.0 | 12.5 | 0.971 |" in shown
    assert "| 7.00 | - | **1.23** |" in shown
    assert "* not run: compile, too long (soft_mask_ 10000x64 fp32)." in shown


def test_claim_is_computed_from_the_headline_cell():
    said = report.claim(result(GPT))
    assert "34.0 ms: 2.65 x official, 2.06 x eager, 1.03 x compile (speed), at 97 %" in said
    assert report.claim(result()) == report.NONE


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (0.0451, "0.0451"), (1.006, "1.01"), (34.06, "34.1"), (1234.5, "1,234"), (4e-6, "0.00000")]
)
def test_numbers_have_three_significant_digits(value, shown):
    assert report.number(value) == shown


README = "# A title\n\n<!-- bench:cpu -->\nold 1 \\1\n<!-- /bench:cpu -->\n\nbetween\n\n<!-- bench:gpu --><!-- /bench:gpu -->\nend\n"


def test_sections_are_replaced_between_their_markers_only_and_once():
    once, absent = report.updated(README, {"cpu": result(GPT)})
    assert absent == ["claim", "demo", "finetune", "remember", "methods"]
    assert once.startswith("# A title\n\n<!-- bench:cpu -->\n")
    assert once.endswith("<!-- bench:gpu -->\nnot measured yet\n<!-- /bench:gpu -->\nend\n")
    assert "old 1" not in once
    assert "\n\nbetween\n\n" in once
    assert report.updated(once, {"cpu": result(GPT)}) == (once, absent)


def test_a_body_with_backslashes_is_taken_as_it_is():
    assert (
        report.replace("<!-- bench:cpu --><!-- /bench:cpu -->", "cpu", r"a \1 \g<0> b")[0]
        == "<!-- bench:cpu -->\na \\1 \\g<0> b\n<!-- /bench:cpu -->"
    )


@pytest.mark.parametrize(
    "text", ["<!-- bench:cpu -->", "<!-- /bench:cpu --><!-- bench:cpu -->", "<!-- bench:cpu --><!-- /bench:cpu -->" * 2]
)
def test_broken_markers_are_refused(text):
    with pytest.raises(ValueError, match="exactly one"):
        report.replace(text, "cpu", "x")


def test_check_finds_a_stale_readme_and_writes_nothing(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(README)
    compare.write(result(GPT), tmp_path)
    args = ["--readme", str(readme), "--results", str(tmp_path)]
    assert report.main([*args, "--check"]) == 1
    assert "does not say what the results say" in capsys.readouterr().err
    assert readme.read_text() == README
    assert report.main(args) == 0
    assert report.main([*args, "--check"]) == 0
    compare.write(result(record("soft_mask_", "gpt2-small", "fp32", official=80.0, eager=70.0, fastcl=35.0, yardstick=33.0)), tmp_path)
    assert report.main([*args, "--check"]) == 1


def test_check_finds_a_missing_section(tmp_path, capsys):
    (tmp_path / "README.md").write_text("# A title\n")
    assert report.main(["--readme", str(tmp_path / "README.md"), "--results", str(tmp_path), "--check"]) == 1
    assert "no section <!-- bench:cpu -->" in capsys.readouterr().err


def test_check_finds_a_missing_plot(tmp_path, capsys):
    (tmp_path / "README.md").write_text(README)
    compare.write(result(GPT), tmp_path)
    args = ["--readme", str(tmp_path / "README.md"), "--results", str(tmp_path)]
    assert report.main(args) == 0
    (tmp_path / "cpu-memory.png").unlink()
    assert report.main([*args, "--check"]) == 1
    assert "missing: cpu-memory.png" in capsys.readouterr().err


def test_a_gpu_result_fills_the_gpu_section(tmp_path):
    gpu = result(GPT, name="h100")
    gpu["machine"] |= {"gpu": "NVIDIA H100", "backend": "cuda"}
    text, _ = report.updated(README, {"cpu": result(GPT), "h100": gpu})
    assert report.NONE not in text
    assert "NVIDIA H100; torch 2.13.0" in text
    assert "bench/results/h100-memory.png" in text
    assert [p.name for p in plots.draw(gpu, tmp_path)] == ["h100-memory.png"]
    assert (tmp_path / "h100-memory.png").stat().st_size > 10_000


def trained(*rows: dict) -> dict:
    settings = {"epochs": 2, "lr": 0.1, "batch_size": 8, "width": 16, "depth": 1}
    stream = {"stream": "split-digits", "scenario": "class", "tasks": 2, "methods": list(rows)}
    return {"format": 1, "machine": result()["machine"], "settings": settings, "seeds": 2, "streams": [stream]}


NAIVE = {
    "method": "naive",
    "options": {},
    "seconds_per_step": [0.001, 0.002],
    "matrices": [[[1.0, 0.0], [0.5, 0.9]], [[0.8, 0.1], [0.0, 1.0]]],
}
SPG = NAIVE | {"method": "spg", "options": {"strength": 1.0}, "seconds_per_step": [0.0015, 0.0022]}
JOINT = NAIVE | {"method": "joint", "matrices": [[[None, None], [0.75, 0.95]]] * 2}


def test_the_table_of_methods():
    shown = methods_report.section(trained(NAIVE, SPG, JOINT))
    assert "| naive |  | 60.0 ± 14.1 | 65.0 ± 21.2 | 1.50 | - |" in shown
    assert "| SPG | strength 1.0 | 60.0 ± 14.1 | 65.0 ± 21.2 | 1.85 | +30 % |" in shown  # the mean of +50 % and +10 %: seed by seed
    assert "| joint |  | 85.0 ± 0.0 | - | 1.50 | +0 % |" in shown
    assert "MLP 64-16-10 with one head" in shown
    assert "![accuracy along the stream, split-digits, class-incremental](bench/results/methods-split-digits-curves.png)" in shown


def test_the_methods_result_fills_its_section_and_is_no_device(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(README + "<!-- bench:methods --><!-- /bench:methods -->\n")
    compare.write(result(GPT), tmp_path)
    args = ["--readme", str(readme), "--results", str(tmp_path)]
    assert report.main(args) == 0
    assert "<!-- bench:methods -->\nnot measured yet\n<!-- /bench:methods -->" in readme.read_text()
    assert methods.write(trained(NAIVE, JOINT), tmp_path).name == "methods.json"
    assert report.main([*args, "--check"]) == 1
    assert report.main(args) == 0
    assert "| joint |  | 85.0 ± 0.0 | - |" in readme.read_text()
    assert set(report.load(tmp_path)) == {"cpu"}
    assert report.main([*args, "--check"]) == 0
    (tmp_path / "methods-split-digits-matrices.png").unlink()
    assert report.main([*args, "--check"]) == 1
    assert "missing: methods-split-digits-matrices.png" in capsys.readouterr().err


def test_methods_are_trained_in_turn(monkeypatch, tmp_path, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(methods, "SETTINGS", methods.SETTINGS | {"width": 8, "depth": 1})
    order = []
    run = methods.run
    monkeypatch.setattr(
        methods, "run", lambda config, folder: order.append((config.first_seed, config.stream, config.method)) or run(config, folder)
    )
    assert methods.main(["--quick", "--method", "naive", "--method", "agem", "--out", str(tmp_path)]) == 0
    streams = ("split-digits", "permuted-digits")
    assert order == [(seed, stream, method) for seed in (0, 1) for stream in streams for method in ("naive", "agem")]
    written = json.loads((tmp_path / "methods.json").read_text())
    assert [len(r["matrices"]) for s in written["streams"] for r in s["methods"]] == [2, 2, 2, 2]
    assert methods_report.section(written, with_pictures=False) in capsys.readouterr().out
    assert len(list(tmp_path.glob("methods-*.png"))) == 4


def test_a_narrowed_run_of_methods_is_not_written(monkeypatch, capsys):
    monkeypatch.setattr(methods, "measure", lambda *a: trained(NAIVE))
    monkeypatch.setattr(methods, "write", lambda *a: pytest.fail("a narrowed run replaced the results"))
    assert methods.main(["--method", "naive"]) == 0
    assert "| naive |" in capsys.readouterr().out


def test_csv_has_one_row_per_provider_and_names_what_was_not_run(tmp_path):
    path = compare.write(result(GPT, record("emax_", "400x64", "fp32", {"compile": "why"}, fastcl=1.0, yardstick=0.5)), tmp_path)
    assert json.loads(path.read_text())["cells"][0] == GPT
    rows = list(csv.DictReader((tmp_path / "cpu.csv").open()))
    assert [r["provider"] for r in rows] == [
        "official",
        "eager",
        "foreach",
        "compile",
        "fastcl",
        "yardstick",
        "fastcl",
        "yardstick",
        "compile",
    ]
    assert rows[6]["times_yardstick"] == "2.0"
    assert rows[8]["not_run"] == "why"
    assert rows[8]["median_ms"] == ""


def test_bench_refuses_on_red_tests(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # starts in half the time
    (tmp_path / "test_red.py").write_text("def test_red():\n    raise ValueError('the op is wrong')\n")
    with pytest.raises(compare.RedTests, match="the op is wrong"):
        compare.require_green(["test_red.py"], tmp_path)
    with pytest.raises(compare.RedTests, match=r"test_gone\.py not found"):
        compare.require_green(["test_gone.py"], tmp_path)
    (tmp_path / "test_none.py").write_text("")
    with pytest.raises(compare.RedTests, match="exited with 5"):
        compare.require_green(["test_none.py"], tmp_path)


def test_bench_runs_on_green_tests_and_measures_nothing_on_red(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (tmp_path / "test_green.py").write_text("def test_green():\n    assert 1 + 1 == 2\n")
    compare.require_green(["test_green.py"], tmp_path)
    monkeypatch.setattr(compare, "require_green", lambda: (_ for _ in ()).throw(compare.RedTests("red")))
    monkeypatch.setattr(compare, "run", lambda *a, **k: pytest.fail("measured in spite of red tests"))
    assert compare.main(["--require-green"]) == 1
    assert "bench: red" in capsys.readouterr().err


def test_a_narrowed_run_is_not_written_as_a_result(monkeypatch, capsys):
    monkeypatch.setattr(compare, "run", lambda *a, **k: result(GPT))
    monkeypatch.setattr(compare, "write", lambda *a: pytest.fail("a narrowed run replaced the results"))
    assert compare.main(["--op", "soft_mask_", "--quick"]) == 0
    assert "gpt2-small" in capsys.readouterr().out


def test_a_part_is_measured_again_and_the_others_are_kept(monkeypatch, tmp_path, capsys):
    facts, settings = machine.facts("cpu"), compare.settings("cpu", 2.0, (5, 400))
    first = {**result(GPT), "machine": {**facts, "date": "2020-01-01"}, "settings": settings, "steps": ["old"], "optimizers": []}
    compare.write(first, tmp_path)
    measured = []
    monkeypatch.setattr(compare, "_progress", lambda total: contextlib.nullcontext(lambda what: contextlib.nullcontext()))
    monkeypatch.setattr(compare.bench_ncl, "measure_training", lambda *a: measured.append("NCL") or "NCL")
    monkeypatch.setattr(compare.bench_step, "measure_step", lambda model, method, *a: measured.append((model, method)) or "new")
    monkeypatch.setattr(compare.report, "section", lambda *a, **k: "shown")
    monkeypatch.setattr(compare.targets, "of", lambda r: [])
    assert compare.main(["--part", "steps", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "cpu.json").read_text())
    assert found["steps"] == ["NCL", *["new"] * (len(measured) - 1)]
    assert len(measured) > 3
    assert found["cells"] == json.loads(json.dumps(first["cells"]))
    assert found["machine"]["date"] == facts["date"] != "2020-01-01"
    (tmp_path / "cpu.json").write_text(json.dumps({**found, "machine": {**facts, "torch": "1.0"}}))
    measured.clear()
    assert compare.main(["--part", "steps", "--out", str(tmp_path)]) == 1
    assert "cpu.json has torch '1.0', this run" in capsys.readouterr().err
    assert compare.main(["--part", "steps", "--out", str(tmp_path / "none")]) == 1
    assert "cpu.json is not there yet: run all parts once" in capsys.readouterr().err
    assert compare.main(["--part", "steps", "--quick"]) == 1
    assert "--part takes whole parts" in capsys.readouterr().err
    assert not measured


@pytest.mark.parametrize(
    ("gpu", "name"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("Tesla T4", "t4"), ("NVIDIA A100-SXM4-40GB", "a100")],
)
def test_slugs(gpu, name):
    assert machine.slug(gpu) == name


def test_a_yardstick_that_refuses_is_an_error():
    class Refusing:
        yardstick_ = staticmethod(lambda written, read: "written[0] is not contiguous")
        yardstick_read = staticmethod(lambda read: 0)

    class Idle(Refusing):
        yardstick_ = staticmethod(lambda written, read: None)

    words = [torch.arange(64, dtype=torch.uint8)]
    with pytest.raises(RuntimeError, match="not contiguous"):
        yardstick._prove(Refusing, words, words, [])
    with pytest.raises(RuntimeError, match="wrong bits"):
        yardstick._prove(Idle, words, words, [])


def test_a_yardstick_over_given_tensors_reads_them_and_writes_one():
    read, written, other = torch.ones(3, 16), torch.arange(32.0), torch.arange(32.0).flip(0)
    expected = written.view(torch.int32) ^ other.view(torch.int32)
    kept = other.clone()
    call = yardstick.over([read], written, other, passes=2)
    if torch.equal(written, torch.arange(32.0)):  # what shows that it sweeps has swept once
        call()
    assert torch.equal(written.view(torch.int32), expected)
    call()
    assert torch.equal(written, torch.arange(32.0))
    assert torch.equal(other, kept)
    assert torch.equal(read, torch.ones(3, 16))


def test_facts_name_no_host_and_no_path():
    said = json.dumps(machine.facts("cpu"))
    host = subprocess.run(["uname", "-n"], capture_output=True, text=True, check=True).stdout.strip()
    assert str(ROOT) not in said
    assert str(Path.home()) + "/" not in said
    assert not host or f'"{host}"' not in said


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [op for op in CASES if op not in STEPPED])
def test_yardstick_moves_the_bytes_of_the_case(op, dtype):
    gradient, stored = DTYPES[dtype]
    amount = yardstick.traffic(CASES[op], 1000, gradient, stored)
    assert amount.total == 1000 * CASES[op].bytes_per_element(gradient.itemsize, stored.itemsize)
    # Streams that are read before a write.
    first = {"spg_importance_": 1, "project_": 2, "project_, not violated": 2, "gem_project_": 20, "quantile": 1, "fisher_add_": 1}
    if gradient == stored:
        assert amount.read == 1000 * gradient.itemsize * first.get(op, 0)
    yardstick.build(amount, "cpu")()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [op for op in CASES if op not in STEPPED])
def test_every_provider_of_a_cell_does_the_ops_work_from_the_same_inputs(op, dtype, monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", [(8, 4), (5,)])
    if DTYPES[dtype][1] == torch.uint8 and not CASES[op].uint8:
        assert not cells([op], dtypes=[dtype])
        return
    work = Workload(Cell(op, "tiny", dtype), "cpu")
    before = [t.clone() for t in work.args[0]]
    names = [n for n in providers(work.cell, "cpu") if n not in ("compile", "yardstick")]
    outcome = {}
    for name in names:
        work.add(name)
        if name in work.calls:
            work.reset()
            work.calls[name]()
            outcome[name] = [t.double() for t in work.args[0]]
    assert set(outcome) | set(work.not_run) == set(names)
    assert any(not torch.equal(b, a) for b, a in zip(before, work.args[0], strict=True)) == (work.cell.amount.sweep > 0)
    tolerance = 1.01 if work.args[0][0].dtype == torch.uint8 else 0.02
    for name, values in outcome.items():
        for value, ours, start in zip(values, outcome["fastcl"], before, strict=True):
            if CASES[op].random:  # which elements are kept is another rival's own; kept ones have one value
                kept = (value != 0) & (ours != 0)
                value, ours = value.where(kept, 0), ours.where(kept, 0)
                assert bool((start != 0).any())
            torch.testing.assert_close(value, ours, rtol=0.02, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")
    work.reset()
    assert all(torch.equal(b, a) for b, a in zip(before, work.args[0], strict=True))


def test_long_lists_are_not_compiled_and_the_reason_is_kept():
    work = Workload(Cell("soft_mask_", "10000x64", "fp32"), "cpu")
    work.add("compile")
    assert "compile" not in work.calls
    assert "10,000 tensors" in work.not_run["compile"]


def test_a_compilation_that_never_ends_is_stopped():
    with pytest.raises(CompileTimeout), deadline(1):
        threading.Event().wait()


def test_a_step_masks_the_same_gradients_with_every_mask(monkeypatch):
    monkeypatch.setitem(bench_step.MODELS, "tiny", lambda: (torch.nn.Linear(6, 10), torch.randn(4, 6)))
    work = bench_step.Step("tiny", "cpu")
    grads = {}
    for name in ("none", "official", "eager", "foreach", "fastcl"):
        work.reset()
        work.step(name)
        grads[name] = [p.grad.clone() for p in work.params]
    expected = [g * (1 - i) for g, i in zip(grads["none"], work.importance, strict=True)]
    for name in ("official", "eager", "foreach", "fastcl"):
        torch.testing.assert_close(grads[name], expected)
    assert not torch.equal(grads["none"][0], expected[0])


def test_a_step_projects_the_same_gradients_with_every_provider(monkeypatch):
    monkeypatch.setitem(bench_step.MODELS, "tiny", lambda: (torch.nn.Linear(6, 10), torch.randn(1, 6)))
    work = bench_step.Step("tiny", "cpu", "A-GEM's projection")
    work.memory_labels = (work.labels + 5) % 10
    grads = {}
    for name in ("none", "official", "eager", "foreach", "fastcl"):
        work.reset()
        work.step(name)
        grads[name] = [p.grad.clone() for p in work.params]
    for name in ("official", "eager", "foreach"):
        torch.testing.assert_close(grads[name], grads["fastcl"])
    violated = not torch.equal(grads["none"][0], grads["fastcl"][0])
    assert violated, "the memory's labels must oppose the batch's, or nothing is projected"


def test_the_overhead_of_a_step_is_a_target():
    target = targets.Target("A-GEM's projection", "MLP", targets.STEP, "overhead", "none", 0.05, 0.02)
    for percent, verdict in ((1.0, "reached"), (4.0, "met"), (6.0, "missed")):
        step = {"method": "A-GEM's projection", "model": "MLP", "variants": {"fastcl": {"overhead_percent": {"median": percent}}}}
        (outcome,) = targets.evaluate([], [step], [target])
        assert outcome.verdict == verdict
    assert targets.evaluate([], [], [target])[0].verdict == "not measured"


@pytest.mark.parametrize("name", [n for n in bench_optim.ROWS if n != "AdamW + ChildMask"])  # which draws
def test_every_provider_of_an_optimizer_does_the_same_step(monkeypatch, name):
    monkeypatch.setitem(SIZES, "400x64", [(5, 7), (64,), (), (3, 1, 2)])
    problem = bench_optim.Problem("400x64", "cpu")
    calls = bench_optim.build(name, problem)
    before = [p.detach().clone() for p in problem.made[0]]
    for call in calls.values():
        problem.restore()
        call()
    bare, *others = problem.made
    assert not any(torch.equal(a, b) for a, b in zip(bare, before, strict=True))
    for params in others:
        for mine, reference in zip(params, others[0], strict=True):
            # A step is about 1e-3; Child-Tuning's order adds eps before the bias correction.
            torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)
    if name != "AdamW":
        assert any((a - b).abs().max() > 1e-4 for a, b in zip(bare, others[0], strict=True))


def test_the_childs_masks_keep_as_many_gradients_in_every_provider(monkeypatch):
    monkeypatch.setitem(SIZES, "400x64", [(400, 50)])
    problem = bench_optim.Problem("400x64", "cpu")
    calls = bench_optim.build("AdamW + ChildMask", problem)
    starts = [params[0].detach().clone() for params in problem.made]
    for call in calls.values():
        problem.restore()
        call()
    _, *children = [(p[0] - s * (1 - bench_optim.LR * bench_optim.DECAY)).abs() > 1e-5 for p, s in zip(problem.made, starts, strict=True)]
    for moved in children:
        assert moved.float().mean().item() == pytest.approx(bench_optim.KEEP, abs=0.02)


def test_optimizers_are_held_against_torchs_and_shown():
    row = record("AdamW + ChildMask", "gpt2-small", "fp32", torch_fused=100.0, official=900.0, fastcl=120.0, yardstick=80.0)
    whole = {**result(GPT), "optimizers": [row]}
    assert "| AdamW + ChildMask | gpt2-small | fp32 | 100 | 900 | - | - | **120** | 80.0 | 1.20 |" in report.optimizers_table(whole)
    lines = [x for x in report.targets_table(whole).splitlines() if "AdamW + ChildMask" in x]
    assert [x.split("|")[-3:-1] for x in lines] == [[" 1.20 x ", " met "], [" 7.50 x ", " met "]]
    assert ("cpu-optimizers.png", "Time of an optimizer's step relative to torch's fused AdamW without a transform") in plots.captions(
        whole
    )


@pytest.mark.parametrize("shapes", [[(4, 4), (4, 4), (3, 6)], [(20, 32), (130, 139)]], ids=["small", "one is large"])
def test_every_provider_of_ncls_step_does_the_same_step(monkeypatch, shapes):
    made = []
    monkeypatch.setitem(bench_ncl.kronecker.SIZES, "tested", shapes)
    monkeypatch.setattr(bench_ncl.kronecker, "make", lambda *a, make=bench_ncl.kronecker.make, **k: made.append(make(*a, **k)) or made[-1])
    for provider in bench_ncl.STEPS:
        call = bench_ncl.step_of("tested", provider)
        start = [torch.cat([w.flatten(), b]).clone() for w, b in made[-1].params]
        call(), call()
    results = [[torch.cat([w.flatten(), b]) for w, b in step.params] for step in made]
    assert len(results) == 4
    for other in results[1:]:
        for a, b, s in zip(results[0], other, start, strict=True):
            assert (a - s).abs().max() > 0.01
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_every_provider_of_the_low_rank_step_does_the_same_step(monkeypatch, momentum):
    monkeypatch.setattr(bench_ncl, "LR", 0.01)
    results = []
    for build in (lambda p: p.ours(momentum), lambda p: p.eager(momentum, False), lambda p: p.eager(momentum, True)):
        problem, made = bench_ncl.LowRank(5000, 3), []
        start = problem.start
        problem.start = type("Start", (), {"clone": lambda _, made=made, start=start: made.append(start.clone()) or made[-1]})()
        monkeypatch.setattr(
            torch, "zeros_like", lambda t, kept=torch.zeros_like, start=start: kept(t if isinstance(t, torch.Tensor) else start)
        )
        call = build(problem)
        call(), call()
        results.append(made[0])
        assert (made[0] - start).abs().max() > 0.01
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-4, atol=1e-5)


def test_both_mergings_find_the_same_posterior(monkeypatch):
    monkeypatch.setattr(bench_ncl, "MERGED", 12)
    official, ours = (torch.kron(*provider()).double() for provider in bench_ncl._merge().values())
    assert (official - ours).norm() < 1e-2 * ours.norm()  # the official rounds end early


def test_precisions_targets_name_rows_and_are_shown():
    rows = {(r.op, r.size): r for r in bench_ncl.ROWS}
    for t in targets.PRECISION:
        if t.kind == "overhead":
            continue
        assert (t.op, t.size, t.dtype) in {(*row, "fp32") for row in rows}, t
        assert t.kind != "memory" or rows[t.op, t.size].memory, t
        assert t.kind == "memory" or t.against in bench_ncl.PROVIDERS, t
    row = bench_ncl.measure_row(
        bench_ncl.Row("kron_merge, kl", "n = m = 400", lambda: {"official": lambda: None, "fastcl": lambda: None}), 0.1, (3, 3)
    )
    whole = {**result(), "precision": [row]}
    assert "kron_merge, kl" in report.precision_table(whole)
    outcome = next(o for o in targets.of(whole) if o.target.op == "kron_merge, kl")
    assert outcome.value is not None


def test_ncls_training_step_is_measured():
    found = bench_ncl.measure_training(0.1, (3, 3))
    assert set(found["variants"]) == {"none", "fastcl"}
    (target,) = [t for t in targets.PRECISION if t.kind == "overhead"]
    assert (target.op, target.size) == (found["method"], found["model"])
    (outcome,) = targets.evaluate([], [found], [target])
    assert outcome.value is not None
