"""The peers' benchmark without peers: made-up runners, lower bounds and agreement by hand."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from visistage.bench import environments, peer_models, peer_tables, peers, scaling, tables
from visistage.bench.lower_bound import (
    Rates,
    layer_work,
    milliseconds,
    prefill_layers,
    step_work,
)
from visistage.bench.peer_models import REFERENCE, Peer, PeerCheckpoint, all_peers
from visistage.bench.runner import (
    RUNNERS,
    Answered,
    PeerError,
    Runner,
    ending,
    last_line,
    parse_line,
)
from visistage.compile.checkpoint.dummy import make_dummy
from visistage.compile.checkpoint.known_models import model_config
from visistage.graphs.config import ModelConfig
from visistage.graphs.errors import VisistageError
from visistage.graphs.plan.call_cost import COUNTS, Work, total_work, vision_work

RATES = Rates({"float32": 1e9, "bfloat16": 2e9, "int8": 4e9}, 1e9)


@pytest.fixture(scope="module")
def demo():
    return PeerCheckpoint.named("demo")


# --- a runner -------------------------------------------------------------------------------------

HONEST = """
from serving import Stopwatch, serve
class Honest:
    about = {"made": "up"}
    def __init__(self, model, threads): pass
    def ask(self, image, question, text, new):
        print("noise on stdout")
        watch = Stopwatch()
        for token in range(new):
            watch.hear(token + int(image.sum()))
        return watch.heard(len(text))
