"""A session in the hands of threads, forks, interrupted streams and wrong arguments."""

import inspect
import os
import pickle
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration
from visistage import runtime
from visistage.compile.build import make_bundle
from visistage.graphs.errors import ImageError, PromptError, TargetError, VisistageError
from visistage.graphs.fields import show
from visistage.runtime.answer import DECODED
from visistage.tests.support import toy
from visistage.tests.support.asking import picture
from visistage.tests.support.stand_ins import stand_in, write_engines

PLAN = "visipruner:shallow=1,t=1,e=2,keep=4"
OPTIONS = {
    "max_tokens": 128,
    "max_new_tokens": None,
    "stop": (),
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "min_p": None,
    "repetition_penalty": None,
    "seed": None,
    "sampling": None,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("session")
    checkpoint = toy.make_checkpoint(folder / "toy")
    return make_bundle(str(checkpoint), plan=PLAN, out=folder / "engines").path


@pytest.fixture
def session(path):
    with runtime.load(path, threads=1) as session:
        session.eos = frozenset()
        yield session


THREADS = """
import sys, threading
import numpy as np
from visistage import runtime

images = [np.random.default_rng(n).integers(0, 256, (40, 52, 3), dtype=np.uint8) for n in range(4)]
questions = ("What is this?", "How many?", "Why?")
with runtime.load(sys.argv[1], threads=2) as session:
    session.eos = frozenset()
    ask = lambda i, q: session.infer(images[i], questions[q], max_tokens=6).tokens
    right = {(i, q): ask(i, q) for i in range(4) for q in range(3)}
    assert len(set(right.values())) > 6
    answers = []
    def work(number):
        for turn in range(25):
            key = (number + turn) % 4, turn % 3
            answers.append(ask(*key) == right[key])
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
print(answers.count(True), "of", len(answers))
"""


def test_threads_take_turns(path):
    """In a process of its own, which collisions used to kill."""
    code = [sys.executable, "-c", THREADS, str(path)]
    done = subprocess.run(code, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("200 of 200\n", 0), done.stderr


def test_threads_take_turns_on_a_device(tmp_path, monkeypatch):
    """The stand-in refuses work from a thread that did not make the device its own."""
    stand_in(monkeypatch)
    checkpoint = toy.make_checkpoint(tmp_path / "toy", kv_heads=2)
    options = {"target": "rtx", "contexts": (128,)}
    bundle = write_engines(make_bundle(str(checkpoint), plan=PLAN, out=tmp_path, **options))
    found = {}
    with runtime.load(bundle.path) as session:
        session.eos = frozenset()

        def work(number):
            tokens = [session.infer(picture(n), "Why?", max_tokens=4).tokens for n in (1, 2, 1)]
            found[number] = tokens

        work(0)
        stream = session.stream(picture(1), "Why?", max_tokens=4)
        threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2)]
        threads.append(threading.Thread(target=lambda: found.update(stream=list(stream))))
        threads[2].start()
        threads[2].join()
        for thread in threads[:2]:
            thread.start()
        for thread in threads[:2]:
            thread.join()
        assert found[0] == found[1] == found[2]
        assert stream.answer.tokens == found[0][0]
        closing = threading.Thread(target=session.close)
        closing.start()
        closing.join()
    assert found[0][0] != found[0][1]


def test_another_thread_ends_a_stream_that_is_left_open(session):
    wanted = session.infer(picture(2), "Why?", max_tokens=8).tokens
    stream = session.stream(picture(1), "How many?", max_tokens=8)
    next(stream)
    asking = threading.Thread(target=session.infer, args=(picture(2), "Why?"))
    asking.start()
    asking.join()
    for _ in range(2):
        with pytest.raises(VisistageError, match="interrupted by a newer question"):
            next(stream)
    newer = session.stream(picture(2), "Why?", max_tokens=8)
    next(newer)
    with pytest.raises(VisistageError, match="interrupted"):
        next(stream)  # says so without a trace in the one that is under way
    for bad in ("", 5, "<image>"):
        with pytest.raises(PromptError):
            session.infer(picture(1), bad)
    list(newer)
    assert newer.answer.tokens == wanted


def test_a_stream_can_be_closed(session):
    with session.stream(picture(1), "How many?", max_tokens=8) as stream:
        first = next(stream)
    assert list(stream) == []
    assert stream.answer is None
    whole = session.stream(picture(1), "How many?", max_tokens=8)
    assert next(whole) == first
    list(whole)
    whole.close()
    assert list(whole) == []
    assert len(whole.answer.tokens) == 8
    session.infer(None, "Why?")
    assert list(stream) == []  # not an interrupted one: it had ended


