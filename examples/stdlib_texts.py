"""Texts that every machine with Python has: its reference manual's topics, and the docstrings of its standard library."""

from __future__ import annotations

import ast
import random
import sysconfig
from pathlib import Path
from pydoc_data import topics

PACKAGES = ("asyncio", "email", "importlib", "multiprocessing", "unittest", "xml")
PARTS = ("train", "validation", "test")
LEAST = 30  # characters of a docstring that says something

Sample = tuple[str, int]


def manual() -> tuple[list[str], list[str]]:
    """The topics of ``pydoc_data.topics`` (what ``help("assert")`` shows) to learn from, and every eighth of them, held out."""
    texts = [text for _, text in sorted(topics.topics.items())]
    return [t for n, t in enumerate(texts) if n % 8], texts[::8]


def docstrings(per_class: int) -> dict[str, list[Sample]]:
    """Docstrings of six packages of the standard library, labelled with the package, in three parts that share no file and no text.

    The files of a package are dealt out, largest first, so that the parts hold about 50, 20 and 30 % of its docstrings. The training part
    has at most ``per_class`` of each package, drawn with a fixed seed.
    """
    root, draw = Path(sysconfig.get_paths()["stdlib"]), random.Random(0)
    parts: dict[str, list[Sample]] = {part: [] for part in PARTS}
    seen: set[str] = set()
    for label, package in enumerate(PACKAGES):
        own: dict[str, list[Sample]] = {part: [] for part in PARTS}
        files = {path: _docstrings_of(path) for path in sorted((root / package).rglob("*.py"))}
        for path in sorted(files, key=lambda p: (-len(files[p]), str(p))):
            part = max(PARTS, key=lambda name: {"train": 0.5, "validation": 0.2, "test": 0.3}[name] / (len(own[name]) + 1))
            fresh = [text for text in dict.fromkeys(files[path]) if text not in seen]
            seen.update(fresh)
            own[part] += [(text, label) for text in fresh]
        draw.shuffle(own["train"])
        own["train"] = own["train"][:per_class]
        for part in PARTS:
            parts[part] += own[part]
    return parts


def _docstrings_of(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in found if text is not None and len(text) >= LEAST]
