"""Pages that sources and pages cite exist, with the headings and files that are named."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("bench", "calib", "cli", "compile", "demo", "docs", "examples", "graphs", "pages")
FOLDERS += ("runtime", "serve", "tests", "tools")
TEXTS = [
    file
    for folder in FOLDERS
    for file in sorted((ROOT / folder).rglob("*"))
    if file.suffix in (".py", ".md") and file.name != "test_docs.py"
] + [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
PAGE = re.compile(r"(?<![\w/.-])(?:docs/)?([a-z_]+\.md)\b(?:,\s+((?:\"[^\"]+\"(?:,? and |, )?)+))?")
QUOTED = re.compile(r"\"([^\"]+)\"")
FILE = re.compile(rf"(?<![\w/.-])((?:{'|'.join(FOLDERS)})/[\w/]+\.(?:py|html|css|js|json|onnx))\b")


def headings(page: Path) -> set[str]:
    """Return the headings of a page, without their markup."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {line.replace("`", "") for line in lines}


def broken(text: str, folder: Path) -> list[str]:
    """Return what ``text``, standing in ``folder``, cites and does not exist."""
    plain = re.sub(r"\s*\n[ #]*", " ", text)
    wrong = []
    for name, quoted in PAGE.findall(plain):
        places = [place for place in (ROOT / "docs", ROOT, folder) if (place / name).is_file()]
        found = headings(places[0] / name) if places else set()
        wrong += [] if places else [name]
        wrong += [
            f'{name}, "{one}"' for one in re.findall(r'"([^"]+)"', quoted) if one not in found
        ]
    return wrong + [name for name in FILE.findall(plain) if not (ROOT / name).is_file()]


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_what_is_cited_exists(file):
    assert broken(file.read_text(encoding="utf-8"), file.parent) == []


@pytest.mark.parametrize(
    "text",
    [
        "as in nowhere.md",
        'docs/design.md, "No such heading"',
        'docs/design.md, "The plan" and "No\n# such heading"',
        "see graphs/nothing.py",
    ],
)
def test_a_planted_dead_end_is_found(text):
    assert broken(text, ROOT / "docs")


def test_what_exists_is_not_called_broken():
    text = 'docs/design.md, "The plan" and "Append rows"; graphs/plan/cost.py, docs/methods.md'
    assert broken(text, ROOT) == []
