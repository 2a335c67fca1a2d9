"""OpenVINO == ONNX Runtime through the whole runtime, and every option honoured or refused."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from visistage.compile.build import make_bundle
from visistage.graphs.contract import PADDING_ORDER
from visistage.graphs.errors import MissingDependencyError, TargetError
from visistage.graphs.quantization import parse_quant_config
from visistage.graphs.targets import OPENVINO, find_target
from visistage.runtime.backends import openvino as ours
from visistage.runtime.session import load
from visistage.tests.support import calibrated, toy
from visistage.tests.support.asking import PLANS, answer, picture
from visistage.tests.support.verified import run, statuses
from visistage.tools.verify.verify_report import FAILED, PASSED

pytest.importorskip("openvino")

PLAN = PLANS["visipruner"]
PROMPTS = (
    ([picture(1)], "What is this?"),
    ([picture(2), picture(3, 33, 90)], "Which one is larger?"),
    ([], "Say something."),
    ([picture(1)], "And how many of them are there, from left to right?"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("openvino")
    toy.make_checkpoint(folder / "toy", layers=8, kv_heads=2)
    return folder


@pytest.fixture(scope="module")
def bundles(folder):
    """Bundles by (plan, target, precision), each built once."""
    built = {}

    def get(plan="visipruner", target=OPENVINO, precision="fp32"):
        key = (plan, target, precision)
        if key not in built:
            given = {"plan": PLANS[plan], "target": target, "precision": precision}
            if precision != "fp32":
                given["calibration"] = folder / "calibration"
                if not given["calibration"].is_dir():
                    calibrated.calibrate(folder / "toy", PLANS[plan], given["calibration"])
            built[key] = make_bundle(str(folder / "toy"), out=folder / "engines", **given)
        return built[key]

    return get


@pytest.mark.parametrize("plan", ["dense", "visipruner", "adaptive", "v2drop", "sparsevlm"])
def test_openvino_answers_like_onnxruntime(bundles, plan):
    with load(bundles(plan, "cpu").path) as wanted, load(bundles(plan).path) as session:
        for images, prompt in PROMPTS:
            tokens = answer(wanted, images, prompt)
            assert len(set(tokens)) >= 8
            assert answer(session, images, prompt) == tokens
            want, got = (one.score(images, prompt, tokens[:5]) for one in (wanted, session))
            assert np.abs(got - want).max() < 1e-4 * want.std()


@pytest.mark.parametrize("wrong", ["write_index", "slot_order", "gates", "positions"])
def test_an_input_that_does_not_arrive_is_noticed(bundles, monkeypatch, wrong):
    with load(bundles().path) as session:
        right = [answer(session, *prompt) for prompt in PROMPTS]
        fill = ours.BoundRequest.fill
        monkeypatch.setattr(
            ours.BoundRequest,
            "fill",
            lambda self, name, v: None if name == wrong else fill(self, name, v),
        )
        session.context.clear()
        for stage in session.executor.stages:
            stage.calls.clear()
        assert [answer(session, *prompt) for prompt in PROMPTS] != right


def test_bundles_run_on_either_back_end(bundles):
    with (
        load(bundles().path) as own,
        load(bundles().path, backend="onnxruntime") as other,
        load(bundles(target="cpu-portable").path, backend=OPENVINO) as foreign,
    ):
        assert type(own.executor) is type(foreign.executor) is ours.OpenVinoExecutor
        assert type(other.executor) is not ours.OpenVinoExecutor
        answers = [answer(one, *PROMPTS[0]) for one in (own, other, foreign)]
        assert answers[0] == answers[1] == answers[2]


def test_what_openvino_cannot_honour_is_refused(bundles, tmp_path):
    with pytest.raises(TargetError, match=r"runs bundles for cpu-portable, openvino.*--target"):
        load(bundles(target="cpu").path, backend=OPENVINO)
    with pytest.raises(TargetError, match=r"--memory-limit .*runs on OpenVINO.*onnxruntime"):
        load(bundles().path, memory_limit=1 << 30)
    with pytest.raises(TargetError, match="--profile"):
        load(bundles().path, profile=tmp_path)


def test_precision_and_threads_reach_openvino(bundles):
    """Left to itself OpenVINO computes in BF16 on some machines."""
    with load(bundles().path, threads=1) as session:
        for model in session.executor.models.values():
            assert model.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
            assert model.get_property("INFERENCE_NUM_THREADS") == 1


def test_without_openvino(bundles, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match=r"pip install.*\[openvino\]"):
        load(bundles().path)
    with load(bundles().path, backend="onnxruntime") as session:
        assert answer(session, *PROMPTS[0])
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(__version__="2025.9.1-1-x"))
    with pytest.raises(MissingDependencyError, match=r"2026\.0 or newer is needed, found 2025"):
        load(bundles().path)
    assert find_target(OPENVINO).versions == ("2026.0", None)


def test_stale_and_poisoned_slots_change_nothing(bundles):
    with load(bundles().path) as session:
        image = session.open(picture(10))
        first = answer(session, image, "How many?")
        for block in session.executor.blocks:
            block[:, :, :, 100:] = 1e4
        assert answer(session, image, "How many?") == first
        assert answer(session, picture(11), "Why?") != first


def test_caches_grow_across_buckets(bundles):
    with load(bundles("dense").path) as session, load(bundles("dense", "cpu").path) as wanted:
        tokens = answer(session, [picture(11)], "Describe it.", 120)
        assert session.executor.blocks[0].shape[3] == 256
        assert tokens == answer(wanted, [picture(11)], "Describe it.", 120)


@pytest.mark.parametrize("plan", ["dense", "visipruner"])
def test_calls_in_pieces_and_without_padding_are_the_same(bundles, monkeypatch, plan):
    with load(bundles(plan).path) as session:
        logits = [session.score(*prompt, (5, 7)) for prompt in PROMPTS]
    monkeypatch.setattr(ours, "MOST_ROWS", 5)
    monkeypatch.setattr(ours, "ROW_STEP", 1)
    with load(bundles(plan).path) as session:
        for prompt, whole in zip(PROMPTS, logits, strict=True):
            cut = session.score(*prompt, (5, 7))
            assert np.abs(cut - whole).max() < 1e-4 * whole.std()
        assert max(session.executor.stages[0].calls) <= 5


def test_only_rows_in_their_order_are_cut(monkeypatch):
    monkeypatch.setattr(ours, "MOST_ROWS", 4)
    rising = np.arange(10)[None]
    assert list(ours.row_chunks(rising)) == [(0, 4), (4, 8), (8, 10)]
    assert list(ours.row_chunks(rising[:, :4])) == [(0, 4)]
    assert list(ours.row_chunks(np.arange(9)[None])) == [(0, 3), (3, 6), (6, 9)]
    for order in ([5, 6, 0, 1, 2, 3], [0, 1, 1, 2, 3], [PADDING_ORDER, 0, 1, 2, 3]):
        assert list(ours.row_chunks(np.array([order]))) == [(0, len(order))]


def test_few_calls_stay_bound(bundles, monkeypatch):
    monkeypatch.setattr(ours, "MOST_CALLS", 2)
    with load(bundles("dense").path) as session:
        first = answer(session, *PROMPTS[0])
        for prompt in PROMPTS:
            answer(session, *prompt)
        assert len(session.executor.stages[0].calls) == 2
        assert answer(session, *PROMPTS[0]) == first


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_verify_reaches_openvino(bundles, monkeypatch, precision):
    bundle = bundles(precision=precision)
    assert precision == "fp32" or parse_quant_config(bundle.manifest.precision).name == "int8"
    report = run(bundle)
    assert report.failed is None
    found = statuses(report)
    assert found["answers"] == found["engine runs"] == PASSED
    # A cache that is not written: the graphs are right, the runtime is not.
    monkeypatch.setattr(ours.BoundRequest, "run", lambda self: (run_(self), self.new_rows.fill(0)))
    report = run(bundle)
    assert statuses(report)["engine runs"] == FAILED


run_ = ours.BoundRequest.run
