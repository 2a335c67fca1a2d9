"""``calibration.html`` shows the calibration's own numbers, escapes its text, and stands alone."""

import html
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console
from visistage.calib.evaluate import Share
from visistage.calib.page.calibration_page import CALIBRATION_PAGE, render_calibration, write_report
from visistage.calib.page.charts import cosines, histograms, pareto
from visistage.calib.page.range_charts import alphas
from visistage.calib.page.series import by_sensitivity, kept_float, rows_seen, series_of
from visistage.calib.page.warnings import calibration_warnings
from visistage.calib.plan_search.agreement import Agreement
from visistage.calib.plan_search.candidates import Pricing
from visistage.calib.plan_search.choose import choose_plan
from visistage.calib.plan_search.dynamics import Dynamics, PromptReading, spread
from visistage.calib.plan_search.goal import SelectionGoal
from visistage.cli.show.calibration_view import calibration_table
from visistage.compile.checkpoint.known_models import KNOWN_MODELS
from visistage.compile.quantize.calibration_file import Calibration, SampleFacts
from visistage.compile.quantize.group_ranges import GroupRanges
from visistage.graphs.config import ModelConfig
from visistage.graphs.errors import CapacityError
from visistage.graphs.linears import linear_groups
from visistage.graphs.plan.cost import Geometry
from visistage.graphs.presets.presets import preset
from visistage.graphs.quantization import OBSERVERS
from visistage.pages.chart import Axis, Chart, of_decades, of_layers, of_shares
from visistage.tests.support import toy
from visistage.tests.support.browser import check_picture

NASTY = '</script><script>document.title="owned"</script> "a" & <b>\'x\'</b>'
LAYERS, TOKENS = 8, 16
PLAN = preset("visipruner", layers=LAYERS, visual_tokens=TOKENS)


def readings(count=40):
    """Prompts that trigger in layer 3 or 4; every fifth never does."""
    random = np.random.default_rng(0)
    out = []
    for prompt in range(count):
        cosine = 1 - random.uniform(0, 0.0009, (LAYERS, TOKENS))
        norm = random.uniform(0.01, 0.05, (LAYERS, TOKENS))
        if prompt % 5:
            cosine[3 + prompt % 2, :3] = 0.9
            norm[3:, :3] = 0.8
        out.append(PromptReading(cosine.astype(np.float32), norm.astype(np.float32)))
    return out


def ranges_of(group, random, rows):
    absmax = random.uniform(1, 20, group.inputs).astype(np.float32)
    top = float(absmax.max())
    smooth = group.fold is not None
    error = float(10 ** random.uniform(-4, -2.2))
    return GroupRanges(
        rows=rows,
        rows_used=min(rows, 2000),
        absmax=absmax,
        alpha=0.5 if smooth else None,
        factors=np.ones(group.inputs, np.float32),
        aware_alpha=0.25 if smooth else None,
        aware=np.ones(group.inputs, np.float32),
        thresholds={"minmax": top, "percentile": 0.9 * top, "entropy": 0.6 * top, "mse": 0.7 * top},
        smoothed_thresholds=dict.fromkeys(OBSERVERS, 0.5 * top),
        errors=dict(zip(OBSERVERS, (error, 0.9 * error, 0.8 * error, 0.6 * error), strict=True)),
        smoothed_errors=dict.fromkeys(OBSERVERS, 0.3 * error if smooth else 0.6 * error)
        | {"mse": 0.2 * error if smooth else 0.55 * error},
        weight_error=0.02,
        aware_error=0.011,
        sensitivity={
            name: {"w8a8": error * (1 + i), "w8": error / 10, "w4": error * 5}
            for i, name in enumerate(group.linears)
        },
    )


def agreed(right, total, kl=0.01):
    at = {None: right, 1: total - right}
    apart = tuple(key for key, count in at.items() for _ in range(count))
    return Agreement(Share(right, total), Share(right, total), kl, apart).to_dict()


