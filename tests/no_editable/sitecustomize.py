"""Takes an editable installation's finder away: it would find in the checkout what a test has left out of its copy."""

import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", type(finder).__name__)]
