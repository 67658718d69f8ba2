"""``python -m fastcl``: what runs here, and why something else does not."""

from __future__ import annotations

import argparse
import json

from fastcl.support import render, support


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(prog="python -m fastcl", description="Which implementation serves each op here, and why another does not.")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    data = support()
    print(json.dumps(data, indent=2) if parser.parse_args().json else render(data))


if __name__ == "__main__":
    main()