serve(Honest)
"""
CRASHING = HONEST.replace("watch = Stopwatch()", "import os, signal; os.kill(os.getpid(), 11)")
SILENT = HONEST.replace("watch = Stopwatch()", "import time; time.sleep(60)")
FAILING = HONEST.replace("): pass", '): raise SystemExit("no such model in /somewhere/deep/file")')


def runner(source, tmp_path) -> Runner:
    script = tmp_path / "made_up.py"
    script.write_text(source)
    settings = json.dumps({"model": "m", "threads": 1})
    return Runner(
        "made up",
        [sys.executable, str(script), settings],
        tmp_path / "log",
        {"PYTHONPATH": str(RUNNERS)},
    )


def request(tmp_path, new=3) -> dict:
    np.save(tmp_path / "0.npy", np.full((2, 2, 3), 1, np.uint8))
    return {"image": str(tmp_path / "0.npy"), "question": "q", "text": "four", "new": new}


def test_a_runner_answers_in_lines_whatever_its_libraries_print(tmp_path):
    with runner(HONEST, tmp_path) as one:
        ready = one.ready(60)
        answer = one.ask(request(tmp_path), 60)
    assert ready.about == {"made": "up"}
    assert ready.peak_mib > 5
    assert answer.tokens == (12, 13, 14)
    assert answer.prompt_tokens == 4
    assert answer.first_ms >= 0
    assert answer.per_token_ms >= 0


def test_a_runner_that_crashes_is_reported_by_its_signal(tmp_path):
    with runner(CRASHING, tmp_path) as one:
        one.ready(60)
        with pytest.raises(PeerError, match=r"made up: ended while answering.*SIGSEGV"):
            one.ask(request(tmp_path), 60)
        with pytest.raises(PeerError, match="ended"):  # and again, at once
            one.ask(request(tmp_path), 60)


def test_a_runner_that_does_not_load_says_why_without_folders_of_this_machine(tmp_path):
    with (
        runner(FAILING, tmp_path) as one,
        pytest.raises(PeerError, match=r"ended while loading \(exit code 1\).*no such model") as e,
    ):
        one.ready(60)
    assert "somewhere" not in str(e.value)


def test_a_runner_that_hangs_is_given_up(tmp_path):
    with runner(SILENT, tmp_path) as one:
        one.ready(60)
        with pytest.raises(PeerError, match="longer than 1 s"):
            one.ask(request(tmp_path), 1)
    assert one.process.returncode is not None


@pytest.mark.parametrize("line", ["Loading weights", "[1, 2]", "{"])
def test_a_line_that_is_no_answer_is_shown(line):
    with pytest.raises(PeerError, match="expected a line of JSON"):
        parse_line(line, "made up")


def test_reasons_carry_neither_addresses_nor_folders():
    log = "first\nERROR: no file https://host.example/simple/x in /home/me/.cache/file.py: gone\n\n"
    assert last_line(log) == "ERROR: no file (address) in .../file.py: gone"
    assert last_line(" \n") == "it wrote nothing"
    assert ending(-9) == "killed by SIGKILL"


# --- a peer during a run --------------------------------------------------------------------------


def peer_run(key="made-up", **fields) -> peers.PeerRun:
    peer = Peer(key, key, "none", environments.OWN, lambda *_: None, **fields)
    return peers.PeerRun(peer)


def answered(tokens, rows=160, first=10.0) -> Answered:
    return Answered(rows, tuple(tokens), first, 2.0, 100.0)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (answered([1, 2], rows=161), "161 tokens, the others' has 160"),
        (answered([1]), "answered 1 tokens, expected 2"),
    ],
)
def test_another_prompt_or_length_fails(answer, words):
    with pytest.raises(PeerError, match=words):
        peers.check(answer, "made up", 160, 2)


def test_a_peer_that_cannot_be_set_up_is_in_the_record_with_the_reason(demo):
    def model(subject):
        raise PeerError("llama-cpp: pip install failed")

    one = peers.PeerRun(Peer("x", "X", "none", environments.OWN, model))
    one.start(demo, 1, stack=None)
    assert one.ask(None, None, 1, 1) is None
    row = peers.row_of(one, demo, [], RATES, one)
    assert row == {
        "key": "x",
        "label": "X",
        "plan": "dense",
        "failed": "llama-cpp: pip install failed",
    }
    machine = {"rounds": 1, "threads": 1, "tokens": 1, "prompt_tokens": 1}
    machine["rates"] = RATES.to_dict()
    page = peer_tables.peers([machine, row])
    assert "* X: llama-cpp: pip install failed" in page
    assert "| X |" not in page


def test_an_environment_that_fails_names_its_step(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    broken = environments.Environment("broken", (("no-such-command",),))
    with pytest.raises(PeerError, match=r"broken: -m pip no-such-command failed \(exit code"):
        environments.interpreter(broken, 2)
    assert not (tmp_path / "peers" / "broken" / environments.NOTE).exists()


# --- agreement ------------------------------------------------------------------------------------


def test_agreement_ends_at_the_first_token_that_differs():
    assert peers.leading((1, 2, 3, 4), (1, 2, 9, 4)) == 0.5
    wanted = {(1, "cold"): answered([1, 2, 3, 4]), (1, "second"): answered([5, 6, 7, 8])}
    given = {(1, "cold"): answered([1, 2, 9, 4]), (1, "second"): answered([5, 6, 7, 8])}
    assert peers.agreement(given, wanted) == {"leading": 0.75, "equal": 0.5, "answers": 2}
    assert peers.agreement({}, wanted) is None


def test_what_the_reference_says_past_its_end_does_not_count():
    wanted = {(1, "cold"): answered([7, 2, 5, 5])}
    given = {(1, "cold"): answered([7, 2, 6, 6])}
    assert peers.agreement(given, wanted)["equal"] == 0
    assert peers.agreement(given, wanted, ends=(2,))["equal"] == 1


def test_the_first_round_warms_up_and_counts_nowhere(demo):
    one = peer_run(precision="fp32")
    one.ready = peers.Ready(1.0, 2.0, 3.0, {})
    one.answers = {
        (0, "cold"): answered([1], first=1000),
        (1, "cold"): answered([1], first=10),
        (2, "cold"): answered([1], first=20),
    }
    asked = [question for _, found in peers.questions(demo, 2) for question in found]
    row = peers.row_of(one, demo, asked, RATES, one)
    assert row["cold"]["median"] == 15
    assert row["agreement"]["answers"] == 2
    assert row["floor"]["cold"] > row["floor"]["second"] > row["floor"]["per_token"] > 0


class NotingRun(peers.PeerRun):
    """A peer that notes what it is told; its second load fails where it is called "fails"."""

    def __init__(self, key, told):
        super().__init__(Peer(key, key, "none", environments.OWN, lambda *_: None))
        self.told = told

    def start(self, subject, threads, stack):
        self.told.append(f"{self.peer.key} loads")
        stack.callback(self.told.append, f"{self.peer.key} ends")
        if self.peer.key == "fails" and self.told.count("fails loads") == 2:
            self.failed = "no memory left"

    def ask(self, image, question, rows, new, patience):
        assert patience == 60
        if self.failed is None:
            self.told.append(f"{self.peer.key} {question.key[0]} {question.key[1]}")


def test_apart_one_peer_is_loaded_at_a_time_and_warmed_up_each_time(demo, tmp_path):
    told = []
    runs = [NotingRun("a", told), NotingRun("fails", told)]
    peers.Asking(demo, 1, 2, 60, tmp_path, list(peers.questions(demo, 4))).apart(runs)
    turn = {key: ["loads", "0 cold", "{} cold", "{} second", "ends"] for key in ("a", "fails")}
    wanted = []
    for number, order in ((1, ("fails", "a")), (2, ("a", "fails")), (3, ("fails", "a"))):
        for key in order:
            said = [f"{key} {words.format(number)}" for words in turn[key]]
            failed = key == "fails" and number > 1
            wanted += ([said[0], said[-1]] if number == 2 else []) if failed else said
    assert told == wanted
    together = []
    runs = [NotingRun("a", together), NotingRun("b", together)]
    peers.Asking(demo, 1, 2, 60, tmp_path, list(peers.questions(demo, 1))).together(runs)
    assert together[:2] == ["a loads", "b loads"]
    assert together[-2:] == ["b ends", "a ends"]


def test_a_reference_that_does_not_run_is_no_peer_apart():
    every = all_peers(("cpu",), 576)
    assert peers.chosen(every, ["visistage-dense-int8"])[0].key == REFERENCE
    (only,) = peers.chosen(every, ["visistage-dense-int8"], apart=True)
    assert only.key == "visistage-dense-int8"


# --- questions ------------------------------------------------------------------------------------


def test_no_picture_or_question_comes_twice(demo):
    found = list(peers.questions(demo, 4))
    assert len({image.tobytes() for image, _ in found}) == 4
    for image, asked in found:
        assert image.shape == (demo.side, demo.side, 3)
        assert [question.key[1] for question in asked] == ["cold", "second"]
        assert len({question.text for question in asked}) == 2


def test_keys_of_peers_name_one_each():
    keys = [peer.key for peer in all_peers(("cpu", "openvino"), 576)]
    assert keys[0] == REFERENCE
    assert len(set(keys)) == len(keys)
    blocks = [peer.key for peer in all_peers(("cpu",), 576, blocks=True)]
    for goal in (*peer_tables.GOALS, *peer_tables.GOALS_OF_SEVEN_BILLION):
        assert goal.ours in blocks
        assert all(any(key.startswith(start) for key in blocks) for start in goal.theirs)
    fp32 = {key for key in keys if key.startswith(peer_tables.F32)}
    assert fp32 == {"openvino-fp32-f32", "openvino-fp32-f32-prefix"}


def test_openvino_prunes_as_many_tokens_as_our_plans_of_a_bare_encoder():
    """CDPruner takes whole percents; of 256 tokens 78 % and 89 % leave 56 and 28."""
    peers = all_peers(("cpu",), 256, bare=True)
    plans = {peer.plan for peer in peers if peer.key.startswith("visistage")}
    pruned = {p.settings["pruned"]: p.plan for p in peers if "cdpruner" in p.key}
    assert pruned == {78: "random:keep=56", 89: "random:keep=28"}
    for percent, plan in pruned.items():
        assert plan == f"random:keep={256 * (100 - percent) // 100}"
        assert plan.replace("random", "divprune") in plans
    assert not any("scope" in plan for plan in plans)
    assert not any("cdpruner" in peer.key for peer in all_peers(("cpu",), 256))


def test_images_of_a_qwen_take_no_more_tokens_than_a_square_that_is_not_resized(monkeypatch):
    given = []
    monkeypatch.setattr(peer_models, "open_checkpoint", opened_without_weights(given))
    subject = PeerCheckpoint.named("qwen2.5-vl-50m")
    assert subject.side == 448
    assert subject.origin.image_tokens == subject.checkpoint.config.visual_tokens == 256
    assert given == [None, 256]


def opened_without_weights(given):
    """Return what opens a known model by its sizes alone, and notes budgets."""

    def opened(model, *, dummy_weights, image_tokens=None):
        given.append(image_tokens)
        return SimpleNamespace(config=model_config(model, image_tokens))

    return opened


def test_weights_in_blocks_are_peers_where_they_are_asked_for():
    plain = {peer.key for peer in all_peers(("cpu",), 576)}
    added = {p.key: p.precision for p in all_peers(("cpu",), 576, blocks=True)}
    added = {key: precision for key, precision in added.items() if key not in plain}
    assert added["llama.cpp-q8_0"] == added["visistage-dense-w8"] == "w8"
    assert added["llama.cpp-q4_0"] == added["openvino-int4-default"] == "w4"
    assert added["visistage-scope-few-w4"] == "w4"
    assert added["visistage-scope-few-int8-w4"] == "int8"
    assert {*added.values()} == {"w8", "w4", "int8"}
    (steps,) = (p for p in all_peers(("cpu",), 576, blocks=True) if p.key.endswith("few-int8-w4"))
    assert steps.decode == "w4"
    assert steps.label == "visistage, scope:keep=64, W8A8, one row W4"


def test_every_peer_has_its_script():
    for peer in all_peers(("cpu",), 576):
        assert (RUNNERS / f"{peer.script}.py").is_file()


# --- lower bounds ---------------------------------------------------------------------------------


def test_work_takes_the_longer_of_computing_and_reading():
    work = Work(flops=2e9, attention_flops=1e9, weight_bytes=1e8)
    assert milliseconds(work, RATES, "fp32") == pytest.approx(2000)  # 2 GFLOP at 1 G a second
    assert milliseconds(work, RATES, "int8") == pytest.approx(1250)  # attention stays FP32
    assert milliseconds(Work(weight_bytes=1e9), RATES, "fp32") == pytest.approx(4000)
    assert milliseconds(Work(weight_bytes=1e9), RATES, "int8") == pytest.approx(1000)


def test_layers_count_what_torch_multiplies(demo):
    """A layer and the vision encoder, operation by operation, by torch's own counter."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(
        demo.checkpoint.path, attn_implementation="eager"
    ).eval()
    config, side = demo.checkpoint.config, demo.side
    rows = 30
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(input_ids=torch.full((1, rows), 9), logits_to_keep=1)
    whole = total_work(prefill_layers(config.text, [0] * config.text.layers, 10, rows - 10))
    pairs = rows * (rows + 1) / 2
    masked = whole.attention_flops * (rows**2 / pairs - 1)  # torch computes those, too
    assert counted.get_total_flops() == pytest.approx(whole.flops + masked)

    layers = model.model.vision_tower.encoder.layers
    del layers[max(n % (len(layers) + 1) for n in config.feature_layers) :]
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        features = model.model.vision_tower(torch.zeros(1, 3, side, side)).last_hidden_state
        model.model.multi_modal_projector(features[:, 1:])
    work = vision_work(config, COUNTS)
    assert counted.get_total_flops() == pytest.approx(work.flops)


