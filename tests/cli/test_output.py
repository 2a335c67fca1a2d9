"""Outputs and their places: hostile text, narrow encodings, full and closed streams, odd files."""

import json
import os
import re
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.table import Table
from visistage.cli.show.output import console, say, show, show_json
from visistage.graphs.errors import CapacityError, VisistageError
from visistage.graphs.files import write_file
from visistage.graphs.foreign_text import MOST_CHARACTERS, MOST_LINES
from visistage.pages.page import write_page

HOSTILE = "a\x1b]0;x\x07\x9b2J\u202eb\u2066c\u2028d\u2029e\x7f [bold]f[/] :smile: \r\x00"
CLEAN = "a]0;x2Jbc d e [bold]f[/] :smile: "
STEERING = {*map(chr, [*range(32), *range(0x7F, 0xA0)]), *"\u202a\u202b\u202c\u202d\u202e"}
STEERING |= set("\u2028\u2029\u2066\u2067\u2068\u2069")
STEERING -= set("\n\t")
HINT = "--out page.html"


def visistage(*arguments, **options):
    command = [sys.executable, "-m", "visistage", *map(str, arguments)]
    return subprocess.run(command, capture_output=options.pop("capture", True), **options)


def test_foreign_text_does_not_steer_the_terminal(capsys):
    say(HOSTILE)
    say(HOSTILE, err=True)
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    show(table)
    console(err=True).print(HOSTILE)
    written = capsys.readouterr()
    assert not STEERING & set(written.out + written.err)
    assert written.out.startswith(CLEAN + "\n")
    for words in ("a]0;x2Jbc", "[bold]f[/]", ":smile:"):
        assert (written.out.count(words), written.err.count(words)) == (4, 2)


def test_json_keeps_hostile_text_escaped(capsys):
    facts = {HOSTILE: [HOSTILE, "\udc80 \U0001f600"]}
    show_json(facts)
    written = capsys.readouterr().out
    assert not STEERING & set(written)
    assert json.loads(written) == facts


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-8", "utf-16"])
def test_a_narrow_encoding_loses_nothing(encoding):
    code = (
        "from visistage.cli.show.output import *\nprepare_streams()\n"
        "say('\\ufffd\\u4e2d\\U0001f600\\xe9\\udc80 end')\n"
        "from rich.table import Table\nt = Table('\\u4e2d end'); show(t)\n"
        "say('JSON')\nshow_json({'text': '\\u4e2d\\U0001f600\\udc80'})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    text, _, data = done.stdout.decode(encoding).partition("JSON")
    assert text.count("end") == 2
    assert json.loads(data) == {"text": "\u4e2d\U0001f600\udc80"}


@pytest.mark.parametrize("arguments", [("plan", "visipruner", "--json"), ("--help",), ("doctor",)])
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device")
def test_a_full_output_is_one_message(arguments):
    with open("/dev/full", "w") as full:
        done = visistage(*arguments, capture=False, stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 2
        assert "No space left" in done.stderr
        assert done.stderr.count("\n") == 1
        done = visistage(*arguments, capture=False, stdout=subprocess.PIPE, stderr=full)
        assert done.returncode == 0
        assert done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="a shell")
def test_closed_outputs():
    def shell(line):
        return subprocess.run(
            ["bash", "-c", line.replace("visistage", f"{sys.executable} -m visistage")],
            capture_output=True,
            text=True,
        )

    done = shell("visistage plan visipruner >&-")
    assert done.returncode == 2
    assert done.stderr.startswith("error: standard output")
    assert shell("visistage plan visipruner 2>&-").stdout
    done = shell("visistage plan visipruner --json | head -c 0; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    "message",
    ["x" * 70_000, "line\n" * 5000, "x" * 3000 + "\n" * 3000],
    ids=["one line", "lines", "both"],
)
def test_a_message_is_at_most_a_screen(message):
    error = str(VisistageError(f"first {message} last"))
    assert len(error) < MOST_CHARACTERS + 100
    assert error.count("\n") <= MOST_LINES + 1
    assert error.startswith("first ")
    assert error.endswith(" last")


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "x" * 50_000),
        ("x" * 50_000,),
        ("inspect", "a" * 5000),
        ("inspect", "\x1b]0;x\x07\u202e"),
        ("build", "a" * 5000),
        ("infer", "a" * 5000, "what?"),
        ("infer", "photo.png", "what?", "--bundle", "a" * 5000),
        ("explain", "a" * 5000, "photo.png", "what?"),
        ("profile", "a" * 5000),
        ("estimate", "a" * 5000, "--device", "cpu"),
        ("verify", "a" * 5000),
        ("evaluate", "a" * 5000),
        ("calibrate", "a" * 5000, "--data", "a" * 5000),
        ("calibrate", "demo", "--data", "a" * 5000),
        ("plan", "dense", "--model", "a" * 5000),
        ("plan", "a" * 5000 + ".yaml"),
        ("engines", "--model", "a" * 5000),
        ("engines", "--model", "~nobody-there/x"),
        ("engines", "--model", "demo", "--plan", "a" * 5000 + ".yaml"),
        ("engines", "--model", "demo", "--calib", "a" * 5000, "--precision", "int8"),
    ],
    ids=lambda arguments: " ".join(word[:12] for word in arguments).encode("ascii", "replace"),
)
def test_names_that_are_too_long_or_hostile(arguments, tmp_path, monkeypatch):
    from click.testing import CliRunner
    from visistage.cli.main import main

    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, list(arguments))
    assert done.exit_code == 2, (done.exception, done.output)
    assert len(done.stderr) < MOST_CHARACTERS + 500
    assert not STEERING & set(done.stderr)


