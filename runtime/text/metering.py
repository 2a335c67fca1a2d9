"""Bounds on what a chat template costs: steps and memory, and by both of them time.

A template of a stranger can count to ten thousand million in two loops, double a string sixty times
or print a list that holds itself many times over. So its tree is given ticks, one at the start of
each body that may run again, and every operation that makes or reads values of any size goes
through a budget first. What that lets through is rendered by jinja, unchanged.

    template ──parse──▶ tree ──MeteredTree──▶ tree with ticks ──jinja──▶ code
                                                                          │ spends
                                                 TemplateBudget, refilled before a rendering
"""

import re
import time
from collections.abc import Callable, Mapping, MappingView
from operator import length_hint
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.runtime import Context, LoopContext, markup_join, str_join
from jinja2.sandbox import SecurityError
from jinja2.utils import Cycler, Namespace
from jinja2.visitor import NodeTransformer

from ...graphs.errors import PromptError

MOST_STEPS, STEPS_PER_CHARACTER = 300_000, 20
"""Steps of a rendering, and for each character of its messages: some templates look at each."""

NODES_PER_STEP, BYTES_PER_STEP = 8, 500
"""Parts of a tree, and bytes of what is read or made, that cost about as much time as a step."""

MOST_BYTES, BYTES_PER_CHARACTER = 32_000_000, 600
"""Bytes of all values that a rendering makes together, likewise."""

MOST_SECONDS = 10.0
MOST_DEPTH, MOST_BITS, MOST_WIDTH, MOST_POWER = 32, 4096, 1000, 64
"""Levels of a list in lists; bits of an integer; columns that text is padded to; an exponent."""

TICK, MADE, READ, JOINED = "* tick", "* made", "* read", "* joined"
"""Filters that no template can name."""

_LONG_FIELD = re.compile(r"\d{4}|[*]|:[^:{}]*\{")
_ITEM = 16  # bytes that a place in a list takes, about


