"""Presets that decide per prompt: a probe in the layers' attention finds t, K and e.

Source: docs/methods.md, "VisiPruner: paper and code" and "VisiPruner: plans per prompt".
"""

from __future__ import annotations

from dataclasses import replace

from ..plan.plan import StagePlan
from ..plan.stages import Mode, Probe
from .request import TEMPLATES, Preset, Request, repeat_mode

EXIT_RULES = ("cumulative", "consecutive")

BOUNDARIES = (8, 10, 12, 14, 16, 18, 20, 23, 27)
"""Last layers of the stages of an adaptive plan, for 32 layers; others in proportion. Triggers
fall around the middle, and a stage of two layers wastes 3 % of the visual work at most
(docs/methods.md, "VisiPruner: plans per prompt"); exits fall late and cost little."""

BUCKET_SHARES = (72, 36, 18, 9, 4, 1)
"""Buckets of an adaptive plan are N divided by these: 8, 16, 32, 64, 144 and all of 576. The
published mean of K is 10; with all N as the largest, no token that counts is ever left out."""

_TRIGGER_OPTIONS = ("boundaries", "buckets", "cosine", "contribution")
_EXIT_OPTIONS = ("exit_cosine", "exit_layers", "exit_rule")
_PROBE_OPTIONS = {
    "middle": "true or false: whether tokens are selected (true)",
    "deep": "true or false: whether the selected tokens may leave (true)",
    "cosine": "below it in some token, a layer selects (0.995)",
    "contribution": "tokens above this L2 norm stay (0.2)",
    "exit_cosine": "not below it in any token, a layer is quiet (0.999)",
    "exit_layers": "quiet layers until vision leaves (2)",
    "exit_rule": "cumulative or consecutive: which quiet layers count together",
}


def _visipruner_code(ask: Request) -> StagePlan:
    template = ask.word("template", TEMPLATES if ask.layers != 40 else TEMPLATES[::-1])
    # The code compares with < and with > around one number, which leaves a dense layer between.
    shallow, first = _text_blind(ask, min(6, 3 * ask.layers // 16), gap=1)
    modes = _shallow("sink_half" if template == "13b" else "sink", "text_blind", shallow)
    ends = list(range(first, ask.layers - 1))
    return ask.probing(ends, _probe(ask, first), modes, decode_sees=True)


def _visipruner_paper(ask: Request) -> StagePlan:
    shallow, first = _text_blind(ask, min(7, 3 * ask.layers // 16 + 1), gap=0)
    modes = _shallow("sink", "text_blind_novv", shallow)
    probe = _probe(ask, first, EXIT_RULES[::-1])
    ends = list(range(first, ask.layers - 1))
    return ask.probing(ends, probe and replace(probe, strict=False), modes)


def _visipruner_adaptive(ask: Request) -> StagePlan:
    template = ask.word("template", TEMPLATES)
    shallow, first = _text_blind(ask, 3 * ask.layers // 16, gap=1)
    modes = _shallow("sink_half" if template == "13b" else "sink", "text_blind", shallow)
    last = ask.layers - 2
    near = {min(max(end * ask.layers // 32, first), last) for end in BOUNDARIES}
    ends = ask.integers("boundaries", tuple(sorted(near)), first, last)
    sizes = {max(1, ask.visual_tokens // share) for share in BUCKET_SHARES}
    buckets = ask.integers("buckets", tuple(sorted(sizes)), 1, ask.visual_tokens)
    probe = _probe(ask, first)
    return ask.probing(ends, probe and replace(probe, buckets=tuple(buckets)), modes)


def _text_blind(ask: Request, default: int, gap: int) -> tuple[int, int]:
    """Options ``shallow`` and ``probe``: the number of text-blind layers, the first probed one."""
    off = ask.options.get("shallow") is False
    middle = default if off else ask.integer("shallow", default)
    # What the last layer's probe finds can change nothing.
    last = ask.layers - 2
    if not 0 <= middle <= last:
        ask.reject("shallow", middle, f"a layer from 0 to {last}")
    shallow = 0 if off else middle
    first = ask.integer("probe", min(middle + gap, last))
    if not shallow <= first <= last:
        wanted = f"a layer from shallow={shallow} to {last}, the last but one"
        ask.reject("probe", first, wanted)
    return shallow, first


def _shallow(first: Mode, others: Mode, count: int) -> tuple[Mode, ...]:
    return (first, *repeat_mode(others, count - 1)) if count else ()


def _probe(ask: Request, first: int, rules: tuple[str, ...] = EXIT_RULES) -> Probe | None:
    """The numbers of the released scripts unless others were asked for; None without a middle."""
    deep = ask.switch("deep", True)
    if not ask.switch("middle", True):
        # Without selected tokens none can leave: the released code runs so, too.
        ask.without("middle=false", "probe", *_TRIGGER_OPTIONS, *_EXIT_OPTIONS)
        return None
    if not deep:
        ask.without("deep=false", *_EXIT_OPTIONS)
    exit_cosine = ask.number("exit_cosine", 0.999, -1, 1)
    exit_layers = ask.integer("exit_layers", 2)
    if exit_layers < 1:
        ask.reject("exit_layers", exit_layers, "1 or more")
    return Probe(
        first,
        cosine=ask.number("cosine", 0.995, -1, 1),
        contribution=ask.number("contribution", 0.2, 0, 1e9),
        exit_cosine=exit_cosine if deep else None,
        exit_layers=exit_layers,
        consecutive=ask.word("exit_rule", rules) == "consecutive",
    )


CODE = Preset(
    "VisiPruner as its released code runs: every layer's probe decides, per prompt",
    {
        "shallow": "first layer that is not text-blind, or false (6, less in short decoders)",
        "probe": "first layer whose probe counts (the one after shallow)",
        "template": "7b or 13b: the rule of layer 0 (13b in a decoder of 40 layers)",
        **_PROBE_OPTIONS,
    },
    _visipruner_code,
)

PAPER = Preset(
    "VisiPruner as its paper describes it: every layer's probe decides, per prompt",
    {
        "shallow": "first layer that is not text-blind, or false (7, less in short decoders)",
        "probe": "first layer whose probe counts (shallow)",
        **_PROBE_OPTIONS,
    },
    _visipruner_paper,
)

ADAPTIVE = Preset(
    "the probe decides per prompt, and acts at the nearest later boundary of a few",
    {
        "shallow": "first layer that is not text-blind, or false (3/16 of the depth)",
        "probe": "first layer whose probe counts (the one after shallow)",
        "template": "7b or 13b: the rule of layer 0 (7b)",
        "boundaries": "last layers of stages, such as 8-10-12 (9 of them in 32 layers)",
        "buckets": "rows that a selection is padded to, such as 8-16-576 (6 of them)",
        **_PROBE_OPTIONS,
    },
    _visipruner_adaptive,
)
