"""``python -m fastcl``: the command ``fastcl``; without arguments what runs here, and why something else does not."""

from fastcl.cli import main

if __name__ == "__main__":
    main(prog="python -m fastcl")