def candidate(text, cost, right, held=None, verdict="", front=False, keep=4):
    return {
        "text": text,
        "name": text.partition(":")[0],
        "s": 2,
        "t": 3,
        "keep": keep,
        "e": 6,
        "cost": cost,
        "visual_flops": cost * 838e6,
        "predicted": 0.031,
        "measured": agreed(right, 400),
        "held_out": None if held is None else agreed(held, 800),
        "front": front,
        "verdict": verdict,
    }


def choice(**changes):
    return {
        "budget": {"lose": 0.01},
        "agreement": "tokens",
        "cost": "visual FLOPs as the graphs run them, dense = 1",
        "max_tokens": 16,
        "samples": {"choosing": 80, "held_out": 40},
        "plan": PLAN.to_dict(),
        "text": "visipruner:t=3,keep=4,e=6",
        "fits": True,
        "reasons": {"s": "nothing is lost", "t": "p90 of t", "K": "holds 90 %", "e": "quiet"},
        "warnings": [],
        "chosen": 1,
        "candidates": [
            candidate("visipruner:t=2", 0.412, 371, verdict="near miss: loses 7 %", front=True),
            candidate("visipruner:t=3,keep=4,e=6", 0.533, 398, 795, "chosen", True),
            candidate("exit-only", 0.871, 399, None, "", True, keep=None),
        ],
        **changes,
    }


@pytest.fixture(scope="module")
def calibration():
    config = ModelConfig.from_hf(toy.make_config(layers=LAYERS))
    random = np.random.default_rng(1)
    blind = [{"shallow": s, **agreed(400 - 9 * s, 400)} for s in range(4)]
    return Calibration(
        model="toy",
        fits={"model": "a" * 64, "template": "b" * 64, "preprocessing": "c" * 64},
        plan=PLAN,
        rows="stage",
        include_prefix=False,
        samples=SampleFacts(("questions.jsonl",), tuple(map(str, range(120))), "d" * 64),
        groups={one.name: ranges_of(one, random, 4000) for one in linear_groups(config)},
        versions={"visistage": "0", "torch": "2"},
        dynamics=Dynamics.of(readings()).to_dict(
            suggested={"plan": "visipruner-adaptive:cosine=0.95", "reason": "It fires in time."},
            text_blind=blind,
        ),
        choice=choice(),
    )


@pytest.fixture(scope="module")
def page(calibration):
    return render_calibration(calibration)


class Tables(HTMLParser):
    """Cells of every table with an id; and whether each tag is closed in its turn."""

    VOID = ("meta",)

    def __init__(self, text):
        super().__init__()
        self.tables, self.open, self.id = {}, [], None
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.id = dict(attrs).get("id")
            self.tables[self.id] = []
        if tag == "tr":
            self.tables[self.id].append([])
        if tag in ("td", "th"):
            self.tables[self.id][-1].append("")

    def handle_startendtag(self, tag, attrs):
        assert tag in ("path", "rect", "circle")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[self.id][-1][-1] += data


def cells(text, table):
    """Rows of a table, without its head."""
    return [[" ".join(cell.split()) for cell in row] for row in Tables(text).tables[table][1:]]


def without(calibration, **parts):
    return replace(calibration, **parts)


# --- numbers --------------------------------------------------------------------------------------


def test_candidates_are_in_the_table_with_their_intervals(page, calibration):
    rows = cells(page, "candidates")
    assert [row[0] for row in rows] == [one["text"] for one in calibration.choice["candidates"]]
    for row, one in zip(rows, calibration.choice["candidates"], strict=True):
        share = one["measured"]["tokens"]
        assert row[6].startswith(f"{100 * one['cost']:.1f} %")
        numbers = (share["share"], share["low"], share["high"])
        assert re.findall(r"[\d.]+", row[9]) == [f"{100 * number:.1f}" for number in numbers]
        assert row[12] == one["verdict"]
    assert rows[1][10].startswith("99.4 %")
    assert rows[0][10] == "–"
    assert [row[4] for row in rows] == ["4", "4", "–"]


def with_entries():
    """Return a choice whose plans have an entry, as of now; the others are as of before."""
    alone = {**candidate("scope:keep=4", 0.25, 399, 797, "chosen", True), "entry": "scope-4"}
    old = choice()["candidates"]
    candidates = [{**alone, "second": 0.81, "second_flops": 81e6}, *old]
    return choice(
        candidates=candidates, chosen=0, text="scope:keep=4", question={"prefix": 3, "text": 9},
        reasons={"s": "nothing", "entry": "scope alone", "precision": "int8: rounded"},
    )  # fmt: skip