@pytest.mark.parametrize("at", range(1, 9))
def test_what_ctrl_c_leaves_half_done_is_forgotten(session, monkeypatch, at):
    wanted = session.infer(picture(1), "How many?", max_tokens=4).tokens
    session.infer(picture(2), "How many?", max_tokens=4)
    calls = iter(range(1, 10**6))

    def interrupt(whole, *given, **more):
        if next(calls) == at:
            raise KeyboardInterrupt
        return whole(*given, **more)

    for name in ("append", "restore", "snapshot", "call_graph"):
        whole = getattr(session.executor, name)
        monkeypatch.setattr(session.executor, name, partial(interrupt, whole))
    with pytest.raises(KeyboardInterrupt):
        [session.infer(picture(number), "How many?", max_tokens=4) for number in (1, 3)]
    assert session.infer(picture(1), "How many?", max_tokens=4).tokens == wanted


MEMORY = """
import sys
import numpy as np, psutil
from visistage import runtime

make = lambda n: np.random.default_rng(n).integers(0, 256, (240, 320, 3), dtype=np.uint8)
images, me, sizes = [make(n) for n in range(50)], psutil.Process(), []
with runtime.load(sys.argv[1], threads=1) as session:
    for number in range(1, 1001):
        session.infer(images[number % 50], f"Question {number % 7}?", max_tokens=2)
        if number in (100, 1000):
            sizes.append(me.memory_info().rss)
print(sizes[1] / sizes[0])
"""