def test_a_paid_picture_leaves_the_questions_own_rows(demo):
    text = demo.checkpoint.config.text
    visual = [144] * 4 + [16] * 2 + [0] * 2
    cold = prefill_layers(text, visual, 10, 20)
    begun = prefill_layers(text, visual, 10, 20, cached_layers=0)
    second = prefill_layers(text, visual, 10, 20, cached_layers=4)
    assert cold[0] == layer_work(text, 174, 0)
    assert begun[0] == layer_work(text, 164, 10)
    assert second[0] == layer_work(text, 20, 154)
    assert second[5] == begun[5] == layer_work(text, 36, 10)
    assert step_work(text, visual, 30).flops < second[-1].flops + sum(w.flops for w in second)


def test_the_better_of_two_rates_is_kept_for_each():
    other = Rates({"float32": 5e8, "bfloat16": 3e9, "int8": 4e9}, 2e9)
    assert RATES.best(other) == Rates({"float32": 1e9, "bfloat16": 3e9, "int8": 4e9}, 2e9)


# --- scaling --------------------------------------------------------------------------------------


def test_a_speed_up_is_compared_with_the_rooflines():
    found = scaling.compared(measured=20, dense=40, roofline=10, ideal=25)
    assert found["speedup"] == 2
    assert found["predicted"] == 2.5
    assert found["reached"] == pytest.approx(0.8)


