"""Conversations: turn n is what asking the whole conversation at once gives, or what is kept."""

import pytest
from visistage import runtime
from visistage.graphs.errors import PromptError, VisistageError
from visistage.tests.support import toy
from visistage.tests.support.asking import picture
from visistage.tests.support.built import built_once

PLANS = {
    "gated": "visipruner:shallow=1,t=1,e=2,keep=4",
    "dense": "dense",
    "entered": "scope:keep=5",
    "vica": "vica:layers=0-2,prefix=frozen",
    "per prompt": "visipruner-code:shallow=1",
}
BLIND = ("dense", "entered", "vica")
ASKED = ["How many?", "And what else, to the left?", "Why?", "Name it."]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    checkpoint = toy.make_checkpoint(tmp_path_factory.mktemp("chat") / "toy")
    return built_once(checkpoint, tmp_path_factory)


@pytest.fixture
def load(bundles):
    opened = []

    def get(name: str, target: str = "cpu") -> runtime.Session:
        opened.append(
            runtime.load(bundles(PLANS[name], target).path, threads=1, cache_bytes=1 << 20)
        )
        opened[-1].eos = frozenset()
        return opened[-1]

    yield get
    for session in opened:
        session.close()


def cold(session, chat, turns: int, max_tokens: int = 6) -> runtime.Answer:
    """Ask the conversation up to question ``turns`` at once, on a session that knows nothing."""
    session.context.clear()
    session.visual_rows.clear()
    system = [m for m in chat.messages if m["role"] == "system"]
    messages = [*system, *chat.messages[len(system) :][: 2 * turns - 1]]
    images = sum(
        block["type"] == "image" for m in messages if m["role"] == "user" for block in m["content"]
    )
    return session.infer(chat.images[:images], messages, max_tokens=max_tokens)


@pytest.mark.parametrize("target", ["cpu", "cpu-portable"])
@pytest.mark.parametrize("name", PLANS)
def test_every_turn_is_the_whole_conversation_asked_at_once(load, name, target):
    session, other = load(name, target), load(name, target)
    chat = session.chat(picture(0), system="Be brief.")
    answers = [chat.ask(prompt, max_tokens=6) for prompt in ASKED]
    for turn, answer in enumerate(answers, 1):
        again = cold(other, chat, turn)
        assert (answer.tokens, answer.plan.kept) == (again.tokens, again.plan.kept)


@pytest.mark.parametrize("name", BLIND)
def test_a_blind_plan_computes_the_new_text_alone(load, name):
    session = load(name)
    chat = session.chat(picture(0))
    chat.ask(ASKED[0], max_tokens=6)
    known = session.context.text_rows_of(session.prompt_parts(chat.messages[:-1], session.asked))
    rows, append = [], session.executor.append

    def noted(stage, given, *rest):
        rows.append(given.shape[1])
        return append(stage, given, *rest)

    session.executor.append = noted
    chat.ask(ASKED[1], max_tokens=1)
    whole = session.context.text_rows_of(session.prompt_parts(chat.messages[:-1], session.asked))
    assert max(rows) <= whole - known


def test_sticky_keeps_what_the_first_question_chose(load):
    session, other = load("gated"), load("gated")
    chat = session.chat(picture(0), selection="sticky")
    first, *later = [chat.ask(prompt, max_tokens=6) for prompt in ASKED]
    assert {answer.plan.kept for answer in later} == {first.plan.kept}
    fresh = other.chat(picture(0))
    assert any(fresh.ask(p, max_tokens=6).plan.kept != first.plan.kept for p in ASKED)


@pytest.mark.parametrize("selection", ["sticky", "reselect"])
@pytest.mark.parametrize("name", PLANS)
def test_questions_between_change_nothing(load, name, selection):
    session, other = load(name), load(name)
    alone, disturbed = (each.chat(picture(0), selection=selection) for each in (session, other))
    for prompt in ASKED:
        expected = alone.ask(prompt, max_tokens=6)
        other.infer(picture(2), "Something else?", max_tokens=3)
        other.infer(None, "And this?", max_tokens=2)
        assert disturbed.ask(prompt, max_tokens=6).tokens == expected.tokens


@pytest.mark.parametrize("name", ["gated", "dense"])
def test_images_may_come_in_any_turn(load, name):
    session, other = load(name), load(name)
    chat = session.chat()
    chat.ask("Hello?", max_tokens=4)
    chat.ask("And this?", picture(0), max_tokens=4)
    answer = chat.ask("Are they alike?", [picture(1), picture(2)], max_tokens=6)
    assert len(chat.images) == 3
    assert answer.tokens == cold(other, chat, 3).tokens


@pytest.mark.parametrize("name", ["gated", "dense"])
def test_edit_undo_and_fork(load, name):
    session, other = load(name), load(name)
    chat = session.chat(picture(0))
    chat.ask(ASKED[0], max_tokens=4)
    before = list(chat.messages)
    chat.ask(ASKED[1], picture(1), max_tokens=4)
    fork = chat.fork()
    edited = chat.edit(ASKED[2], max_tokens=4)
    assert len(chat.images) == 2
    assert edited.tokens == cold(other, chat, 2, 4).tokens
    assert fork.messages[3]["content"] != chat.messages[3]["content"] or (
        fork.messages[2] != chat.messages[2]
    )
    forked = fork.ask(ASKED[3], max_tokens=6)
    assert forked.tokens == cold(other, fork, 3).tokens
    chat.undo()
    assert chat.messages == before
    assert len(chat.images) == 1
    chat.undo()
    with pytest.raises(PromptError, match="no question to take back"):
        chat.undo()


def test_a_turn_that_was_not_finished_is_none(load):
    chat = load("gated").chat(picture(0))
    with chat.stream("Why?", max_tokens=9) as pieces:
        next(pieces)
    assert chat.messages == []
    with pytest.raises(PromptError):
        chat.ask("", max_tokens=2)
    assert chat.ask("Why?", max_tokens=2).tokens
    assert len(chat.messages) == 2
    assert len(chat.images) == 1


def test_what_cannot_be_is_refused(load):
    session = load("gated")
    with pytest.raises(PromptError, match="reselect or sticky"):
        session.chat(selection="none")
    chat = session.chat(picture(0), selection="sticky")
    chat.ask("Why?", max_tokens=2)
    with pytest.raises(PromptError, match="no further images"):
        chat.ask("And this?", picture(1))
    with pytest.raises(VisistageError):
        session.chat("absent.png")


def test_rows_of_another_turn_would_be_noticed(load, monkeypatch):
    """Plant it: text is appended without taking back what is no longer said."""
    session, other = load("dense"), load("dense")
    chat = session.chat(picture(0))
    for prompt in ASKED[:2]:
        chat.ask(prompt, max_tokens=6)
    monkeypatch.setattr("visistage.graphs.chain.chain.StageSlots.rewind", lambda self, used: None)
    answer = chat.edit("What is it, and where?", max_tokens=6)
    monkeypatch.undo()
    assert answer.tokens != cold(other, chat, 2).tokens
