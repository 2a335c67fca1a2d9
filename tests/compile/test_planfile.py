"""Plan files, the short form of presets, and the report of a plan."""

import json
import sys
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from visistage.cli.show.plan_view import plan_json, plan_label, plan_table
from visistage.compile.planfile import (
    MAX_FILE_BYTES,
    load_plan,
    modes_from_text,
    modes_text,
    plan_from_json,
    plan_from_yaml,
    plan_to_yaml,
    resolve_plan,
    save_plan,
)
from visistage.graphs.errors import MissingDependencyError, PlanError
from visistage.graphs.plan.cost import LLAVA_7B, Geometry, plan_cost
from visistage.graphs.plan.plan import StagePlan
from visistage.graphs.plan.stages import Stage
from visistage.graphs.presets.presets import PRESETS, preset

PLAN = preset("visipruner", 32, 576, shallow=6, t=14, keep=32, e=23)

HAND_WRITTEN = """
version: 1
name: mine
layers: 8
visual_tokens: 9
stages:
- {layers: [0, 4], visual_tokens: 9, modes: "sink, text_blind x1, dense x2"}
- layers: [4, 6]
  visual_tokens: 3
  modes: [dense, dense]
- {layers: [6, 8], visual_tokens: 0, modes: dense}
edges: [{op: select, score: value_norm, keep: 3}, {op: drop}]
"""


def edited(old, new):
    assert old in HAND_WRITTEN
    return HAND_WRITTEN.replace(old, new)


def test_hand_written_yaml():
    plan = plan_from_yaml(HAND_WRITTEN)
    assert plan.stages[0].modes == ("sink", "text_blind", "dense", "dense")
    assert plan.stages[2].modes == ("dense", "dense")
    assert (plan.trigger, plan.keep, plan.exit) == (3, 3, 5)


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json", ".JSON"])
def test_files_round_trip(tmp_path, suffix):
    path = tmp_path / f"plan{suffix}"
    save_plan(PLAN, path)
    assert load_plan(path) == PLAN
    assert resolve_plan(str(path), 32, 576) == PLAN


@st.composite
def some_plans(draw):
    name = draw(st.sampled_from(sorted(PRESETS)))
    layers = 32 if name == "vica" else draw(st.integers(4, 40))
    plan = preset(name, layers, draw(st.integers(8, 700)))
    note = draw(st.text(max_size=60).filter(str.isprintable))
    fields = {"note": note, "calibrated": draw(st.booleans())}
    return replace(plan, **fields, name=draw(st.sampled_from(["1", "1e3", "no", "a"])))


@given(some_plans())
@settings(deadline=None)
def test_any_plan_round_trips_through_yaml(plan):
    again = plan_from_yaml(plan_to_yaml(plan))
    assert again == plan
    assert again.hash == plan.hash
    assert plan_from_json(json.dumps(plan.to_dict())) == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            edited("name: mine", "name: mine\nname: yours"),
            "name: found again in line 4 after line 3",
        ),
        (
            edited("modes: dense}", "modes: dense, modes: sink}"),
            "stages[2].modes: found again in line 11",
        ),
        (edited("op: select", "op: select, keep: 3"), "edges[0].keep: found again in line 12"),
        (edited("name: mine", "name: &a mine"), "line 3: found the alias or anchor 'a'"),
        (edited("name: mine", "name: !!python/name:os.system x"), "found the tag"),
        (edited("name: mine", "name: !!int ''"), "line 3: found the tag"),
        (edited("name: mine", "<<: {name: mine}"), "<<: found again in line 3 (a merge)"),
        (edited("[0, 4]", "[0, 4"), "line"),
        (edited("name: mine", "name: 2001-99-99"), "not YAML: month must be in 1..12"),
        (edited("name: mine", "name: 2001-09-09"), "name: found datetime.date(2001, 9, 9)"),
        (edited("name: mine", "name: 0x" + "f" * 9000), "name: found a huge int"),
        (edited("name: mine", "? [a, b]\n: 1"), "found unhashable key"),
        (edited("name: mine", "name: mine\n--- {}"), "not YAML"),
        (edited("name: mine", 'name: "\\e[2J"'), "name: found '\\x1b[2J'"),
        (edited("name: mine", 'name: mine\n"\\e[2J": 1\n"\\e[2J": 1'), "'\\x1b[2J': found again"),
        (edited("name: mine", "name: mi\x00ne"), "not YAML"),
        (edited("layers: 8", "layers: eight"), "layers: found 'eight'"),
        (edited("text_blind x1", "text_blind x9"), "stages[0].modes: found 12 modes, expected 4"),
        (edited("text_blind x1", "text_blnd"), "stages[0].modes[1]: found 'text_blnd'"),
        (edited("text_blind x1", "x1 text_blind"), "stages[0].modes: found 'x1 text_blind'"),
        (edited("dense x2", "dense x99999999"), "stages[0].modes: found 'dense x99999999'"),
        (edited("[4, 6]", "4-6"), "stages[1].layers: found '4-6', expected a list"),
        ("", "plan: found None, expected a mapping"),
        ("- 1", "plan: found [1], expected a mapping"),
        ("stages: 7", "version: found nothing"),
        ("a: " + "[" * 50000, "found more than 10 levels"),
        ("[" * 2000 + "]" * 2000, "found more than 10 levels"),
    ],
)
def test_bad_yaml(text, message):
    with pytest.raises(PlanError) as caught:
        plan_from_yaml(text)
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"version": 1, "version": 1}', "version: found twice"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("1" * 5000, "not JSON"),
        ('{"version": NaN}', "NaN is no finite number"),
        ('{"version": 1}', "name: found nothing"),
        ("null", "plan: found None"),
    ],
)
def test_bad_json(text, message):
    with pytest.raises(PlanError) as caught:
        plan_from_json(text)
    assert message in str(caught.value)