def test_an_entry_and_the_second_question_are_on_the_page(calibration):
    plan = preset("scope", layers=LAYERS, visual_tokens=TOKENS, keep=4)
    text = render_calibration(without(calibration, plan=plan, choice=with_entries()))
    rows = cells(text, "candidates")
    assert [row[1] for row in rows] == ["scope-4", "–", "–", "–"]
    assert [row[7].split()[0] for row in rows] == ["81.0", "–", "–", "–"]
    shown = html.unescape(re.sub("<[^>]*>", "", text)).replace("\xa0", " ")
    assert "4 of 16 visual tokens enter, by scope, the same whatever is asked." in shown
    assert "a second question about the same image 81 % of the dense model's" in shown
    assert "all FLOPs of 9 more rows about the same image" in shown
    assert re.findall(r"<div><dt>(\w+)</dt>", text) == ["precision", "entry", "s"]
    assert "diamonds: with an entry" in shown
    drawn = pareto(with_entries())
    assert len(re.findall(r'<path class="mark warm" d="M[^"]*z"><title>scope:keep=4', drawn)) == 1


def test_a_choice_made_before_there_were_entries_has_its_page(page, calibration):
    assert "entry" not in calibration.choice["candidates"][0]
    assert {row[1] for row in cells(page, "candidates")} == {"–"}
    assert {row[7] for row in cells(page, "candidates")} == {"–"}
    assert "second question about" not in page
    assert "diamonds" not in page
    console = Console(width=200, record=True, file=StringIO())
    console.print(calibration_table(Path("x"), calibration, ""))
    assert "exit-only" in console.export_text()


def test_the_verdict_is_the_chosen_plan_on_what_was_held_out(page):
    verdict = re.search(r'<p class="verdict">(.*?)</p>', page, re.S)[1]
    text = " ".join(html.unescape(re.sub("<[^>]*>", "", verdict)).split())
    assert "costs 53.3 %" in text
    assert "in 99.4 % of 800 tokens held out from choosing" in text
    assert '<p class="headline">visipruner:t=3,keep=4,e=6</p>' in page


def test_every_group_is_in_the_table(page, calibration):
    rows = cells(page, "groups")
    assert [row[0] for row in rows] == list(calibration.groups)
    for row, group in zip(rows, calibration.groups.values(), strict=True):
        assert row[1] == str(group.rows)
        assert row[2] == f"{group.absmax.max():.4g}"
        assert row[3:7] == [f"{group.thresholds[name]:.4g}" for name in OBSERVERS]
        assert row[7] == ("–" if group.alpha is None else f"{group.alpha:g}")
        assert row[9] == f"{100 * group.errors['mse']:.4f} %"
        assert row[10] == f"{100 * group.smoothed_errors['mse']:.4f} %"


