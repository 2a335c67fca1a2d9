"""``visistage estimate``: the fit finds what was put in, and every figure has a source."""

import json
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
from click.testing import CliRunner
from visistage.bench import fit as bench_fit
from visistage.bench.fit import Observation, error_of, fit, leave_one_out, validate
from visistage.cli.main import main
from visistage.cli.show.estimate_view import show_times
from visistage.compile.checkpoint.known_models import model_config
from visistage.graphs.bundle import Bundle
from visistage.graphs.caches import stage_slots
from visistage.graphs.errors import CapacityError, TargetError
from visistage.graphs.families.registry import smaller_images, with_budget
from visistage.graphs.plan.call_cost import GraphCall, Sizes, question_calls, work_of
from visistage.tools.estimate import devices
from visistage.tools.estimate.devices import (
    CPU_DEVICE,
    DEVICES,
    FIGURES,
    MEASURED_FILE,
    NAMES,
    Efficiency,
    Measured,
    compute_type,
    efficiency_range,
    figures_of,
    find_device_spec,
    measured,
)
from visistage.tools.estimate.estimate_target import EstimateTarget, estimate_target
from visistage.tools.estimate.predict import PromptLengths, estimate

TRUE = Efficiency(compute=0.6, bandwidth=0.75, layer_ms=0.05)


def observations(noise=0.0, seed=0):
    """Models of several sizes at several lengths, on a machine with known efficiencies."""
    random = np.random.default_rng(seed)
    out = []
    for model, (layers, width) in {"a": (4, 256), "b": (8, 512), "c": (12, 1024)}.items():
        for length in (0, 64, 256, 1024):
            rows = length or 1
            nbytes = layers * 12 * width**2 * 4.0
            flops = 2 * rows * nbytes / 4
            ms = TRUE.predict_ms(flops, nbytes, layers, 2e11, 2e10)
            ms *= 1 + noise * random.normal()
            phase = "prefill" if length else "token"
            out.append(
                Observation(model, "dense", phase, length, flops, nbytes, layers, ms, 2e11, 2e10)
            )
    return out


# --- the fit --------------------------------------------------------------------------------------


def test_a_fit_finds_the_efficiencies_that_made_the_times():
    found = fit(observations())
    for name in ("compute", "bandwidth", "layer_ms"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-6)
    assert all(abs(error_of(found, one)) < 1e-9 for one in observations())


def test_a_noisy_fit_comes_near_and_its_error_is_that_of_the_noise():
    seen = observations(noise=0.1)
    assert fit(seen).compute == pytest.approx(0.6, rel=0.25)
    by_model, by_length = validate(seen)
    assert set(by_model.groups) == {"a", "b", "c"}
    assert set(by_length.groups) == {"64", "256", "1024"}
    for one in (by_model, by_length):
        assert 0.01 < one.median_error < 0.3
        assert one.median_error <= one.largest_error


def test_what_is_left_out_is_really_not_seen():
    """A model that is three times as slow as the others is predicted three times too fast."""
    seen = [replace(o, ms=3 * o.ms) if o.model == "b" else o for o in observations()]
    found = leave_one_out(seen, "model", lambda o: o.model)
    assert found.groups["b"] == pytest.approx(2 / 3)


def test_nothing_is_fitted_negative():
    seen = [replace(o, ms=o.ms - 0.9 * o.layers * TRUE.layer_ms) for o in observations()]
    assert fit(seen).layer_ms >= 0
    faster = [replace(o, ms=max(o.ms - 2 * o.layers * TRUE.layer_ms, 1e-4)) for o in observations()]
    found = fit(faster)
    assert min(found.compute, found.bandwidth) > 0
    assert found.layer_ms >= 0


def test_too_little_to_fit_is_said():
    with pytest.raises(ValueError, match="cannot fix 3"):
        fit(observations()[:2])
    with pytest.raises(ValueError, match="needs two"):
        leave_one_out(observations()[:4], "model", lambda o: o.model)


