"""Names and words: no public class twice, docstrings and loops in plain English."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("demo", "graphs", "pages", "runtime", "serve", "compile", "calib", "tools", "cli")
FILES = sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))
TWICE: set[str] = set()
"""Public class names that stand for two things on purpose."""

QUESTION = re.compile(r"(What|Who|Whose|How|Which|Whether|Where|Why|Of|Nobody|Whoever)\b")
PRIVATE = re.compile(
    r"\b(towers?|rungs?|opponents?|whoever|nobody|mend|mends|crew|likeliest|travellers?)\b", re.I
)
"""Words where the field has others: docs/glossary.md."""

SERIALISED = re.compile(
    r"vision_tower|tower_(ms|minutes|lr)|tower \{rank\}|[\"'`]rungs[\"'`]|--tower|\brungs\b"
)
"""Names of weights, JSON keys, options and seeds that keep theirs."""


def documented(tree: ast.Module) -> list[tuple[int, str]]:
    """Return line and docstring of a module and of everything in it that has one."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    found = [(getattr(node, "lineno", 1), ast.get_docstring(node)) for node in nodes]
    return [(line, text) for line, text in found if text]


def loops(tree: ast.Module) -> list[int]:
    """Return the lines of ``for one in``."""
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.For | ast.comprehension)]
    return [
        node.target.lineno
        for node in nodes
        if isinstance(node.target, ast.Name) and node.target.id == "one"
    ]


def mannered(source: str) -> list[str]:
    """Return what reads unlike the rest of the field in one source, with its lines."""
    tree = ast.parse(source)
    wrong = [f"{line}: {text[:60]}" for line, text in documented(tree) if QUESTION.match(text)]
    wrong += [f"{line}: for one in" for line in loops(tree)]
    for number, line in enumerate(source.splitlines(), 1):
        if PRIVATE.search(SERIALISED.sub("", line)):
            wrong.append(f"{number}: {line.strip()[:80]}")
    return wrong


def test_no_public_class_name_stands_for_two_things():
    names = Counter(
        node.name
        for file in FILES
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert {name for name, count in names.items() if count > 1} == TWICE


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_english_is_plain(file):
    assert mannered(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        '"""What a module is."""',
        'def f():\n    """Of the checkpoint."""',
        "for one in range(3):\n    pass",
        "x = [one for one in range(3)]",
        "tower = 1",
        "# whoever reads this",
    ],
)
def test_a_planted_mannerism_is_found(source):
    assert mannered(source)


def test_names_of_weights_and_keys_are_no_mannerisms():
    assert not mannered('names = ["vision_tower.", "tower_ms"]\n"""Return the value."""')