def test_linear_layers_come_the_worst_first_and_five_per_cent_arekept_float(page, calibration):
    every = {
        name: by_scheme["w8" if name == "lm_head" else "w8a8"]
        for group in calibration.groups.values()
        for name, by_scheme in group.sensitivity.items()
    }
    order = sorted(every, key=lambda name: -every[name])
    assert [row[0] for row in cells(page, "linears")] == order
    kept = cells(page, "kept-float")
    assert len(kept) == -(-len(every) // 20)
    assert [row[0] for row in kept] == order[: len(kept)]
    assert kept[0][1] == f"{100 * every[order[0]]:.4f} %"
    assert by_sensitivity(calibration.groups)[: len(kept)] == kept_float(calibration.groups)


def test_the_kept_layers_are_those_that_a_build_keeps(calibration):
    """Both rank them; they must not come to differ."""
    from visistage.compile.quantize.quantize import kept_float as kept_by_build
    from visistage.graphs.quantization import parse_quant_config

    schemes = {
        name: "w8" if name == "lm_head" else "w8a8"
        for group in calibration.groups.values()
        for name in group.sensitivity
    }
    built = kept_by_build(parse_quant_config("int8:keep=5%"), schemes, calibration)
    assert list(built) == [name for name, _ in kept_float(calibration.groups)]


def test_rows_are_shown_by_stage(page, calibration):
    rows = cells(page, "rows")
    stages = [one for one in rows if one[0].startswith("stage")]
    assert [row[1] for row in stages] == [str(stage.visual_tokens) for stage in PLAN.stages]
    assert {row[2] for row in rows} == {"4000"}
    assert {row[3] for row in rows} == {"2000"}
    assert {"head", "vision encoder and projector"} <= {row[0] for row in rows}


def test_quantiles_and_censoring_are_shown_in_words(page, calibration):
    triggers = cells(page, "triggers")
    for row, one in zip(triggers, calibration.dynamics["triggers"], strict=True):
        assert row == [str(one["cosine"]), " ".join(one["t"]["text"].split())]
    assert any("8 of 40" in row[1] for row in triggers)
    table = cells(page, "cosines")
    assert [[float(x) for x in row[1:]] for row in table] == calibration.dynamics["min_cosine"]


def test_observers_are_compared_by_their_mean_errors(page, calibration):
    groups = list(calibration.groups.values())
    for name, plain, smooth in cells(page, "observers"):
        assert plain == f"{100 * np.mean([g.errors[name] for g in groups]):.4f} %"
        assert smooth == f"{100 * np.mean([g.smoothed_errors[name] for g in groups]):.4f} %"


def test_every_group_is_in_one_series(calibration):
    every = series_of(calibration.groups)
    names = [name for one in every for _, name, _ in one.entries]
    assert sorted(names) == sorted(calibration.groups)
    decoder = [one for one in every if one.decoder]
    assert all([layer for layer, *_ in one.entries] == [*range(LAYERS)] for one in decoder)
    assert decoder[0].title == "self_attn: k, q, v"
    assert every[4].title == "encoder self_attn: k, q, v"
    assert len(decoder) == 4
    assert sum(one.rows[0] > 0 for one in rows_seen(calibration.groups, PLAN)) == 5


# --- warnings -------------------------------------------------------------------------------------


def clean(calibration):
    """The same with nothing to complain about."""
    triggers = [
        {**row, "t": {**row["t"], "reached": row["t"]["of"]}}
        for row in calibration.dynamics["triggers"]
    ]
    groups = {
        name: replace(
            group, sensitivity={n: dict.fromkeys(e, 1e-4) for n, e in group.sensitivity.items()}
        )
        for name, group in calibration.groups.items()
    }
    return without(
        calibration, dynamics={**calibration.dynamics, "triggers": triggers}, groups=groups
    )


def changed_group(calibration, **changes):
    name = next(name for name in calibration.groups if name.startswith("model.layers.7."))
    return {**calibration.groups, name: replace(calibration.groups[name], **changes)}


def test_where_nothing_speaks_against_it_the_page_says_so(calibration):
    spotless = clean(calibration)
    assert calibration_warnings(spotless) == []
    assert "speaks against it" in render_calibration(spotless)
    assert "Before you trust it" not in render_calibration(spotless)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (lambda c: {"choice": {}}, "given, not chosen"),
        (lambda c: {"choice": choice(fits=False, chosen=None)}, "No pruned plan kept the budget"),
        (lambda c: {"choice": choice(warnings=["Mind the gap."])}, "Mind the gap."),
        (lambda c: {"choice": choice(chosen=2)}, "Nothing was held out"),
        (lambda c: {"choice": wide()}, "anywhere between"),
        (lambda c: {"samples": SampleFacts((), ("a",), "e" * 64)}, "Only 1 sample was read"),
        (
            lambda c: {"samples": replace(c.samples, unreadable=(("x.png", "cut short"),))},
            "1 of 121 samples could not be read",
        ),
        (lambda c: {"groups": {}}, "No ranges were measured"),
        (lambda c: {"rows": "dense"}, "Ranges are of the dense model's rows"),
        (lambda c: {"include_prefix": True}, "Rows before the image count"),
        (lambda c: {"groups": changed_group(c, rows=120)}, "stage 2, layer 7 rest on 120 rows"),
        (
            lambda c: {
                "groups": changed_group(c, smoothed_thresholds=dict.fromkeys(OBSERVERS, 0.1))
            },
            "deepest in model.layers.7.self_attn.q_proj",
        ),
        (
            lambda c: {
                "groups": changed_group(c, sensitivity={"loud": {"w8a8": 0.2, "w8": 0, "w4": 0}})
            },
            "most in loud: 20",
        ),
    ],
)
def test_each_warning_is_raised_by_its_cause_alone(calibration, changes, said):
    spotless = clean(calibration)
    doubted = calibration_warnings(without(spotless, **changes(spotless)))
    assert len(doubted) == 1, doubted
    assert said in doubted[0]


