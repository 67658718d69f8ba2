"""The command ``fastcl``: ``support`` needs nothing but torch, ``run`` and ``compare`` need the extra ``cli``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from fastcl.support import render, support

HELP = ("-h", "--help")
INSTALL = "pip install 'fastcl[cli]', or '.[cli]' in a checkout"
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None, prog: str = "fastcl") -> None:
    """Run the command line; without a sub-command it prints the support report."""
    try:
        _main(list(sys.argv[1:] if argv is None else argv), prog)
    except KeyboardInterrupt:  # also while the sub-commands are imported, which takes seconds
        print(f"{prog}: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _main(arguments: list[str], prog: str) -> None:
    if arguments[:1] == ["support"]:
        report(arguments[1:], f"{prog} support")
    elif not arguments or (arguments[0].startswith("-") and arguments[0] not in HELP):
        report(arguments, prog)
    else:
        try:
            from fastcl.experiment._commands import execute
        except ImportError as error:
            if error.name and error.name.split(".")[0] == "fastcl":
                raise
            if arguments[0] in HELP:
                report(arguments, prog, f"The sub-commands run and compare need {error.name}: {INSTALL}")
            sys.exit(f"{prog} {arguments[0]}: needs {error.name}, which is not installed; {INSTALL}")
        sys.exit(execute(arguments, prog))


def report(argv: Sequence[str], prog: str, more: str | None = None) -> None:
    """Print the support report; with ``--json`` for programs."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Which implementation serves each op here, and why another does not.", epilog=more
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    as_json = parser.parse_args(argv).json
    data = support()
    try:
        print(json.dumps(data, indent=2) if as_json else render(data), flush=True)
    except BrokenPipeError:  # as in `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends


if __name__ == "__main__":
    main()
