"""What a chat template of a stranger may cost, and may not reach."""

import ast
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from visistage.graphs.errors import PromptError
from visistage.runtime.text.metering import MOST_STEPS
from visistage.runtime.text.template import ChatTemplate
from visistage.tests.support.hostile import COSTLY, ESCAPES

ASKED = [{"role": "user", "content": "hi"}]
SECONDS, MEBIBYTES = 3.0, 500
"""Of processor time for a template, on a slow machine; of all of them together."""

RENDER = """
import json, time
from visistage.graphs.errors import PromptError
from visistage.runtime.hardware import peak_memory
from visistage.runtime.text.template import ChatTemplate
from visistage.tests.support.hostile import COSTLY
for name, source in COSTLY.items():
    start = time.process_time()
    try:
        ChatTemplate(source, max_chars=900_000).render([{"role": "user", "content": "hi"}])
        said = None
    except PromptError as error:
        said = str(error)
    except BaseException as error:
        said = repr(error)
    mebibytes = peak_memory() / 2**20
    print(json.dumps([name, said, time.process_time() - start, mebibytes]), flush=True)
"""
HARMLESS = ("escape", "long tilde", "comment", "blank lines", "long and", "outputs")
"""Of the costly ones, what may be rendered."""


@pytest.fixture(scope="module")
def rendered():
    """What became of every costly template in a process of its own."""
    done = subprocess.run([sys.executable, "-c", RENDER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", COSTLY)
def test_a_costly_template_is_refused_in_time(rendered, name):
    said, seconds, mebibytes = rendered[name]
    assert said is not None or name in HARMLESS
    assert said is None or "chat template" in said
    assert len(said or "") < 600
    assert seconds < SECONDS
    assert mebibytes < MEBIBYTES


@pytest.mark.parametrize("name", ESCAPES)
def test_a_known_escape_leads_nowhere(name):
    messages = [dict(ASKED[0])]
    try:
        written = ChatTemplate(ESCAPES[name]).render(messages)
    except PromptError:
        written = ""
    assert messages == ASKED
    assert not set(written.split()) - {"[Undefined]"}


def test_the_budget_grows_with_the_messages_and_is_fresh_each_time():
    each = ChatTemplate(
        "{% for m in messages %}{% for c in m.content %}{{ c }}{% endfor %}{% endfor %}"
    )
    long = [{"role": "user", "content": "x" * MOST_STEPS}]
    for messages in (long, ASKED, long):
        assert each.render(messages) == messages[0]["content"]
    loop = "{% for i in range(99) %}{% for j in range(999) %}{% endfor %}{% endfor %}ok"
    template = ChatTemplate(loop)
    assert [template.render(ASKED) for _ in range(5)] == ["ok"] * 5


def test_threads_do_not_spend_each_others_steps():
    template = ChatTemplate("{% for i in range(9999) %}{% endfor %}{{ messages[0].content }}")
    said = []
    ask = lambda: said.extend(template.render(ASKED) for _ in range(9))  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == ["hi"] * 36


CONVERSATIONS = [
    ASKED,
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What? <b>"}]}],
    [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b</think>c"},
        {"role": "user", "content": "é猫\n"},
    ],
]
TRICKY = [  # what meters might change
    "{% if messages|selectattr('role', 'eq', 'nobody') %}an iterator is true{% endif %}",
    "{{ messages|map(attribute='role')|join(', ') }}{{ messages|map('length')|list }}",
    "{% for m in messages if m.role == 'user' %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}"
    "{% else %}none{% endfor %}",
    "{% for m in messages recursive %}{{ m if m is string else loop(m.content|list) }}{% endfor %}",
    "{% set a, b = 1, [2, (3, {'x': none})] %}{{ a ~ b ~ (1, 2)[1:] }}{{ 'abc'[::-1] }}",
    "{% macro f(x, y=[1]) %}{{ x }}{{ y }}{{ caller() if caller }}{% endmacro %}{{ f('a') }}"
    "{% call f(2) %}!{% endcall %}",
    "{% set ns = namespace(l=[]) %}{% for m in messages %}{% set ns.l = ns.l + [m.role] %}"
    "{% endfor %}{{ ns.l }}{{ ns is defined }}{{ 'user' in ns.l }}{{ 1 < 2 <= 2 }}",
    "{% set x %}{% filter upper %}a{{ bos_token }}{% endfilter %}{% endset %}{{ x|trim }}",
    "{{ '%s %5d|%-3s' % ('a', 3, 'b') }}{{ '{:>5}{}'.format('a', 2) }}{{ 7 // 2 ** 2 % 3 - -1 }}",
    "{{ missing ~ none ~ true ~ 1.5 }}{{ missing|default('d') }}{{ [missing, none] }}",
    "{{ messages|groupby('role')|list|length }}{{ [3, 1]|sort }}{{ {'b': 1}|dictsort }}",
    "{{ 'x\\ny'|indent }}{{ range(3) }}{{ range(3)|list }}",
    "{{ [1, 2, 3]|batch(2)|list }}{{ 'a b'|title }}{{ [1]|sum }}",
]


def published():
    """Templates in the source of transformers, by the file and line they stand in."""
    root = Path(pytest.importorskip("transformers").__file__).parent
    for file in sorted(root.rglob("*.py")):
        text = file.read_text("utf-8", errors="ignore")
        for node in ast.walk(ast.parse(text)) if "{%" in text and "messages" in text else ():
            value = getattr(node, "value", None)
            if isinstance(node, ast.Constant) and isinstance(value, str) and "{% for" in value:
                yield value


def test_what_is_let_through_is_rendered_as_in_transformers():
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    names = {"bos_token": "<s>", "eos_token": "</s>", "image_token": "<image>"}
    compared = 0
    for source in [*TRICKY, *published()]:
        for messages in CONVERSATIONS:
            ours = ChatTemplate(source, names)
            try:
                wanted, _ = utils.render_jinja_template(
                    [messages], chat_template=source, add_generation_prompt=True, **names
                )
            except Exception:
                with pytest.raises(PromptError):
                    ours.render(messages)
                continue
            assert ours.render(messages) == wanted[0], source[:80]
            compared += 1
    assert compared >= 2 * len(TRICKY)