def test_few_rows_of_the_head_are_no_warning(calibration):
    """INT8 bundles round only its weights."""
    spotless = clean(calibration)
    head = {**spotless.groups, "lm_head": replace(spotless.groups["lm_head"], rows=7)}
    assert calibration_warnings(without(spotless, groups=head)) == []


def wide():
    few = candidate("visipruner", 0.5, 398, verdict="chosen", front=True)
    return choice(budget={"cost": 0.5}, chosen=0, candidates=[{**few, "held_out": agreed(19, 20)}])


def test_prompts_that_never_trigger_are_a_warning(calibration):
    assert any(
        "8 of 40 prompts never triggered" in warning
        for warning in calibration_warnings(calibration)
    )


# --- the page -------------------------------------------------------------------------------------


def test_every_tag_is_closed_and_every_drawing_is_xml(page):
    Tables(page)
    drawings = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(drawings) > 10
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    assert "nan" not in " ".join(drawings)
    assert "None" not in re.sub("<style>.*?</style>", "", page, flags=re.S)


def test_nothing_is_fetched_and_nothing_runs(page):
    assert not re.search(r"""(?:src|href)=|url\(|@import|https?:|<script""", page)
    assert "default-src 'none'" in page


def test_strings_are_escaped(calibration):
    samples = SampleFacts((NASTY,), (NASTY,), "d" * 64, ((NASTY, NASTY),))
    sick = choice(
        text=NASTY, cost=NASTY, warnings=[NASTY], reasons={NASTY: NASTY}, chosen=0,
        candidates=[candidate(NASTY, 0.5, 390, 700, NASTY, True)],
    )  # fmt: skip
    text = render_calibration(without(calibration, model=NASTY, samples=samples, choice=sick))
    assert "<script" not in text
    assert "<b>'x'" not in text
    assert html.escape(NASTY, quote=False)[:30] in text
    Tables(text)
    for drawing in re.findall(r"<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(drawing)


@pytest.mark.parametrize(
    ("parts", "absent"),
    [
        ({"choice": {}}, ["candidates"]),
        ({"dynamics": {}}, ["triggers", "kept", "cosines"]),
        ({"choice": {}, "dynamics": {}}, ["candidates", "triggers"]),
        ({"groups": {}}, ["groups", "linears", "rows"]),
        ({"groups": {}, "choice": {}, "dynamics": {}}, ["groups", "triggers", "candidates"]),
    ],
)
def test_what_was_not_measured_is_left_out(calibration, parts, absent):
    tables = Tables(render_calibration(without(calibration, **parts))).tables
    assert not set(absent) & set(tables)
    full = {"candidates", "triggers", "kept", "cosines", "groups", "linears", "rows"}
    assert len(full & set(tables)) < len(full)


def test_a_dense_choice_and_a_cost_budget_have_a_page(calibration):
    dense = choice(fits=False, chosen=None, budget={"cost": 0.2}, text="dense")
    text = render_calibration(without(calibration, choice=dense))
    assert '<p class="headline">dense</p>' in text
    assert "at most 20.0" in html.unescape(text)
    nothing = choice(fits=False, chosen=None, candidates=[])
    assert (
        "candidates" not in Tables(render_calibration(without(calibration, choice=nothing))).tables
    )


@pytest.mark.parametrize(
    "goal", [SelectionGoal(lose=0.01), SelectionGoal(lose=0.0), SelectionGoal(cost=0.6)]
)
def test_what_choose_plan_returns_can_be_shown(calibration, goal):
    def measure(plan):
        lost = 0 if plan.trigger >= 4 else 40 * (4 - plan.trigger)
        return Agreement(Share(400 - lost, 400), Share(400 - lost, 400), lost / 400, (None, 1))

    dynamics = Dynamics.of(readings())
    pricing = Pricing(Geometry(LAYERS, 64, 128, 100), TOKENS)
    made = choose_plan(dynamics, pricing, replace(goal, most=6), measure, measure)
    shown = replace(
        calibration,
        plan=made.plan,
        choice=made.to_dict() | {"max_tokens": 16},
        dynamics=dynamics.to_dict(),
    )
    text = render_calibration(shown)
    Tables(text)
    assert len(cells(text, "candidates")) == len(made.tried)
    assert f'<p class="headline">{made.text}</p>' in text
    for reason in made.rationale.values():
        assert reason in html.unescape(text)


def test_a_large_model_makes_a_page_of_bounded_size(calibration):
    """A 7B has 227 groups here: 32 decoder layers and 23 encoder layers of four, and the rest."""
    random = np.random.default_rng(2)
    config = ModelConfig.from_hf(KNOWN_MODELS["llava-7b"].config)
    groups = {one.name: ranges_of(one, random, 4000) for one in linear_groups(config)}
    plan = preset("visipruner", layers=32, visual_tokens=576)
    names = tuple(f"photographs-of-the-summer.jsonl:{i}" for i in range(100_000))
    samples = SampleFacts(("x.jsonl",), names, "d" * 64, tuple((n, "cut short") for n in names))
    many = replace(calibration, plan=plan, groups=groups, samples=samples)
    assert len(groups) > 200
    assert len(render_calibration(many).encode()) < 1.5e6


def test_the_page_is_written_whole_or_not_at_all(calibration, tmp_path):
    assert write_report(calibration, tmp_path) == CALIBRATION_PAGE
    assert (tmp_path / CALIBRATION_PAGE).read_text(encoding="utf-8") == render_calibration(
        calibration
    )
    (tmp_path / "taken" / CALIBRATION_PAGE).mkdir(parents=True)
    with pytest.raises(CapacityError, match="cannot be written"):
        write_report(calibration, tmp_path / "taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == [CALIBRATION_PAGE]


# --- charts ---------------------------------------------------------------------------------------


def test_a_mark_lies_where_its_value_says():
    chart = Chart(Axis(0, 10), Axis(0, 1), "halves", width=176, height=154)
    chart.dot(5, 0.5, "ink")
    chart.dot(10, 1, "ink")
    chart.dot(99, -1, "ink")  # drawn at the ends
    found = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', chart.svg())
    assert [tuple(map(float, one)) for one in found] == [(102, 64), (152, 14), (152, 114)]


def test_log_axes_give_every_decade_the_same_room():
    axis = of_decades([0.003, 40])
    assert (axis.low, axis.high) == (0.001, 100)
    assert axis.part(0.001) == 0
    assert axis.part(0.1) == pytest.approx(0.4)
    assert axis.part(0) == 0


def test_only_smoothed_layers_have_an_alpha(calibration):
    smoothed = [
        name
        for name, group in calibration.groups.items()
        if group.alpha is not None and ".layers." in name
    ]
    drawn = alphas(series_of(calibration.groups))
    assert sorted(re.findall(r"<title>(\S+): alpha 0.5</title>", drawn)) == sorted(smoothed)


@pytest.mark.parametrize(
    ("axis", "words"),
    [
        (of_decades([0.0001, 0.0004], shares=True), ["0.01 %", "0.02 %", "0.05 %"]),
        (of_decades([3, 40]), ["2", "5", "10", "20", "50"]),
        (of_decades([0]), ["1", "2"]),
        (of_shares(0.93, 1.0), ["92 %", "94 %", "96 %", "98 %", "100 %"]),
        (of_shares(0, 1), ["0 %", "25 %", "50 %", "75 %", "100 %"]),
        (of_shares(0.9991, 1.0), ["99.9 %", "100.0 %"]),
        (of_shares(1, 1), ["99.0 %", "99.2 %", "99.4 %", "99.6 %", "99.8 %", "100.0 %"]),
        (of_layers(3), ["0", "1", "2"]),
        (of_layers(32), ["0", "4", "8", "12", "16", "20", "24", "28"]),
    ],
)
def test_ticks_are_round(axis, words):
    assert [word for _, word in axis.ticks] == words


def test_names_of_dots_cover_neither_each_other_nor_the_edge():
    chart = Chart(Axis(0, 10), Axis(0, 10), "dots")
    for x, y in ((5, 5), (5, 5.2), (5, 5.4), (5.3, 5.2), (10, 5), (0, 0)):
        chart.name(x, y, "stage0")
    drawn = ElementTree.fromstring(chart.svg())
    texts = [text for text in drawn.iter() if text.tag.endswith("text") and text.text == "stage0"]
    places = [(float(text.get("x")), float(text.get("y"))) for text in texts]
    width, height = 6.5 * len("stage0"), 12
    assert len(places) >= 4
    for x, y in places:
        assert chart.left <= x <= chart.width - width
        others = [(u, v) for u, v in places if (u, v) != (x, y)]
        assert all(abs(u - x) >= width or abs(v - y) >= height for u, v in others)


def test_close_cosines_are_told_apart():
    rows = [[0.9, 0.95, 0.99, 0.999, 0.9999]] * 3
    facts = {"quantiles": [0, 0.25, 0.5, 0.75, 1], "min_cosine": rows}
    drawn = ElementTree.fromstring(cosines(facts))
    heights = [
        float(m[1]) for m in re.finditer(r'cy="([\d.]+)"', ElementTree.tostring(drawn, "unicode"))
    ]
    assert len(set(heights)) == 1
    exact = {"quantiles": [0, 0.5, 1], "min_cosine": [[1, 1, 1], [1, 1, 1]]}
    ElementTree.fromstring(cosines(exact))


def test_a_histogram_counts_those_that_never_got_there():
    drawn = histograms([("cos 0.9", spread([3, 3, None], 4))], 4, "never")
    assert "2 of 3 prompts in layer 3" in drawn
    assert "1 of 3 prompts never" in drawn


def test_the_plot_marks_the_chosen_plan_and_the_budget():
    drawn = pareto(choice())
    assert len(re.findall(r'class="mark warm"', drawn)) == 1
    assert len(re.findall(r'class="mark amber"', drawn)) == 1
    assert len(re.findall(r'class="mark cool open"', drawn)) == 1
    assert "budget: 99.0" in drawn


def test_a_plan_that_agrees_little_does_not_flatten_the_plot(calibration):
    bad = choice(candidates=[candidate("bad", 0.1, 80), *choice()["candidates"]], chosen=2)
    assert "75 %" not in re.findall(r"<text[^>]*end.>(.*?)</text>", pareto(bad))
    assert "are drawn at the foot" in render_calibration(without(calibration, choice=bad))
    assert "are drawn at the foot" not in render_calibration(calibration)


def test_reasons_come_in_the_order_of_the_layers(calibration):
    turned = choice(reasons={"K": "holds", "e": "quiet", "s": "none", "t": "late"})
    text = render_calibration(without(calibration, choice=turned))
    assert re.findall(r"<div><dt>(.)</dt>", text) == ["s", "t", "K", "e"]


# --- a browser ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_looks_like_a_page(browser, page, tmp_path, scheme):
    file, shot = tmp_path / CALIBRATION_PAGE, tmp_path / "shot.png"
    file.write_text(page, encoding="utf-8")
    _, complaints = browser(
        file.as_uri(),
        f"--screenshot={shot}",
        "--window-size=1000,1500",
        f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
    )
    assert not complaints
    check_picture(shot, scheme, least=0.01)


def test_an_injected_script_does_not_run(browser, page, tmp_path):
    """Even unescaped: the policy stops it."""
    file = tmp_path / CALIBRATION_PAGE
    file.write_text(page.replace("</body>", NASTY + "</body>"), encoding="utf-8")
    dom, complaints = browser(file.as_uri(), "--dump-dom")
    assert complaints  # refused to execute
    assert "<title>owned" not in dom
