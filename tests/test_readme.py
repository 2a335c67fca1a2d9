"""README.md tells the truth: its commands and links exist, and it is short."""

import re
from pathlib import Path

import click
import pytest
from visistage.cli.main import main

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
MAKEFILE = ROOT / "Makefile"
MOST_LINES = 160
START = r"(?:^|[;&|(]\s*|bin/|\$ )"  # where a command may begin, unlike `from visistage import`


@pytest.fixture(scope="module")
def text() -> str:
    return README.read_text(encoding="utf-8")


def code(text: str) -> str:
    """Fenced and indented blocks and inline code: where commands stand."""
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.M | re.S)
    inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    indented = re.findall(r"^ {4}(\S.*)$", text, re.M)
    return "\n".join([*fenced, *inline, *indented])


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):.*##", MAKEFILE.read_text(encoding="utf-8"), re.M))


def wrong_commands(text: str) -> list[str]:
    """Make targets and variables, commands and options in ``text`` that do not exist."""
    wrong = []
    variables = set(re.findall(r"\$\((?:[a-z-]+ [^$()]*,)?\$?\(?([A-Z_]+)\)", MAKEFILE.read_text()))
    for line in code(text).splitlines():
        line = re.sub(r"(^|\s)#.*", "", line)
        for match in re.finditer(START + r"make((?: +[\w./=:,%\"-]+)*)", line):
            for word in match[1].split():
                name, equals, _ = word.partition("=")
                known = variables if equals else make_targets()
                if name not in known and not word.startswith("-"):
                    wrong.append(f"make {word}")
        for match in re.finditer(START + r"visistage +([a-z]+(?:-[a-z]+)*)([^#|;&]*)", line):
            command = main.commands.get(match[1])
            if command is None:
                wrong.append(f"visistage {match[1]}")
                continue
            options = {name for p in command.params for name in [*p.opts, *p.secondary_opts]}
            unquoted = re.sub(r"\"[^\"]*\"|'[^']*'", "", match[2])
            for option in re.findall(r"(?<!\S)--[\w-]+", unquoted):
                if option not in options | {"--help"}:
                    wrong.append(f"visistage {match[1]} {option}")
    return wrong


def broken_links(text: str) -> list[str]:
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r"src=\"([^\"]+)\"", text)
    files = [t.partition("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)]
    return [file for file in files if not (ROOT / file).exists()]


def test_commands_exist(text):
    assert "make demo" in code(text)
    assert not wrong_commands(text)


def test_links_resolve(text):
    assert not broken_links(text)


def test_it_is_short(text):
    assert len(text.splitlines()) <= MOST_LINES


@pytest.mark.parametrize(
    "line",
    [
        "make demonstrate",
        "make engines MODLE=demo",
        "make setup && make tset",
        "visistage enginse --model demo",
        ".venv/bin/visistage engines --modle demo",
        'visistage infer a.jpg "Why --so?" --sream',
    ],
)
def test_a_wrong_command_is_caught(line):
    assert wrong_commands(f"```\n{line}\n```\n")
    assert wrong_commands(f"Type `{line}` now.")
    assert wrong_commands(f"\n    {line}\n")


@pytest.mark.parametrize(
    "line",
    [
        "make demo",
        "make engines MODEL=llava-7b TARGET=cuda PLAN=visipruner:t=14",
        "make engines MODEL=llava-7b PRECISION=fp16 DUMMY=1 OUT=out",
        "make PYTHON=python3.12 setup  # make it so",
        'visistage infer photo.jpg "Is --this an option?" --bundle engines/demo --no-stream',
        "visistage --help",
        "from visistage import runtime",
    ],
)
def test_a_right_command_passes(line):
    assert not wrong_commands(f"```\n{line}\n```\n")


def test_a_broken_link_is_caught():
    assert broken_links("[here](docs/absent.txt#top)") == ["docs/absent.txt"]
    assert not broken_links("[a](Makefile) [b](https://example.org/x) [c](#top)")


def test_help_lists_every_target_with_a_line():
    rules = re.findall(r"^([a-z]+):", MAKEFILE.read_text(encoding="utf-8"), re.M)
    assert set(rules) == make_targets()


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_teaches(name):
    command = main.commands[name]
    assert isinstance(command, click.Command)
    assert command.help
    assert all(p.help for p in command.params if isinstance(p, click.Option) and p.required)