def test_a_thousand_questions_take_no_more_memory_than_a_hundred(path):
    code = [sys.executable, "-c", MEMORY, str(path)]
    done = subprocess.run(code, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.02


def test_a_closed_session_says_so(path):
    session = runtime.load(path, threads=1)
    stream = session.stream(None, "Why?")
    session.close()
    session.close()
    for call in (
        lambda: session.infer(None, "Why?"),
        lambda: session.stream(None, "Why?"),
        lambda: session.score(None, "Why?", (1,)),
        lambda: session.open(picture(1)),
        lambda: next(stream),
    ):
        with pytest.raises(VisistageError, match="this session is closed"):
            call()


FORK = """
import os, sys
from visistage import runtime
session = runtime.load(sys.argv[1], threads=2)
before = str(runtime.infer(None, "Why?", bundle=sys.argv[1], max_tokens=3))
if os.fork() == 0:
    try:
        session.infer(None, "Why?")
    except runtime.VisistageError as error:
        print(error)
    session.close()
    assert str(runtime.infer(None, "Why?", bundle=sys.argv[1], max_tokens=3)) == before
    sys.exit(0)
assert os.wait()[1] == 0
session.infer(None, "Why?", max_tokens=1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_forked_process_is_told_to_load_its_own(path):
    code = [sys.executable, "-c", FORK, str(path)]
    done = subprocess.run(code, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "does not survive a fork" in done.stdout
    assert "runtime.load" in done.stdout


CALLS = (runtime.infer, runtime.Session.infer, runtime.Session.stream)


def test_calls_that_answer_take_the_same_options():
    """Names, defaults and types are written three times, for readers; and must not drift apart."""

    def options(call):
        found = inspect.signature(call).parameters
        return [found[name] for name in found if name not in ("self", "bundle")]

    assert options(CALLS[0]) == options(CALLS[1]) == options(CALLS[2])


@pytest.mark.parametrize("call", CALLS)
def test_options_are_spelt_out(call):
    found = inspect.signature(call).parameters
    assert {name: found[name].default for name in OPTIONS} == OPTIONS
    assert not [one for one in found.values() if one.kind == one.VAR_KEYWORD]
    with pytest.raises(TypeError, match="max_tokns"):
        call(None, None, "Why?", max_tokns=3)


HUGE = 10**5000
NO_NUMBERS = (True, 3.0, 3.5, "5", b"5", [5], float("nan"), float("inf"))
BAD_OPTIONS = [
    *(("max_tokens", value) for value in (*NO_NUMBERS, None, 0, -1, HUGE)),
    *(("max_new_tokens", value) for value in (*NO_NUMBERS, 0, -1, HUGE)),
    *(("top_k", value) for value in (*NO_NUMBERS, -1)),
    *(("seed", value) for value in (*NO_NUMBERS, -1)),
    *(
        (name, value)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty")
        for value in (True, "1", b"1", [1], float("nan"), float("inf"), -0.1, HUGE)
    ),
    ("top_p", 0),
    ("top_p", 1.5),
    ("repetition_penalty", 0),
    *(("stop", value) for value in (5, None, b"x", [b"x"], "", [""], ["x"] * 17, "x" * 1025)),
    *(("sampling", value) for value in (0.7, "greedy", {"temperature": 1})),
]


@pytest.mark.parametrize(("name", "value"), BAD_OPTIONS, ids=show)
def test_a_wrong_option_is_refused_by_name(session, name, value):
    for call in (session.infer, session.stream):
        with pytest.raises(PromptError, match=name.replace("max_tokens", "max_")) as caught:
            call(None, "Why?", **{name: value})
        assert len(str(caught.value)) < 300


def test_options_do_what_they_say(session):
    def ask(**options):
        return session.infer(picture(1), "Why?", **options).tokens

    greedy = ask(max_tokens=6)
    assert ask(max_new_tokens=np.int64(6)) == ask(max_tokens=6, max_new_tokens=6) == greedy
    with pytest.raises(PromptError, match="Give one"):
        ask(max_tokens=6, max_new_tokens=7)
    warm = runtime.Sampling(temperature=2.0, seed=1)
    drawn = ask(max_tokens=6, temperature=2.0, seed=1)
    assert drawn == ask(max_tokens=6, sampling=warm) != greedy
    assert ask(max_tokens=6, sampling=warm, temperature=0) == greedy
    assert ask(max_tokens=6, temperature=2.0, top_k=1) == greedy
    assert ask(max_tokens=6, temperature=2.0, top_p=1e-9) == greedy
    assert ask(max_tokens=6, temperature=2.0, min_p=1.0) == greedy
    assert len(set(ask(max_tokens=6, repetition_penalty=1e6))) == 6


def test_an_image_may_not_be_larger_than_asked(path):
    session = runtime.load(path, threads=1, max_pixels=2079)
    with session, pytest.raises(ImageError, match="40 = 2080 pixels; the limit is 2079"):
        session.infer(picture(1), "Why?")


@pytest.mark.parametrize("name", ["max_pixels", "cache_bytes", "threads", "memory_limit"])
@pytest.mark.parametrize("value", [1.5, "2", True, -1], ids=show)
def test_a_wrong_option_of_load_is_refused_by_name(path, name, value):
    with pytest.raises(TargetError, match=name):
        runtime.load(path, **{name: value})


def test_images_are_counted_before_any_is_decoded(session):
    with pytest.raises(PromptError, match="257 images were given"):
        session.infer([b"broken"] * 257, "Why?")


@pytest.mark.parametrize("cache_bytes", [0, 64 << 20])
def test_the_cache_is_as_large_as_asked(path, cache_bytes):
    with runtime.load(path, threads=1, cache_bytes=cache_bytes) as session:
        graphs = [session.infer(picture(1), "Why?").timings.graphs_ms for _ in range(2)]
    assert "vision" in graphs[0]
    assert ("vision" in graphs[1]) == (cache_bytes == 0)


@torch.no_grad()
@pytest.mark.parametrize("penalty", [1.0, 1.05, 1.3, 2.0])
def test_a_penalty_sees_the_image_token(tmp_path, penalty):
    """As in transformers, which has it among the prompt's ids; this toy's answers reach for it."""
    checkpoint = toy.make_checkpoint(tmp_path / "tied", tied=True)
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(checkpoint, backend="pil")
    bundle = make_bundle(str(checkpoint), plan="dense", out=tmp_path / "engines")
    with runtime.load(bundle.path, threads=1) as session:
        session.eos = frozenset()
        for images in ([], [picture(1)], [picture(1), picture(2)]):
            content = [*({"type": "image"} for _ in images), {"type": "text", "text": "Why?"}]
            text = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            inputs = processor(text=text, images=images or None, return_tensors="pt")
            count, new = inputs["input_ids"].shape[1], {"max_new_tokens": 30, "min_new_tokens": 30}
            theirs = model.generate(**inputs, **new, do_sample=False, repetition_penalty=penalty)
            ours = session.infer(images, "Why?", max_tokens=30, repetition_penalty=penalty).tokens
            assert list(ours) == theirs[0, count:].tolist()


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.names, self.words = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)

    def handle_data(self, data):
        self.words += data


def test_an_answer_shows_itself(session):
    images = [picture(1), picture(2, 90, 33)]
    answer = replace(session.infer(images, "Why?", max_tokens=3), text="a bird")
    assert "3 tokens, max_tokens was reached" in repr(answer)
    assert "kept 4 of 32 visual tokens" in repr(answer)
    assert "shown" not in answer.to_dict()
    masks = [place.kept(answer.plan.kept) for place in answer.shown]
    assert sum(int(mask.sum()) for mask in masks) == 4
    places = [i for mask in masks for i in np.flatnonzero(mask)]
    starts = [int(place.positions[0]) for place in answer.shown]
    assert [n - starts[n >= starts[1]] for n in answer.plan.kept] == places
    assert Tags(answer._repr_html_()).names == ["img", "img", "div", "small"]
    whole = session.infer(picture(1), "Why?", max_tokens=1)
    assert whole.shown[0].kept(None).all()
    copy = pickle.loads(pickle.dumps(answer))
    assert copy == answer
    session.asked, images = [], []
    session.infer(None, "Why?", max_tokens=1)
    assert len(DECODED) == 0  # an answer keeps no image alive
    assert Tags(copy._repr_html_()).names == ["div", "small"]


def test_an_answer_escapes_what_the_model_wrote_and_says_that_it_is_empty(session):
    answer = session.infer(None, "Why?", max_tokens=1)
    hostile = replace(answer, text="<script>alert('&')</script>\x1b[2J")
    assert Tags(hostile._repr_html_()).names == ["div", "small"]
    assert "<script>alert('&')</script>" in Tags(hostile._repr_html_()).words
    assert "\x1b" not in repr(hostile)
    empty = replace(answer, text="", finish="eos")
    assert "an empty answer" in repr(empty)
    assert "(empty)" in Tags(empty._repr_html_()).words