@given(st.text(max_size=60) | st.text("{}[]:,-&*!|>'\"%@` \n?x0.", max_size=40))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_text_is_refused_in_words(text):
    for parse in (plan_from_yaml, plan_from_json):
        with pytest.raises(PlanError):
            parse(text)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_damaged_file_is_a_plan_or_a_plan_error(data):
    cut = data.draw(st.integers(0, len(HAND_WRITTEN) - 1))
    width = data.draw(st.integers(0, 6))
    filling = data.draw(st.text("{}[]:,-&*!0123456789 \nxabd'\"", max_size=4))
    text = HAND_WRITTEN[:cut] + filling + HAND_WRITTEN[cut + width :]
    try:
        plan = plan_from_yaml(text)
    except PlanError:
        return
    assert plan_from_yaml(plan_to_yaml(plan)) == plan


def test_errors_name_the_file_and_the_field(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text(edited("visual_tokens: 3", "visual_tokens: 4"))
    with pytest.raises(PlanError, match=r"broken.yaml: stages\[1\].visual_tokens: found 4"):
        load_plan(path)


def test_unusable_files(tmp_path):
    big, binary = tmp_path / "big.yaml", tmp_path / "binary.json"
    big.write_text("#" * (MAX_FILE_BYTES + 1))
    binary.write_bytes(b"\xff\xfe\x00")
    for path, message in [
        (big, "at most 65536 bytes"),
        (binary, "binary.json: the plan is not JSON"),
        (tmp_path / "none.yaml", "cannot be read: No such file"),
        (tmp_path / "no.txt", "expected a name in .yaml, .yml, .json"),
        ("a\x00.yaml", "cannot be read"),
    ]:
        with pytest.raises(PlanError, match=message):
            load_plan(path)
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(PlanError, match="cannot be read"):
        load_plan(tmp_path / "folder.yaml")
    with pytest.raises(PlanError, match="expected a name in"):
        save_plan(PLAN, tmp_path / "plan")
    with pytest.raises(PlanError, match="cannot write the plan: No such file"):
        save_plan(PLAN, tmp_path / "none" / "plan.json")


def test_a_byte_order_mark_is_no_obstacle(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(HAND_WRITTEN, encoding="utf-8-sig")
    assert load_plan(path).name == "mine"


@pytest.mark.parametrize("text", sorted(PRESETS))
def test_resolve_presets(text):
    assert resolve_plan(text, 32, 576) == preset(text, 32, 576)


def test_resolve_presets_with_options():
    found = resolve_plan("visipruner:t=14, keep=32,e=23,shallow=6", 32, 576)
    assert found == PLAN
    assert resolve_plan("visipruner:", 32, 576) == preset("visipruner", 32, 576)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("visipruner:tt=3", "tt: found an unknown key"),
        ("visipruner:t", "option: found 't', expected key=value"),
        ("fastvv", "Did you mean 'fastv'?"),
        ("", "preset: found ''"),
        ("x" * 300, "preset: found"),
        ("plans/mine", "expected a name in .yaml"),
        ("plans/mine.yaml", "cannot be read"),
    ],
)
def test_resolve_refuses(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlanError) as caught:
        resolve_plan(text, 32, 576)
    assert message in str(caught.value)


