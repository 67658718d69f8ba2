"""Tries a wheel under several versions of torch, each in an environment of its own, and writes docs/wheel-check.md.

Fetches gigabytes: torch's default wheels for Linux bring CUDA. One environment exists at a time. Exit status 1 if any version failed or
could not be tried.

    python tests/wheel_check.py dist/*.whl
    python tests/wheel_check.py --torch 2.13.* --record /tmp/record.md dist/*.whl
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("2.10.*", "2.11.*", "2.13.*")
GIB_PER_ENVIRONMENT = 15


@dataclasses.dataclass
class Outcome:
    wanted: str
    problem: str | None = None
    report: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    @property
    def failed(self) -> list[str]:
        return [f"{name}: {said}" for name, said in self.report.get("checks", {}).items() if said != "ok"]

    @property
    def passed(self) -> bool:
        return self.problem is None and bool(self.report.get("checks")) and not self.failed

    @property
    def verdict(self) -> str:
        if self.problem is not None:
            return f"not checked: {self.problem}"
        checks = self.report["checks"]
        return f"{len(checks) - len(self.failed)} of {len(checks)} checks passed"


def step(what: str) -> None:
    print(f"   {time.strftime('%H:%M:%S')} {what}", flush=True)


def last_line(text: str) -> str:
    """The line that names the cause: pip's last ERROR, else the last line."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1] if lines else "no output")


def try_version(wanted: str, wheel: Path, folder: Path, minutes: float) -> Outcome:
    free = shutil.disk_usage(folder).free / 2**30
    if free < GIB_PER_ENVIRONMENT:
        return Outcome(wanted, f"{free:.0f} GiB are free in {folder}, {GIB_PER_ENVIRONMENT} are needed; set TMPDIR")
    home = folder / "environment"
    venv.create(home, with_pip=True)
    python = str(home / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    pip = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--disable-pip-version-check"]
    for what, command in (
        (f"installing torch=={wanted} (at most {minutes:g} minutes)", [*pip, f"torch=={wanted}", "numpy", "safetensors"]),
        (f"installing {wheel.name}", [*pip, "--no-deps", str(wheel)]),
    ):
        step(what)
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=minutes * 60, cwd=folder)
        except subprocess.TimeoutExpired:
            return Outcome(wanted, f"{what}: not done in time")
        if done.returncode:
            print(done.stderr[-2000:], file=sys.stderr)
            return Outcome(wanted, f"{what}: {last_line(done.stderr)}")
    step("checking")
    inside = Path(shutil.copy(ROOT / "tests/wheel_inside.py", folder))  # away from the checkout, whose fastcl must not be found
    try:
        done = subprocess.run([python, "-I", str(inside)], capture_output=True, text=True, check=False, timeout=600, cwd=folder)
    except subprocess.TimeoutExpired:
        return Outcome(wanted, "the checks were not done in 10 minutes")
    if done.returncode:
        print(done.stderr[-4000:], file=sys.stderr)
        return Outcome(wanted, f"the checks ended with status {done.returncode}: {last_line(done.stderr)}")
    return Outcome(wanted, report=json.loads(done.stdout.strip().splitlines()[-1]))


def table(outcomes: list[Outcome]) -> list[str]:
    rows = ["| wanted | torch | its CUDA | result | digest of the results |", "|---|---|---|---|---|"]
    for o in outcomes:
        version, digest = o.report.get("torch", "-"), o.report.get("digest", "-")[:16]
        rows.append(f"| {o.wanted} | {version} | {o.report.get('cuda') or '-'} | {o.verdict} | {digest} |")
    return rows


def agreement(outcomes: list[Outcome]) -> str | None:
    """What the digests say: the compiled ops must give the same bits under every torch."""
    digests = {o.report["digest"] for o in outcomes if o.report}
    if len(digests) < 2:
        return None
    return f"the results differ between versions of torch: {len(digests)} different digests"


def modules(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return sorted(f"`{name}`" for name in archive.namelist() if name.endswith(".so"))


def record(wheel: Path, outcomes: list[Outcome], seconds: float) -> str:
    checked = [o for o in outcomes if o.report]
    lines = [
        "# The wheel under several versions of torch",
        "",
        "Written by `make wheel-check`; not edited by hand.",
        "",
        f"* Wheel: `{wheel.name}`, one file for all rows, with {' and '.join(modules(wheel)) or 'no compiled module'}",
        f"* Python {platform.python_version()}, {platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        f"* {datetime.date.today().isoformat()}, {seconds / 60:.0f} minutes; on the CPU alone",
        "",
        *table(outcomes),
        "",
    ]
    if checked:
        lines += ["Checks, each in a fresh environment with that torch, NumPy and safetensors:", ""]
        for name in checked[0].report["checks"]:
            bad = [f"torch {o.report['torch']}: {o.report['checks'][name]}" for o in checked if o.report["checks"].get(name) != "ok"]
            lines.append(f"* {name.replace('_', ' ')}: {'; '.join(bad) if bad else 'ok'}")
    if len(checked) > 1:
        lines.append(f"* the results are the same bits under every version: {agreement(outcomes) or 'ok'}")
    return "\n".join(lines) + "\n"


def own_wheel(wheels: list[Path]) -> Path:
    """The newest of the wheels that fits this Python."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}-"
    fitting = [w for w in wheels if w.is_file() and tag in w.name]
    if not fitting:
        named = ", ".join(w.name for w in wheels)
        raise SystemExit(f"none of the wheels fits this Python ({tag}{sysconfig.get_platform()}): {named}; run `make wheel`")
    return max(fitting, key=lambda w: w.stat().st_mtime).resolve()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", nargs="+", type=Path, metavar="WHEEL")
    parser.add_argument("--torch", nargs="+", default=list(VERSIONS), metavar="VERSION", help=f"default: {' '.join(VERSIONS)}")
    parser.add_argument("--record", type=Path, default=ROOT / "docs/wheel-check.md")
    parser.add_argument("--minutes", type=float, default=30.0, help="for one installation of torch")
    arguments = parser.parse_args()
    wheel, outcomes, start = own_wheel(arguments.wheels), [], time.monotonic()
    for number, wanted in enumerate(arguments.torch, 1):
        print(f"== torch {wanted} ({number} of {len(arguments.torch)})", flush=True)
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="fastcl-wheel-", ignore_cleanup_errors=True) as folder:
            outcome = try_version(wanted, wheel, Path(folder), arguments.minutes)
        outcome.seconds = time.monotonic() - began
        outcomes.append(outcome)
        print("\n".join([f"   {outcome.verdict} ({outcome.seconds:.0f} s)", *(f"   FAILED {line}" for line in outcome.failed)]), flush=True)
    arguments.record.parent.mkdir(parents=True, exist_ok=True)
    arguments.record.write_text(record(wheel, outcomes, time.monotonic() - start))
    print("\n".join(["", *table(outcomes), "", f"written: {arguments.record}"]))
    disagreement = agreement(outcomes)
    if disagreement:
        print(disagreement, file=sys.stderr)
    raise SystemExit(1 if disagreement or not all(o.passed for o in outcomes) else 0)


if __name__ == "__main__":
    main()
