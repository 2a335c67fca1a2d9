"""The conversation in a terminal, through a pipe."""

import json
from functools import partial

import pytest
from click.testing import CliRunner
from PIL import Image
from visistage.cli import chatting
from visistage.cli.main import main
from visistage.compile.build import make_bundle
from visistage.tests.support.asking import picture


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_bundle("demo", plan="visipruner", out=tmp_path_factory.mktemp("chat")).path


@pytest.fixture
def talk(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for at in range(2):
        Image.fromarray(picture(at)).save(tmp_path / f"{at}.png")
    run = partial(CliRunner().invoke, main)
    return lambda text, *words: run(["chat", *words, "--bundle", str(path)], input=text)


def test_a_pipe_gets_answers_alone(talk):
    done = talk("What is this?\n\nAnd how many?\n/quit\nnever asked\n", "0.png")
    assert done.exit_code == 0
    assert len(done.stdout.splitlines()) == 2
    assert "bundle" in done.stderr


def test_commands(talk, tmp_path):
    text = "/image 0.png 1.png\nWhat is this?\n/stats\n/save talk.json\n/undo\n/save less.json\n"
    done = talk(text)
    assert done.exit_code == 0, done.output
    assert "2 images with the next question" in done.stderr
    assert "plan visipruner" in done.stderr
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [message["role"] for message in saved] == ["user", "assistant"]
    assert saved[1]["content"] == done.stdout.strip()
    assert json.loads((tmp_path / "less.json").read_text()) == []


def test_reset_keeps_the_system_message_alone(talk, tmp_path):
    talk("What?\n/reset\nWhy?\n/save talk.json\n", "0.png", "--system", "Be brief.")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [message["role"] for message in saved] == ["system", "user", "assistant"]
    assert saved[1]["content"] == [{"type": "text", "text": "Why?"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/image absent.png", "absent.png cannot be opened"),
        ("/image", "needs a file"),
        ("/image 'a", "No closing quotation"),
        ("/dance", "/dance is no command"),
        ("/undo", "no question to take back"),
        ("/stats", "nothing was answered yet"),
        ("/save", "needs one file"),
        ("/save no/such/folder.json", "Name another file"),
        ("Is <image> one?", "image token"),
    ],
)
def test_a_line_that_cannot_be_is_told_and_the_next_is_answered(talk, line, message):
    done = talk(f"{line}\nWhat is this?\n", "0.png")
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_ctrl_c_ends_an_answer_and_not_the_conversation(path, monkeypatch):
    from visistage import runtime

    with runtime.load(path) as session:
        terminal = chatting.ChatTerminal(session.chat(picture(0)))
        say, said = chatting.say, []

        def interrupt(*given, **options):
            if not said:
                said.append(given)
                raise KeyboardInterrupt
            say(*given, **options)

        monkeypatch.setattr(chatting, "say", interrupt)
        assert terminal.take("What is this?", 20)
        assert terminal.chat.messages == []
        assert terminal.take("What is this?", 20)
        assert len(terminal.chat.messages) == 2
        assert not terminal.failed