def test_a_file_without_suffix_is_recognised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text(HAND_WRITTEN)
    with pytest.raises(PlanError, match="found the file 'mine'"):
        resolve_plan("mine", 8, 9)


def test_a_plan_must_fit_the_model(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(HAND_WRITTEN)
    assert resolve_plan(str(path), 8, 9).name == "mine"
    with pytest.raises(PlanError, match=r"mine.yaml: found layers=8, expected 32"):
        resolve_plan(str(path), 32, 9)
    with pytest.raises(PlanError, match=r"mine.yaml: found visual_tokens=9, expected 576"):
        resolve_plan(str(path), 8, 576)


def test_yaml_is_named_when_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(MissingDependencyError, match="pip install"):
        plan_from_yaml(HAND_WRITTEN)
    assert resolve_plan("visipruner", 32, 576).keep == 64


@settings(deadline=None)
@given(st.lists(st.sampled_from(["dense", "sink", "text_blind"]), min_size=2, max_size=30))
def test_runs_of_modes(modes):
    text = modes_text(modes)
    assert modes_from_text(text, depth=99) == modes
    assert modes_text(["sink", "dense", "dense"]) == "sink, dense x2"


# --- report ---------------------------------------------------------------------------------------


def rendered(plan, geometry=LLAVA_7B, width=120, **options):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    facts = plan_json(plan, geometry, **options)
    console.print(plan_table(facts, plan, options.get("outcome")))
    return console.export_text()


def test_table_of_a_plan():
    text = rendered(PLAN)
    for words in (
        PLAN.name,
        PLAN.hash[:12],
        "sink, text_blind x5, dense x9",
        "select 32 by value_norm",
        "drop",
        "51.60 %",
        "45.81 %",
        "139.50 MiB",
        "288.00 MiB",
        "279.00",
        "35 prefix + 576 visual + 40 text rows",
        "chosen by hand, not calibrated",
    ):
        assert words in text


def test_table_says_what_is_not_calibrated():
    assert "uncalibrated defaults: shallow, t, e, keep" in rendered(preset("visipruner", 32, 576))
    assert "calibrated" not in rendered(preset("dense", 32, 576))
    hand = StagePlan("mine", 2, 9, (Stage((0, 2), 9, ("sink", "dense")),))
    assert "not calibrated" in rendered(hand, Geometry(2, 8, 16, 32))
    measured = replace(PLAN, calibrated=True, note="on 300 pictures [bold]")
    assert plan_label(measured) is None
    assert "on 300 pictures [bold]" in rendered(measured)  # a note is no markup


def test_json_has_the_same_numbers():
    facts = plan_json(PLAN, LLAVA_7B, 35, 60)
    cost = plan_cost(PLAN, LLAVA_7B, 35, 60)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["totals"]["prefill_macs"] == cost.prefill_macs
    in_stages = sum(stage["prefill_macs"] for stage in facts["stages"])
    assert in_stages + cost.head_macs == cost.prefill_macs
    for field in ("visual_macs", "visual_kv_bytes", "kv_bytes"):
        assert sum(stage[field] for stage in facts["stages"]) == facts["totals"][field]
    assert f"{facts['reduction_percent']['prefill_macs']:.1f}" == "44.5"
    assert facts["stages"][0]["edge"] == "select 32 by value_norm"
    assert facts["stages"][2]["edge"] is None
    assert (facts["trigger"], facts["keep"], facts["exit"]) == (14, 32, 23)
    assert facts["label"] == "not calibrated"


@pytest.mark.parametrize("accounting", ["modes", "paper", "graphs"])
def test_report_names_its_accounting(accounting):
    assert plan_json(PLAN, LLAVA_7B, accounting=accounting)["accounting"] == accounting
    assert "Accounting:" in rendered(PLAN, accounting=accounting)


def test_table_fits_a_narrow_terminal():
    assert all(len(line) <= 80 for line in rendered(PLAN, width=80).splitlines())
