"""The folder of a run: whose it is, what is in it, and that one process at a time works in it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fastcl.experiment.config import Config
from fastcl.experiment.environment import environment
from fastcl.experiment.files import load_json, read_json, write_json

FORMAT, VERSION = "fastcl.run", 1


class FolderError(ValueError):
    """The folder cannot be used for this run; the message begins with ``out``."""


def seed_folder(folder: Path, seed: int) -> Path:
    """Where a seed's checkpoint and result lie."""
    return folder / f"seed{seed}"


def read_config(path: Path) -> Config:
    """The configuration in a ``config.json``. Raises OSError or ValueError; the message names the path."""
    try:
        return Config.from_json(read_json(path, FORMAT, VERSION).get("config"))
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from error


@contextlib.contextmanager
def opened(folder: Path, config: Config, *, force: bool = False) -> Iterator[None]:
    """Make the folder, or take it up again, for as long as the block lasts.

    Raises:
        FolderError: a file, a folder of something else, a run with another configuration (without ``force``), another process at work,
            a folder that cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            _enter(stack, folder, config, force)
        except OSError as error:
            raise FolderError(f"out cannot be written: {folder} ({error.strerror or error})") from error
        yield


def _enter(stack: contextlib.ExitStack, folder: Path, config: Config, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise FolderError(f"out is a file, and it must be a folder: {folder}")
    known = folder / "config.json"
    if folder.exists() and not known.exists() and any(not p.name.startswith(".") for p in folder.iterdir()):
        raise FolderError(f"out holds other things and no config.json of a run: {folder}; give a new folder")
    if known.exists():
        _must_be_a_run(known, any_version=force)
    folder.mkdir(parents=True, exist_ok=True)
    _lock(stack.enter_context((folder / ".lock").open("a")), folder)
    if known.exists() and force:
        _clear(folder)
    if known.exists():
        _compare(read_config(known), config, folder)
    else:
        write_json(known, {"format": FORMAT, "version": VERSION, "config": config.to_json(), "environment": environment(config)})


def _must_be_a_run(known: Path, *, any_version: bool) -> None:
    """Whatever is about to happen in the folder, the ``config.json`` there must be fastcl's: others name their files so, too."""
    try:
        if any_version:
            found = load_json(known)
            stated = found.get("format") if isinstance(found, dict) else None
            if stated != FORMAT:
                raise ValueError(f"{known} has the format {stated!r}; a run's is {FORMAT!r}")
        else:
            read_config(known)
    except ValueError as error:
        raise FolderError(f"out is not the folder of a run: {error}; give a new folder") from error


def _lock(file: IO[str], folder: Path) -> None:
    """The lock of a killed process vanishes with it."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system: nothing guards the folder there
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise FolderError(f"out is in use by another process: {folder}") from error


def _clear(folder: Path) -> None:
    """Take away what a run wrote, the configuration last: killed in between, the folder still belongs to a run."""
    for old in [p for p in folder.glob("seed*") if p.is_dir() and p.name.removeprefix("seed").isdecimal()]:
        shutil.rmtree(old)
    (folder / "config.json").unlink()


def _compare(there: Config, wanted: Config, folder: Path) -> None:
    different = there.differences(wanted)
    if different:
        listed = "; ".join(different)
        raise FolderError(f"out holds a run with another configuration: {folder} (there, now: {listed}); give another folder, or --force")