def test_a_point_that_fails_says_which(monkeypatch):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nCapacityError: too long")

    monkeypatch.setattr(scaling.subprocess, "run", run)
    with pytest.raises(VisistageError, match="images 5 dense failed: CapacityError: too long"):
        scaling.in_child(scaling.ScalingPoint("images", 5, "dense", "nowhere", images=5), 1, 2, 1)


def test_dummy_weights_may_take_pictures_of_another_size(tmp_path):
    folder = make_dummy("llava-45m", tmp_path / "m", image_size=168)
    config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
    assert config.visual_tokens == 144
    crop = json.loads((folder / "preprocessor_config.json").read_text())["crop_size"]
    assert crop == {"height": 168, "width": 168}


# --- tables ---------------------------------------------------------------------------------------


def test_goals_compare_with_the_fastest_of_theirs():
    def row(key, cold):
        return {"key": key, "label": key, "cold": {"median": cold}}

    rows = [row(f"{peer_tables.CHOSEN}fp32", 40.0), row("openvino-fp32-f32", 120.0)]
    rows += [row("openvino-fp32-f32-prefix", 100.0), row("openvino-fp32-default", 10.0)]
    first = peer_tables.goals(rows)[0]
    assert first["ratio"] == pytest.approx(0.4)
    assert first["reached"] == "yes"
    assert "prefix" in first["theirs"]
    assert "ratio" not in peer_tables.goals(rows[:1])[0]


