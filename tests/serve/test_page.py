"""The page of a server, in a browser: drop an image, ask, see the tokens, stop."""

import json

import pytest
from visistage.tests.support import toy
from visistage.tests.support.browser import check_picture, find
from visistage.tests.support.built import built_once
from visistage.tests.support.driven import driven
from visistage.tests.support.served import data_uri, question, serving, slowed

PLAN = "visipruner:shallow=1,t=1,e=2,keep=4"
DROP = """(() => {
    const bytes = Uint8Array.from(atob(%s), (letter) => letter.charCodeAt(0));
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([bytes], "photo.png", {type: "image/png"}));
    const drop = document.getElementById("drop");
    drop.dispatchEvent(new DragEvent("drop", {dataTransfer, bubbles: true, cancelable: true}));
})()"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    checkpoint = toy.make_checkpoint(tmp_path_factory.mktemp("serve") / "toy")
    with serving({"toy": built_once(checkpoint, tmp_path_factory)(PLAN)}, lanes=2) as running:
        yield running


@pytest.fixture
def page(server, tmp_path):
    if find() is None:
        pytest.skip("no browser is installed")
    with driven(tmp_path / "browser") as page:
        page.size(1200, 800)
        page.call("Page.navigate", url=f"http://127.0.0.1:{server.port}/")
        page.until("document.readyState === 'complete' && document.getElementById('ask')")
        yield page


def ask(page, text):
    page.run(f"""document.getElementById("question").value = {json.dumps(text)};
        document.getElementById("form").requestSubmit();""")


def test_an_image_is_dropped_asked_about_and_its_kept_tokens_are_seen(server, page, tmp_path):
    uri = data_uri(3)
    page.run(DROP % json.dumps(uri.partition(",")[2]))
    page.until("!document.getElementById('frame').hidden")
    page.run("document.getElementById('most').value = 12")
    ask(page, "What is it?")
    page.until("document.querySelectorAll('#before li').length === 1")
    body = question("What is it?", uri, max_tokens=12, visistage=True)
    expected = server.ask(body)[1]
    said = page.run("document.getElementById('answer').textContent")
    assert said.strip() == expected["choices"][0]["message"]["content"]
    facts = page.run("document.getElementById('facts').textContent")
    assert "12 tokens" in facts
    assert "4 of 16 visual tokens kept (visipruner-shallow1-t1-e2-keep4)" in facts
    squares = page.run("document.querySelector('#tokens .edge').getAttribute('d')")
    kept = expected["visistage"]["images"][0]["kept"]
    assert squares.count("M") == len(kept) == 4
    over = page.run("""(() => {
        const [photo, tokens] = ["photo", "tokens"].map(
            (id) => document.getElementById(id).getBoundingClientRect());
        return [tokens.left >= photo.left - 1, tokens.right <= photo.right + 1,
            Math.abs(tokens.width / tokens.height - 52 / 40) < 0.02];
    })()""")
    assert over == [True, True, True], "the drawing has the picture's own shape"
    for name, size, dark in (("wide", (1200, 800), False), ("narrow", (390, 844), True)):
        page.size(*size, dark)
        page.run("new Promise((good) => setTimeout(good, 100))")
        assert page.run("document.documentElement.scrollWidth <= innerWidth"), name
        page.shot(tmp_path / f"{name}.png")
        check_picture(tmp_path / f"{name}.png", "dark" if dark else "light", 0.01)
    page.run("document.getElementById('overlay').click()")
    assert page.run("document.querySelector('#tokens').children.length") == 0
    assert page.complaints == []


def test_an_answer_is_stopped_and_its_lane_is_free(server, page):
    page.run("document.getElementById('most').value = 1000")
    with slowed(server.engine):
        ask(page, "Go on")
        page.until("document.getElementById('answer').textContent.length > 3")
        assert server.engine.load()["running"] == 1
        page.run("document.getElementById('stop').click()")
        page.until("document.getElementById('facts').textContent === 'stopped'")
        assert server.idle(3)
    ask(page, "And now?")
    page.run("document.getElementById('stop').click()")
    page.until("!document.getElementById('ask').disabled")
    assert page.complaints == []


def test_a_refusal_is_shown(server, page):
    ask(page, "</s>")
    page.until("!document.getElementById('alarm').hidden")
    assert "control token" in page.run("document.getElementById('alarm').textContent")


def test_the_page_asks_for_nothing_from_elsewhere(server):
    status, body, headers = server.call("GET", "/")
    text = body.decode()
    assert status == 200
    assert "default-src 'none'" in text
    assert headers["content-security-policy"] == "frame-ancestors 'none'"
    assert "http://" not in text.replace("http://127.0.0.1:8000", "").replace(
        "http://www.w3.org/2000/svg", ""
    )
    assert "https://" not in text