def test_the_shipped_efficiencies_are_those_of_the_records():
    shipped = json.loads(MEASURED_FILE.read_text()) if MEASURED_FILE.is_file() else {}
    assert shipped == bench_fit.fitted(), "python -m visistage.bench.fit"
    for precisions in shipped.values():
        for one in precisions.values():
            assert 0 < one["efficiency"]["compute"] <= 1.5
            assert {"model", "length"} == {check["by"] for check in one["validations"]}


def test_a_record_becomes_what_estimates_read(tmp_path, monkeypatch):
    rows = [asdict(one) for one in observations()]
    origin = {"command": "c", "date": "d", "device": {"processor": "p"}}
    (tmp_path / "estimate-h200.json").write_text(json.dumps({**origin, "rows": rows}))
    monkeypatch.setattr(bench_fit, "RESULTS", tmp_path)
    found = bench_fit.fitted()
    file = tmp_path / "measured.json"
    file.write_text(json.dumps(found))
    known = measured("h200", "fp32", file)
    assert known.efficiency == TRUE
    assert known.error < 1e-6
    assert known.origin == origin
    assert measured("h200", "fp16", file) is None


# --- data -----------------------------------------------------------------------------------------


def test_every_device_has_sources_and_says_what_was_derived():
    assert set(NAMES) == {
        *("orin-agx-64", "orin-nx-16", "orin-nano-8", "thor", "h100", "h200", "rtx-4090", "cpu")
    }
    for device in DEVICES.values():
        assert device.sources
        assert set(device.flops) == {"fp32", "fp16", "int8"}
        rates = [rate for rate in device.flops.values() if rate is not None]
        assert sorted(rates) == rates  # narrower is faster
        jetson = device.name.startswith(("orin", "thor"))
        assert bool(device.derived) == jetson == device.shared


def test_an_unknown_device_is_refused_with_the_nearest():
    with pytest.raises(TargetError, match=r"Did you mean 'orin-nano-8'\?"):
        find_device_spec("orin-nano")


@pytest.mark.parametrize(
    ("precision", "kind"),
    [
        ("fp32", "fp32"),
        ("fp16", "fp16"),
        ("int8:head=float", "int8"),
        ("w4", "fp16"),
        ("w8", "fp16"),
    ],
)
def test_products_of_a_precision(precision, kind):
    assert compute_type(precision) == kind


def test_published_figures_reach_a_believable_share_of_the_peaks():
    known = [figure.efficiency for figure in FIGURES if figure.efficiency is not None]
    assert len(known) == 8
    assert all(0.3 < one < 1 for one in known)
    for prefill in (True, False):
        low, high = efficiency_range(prefill)
        assert low < high
    vicuna = figures_of("orin-agx-64")[0]
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000
    assert vicuna.efficiency == pytest.approx(2 * weights / 0.0848 / 204.8e9)


# --- estimates ------------------------------------------------------------------------------------


def target(precision="fp16", plan="visipruner"):
    return estimate_target("llava-7b", plan, precision, None)


def test_a_range_holds_what_others_measured_for_the_same_decoder():
    """Vicuna-7B on an AGX Orin is part of what the range was made from: it must contain it."""
    facts = estimate(target(plan="dense"), "orin-agx-64", PromptLengths(tokens=1, context=704))
    slow, fast = max(facts["estimates"]["plan"]["per_token_ms"]), 84.8
    assert min(facts["estimates"]["plan"]["per_token_ms"]) <= slow
    low, high = sorted(facts["estimates"]["plan"]["per_token_ms"])
    assert low < fast * 1.1
    assert high > fast
    assert not facts["efficiency"]["fitted"]
    assert facts["peers"]