def test_a_large_model_is_held_against_the_best_peer_of_eight_bits_in_time_and_in_memory():
    def row(key, cold, mib):
        spreads = {name: {"median": cold} for name in ("cold", "second", "per_token")}
        facts = {"label": key, "peak_mib": mib, "import_ms": 1, "load_ms": 2, "floor": {}}
        return {"key": key, **facts, **spreads}

    rows = [
        row("openvino-int8-default", 2000.0, 9000),
        row("llama.cpp-q8_0", 4000.0, 8000),
        row("openvino-int4-default", 10.0, 10),
        row("visistage-scope-visipruner-int8", 800.0, 8400),
        row("visistage-scope-visipruner-w4", 10.0, 10),
    ]
    time, memory = peer_tables.goals(rows, peer_tables.GOALS_OF_SEVEN_BILLION)
    assert (time["ratio"], time["reached"]) == (0.4, "yes")
    assert (memory["ratio"], memory["reached"]) == (1.05, "no")
    assert "8,000.0 MiB, llama.cpp-q8_0" in memory["theirs"]
    machine = {"model": "llava-7b", "rounds": 1, "threads": 1, "tokens": 1, "prompt_tokens": 1}
    page = peer_tables.peers([machine | {"rates": RATES.to_dict()}, *rows])
    assert peer_tables.AGREEMENT not in page
    assert "| cold TTFT, 8 bits, pruned | at most 0.45x | 0.40x | yes |" in page
    shown = peer_tables.first([{}, *rows])
    assert "| visistage-scope-visipruner-int8 | 0.8 s |" in shown
    assert "int4" not in shown
    assert "w4" not in shown


def test_a_missing_record_is_said_and_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "bench.peers --model demo" in tables.TABLES["peers-demo"].text()
    assert "bench.scaling" in tables.TABLES["scaling"].text()