class TemplateBudget:
    """Steps and bytes that a rendering may still take.

    ``most``: characters of a text, and half of the bytes of any other value.

    Every method but ``refill`` raises a PromptError where that is too much.
    """

    def __init__(self, most: int):
        self.most = most
        self.refill(())

    def refill(self, messages: Any) -> None:
        """Begin a rendering."""
        self.steps, self.bytes = MOST_STEPS, MOST_BYTES
        self.deadline = time.perf_counter() + MOST_SECONDS
        self._known: dict[int, tuple[Any, int, int]] = {}  # held, or its id might be another's
        size = self.read(messages)
        self.steps += STEPS_PER_CHARACTER * size
        self.bytes += BYTES_PER_CHARACTER * size

    def spend(self, steps: int) -> None:
        """Take steps."""
        self.steps -= steps
        if self.steps < 0 or time.perf_counter() > self.deadline:
            raise PromptError(
                "the chat template takes too many steps. Shorten the messages; if they are short, "
                "chat_template.jinja is broken or hostile."
            )

    def read(self, value: Any) -> int:
        """Take what it costs to look through a value; return about how many bytes it has."""
        nbytes, _ = self._weigh(value)
        self.spend(1 + nbytes // BYTES_PER_STEP)
        return nbytes

    def made(self, value: Any) -> Any:
        """Take what a new value costs, and return it."""
        if hasattr(value, "__next__") and not isinstance(value, (LoopContext, Cycler)):
            items = []
            for item in value:
                self.spend(1)
                items.append(item)
            return iter(self.made(items))  # still an iterator: true, even where it is empty
        if isinstance(value, Namespace):
            return value
        nbytes, _ = self._weigh(value)
        self.bytes -= nbytes
        self.spend(1 + nbytes // BYTES_PER_STEP)
        if self.bytes < 0:
            raise PromptError(
                "the chat template makes too much text. Shorten the messages; if they are short, "
                "chat_template.jinja is broken or hostile."
            )
        return value

    def check(self, characters: int) -> None:
        """Refuse a text of so many characters, or a list that takes as much, before it is made."""
        if characters > self.most:
            raise PromptError(
                f"the chat template writes more than {self.most} characters. Shorten the messages; "
                "if they are short, chat_template.jinja is broken."
            )

    def _weigh(self, value: Any) -> tuple[int, int]:
        """Return about how many bytes a value takes with all that is in it, and its levels."""
        if isinstance(value, str):
            self.check(len(value))
            return len(value), 0
        if isinstance(value, int):
            if value.bit_length() > MOST_BITS:
                raise PromptError("the chat template counts too high: an integer has no room.")
            return 8, 0
        if isinstance(value, range):
            return _ITEM * len(value), 0
        if isinstance(value, Namespace):
            raise SecurityError("a namespace is no value to print, compare or put into a list")
        if not isinstance(value, (list, tuple, set, frozenset, Mapping, MappingView)):
            return _ITEM, 0
        if id(value) not in self._known:
            nbytes, depth = _ITEM, 0
            self.spend(2)
            self._known[id(value)] = value, 2 * self.most + 1, 0  # of one that holds itself
            items: Any = value.items() if isinstance(value, Mapping) else value
            for item in items:
                within, levels = self._weigh(item)
                nbytes, depth = nbytes + within + _ITEM, max(depth, levels + 1)
                self.check(nbytes // 2)
                if depth > MOST_DEPTH:
                    raise SecurityError("lists in lists this deep are out of bounds")
            self._known[id(value)] = value, nbytes, depth
        return self._known[id(value)][1:]


class MeteredTree(NodeTransformer):
    """Puts ticks and meters into the tree of a template."""

    def visit_body(self, node: Any) -> Any:
        """Tick at the start of a body that may run again, and in the condition of a loop."""
        weight = 1 + sum(1 for _ in node.find_all(nodes.Node)) // NODES_PER_STEP
        self.generic_visit(node)
        tick = _filter(TICK, nodes.Const(weight), node)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        if getattr(node, "test", None) is not None:
            node.test = nodes.And(_filter(TICK, nodes.Const(weight), node), node.test)
        return node

    visit_For = visit_Macro = visit_CallBlock = visit_Block = visit_body

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """Join under the budget."""
        self.generic_visit(node)
        return _filter(JOINED, nodes.List(node.nodes, lineno=node.lineno), node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        """Read what is compared."""
        self.generic_visit(node)
        node.expr = _filter(READ, node.expr, node)
        for operand in node.ops:
            operand.expr = _filter(READ, operand.expr, node)
        return node

    def visit_new(self, node: Any) -> nodes.Node:
        """Charge for a list, a slice or the like; not names that are assigned to."""
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _filter(MADE, node, node)

    visit_List = visit_Tuple = visit_Dict = visit_new

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        """Charge for a slice."""
        self.generic_visit(node)
        return _filter(MADE, node, node) if isinstance(node.arg, nodes.Slice) else node


def _filter(name: str, expression: nodes.Expr, at: nodes.Node) -> nodes.Filter:
    return nodes.Filter(expression, name, [], [], None, None, lineno=at.lineno)


def _budget(context: Context) -> TemplateBudget:
    environment: Any = context.environment
    return environment.budget


@pass_context
def _tick(context: Context, steps: int) -> bool:
    _budget(context).spend(steps)
    return True


@pass_context
def _made(context: Context, value: Any) -> Any:
    return _budget(context).made(value)


@pass_context
def read(context: Context, value: Any) -> Any:
    """Return ``value``, whose cost the rendering has paid: what is printed or compared."""
    _budget(context).read(value)
    return value


@pass_context
def _joined(context: Context, parts: list[Any]) -> str:
    budget = _budget(context)
    budget.check(sum(map(budget.read, parts)))
    return budget.made((markup_join if context.eval_ctx.autoescape else str_join)(parts))


# --- operations that may give far more than they are given -------------------------------------


def check_percent(budget: TemplateBudget, text: Any, values: Any) -> None:
    """Refuse ``text % values`` and ``text.format(*values)`` with wide or very many fields."""
    if _LONG_FIELD.search(str(text)):
        raise SecurityError("a format with wide fields is out of bounds")
    fields = str(text).count("%") + str(text).count("{")
    budget.check(len(str(text)) + fields * len(str(values)))


def _replace(
    budget: TemplateBudget, text: Any, old: Any = "", new: Any = "", *_: Any, **__: Any
) -> None:
    text, old, new = str(text), str(old), str(new)
    budget.check(len(text) + text.count(old) * len(new))


def _join(budget: TemplateBudget, items: Any, between: Any = "", *_: Any, **more: Any) -> None:
    budget.check(length_hint(items) * len(str(more.get("d", between))))


def _indent(budget: TemplateBudget, text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    columns = width if isinstance(width, int) else len(str(width))
    budget.check(len(str(text)) + len(str(text).splitlines()) * columns)


def _narrow(budget: TemplateBudget, text: Any, *given: Any, **named: Any) -> None:
    """Refuse numbers and texts that make every line, item or digit long."""
    for value in (*given, *named.values()):
        size = abs(value) if isinstance(value, (int, float)) else len(str(value))
        if size > MOST_WIDTH:
            raise SecurityError(f"a width of {size} is out of bounds")


def _pretty(budget: TemplateBudget, value: Any, *given: Any, **named: Any) -> None:
    for option in (*given, *named.values()):
        size = option if isinstance(option, int) else len(str(option))
        if size > 40:  # of an indent, or the text of two separators
            raise SecurityError("JSON this wide is out of bounds")
    for _ in range(20):  # indented JSON is slow
        budget.read(value)


def _number(budget: TemplateBudget, items: Any, *given: Any, start: Any = 0, **_: Any) -> None:
    if any(not isinstance(value, (int, float)) for value in (*given[1:], start)):
        raise SecurityError("sum() adds numbers")


def _attributes(budget: TemplateBudget, items: Any, *given: Any, **named: Any) -> None:
    """Pay for a filter that follows the dots of a name in every item."""
    dots = sum(str(value).count(".") for value in (*given, *named.values()))
    budget.spend(length_hint(items, 1) * (1 + dots))


Check = Callable[..., None] | None


def _all(names: str, check: Check = None) -> dict[str, Check]:
    return dict.fromkeys(names.split(), check)


FILTERS: dict[str, Check] = {
    **_all("abs attr capitalize dictsort e escape float groupby int items list"),
    **_all("lower reverse safe string title trim upper urlencode wordcount"),
    **_all("map max min reject rejectattr select selectattr sort unique"),
    "replace": _replace,
    "join": _join,
    "indent": _indent,
    "format": lambda budget, text, *given, **named: check_percent(budget, text, (given, named)),
    "tojson": _pretty,
    "sum": _number,
    **_all("batch center round slice truncate", _narrow),
}
"""Filters that templates may use, and what refuses some of their arguments."""

FREE = ("count", "d", "default", "first", "last", "length")
"""Filters that cost nothing, whatever they are given."""

FOLLOWING = _all("groupby map max min reject rejectattr select selectattr sort sum unique")
"""Filters that follow the dots of a name in each item."""

METHODS: dict[type, dict[str, Check]] = {
    str: {
        **_all("capitalize casefold count endswith find index isalnum isalpha"),
        **_all("isdecimal isdigit islower isnumeric isspace istitle isupper"),
        **_all("lower lstrip partition removeprefix removesuffix rfind rindex"),
        **_all("rpartition rsplit rstrip split splitlines startswith strip"),
        **_all("swapcase title upper"),
        **_all("center ljust rjust zfill", _narrow),
        "replace": _replace,
        "join": lambda budget, text, items=(): _join(budget, items, text),
        "format": lambda budget, text, *given, **named: check_percent(budget, text, (given, named)),
        "format_map": lambda budget, text, values=(): check_percent(budget, text, values),
    },
    dict: _all("copy get items keys values"),
    list: _all("copy count index"),
    tuple: _all("count index"),
    int: {},
    float: _all("is_integer"),
}
"""Methods that templates may call, by type, and what refuses some of their arguments."""


def method_table(value: Any) -> dict[str, Check] | None:
    """Return the methods that may be called on a value; None: jinja's sandbox decides."""
    return next((table for kind, table in METHODS.items() if isinstance(value, kind)), None)


def metered(
    function: Callable[..., Any], check: Check = None, *, test: bool = False, follows: bool = False
) -> Callable[..., Any]:
    """Return a filter or a test that pays for what it reads and makes."""
    kind = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

    @pass_context
    def paid(context: Context, *given: Any, **named: Any) -> Any:
        budget = _budget(context)
        for value in (*given, *named.values()):
            if not (test and isinstance(value, Namespace)):
                budget.read(value)
        if follows:
            _attributes(budget, *given, **named)
        if check is not None:
            check(budget, *given, **named)
        first = {"context": context, "eval_context": context.eval_ctx, None: None}
        lead = [] if kind is None else [first.get(kind, context.environment)]
        return budget.made(function(*lead, *given, **named))

    return paid


def install(environment: Any) -> None:
    """Charge the filters and tests of an environment to its ``budget``."""
    known = environment.filters
    environment.filters = {name: known[name] for name in FREE} | {
        name: metered(known[name], check, follows=name in FOLLOWING)
        for name, check in FILTERS.items()
    }
    environment.filters |= {TICK: _tick, MADE: _made, READ: read, JOINED: _joined}
    environment.tests = {
        name: metered(known, test=True) for name, known in environment.tests.items()
    }