def test_a_range_without_a_fit_is_the_slower_of_two_terms_call_by_call():
    facts = estimate(target(), "h100", PromptLengths())
    own = target()
    compute, memory = efficiency_range(True), efficiency_range(False)
    fixed = stage_slots(own.plan, 576, 1024)
    calls = question_calls(
        own.plan, prefix=35, visual=576, text=40, slots=lambda stage, held: fixed[stage]
    )
    works = [work_of(call, own.config, own.plan, Sizes.of("fp16")) for call in calls]
    for end in (0, 1):
        expected = sum(
            max(w.flops / (compute[1 - end] * 989.4e12), w.nbytes / (memory[1 - end] * 3350e9))
            for w in works
        )
        assert facts["estimates"]["plan"]["first_token_ms"][end] == pytest.approx(1e3 * expected)


def test_a_measured_device_gets_one_figure_and_its_error(tmp_path, monkeypatch):
    checks = [
        {"by": name, "median_error": 0.07, "largest_error": 0.2, "groups": {}}
        for name in ("model", "length")
    ]
    origin = {"command": "", "date": "2026-01-01", "device": {"processor": "a card"}}
    facts = {
        "efficiency": {"compute": 0.5, "bandwidth": 0.8, "layer_ms": 0.01},
        "validations": checks,
        "origin": origin,
    }
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"h100": {"fp16": facts}}))
    monkeypatch.setattr(devices.measured, "__defaults__", (file,))
    found = estimate(target(), "h100", PromptLengths())
    assert found["efficiency"]["fitted"]
    assert len(found["estimates"]["plan"]["per_token_ms"]) == 1
    assert measured("h100", "fp32") is None
    run = CliRunner().invoke(main, ["estimate", "llava-7b", "--device", "h100"])
    assert "+- 7 %" in run.stdout
    assert "wrong by 7 % (median), 20 % at worst" in run.stdout


def test_pruning_shows_where_it_works_and_nowhere_else():
    facts = estimate(target(), "orin-agx-64", PromptLengths())["estimates"]
    assert facts["plan"]["prefill_ms"][0] < 0.8 * facts["dense"]["prefill_ms"][0]
    assert facts["plan"]["tower_ms"] == facts["dense"]["tower_ms"]
    assert set(estimate(target(plan="dense"), "thor", PromptLengths())["estimates"]) == {"plan"}