# --- places ---------------------------------------------------------------------------------------


def test_a_page_goes_to_the_target_of_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    real, link = tmp_path / "there" / "real.html", tmp_path / "page.html"
    real.write_text("old")
    link.symlink_to(real)
    write_page("new", link, HINT)
    assert link.is_symlink()
    assert real.read_text() == "new"
    dangling = tmp_path / "dangling.html"
    dangling.symlink_to(tmp_path / "there" / "to-come.html")
    write_page("new", dangling, HINT)
    assert dangling.is_symlink()
    assert (tmp_path / "there" / "to-come.html").read_text() == "new"
    assert len(list((tmp_path / "there").iterdir())) == 2


def test_a_file_of_a_bundle_never_goes_through_a_link(tmp_path):
    other, link = tmp_path / "other", tmp_path / "link"
    other.write_text("a stranger's")
    link.symlink_to(other)
    write_file(link, "ours")
    assert other.read_text() == "a stranger's"
    assert link.read_text() == "ours"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_page_goes_through_a_pipe(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    with pytest.raises(CapacityError, match="cannot be written"):
        write_page("nobody reads", pipe, HINT)
    page = "page" * 100_000  # more than a pipe holds
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    while not read and reader.is_alive():
        try:
            write_page(page, pipe, HINT)
            break
        except CapacityError:  # the reader has not opened it yet
            continue
    reader.join()
    assert read == [page]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_device_stays_one(tmp_path):
    node = tmp_path / "null"
    try:
        os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        node.read_bytes()
    except (AttributeError, OSError):
        pytest.skip("devices cannot be made here")
    write_page("page", node, HINT)
    assert stat.S_ISCHR(node.stat().st_mode)


def _loop(at):
    (at / "page.html").symlink_to(at / "page.html")


def _locked(at):
    (at / "page.html").write_text("old")
    (at / "page.html").chmod(0o444)


@pytest.mark.parametrize(
    ("name", "prepare"),
    [
        ("page.html", lambda at: (at / "page.html").mkdir()),
        ("file/page.html", lambda at: (at / "file").write_text("")),
        ("absent/page.html", None),
        ("x" * 5000, None),
        ("x" * 250, None),
        ("page.html", _loop),
        ("page.html", _locked),
    ],
    ids=["folder", "below a file", "no folder", "too long", "too long a name", "loop", "read-only"],
)
def test_a_place_that_cannot_take_a_page(name, prepare, tmp_path):
    if prepare is _locked and os.geteuid() == 0:
        pytest.skip("root may write everything")
    if prepare is not None:
        prepare(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CapacityError, match="the page cannot be written"):
        write_page("page", tmp_path / name, HINT)
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_else_writes():
    other = r"click\.echo|(?<![\w.])print\(|\bConsole\(|sys\.std(?:out|err)\.write"
    for file in (Path(__file__).parents[2] / "cli").rglob("*.py"):
        if file.name != "output.py":
            assert not re.findall(other, file.read_text(encoding="utf-8")), file
