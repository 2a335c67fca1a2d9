"""Commands in messages can be pasted: quoted, with the model that they are about, and published."""

import re
import shlex
from pathlib import Path

import pytest
from visistage.graphs.commands import build_command, install, visistage

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["demo", "my model", "a; rm -rf ~", "$(reboot)", "it's", "-x"])
def test_words_are_quoted(name):
    command = visistage("build", name, calib=Path("calibrations") / name, offline=True, plan=None)
    words = ["visistage", "build", name, "--calib", f"calibrations/{name}", "--offline"]
    assert shlex.split(command) == words


def test_dummies_are_asked_for_by_an_option():
    assert build_command("llava-7b-dummy") == "visistage build llava-7b --dummy-weights"
    assert build_command("llava-7b", plan="dense") == "visistage build llava-7b --plan dense"


def test_a_clone_is_installed_from_itself():
    assert install("gpu") == "pip install -e '.[gpu]' in the clone of visistage"


def test_one_function_says_what_to_install():
    rooms = ("graphs", "pages", "runtime", "compile", "calib", "tools", "cli")
    files = {file for room in rooms for file in (ROOT / room).rglob("*.py")}
    for file in files - {ROOT / "graphs" / "commands.py"}:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"install [^\n]*visistage\[|make engines [A-Z]|\bMODEL=", text), file
