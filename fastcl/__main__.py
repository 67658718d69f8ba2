"""``python -m fastcl``: what runs here, and why something else does not."""

from __future__ import annotations

import argparse
import json
import os
import sys

from fastcl.support import render, support


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(
        prog="python -m fastcl", description="Which implementation serves each op here, and why another does not."
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    as_json = parser.parse_args().json
    data = support()
    try:
        print(json.dumps(data, indent=2) if as_json else render(data), flush=True)
    except BrokenPipeError:  # as in `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends


if __name__ == "__main__":
    main()