def test_memory_is_weights_and_caches_against_what_there_is():
    fp16 = estimate(target(), "orin-nano-8", PromptLengths())["memory"]
    w4 = estimate(target("w4"), "orin-nano-8", PromptLengths())["memory"]
    assert fp16["weight_bytes"] == pytest.approx(2 * 7.06e9, rel=0.01)
    assert not fp16["fits"]
    assert w4["fits"]
    assert 4.2e9 < w4["weight_bytes"] < 4.4e9  # of it the vision encoder, in FP16: 0.6e9
    stages = target().plan.stages
    slots = [-(-(1024 - 576 + stage.visual_tokens) // 64) * 64 for stage in stages]
    rows = sum(stage.depth * count for stage, count in zip(stages, slots, strict=True))
    assert fp16["cache_bytes"] == 2 * 4096 * 2 * rows


def test_what_no_source_says_is_not_guessed():
    facts = estimate(target("int8"), "thor", PromptLengths())
    run = facts["estimates"]["plan"]
    assert run["first_token_ms"] is None
    assert run["prefill_ms"] is None
    assert run["per_token_ms"][0] > 0
    done = CliRunner().invoke(
        main, ["estimate", "llava-7b", "--device", "thor", "--precision", "int8"]
    )
    assert "unknown" in done.stdout
    assert "no source says how fast it computes in int8" in done.stdout


def test_a_prompt_that_does_not_fit_is_refused_with_what_to_type():
    with pytest.raises(CapacityError, match=r"683 rows, the context is 512. Type: --context 704"):
        estimate(target(), "h100", PromptLengths(context=512))


def test_an_image_without_a_budget_is_one_of_the_most_tokens_and_says_so():
    words = ("estimate", "qwen3-vl-2b", "--device", "thor", "--context", "20000")
    whole, capped = (
        CliRunner().invoke(main, [*words, *more]) for more in ((), ("--image-tokens", "576"))
    )
    assert "16384: --image-tokens 576 builds for fewer" in whole.stderr
    assert "builds for fewer" not in capped.stderr
    refused = CliRunner().invoke(main, words[:-2])
    assert refused.exit_code == 2
    assert "an image of 16384 tokens" in refused.stderr
    assert "--image-tokens 576" in refused.stderr


def test_budgets_that_are_advised_can_be_had():
    for name, tokens in (("llava-next-7b", 1830), ("internvl3-8b", 576), ("llava-7b", None)):
        config = model_config(name)
        option = smaller_images(config)
        assert option == (f"--image-tokens {tokens}" if tokens else "")
        if tokens:
            assert with_budget(config, tokens).visual_tokens < config.visual_tokens


def test_wrong_options_are_one_message(tmp_path):
    for arguments, words in (
        (("llava-7b", "--device", "toaster"), "'toaster' is none of"),
        (("llava-7b", "--device", "h100", "--precision", "fp8"), "unknown precision 'fp8'"),
        (("llava-7c", "--device", "h100"), "llava-7c"),
        (("llava-7b", "--device", "cpu", "--precision", "int8"), "no rate of precision 'int8'"),
    ):
        done = CliRunner().invoke(main, ["estimate", *arguments])
        assert done.exit_code == 2, done.output
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_a_bundle_brings_its_own_plan_and_precision(tmp_path, monkeypatch):
    own = replace(target("fp32"), name="demo")

    class Stand:
        """A manifest, as far as an estimate reads it."""

        model, config, plan, precision = "demo", own.config, own.plan, "fp32"
        prefix, weight_bytes = None, 123

    found = EstimateTarget.of(Bundle(tmp_path, Stand()))
    assert (found.prefix, found.weights(), found.precision) == (0, 123, "fp32")
    (tmp_path / "manifest.json").write_text("{}")
    monkeypatch.setattr(Bundle, "open", lambda path: Bundle(tmp_path, Stand()))
    with pytest.raises(TargetError, match="has its own plan"):
        estimate_target(str(tmp_path), "fastv", None, None)
    assert estimate_target(str(tmp_path), None, None, None).weights() == 123


def test_this_cpu_is_measured_and_never_looked_up(monkeypatch):
    facts = {"efficiency": {"compute": 0.5, "bandwidth": 0.5, "layer_ms": 0.0}, "validations": []}
    checks = [{"by": "model", "median_error": 0.1, "largest_error": 0.1, "groups": {}}]
    known = Measured(Efficiency(**facts["efficiency"]), checks, {})
    monkeypatch.setattr("visistage.tools.estimate.predict.measured", lambda *rest: known)
    found = estimate(target(plan="dense"), CPU_DEVICE, PromptLengths(), threads=1)
    assert found["device"]["sources"] == ["measured now"]
    run = found["estimates"]["plan"]
    step = [GraphCall("stage0", 1, 768)]
    work = work_of(step[0], target().config, target(plan="dense").plan, Sizes.of("fp32"))
    flops, bandwidth = found["device"]["flops"], found["device"]["bandwidth"]
    expected = 1e3 * (work.flops / (0.5 * flops) + work.nbytes / (0.5 * bandwidth))
    assert run["per_token_ms"] == [pytest.approx(expected)]


def test_ranges_and_figures_read_as_such():
    assert show_times([12.34, 20.0], None) == "12.3 to 20.0 ms"
    assert show_times([234.5], 0.08) == "234 ms +- 8 %"
    assert show_times([9000.0, 12_345.0], None) == "9.00 to 12.3 s"
    assert show_times(None, None) == "unknown"


def test_the_page_on_devices_names_every_source():
    page = (bench_fit.RESULTS.parents[1] / "docs" / "profile.md").read_text()
    for device in DEVICES.values():
        assert f"`{device.name}`" in page
        for source in device.sources:
            title = re.split(r", (?=docs\.|glenn|codesota|lzwjava|waredb|Ridge)", source)[0]
            assert title in page, title
