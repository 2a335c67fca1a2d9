"""Ranges are those of the rows that a stage really sees, and of all of them."""

from collections import defaultdict

import numpy as np
import pytest
import torch
from visistage.calib.run.collect_ranges import Collector, chosen_rows, collect
from visistage.calib.run.layerwise import layerwise_pieces, run_layerwise
from visistage.calib.run.observers import Histogram, threshold
from visistage.calib.run.prompt_state import ANSWER, TEXT, VISUAL
from visistage.calib.sample_prompts import SampleImage, SamplePrompt
from visistage.compile.checkpoint.checkpoint import open_checkpoint
from visistage.compile.export.texts import fits, text_facts
from visistage.compile.quantize.group_ranges import best_observer
from visistage.compile.quantize.int_arithmetic import (
    activation_scale,
    blocked_weight,
    int8_weight,
    restored,
)
from visistage.graphs.errors import ModelError, PlanError
from visistage.graphs.linears import linear_groups
from visistage.graphs.presets.presets import preset
from visistage.graphs.quantization import OBSERVERS
from visistage.tests.support import toy
from visistage.tests.support.chain_judge import PREFIX, RecordingObserver, ids, prompts

LAYERS, N = 6, 16
PLAN = preset("visipruner", LAYERS, N, shallow=1, t=2, e=3, keep=4)
OUTLIER = "model.layers.3.self_attn.q_proj"
CHANNEL = 5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A toy with one loud channel before layer 3's attention, undone in the weights behind it."""
    folder = tmp_path_factory.mktemp("loud")
    toy.make_checkpoint(folder, layers=LAYERS, max_positions=256)
    change(folder, "layers.3.input_layernorm", lambda weight: weight.index_fill_(0, at(), 60.0))
    return open_checkpoint(str(folder))


def at():
    return torch.tensor([CHANNEL])


