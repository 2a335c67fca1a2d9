"""Pages of docs/: they begin with what they answer, and what they name exists."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from visistage.tests.support.page_commands import KINDS, RUN, commands, kind_of
from visistage.tests.test_readme import wrong_commands

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
CODE = [
    file
    for file in [*ROOT.rglob("*.py"), ROOT / "Makefile"]
    if not {".venv", ".cache"} & set(file.relative_to(ROOT).parts)
]
VARIABLE = re.compile(r"\b_?VISISTAGE_[A-Z_]+\b")


def beginning(text: str) -> str:
    """Return what follows a page's title."""
    return text.partition("\n\n")[2].partition("\n\n")[0]


def answers_something(text: str) -> bool:
    """Return whether a page begins with prose."""
    first = beginning(text)
    return text.startswith("# ") and bool(re.match(r"[A-Z0-9`][^\n]{40}", first))


def messages() -> list[str]:
    """Return the parts of messages that the table of errors begins its rows with."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    return re.findall(r"^\| `([^`]+)` \|", text, re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_begins_with_what_it_answers(page):
    assert answers_something(page.read_text("utf-8")), beginning(page.read_text("utf-8"))


@pytest.mark.parametrize("text", ["# A\n\n    visistage list\n", "# A\n\n| a |\n", "# A\n\n## B\n"])
def test_a_page_that_answers_nothing_is_noticed(text):
    assert not answers_something(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_and_their_options_exist(page):
    assert wrong_commands(page.read_text("utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_index_says_what_every_command_needs(page):
    text = (ROOT / "docs" / "index.md").read_text("utf-8")
    named = set(re.findall(r"^\| (`.*) \| ", text, re.M))
    assert named == set(KINDS) - {RUN}
    assert {kind_of(command) for command in commands(page)} <= named | {RUN}


def test_a_command_of_no_kind_is_noticed():
    with pytest.raises(LookupError):
        kind_of("docking --now")


def test_every_variable_is_on_the_page_and_no_other():
    found = {name for file in CODE for name in VARIABLE.findall(file.read_text("utf-8"))}
    page = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    named = set(re.findall(r"^\| `(_?VISISTAGE_[A-Z_]+)` \|", page, re.M))
    assert named == found


def test_every_error_of_the_table_is_raised_somewhere():
    text = "".join(
        re.sub(r'"\s*\n\s*f?"', "", file.read_text("utf-8"))
        for file in CODE
        if file.relative_to(ROOT).parts[0] not in ("tests", "bench")
    )
    assert len(messages()) > 20
    assert [part for part in messages() if part not in text] == []


@pytest.fixture(scope="module")
def copied(tmp_path_factory) -> Path:
    """A copy of the files that the site is made of, without what git ignores."""
    folder = tmp_path_factory.mktemp("site") / "visistage"
    ignore = shutil.ignore_patterns(".git", ".venv", ".cache", "__pycache__", "engines", "model*")
    return shutil.copytree(ROOT, folder, ignore=ignore)


def build(folder: Path) -> subprocess.CompletedProcess:
    """Build the site as `make docs` does."""
    environment = {**os.environ, "PYTHONPATH": str(folder.parent), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--clean"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_site_is_built(copied):
    done = build(copied)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {file.stem for file in (copied / ".cache" / "site").glob("*.html")}
    assert {page.stem for page in PAGES} | {"contributing", "changelog"} <= pages
    api = (copied / ".cache" / "site" / "api.html").read_text("utf-8")
    assert "cache_bytes" in api
    assert "fonts.googleapis" not in api


def test_planted_dead_links_end_the_build(copied):
    """A page, a heading and a source that are not there; without the API, which takes longest."""
    config = (copied / "mkdocs.yml").read_text("utf-8")
    config = re.sub(r"  - mkdocstrings:.*?(?=markdown_extensions)", "", config, flags=re.S)
    (copied / "mkdocs.yml").write_text(config, "utf-8")
    page = copied / "docs" / "chat.md"
    text = page.read_text("utf-8")
    for link, said in {"glossary.md#nothing": "#nothing", "../no.py": "which is not there"}.items():
        page.write_text(f"{text}\n[a]({link})\n", "utf-8")
        done = build(copied)
        assert done.returncode != 0
        assert said in done.stdout + done.stderr
