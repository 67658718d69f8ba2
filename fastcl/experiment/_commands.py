"""The sub-commands of ``fastcl``: options become settings, results become tables. Their options are made from the settings' table."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console
from tqdm import tqdm

from fastcl import BackendUnavailable, cli
from fastcl.experiment.compare import DEFINITIONS, Group, Run, compare, load_run, mean_matrix, told_apart, write_csv
from fastcl.experiment.config import FIELDS, Config
from fastcl.experiment.folder import read_config
from fastcl.experiment.learners import METHODS
from fastcl.experiment.runner import Progress, TrainingError, run
from fastcl.experiment.tables import comparison_table, matrix_table

USAGE, FAILED, INTERRUPTED = 2, 1, cli.INTERRUPTED
_UsageError: Any = typer.BadParameter.__mro__[1]  # click's, wherever this version of typer keeps it

app = typer.Typer(
    name="fastcl",
    help="Continual-learning experiments that can be repeated, resumed and compared.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Mistake(Exception):
    """What the user can mend: one line, and the exit status."""

    def __init__(self, line: str, status: int = USAGE) -> None:
        super().__init__(line)
        self.status = status


def execute(arguments: Sequence[str], prog: str) -> int:
    """Run a sub-command; the exit status. Every mistake of the user is one line on stderr."""
    try:
        ended = app(args=list(arguments), prog_name=prog, standalone_mode=False)
    except _UsageError as error:
        line, status = error.format_message(), USAGE
    except Mistake as error:
        line, status = str(error), error.status
    else:
        return ended if isinstance(ended, int) else 0
    print(f"{prog} {arguments[0]}: {' '.join(line.split()) if status == USAGE else line}", file=sys.stderr)
    return status


def _as_option(message: str) -> str:
    """A message that begins with a setting's name begins with the option's."""
    name = re.match(r"\w+", message)
    known = {*FIELDS, "out", "runs"}
    return "--" + name[0].replace("_", "-") + message[name.end() :] if name and name[0] in known else message


def _settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each setting of a run, passed on as keyword arguments."""
    hints, given = get_type_hints(Config), inspect.signature(command)
    own = [p for p in given.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    options = []
    for name, field in FIELDS.items():
        spelled = name.replace("_", "-")
        names = f"--{spelled}/--no-{spelled}" if hints[name] is bool else f"--{spelled}"
        option = typer.Option(names, help=field.metadata["help"] + _default(name), show_default=False)
        kind: Any = hints[name] | None
        options.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option]))
    resolved = get_type_hints(command, include_extras=True)
    own = [p.replace(annotation=resolved[p.name], kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    command.__signature__ = given.replace(parameters=[*options, *own], return_annotation=None)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in (*options, *own)}
    return command


def _default(name: str) -> str:
    """A setting's default for its help; a method's own setting has one for each method that knows it."""
    if FIELDS[name].metadata["of_method"]:
        of_methods = [f"{method} {row.options[name]}" for method, row in METHODS.items() if name in row.options]
        return f" [default: {', '.join(of_methods)}]"
    default = FIELDS[name].default
    return f" [default: {default}]" if isinstance(default, (int, float, str)) and not isinstance(default, bool) else ""


class Bars(Progress):
    """A bar per seed, and a line for everything that should stay."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.trained = False

    def begin(self, config: Config, seed: int, stages: int, done: int) -> None:
        """Open the seed's bar."""
        self.close()
        self.trained = self.trained or done < stages
        if done:
            self.note(f"seed {seed}: goes on after {done} of {stages} tasks")
        total, first = stages * config.epochs, done * config.epochs
        self.bar = tqdm(total=total, initial=first, desc=f"{config.method}, seed {seed}", unit="epoch", leave=False, disable=None)

    def epoch(self) -> None:
        """Move it."""
        self.bar.update()

    def task(self, number: int, accuracies: list[float]) -> None:
        """Show what was measured."""
        self.bar.set_postfix_str(f"task {number} done, accuracies " + " ".join(f"{100 * a:.0f}" for a in accuracies))

    def note(self, text: str) -> None:
        """A line on stderr."""
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()


@app.command("run")
@_settings
def run_command(
    out: Annotated[Path, typer.Option("--out", help="folder of the run; made if it is not there")],
    config: Annotated[Path | None, typer.Option("--config", help="settings from a config.json; other options change them")] = None,
    force: Annotated[bool, typer.Option("--force", help="train anew even if the folder holds a run")] = False,
    **given: Any,
) -> None:
    """Train a method on a stream, seed by seed, into a folder. The same command goes on with a run that was stopped."""
    settings = {name: value for name, value in given.items() if value is not None}
    bars = Bars()
    try:
        wanted = _configuration(settings, config, bars)
        results = run(wanted, out, force=force, progress=bars)
    except KeyboardInterrupt as stop:  # before typer sees it: what becomes of it there depends on typer's version
        again = "the same command without --force" if force else "the same command"
        raise Mistake(f"interrupted; {again} goes on after the last task that ended", INTERRUPTED) from stop
    except ImportError as error:
        raise Mistake(str(error), FAILED) from error
    except ValueError as error:
        raise Mistake(_as_option(str(error))) from error
    except BackendUnavailable as error:
        raise Mistake(f"FASTCL_BACKEND: {error}") from error
    except (OSError, TrainingError) as error:
        raise Mistake(str(error), FAILED) from error
    finally:
        bars.close()
    if not bars.trained:
        bars.note(f"{out} is complete; nothing was trained. --force trains anew")
    finished = Run(out.name or str(out), wanted, results)
    console = _console()
    if not finished.at_once:
        console.print(matrix_table("accuracy in %, mean ± std over seeds", finished.matrices))
    _print(console, [finished])


def _configuration(settings: dict[str, Any], file: Path | None, bars: Bars) -> Config:
    """The settings on the command line over those of a file over the defaults; what the method does not have is left out, and said."""
    stated: dict[str, Any] = {}
    if file is not None:
        try:
            stated = read_config(file).to_json()
        except (OSError, ValueError) as error:
            raise Mistake(f"--config must be the config.json of a run: {error}") from error
    if "stream" in settings:  # it decides about these anew
        stated = {n: v for n, v in stated.items() if n not in {"scenario", "tasks"}}
    if "method" in settings and stated:  # what was only the other method's default gives way to this one's
        defaults = METHODS[stated["method"]].options if settings["method"] != stated["method"] else {}
        stated = {n: v for n, v in stated.items() if n not in defaults or v != defaults[n]}
    merged = stated | settings
    row = METHODS.get(merged.get("method", "naive"))
    if row is not None:
        unused = [n for n in settings if FIELDS[n].metadata["of_method"] and n not in row.options]
        if unused:
            named = ", ".join("--" + n.replace("_", "-") for n in unused)
            bars.note(f"{merged.get('method', 'naive')} has no {named}: left out")
        merged = {n: v for n, v in merged.items() if n in row.options or not FIELDS[n].metadata["of_method"]}
    return Config.of(**merged)


@app.command("compare")
def compare_command(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs; others are passed over", metavar="RUNS...")],
    out: Annotated[Path | None, typer.Option("--out", help="folder of CSV and plots [default: comparison, beside the first run]")] = None,
) -> None:
    """Put runs side by side: a table for each stream and scenario, a CSV file, heat maps and curves."""
    folders = list({os.path.abspath(folder): folder for folder in runs if (folder / "config.json").is_file()}.values())
    for folder in runs:
        if not (folder / "config.json").is_file():
            print(f"{folder}: passed over, it has no config.json", file=sys.stderr)
    if not folders:
        raise Mistake("none of the given folders holds a run")
    target = _beside(folders[0]) / "comparison" if out is None else out
    readable = (_loaded(folder, name) for folder, name in zip(folders, told_apart(folders), strict=True))
    loaded = [r for r in readable if r is not None]
    for unfinished in (r for r in loaded if not r.results):
        print(f"{unfinished.name}: passed over, no seed is complete", file=sys.stderr)
    complete = [r for r in loaded if r.results]
    if not complete:
        raise Mistake("none of the given runs has a complete seed", FAILED)
    groups = _print(_console(), complete)
    try:
        _write(target, groups)
    except ImportError as error:
        raise Mistake(f"the plots need {error.name}: {cli.INSTALL}", FAILED) from error
    except OSError as error:
        raise Mistake(f"--out cannot be written: {target} ({error.strerror or error})", FAILED) from error
    print(f"written to {target}")


def _loaded(folder: Path, name: str) -> Run | None:
    """The run, under this name; None, and a line about it, if a file of it is damaged: the others can be compared all the same."""
    try:
        return dataclasses.replace(load_run(folder), name=name)
    except (OSError, ValueError) as error:
        print(f"{name}: passed over, {' '.join(str(error).split())}", file=sys.stderr)
        return None


def _beside(folder: Path) -> Path:
    """The folder that holds this one, in the words of the caller where they say it."""
    return Path(os.path.abspath(folder)).parent if folder.name in {"", ".."} else folder.parent


@app.command("support")
def support_command(as_json: Annotated[bool, typer.Option("--json", help="machine-readable output")] = False) -> None:
    """Which implementation serves each op here, and why another does not."""
    cli.report(["--json"] * as_json, "fastcl support")


def _console() -> Console:
    """As wide as the terminal; wide enough for the tables where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def _print(console: Console, runs: list[Run]) -> list[Group]:
    groups = compare(runs)
    for group in groups:
        console.print(comparison_table(group))
    console.print(DEFINITIONS, style="dim", markup=False)
    return groups


def _write(folder: Path, groups: list[Group]) -> None:
    from fastcl.experiment.plots import curves, heat_maps

    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "comparison.csv", groups)
    for group in groups:
        runs = {row.run.name: row.run for row in group.rows}
        sequential = {name: r.matrices for name, r in runs.items() if not r.at_once}
        bounds = {name: r.matrices for name, r in runs.items() if r.at_once}
        if sequential:
            heat_maps(folder / f"{group.slug}-matrices.png", group.title, {n: mean_matrix(m) for n, m in sequential.items()})
        curves(folder / f"{group.slug}-curves.png", group.title + "; bars: one standard deviation", sequential, bounds)