def change(folder, part, how):
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    weights = load_file(file)
    (name,) = [name for name in weights if part in name]
    how(weights[name])
    save_file(weights, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def found(checkpoint):
    return collect(checkpoint, prompts(), PLAN, PREFIX).groups


@pytest.fixture(scope="module")
def seen(checkpoint):
    """Every row that every linear layer was given."""
    observer = RecordingObserver()
    run_layerwise(checkpoint, prompts(), PLAN, PREFIX, observer=observer)
    return {name: torch.cat(rows).numpy() for name, rows in observer.rows.items()}


def test_there_are_ranges_of_every_group_in_order(checkpoint, found):
    groups = linear_groups(checkpoint.config)
    assert list(found) == [group.name for group in groups]
    for group in groups:
        assert set(found[group.name].sensitivity) == set(group.linears)
        for scheme in ("w8a8", "w8", "w4"):
            assert all(0 < one[scheme] < 0.5 for one in found[group.name].sensitivity.values())


def test_ranges_are_of_every_row(found, seen):
    for name, ranges in found.items():
        rows = seen[name]
        assert ranges.rows == len(rows)
        np.testing.assert_array_equal(ranges.absmax, np.abs(rows).max(0))
        histogram = Histogram()
        histogram.add(rows)
        assert ranges.thresholds == {o: threshold(histogram, o) for o in OBSERVERS}
        assert ranges.thresholds["minmax"] == ranges.absmax.max()


def test_smoothing_flattens_a_loud_channel(found, seen):
    ranges = found[OUTLIER]
    assert ranges.alpha is not None
    assert ranges.factors.argmax() == CHANNEL
    assert ranges.smoothed_errors["minmax"] < 0.3 * ranges.errors["minmax"]
    histogram = Histogram()
    histogram.add(seen[OUTLIER] / ranges.factors)
    expected = {o: threshold(histogram, o) for o in OBSERVERS}
    assert ranges.smoothed_thresholds == pytest.approx(expected, rel=1e-6)
    assert ranges.rows_used == ranges.rows


def test_groups_that_nothing_can_fold_into_have_no_factors(checkpoint, found):
    rigid = [group.name for group in linear_groups(checkpoint.config) if group.fold is None]
    assert rigid
    for name in rigid:
        ranges = found[name]
        assert (ranges.alpha, ranges.aware_alpha) == (None, None)
        assert (ranges.factors == 1).all() and (ranges.aware == 1).all()  # noqa: PT018
        assert ranges.smoothed_thresholds == ranges.thresholds
        assert ranges.smoothed_errors == ranges.errors
        assert ranges.aware_error == ranges.weight_error


@pytest.mark.parametrize("name", [OUTLIER, "model.layers.1.mlp.down_proj", "lm_head"])
def test_sensitivities_are_the_errors_of_really_rounded_layers(checkpoint, found, seen, name):
    """On all rows and outputs here, where the measurement takes a part of both."""
    ranges, best = found[name], best_observer(found.values())
    x, weight = seen[name].astype(np.float64), checkpoint.load(f"{name}.weight").float().numpy()
    exact = x @ weight.T.astype(np.float64)

    def error(inputs, rounded):
        return ((inputs @ rounded.T - exact) ** 2).sum() / (exact**2).sum()

    scale = activation_scale(ranges.smoothed_thresholds[best])
    inputs = np.clip(np.rint(x / ranges.factors / scale), -127, 127) * scale
    w8a8 = error(inputs, restored(*int8_weight(weight * ranges.factors)))
    w8 = error(x, restored(*int8_weight(weight)))
    w4 = error(x / ranges.aware, restored(*blocked_weight(weight * ranges.aware), 128))
    expected = {"w8a8": w8a8, "w8": w8, "w4": w4}
    assert ranges.sensitivity[name] == pytest.approx(expected, rel=0.25)


def test_stages_see_other_rows_than_the_dense_model(checkpoint, found):
    dense = collect(checkpoint, prompts(), PLAN, PREFIX, rows="dense").groups
    again = collect(checkpoint, prompts(), preset("dense", LAYERS, N), PREFIX).groups
    last = "model.layers.5.mlp.down_proj"
    images = sum(isinstance(part, SampleImage) for prompt in prompts() for part in prompt.parts)
    assert dense[last].rows - found[last].rows == images * N
    assert not np.array_equal(dense[last].absmax, found[last].absmax)
    for name, ranges in dense.items():
        np.testing.assert_array_equal(ranges.absmax, again[name].absmax)
    encoder = "vision_tower.encoder.layers.0.mlp.fc1"
    np.testing.assert_array_equal(dense[encoder].absmax, found[encoder].absmax)


def test_the_prefix_counts_only_where_it_is_asked_for(checkpoint, found):
    included = collect(checkpoint, prompts(), PLAN, PREFIX, include_prefix=True).groups
    with_prefix = sum(
        1 for prompt in prompts() if prompt.name not in ("other prefix", "picture first")
    )
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.5.mlp.gate_proj"):
        assert included[name].rows - found[name].rows == with_prefix * len(PREFIX)
        assert (included[name].absmax >= found[name].absmax * (1 - 1e-5)).all()
    assert included["lm_head"].rows == found["lm_head"].rows


def test_a_massive_prefix_stays_out_of_the_ranges(tmp_path):
    """One token that dwarfs the others, as BOS does in published models."""
    toy.make_checkpoint(tmp_path, layers=LAYERS, max_positions=256)
    change(tmp_path, "embed_tokens", lambda table: table[PREFIX[1]].mul_(100.0))
    token = open_checkpoint(str(tmp_path)).load("model.embed_tokens.weight")[PREFIX[1]].clone()
    for name in ("gate_proj", "up_proj"):  # one unit that answers to this token alone
        part = f"layers.0.mlp.{name}"
        change(tmp_path, part, lambda weight: weight[3].copy_(4 * token / token.norm()))
    checkpoint = open_checkpoint(str(tmp_path))
    given = [prompt for prompt in prompts() if prompt.name != "picture first"][:3]
    without = collect(checkpoint, given, PLAN, PREFIX).groups
    counted = collect(checkpoint, given, PLAN, PREFIX, include_prefix=True).groups
    name = "model.layers.0.mlp.down_proj"
    ratio = counted[name].thresholds["minmax"] / without[name].thresholds["minmax"]
    assert ratio > 3, ratio


def test_few_rows_are_kept_of_many_and_the_ranges_are_still_of_all(checkpoint, seen):
    collector = Collector(checkpoint.config, rows_kept=40)
    run_layerwise(checkpoint, prompts(), PLAN, PREFIX, observer=collector)
    ranges = collector.ranges()[OUTLIER]
    assert (ranges.rows, ranges.rows_used) == (len(seen[OUTLIER]), 40)
    np.testing.assert_array_equal(ranges.absmax, np.abs(seen[OUTLIER]).max(0))
    assert ranges.smoothed_thresholds["minmax"] == (ranges.absmax / ranges.factors).max()


def test_rows_are_kept_evenly_and_rare_kinds_whole():
    kinds = [np.full(500, VISUAL), np.full(20, TEXT), np.full(3, ANSWER)] * 4
    chosen = chosen_rows(kinds, 300)
    counts = defaultdict(int)
    for kind, rows in zip(kinds, chosen, strict=True):
        assert (np.diff(rows) > 0).all()
        counts[int(kind[0])] += len(rows)
    assert counts == {VISUAL: 208, TEXT: 80, ANSWER: 12}
    assert {len(rows) for rows in chosen[::3]} == {52}
    assert [len(rows) for rows in chosen_rows(kinds, 9999)] == [len(kind) for kind in kinds]
    assert sum(map(len, chosen_rows(kinds, 5))) == 5
    mixed = chosen_rows([np.array([VISUAL, VISUAL, TEXT, VISUAL])], 2)
    assert len(mixed) == 1
    assert 2 in mixed[0]


def test_ranges_do_not_depend_on_the_run(checkpoint, found):
    again = collect(checkpoint, prompts(), PLAN, PREFIX).groups
    for name, ranges in found.items():
        assert again[name].facts() == ranges.facts()
        np.testing.assert_array_equal(again[name].factors, ranges.factors)


def test_progress_counts_every_piece(checkpoint):
    done = []
    collect(checkpoint, prompts()[:1], PLAN, PREFIX, advance=done.append)
    assert sum(done) == layerwise_pieces(checkpoint.config, PREFIX)
    done.clear()
    collect(checkpoint, prompts()[:1], PLAN, PREFIX, include_prefix=True, advance=done.append)
    assert sum(done) == layerwise_pieces(checkpoint.config, ())


def test_a_plan_that_decides_per_prompt_is_refused(checkpoint):
    with pytest.raises(PlanError, match="Calibrate a static plan"):
        collect(checkpoint, prompts(), preset("visipruner-adaptive", LAYERS, N), PREFIX)


def test_damaged_weights_are_named(tmp_path):
    toy.make_checkpoint(tmp_path, layers=LAYERS, max_positions=256)
    change(tmp_path, "layers.2.mlp.up_proj", lambda weight: weight[3].fill_(float("inf")))
    with pytest.raises(ModelError, match=r"input of model\.layers\.2\.mlp\.down_proj"):
        collect(open_checkpoint(str(tmp_path)), prompts()[:1], PLAN, PREFIX)


def test_prompts_without_images_have_ranges(checkpoint):
    ranges = collect(checkpoint, [SamplePrompt("text", (PREFIX + ids(5, 1),))], PLAN, PREFIX).groups
    assert "multi_modal_projector.linear_1" not in ranges
    assert ranges["lm_head"].rows == 1


def test_what_a_calibration_fits_follows_the_checkpoint(tmp_path):
    facts = []
    for seed in (0, 0, 1):
        folder = toy.make_checkpoint(tmp_path / str(len(facts)), layers=LAYERS, seed=seed)
        checkpoint = open_checkpoint(str(folder))
        read = []
        facts.append(fits(checkpoint, text_facts(checkpoint), read.append))
        assert sum(read) == checkpoint.file_bytes
    assert facts[0] == facts[1]
    assert facts[0]["model"] != facts[2]["model"]
    assert facts[0]["template"] == facts[2]["template"]
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "\n{# new #}")
    changed = fits(open_checkpoint(str(folder)), text_facts(open_checkpoint(str(folder))))
    assert changed["template"] != facts[2]["template"]
    assert changed["model"] == facts[2]["model"]
