"""Factors leave the function as it is, find planted channels, and equal a search by definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from visistage.calib.run.smoothing import (
    ALPHAS,
    AWQ_ALPHAS,
    BOUND,
    SAMPLE_OUTPUTS,
    SAMPLE_ROWS,
    OutputSample,
    awq_factors,
    search_awq,
    search_smoothing,
    smoothing_factors,
)
from visistage.compile.quantize.int_arithmetic import (
    activation_scale,
    blocked_weight,
    dequantise,
    int8_weight,
    quantise,
    restored,
)

K = 96
SALIENT = [5, 40, 77]

MAGNITUDES = hnp.arrays(
    np.float32, 12, elements=st.just(0.0) | st.floats(2.0**-120, 2.0**120, width=32)
)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def group(outliers: float = 1.0, rows: int = 64) -> tuple[np.ndarray, list[np.ndarray]]:
    """Rows with a few channels ``outliers`` times larger, and two layers that read them."""
    x = normal(rows, K)
    x[:, SALIENT] *= outliers
    return x, [normal(48, K, seed=1), normal(32, K, seed=2)]


def relative(exact: np.ndarray, found: np.ndarray) -> float:
    exact, found = exact.astype(np.float64), found.astype(np.float64)
    return float(((exact - found) ** 2).sum() / (exact**2).sum())


def w8a8_error(rows, weights, factors) -> float:
    """Layer by layer, through the integers themselves."""
    inputs = rows / factors
    scale = activation_scale(np.abs(inputs).max())
    exact, found = [], []
    for weight in weights:
        values, scales = int8_weight(weight * factors)
        product = quantise(inputs, scale).astype(np.int64) @ values.astype(np.int64)
        exact.append(rows.astype(np.float64) @ weight.T.astype(np.float64))
        found.append(product * (scales.astype(np.float64) * float(scale)))
    return relative(np.hstack(exact), np.hstack(found))


def w4_error(rows, weights, factors, block) -> float:
    exact = [rows @ weight.T for weight in weights]
    found = [
        (rows / factors) @ restored(*blocked_weight(weight * factors, block), block).T
        for weight in weights
    ]
    return relative(np.hstack(exact), np.hstack(found))


def rms_norm(x, gain):
    return x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5) * gain


def silu(x):
    return x / (1 + np.exp(-x.astype(np.float64)))


@given(MAGNITUDES, MAGNITUDES, st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_factors_are_finite_bounded_and_one_for_dead_channels(inputs, weights, alpha):
    for factors in (smoothing_factors(inputs, weights, alpha), awq_factors(inputs, alpha)):
        assert factors.dtype == np.float32
        assert ((factors >= 1 / BOUND) & (factors <= BOUND)).all()
        assert (factors[inputs == 0] == 1).all()
    assert (smoothing_factors(inputs, weights, alpha)[weights == 0] == 1).all()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.85, 1.0])
def test_smoothing_factors_are_equation_4_with_a_mean_of_one(alpha):
    inputs, weights = np.abs(normal(K)) + 0.1, np.abs(normal(K, seed=1)) + 0.1
    factors = smoothing_factors(inputs, weights, alpha)
    ratio = factors / (inputs**alpha / weights ** (1 - alpha))
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
    assert np.log(factors.astype(np.float64)).mean() == pytest.approx(0, abs=1e-6)


def test_awareness_factors_are_powers_of_the_mean_centred_as_awq_does():
    mean = np.abs(normal(K)) + 0.1
    factors = awq_factors(mean, 0.4)
    expected = mean**0.4
    expected /= np.sqrt(expected.max() * expected.min())
    np.testing.assert_allclose(factors, expected, rtol=1e-5)


def test_folding_into_a_norm_leaves_the_function_as_it_is():
    x, gain = normal(32, K), np.abs(normal(K, seed=3)) + 0.01
    gain[SALIENT] *= 80
    _, weights = group()
    rows = rms_norm(x, gain).astype(np.float32)
    factors = search_smoothing(rows, weights).factors
    assert np.ptp(factors) > 1
    for weight in weights:
        before = rms_norm(x, gain) @ weight.T
        after = rms_norm(x, gain / factors).astype(np.float32) @ (weight * factors).T
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())


def test_folding_into_the_rows_of_up_leaves_the_function_as_it_is():
    x, gate, up = normal(32, 24), normal(K, 24, seed=1), normal(K, 24, seed=2)
    up[SALIENT] *= 60
    down = normal(24, K, seed=3)
    inner = (silu(x @ gate.T) * (x @ up.T)).astype(np.float32)
    factors = search_smoothing(inner, [down]).factors
    assert np.ptp(factors) > 1
    before = inner @ down.T
    after = silu(x @ gate.T) * (x @ (up / factors[:, None]).T) @ (down * factors).T
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())


def test_planted_outlier_channels_are_found():
    rows, weights = group(outliers=60)
    found = search_smoothing(rows, weights)
    others = np.setdiff1d(np.arange(K), SALIENT)
    assert found.alpha is not None
    assert found.error < found.error_plain / 5
    assert found.factors[SALIENT].min() > 2 * found.factors[others].max()


def test_without_outliers_nothing_is_folded_or_little_gained():
    rows, weights = group()
    found = search_smoothing(rows, weights)
    assert found.error <= found.error_plain
    assert found.error > found.error_plain / 2


def test_equal_channels_are_left_alone():
    """Every channel alike: all factors are 1, so none can save anything."""
    signs = np.where(normal(64, K) < 0, np.float32(-1), np.float32(1))
    weights = [np.where(normal(32, K, seed=1) < 0, np.float32(-1), np.float32(1))]
    for found in (search_smoothing(signs, weights), search_awq(signs, weights)):
        assert found.alpha is None
        assert (found.factors == 1).all()
        assert found.error == found.error_plain


@pytest.mark.parametrize("outliers", [1.0, 8.0, 60.0])
def test_search_equals_brute_force_through_the_integers(outliers):
    rows, weights = group(outliers)
    found = search_smoothing(rows, weights)
    inputs = np.abs(rows).max(0)
    outputs = np.abs(np.concatenate(weights)).max(0)
    plain = w8a8_error(rows, weights, np.ones(K, np.float32))
    errors = {
        alpha: w8a8_error(rows, weights, smoothing_factors(inputs, outputs, alpha))
        for alpha in ALPHAS
    }
    assert found.error_plain == pytest.approx(plain, rel=1e-3)
    assert found.errors == pytest.approx(errors, rel=1e-3)
    best = min(errors, key=errors.__getitem__)
    assert found.alpha == (best if errors[best] < 0.99 * plain else None)


def test_awareness_equals_brute_force():
    rows, weights = group(outliers=12)
    found = search_awq(rows, weights, block=32)
    mean = np.abs(rows).mean(0)
    errors = {alpha: w4_error(rows, weights, awq_factors(mean, alpha), 32) for alpha in AWQ_ALPHAS}
    assert found.errors == pytest.approx(errors, rel=1e-3)
    assert found.error_plain == pytest.approx(
        w4_error(rows, weights, np.ones(K, np.float32), 32), rel=1e-3
    )
    assert found.alpha == min(errors, key=errors.__getitem__)
    np.testing.assert_allclose(found.factors, awq_factors(mean, found.alpha), rtol=1e-6)


@pytest.mark.parametrize("block", [32, 40, 128])
def test_awareness_beats_plain_rounding_where_channels_are_salient(block):
    rows, weights = group(outliers=20)
    found = search_awq(rows, weights, block=block)
    assert found.alpha is not None
    assert found.error < found.error_plain / 2


def test_statistics_of_rows_that_are_not_here_count():
    """A channel that was larger elsewhere sets the range, and takes a larger factor."""
    rows, weights = group(outliers=20)
    elsewhere = np.abs(rows).max(0)
    elsewhere[11] *= 500
    here = search_smoothing(rows, weights)
    there = search_smoothing(rows, weights, input_absmax=elsewhere)
    assert there.error_plain > 10 * here.error_plain
    assert there.factors[11] > 10 * here.factors[11]
    mean = np.abs(rows).mean(0)
    mean[11] *= 500
    assert not np.array_equal(
        search_awq(rows, weights).factors,
        search_awq(rows, weights, input_mean=mean).factors,
    )


def test_dead_channels_stay_out_of_it():
    rows, weights = group(outliers=60)
    rows[:, 7] = 0
    for weight in weights:
        weight[:, 9] = 0
    for found in (search_smoothing(rows, weights), search_awq(rows, weights)):
        assert found.alpha is not None
        assert found.factors[7] == 1
        assert np.isfinite(found.factors).all()
        assert all(np.isfinite(error) for error in found.errors.values())
    assert search_smoothing(rows, weights).factors[9] == 1


def test_rows_of_zeros_cost_nothing():
    found = search_smoothing(np.zeros((4, K), np.float32), group()[1])
    assert (found.alpha, found.error, found.error_plain) == (None, 0.0, 0.0)


def test_only_a_spread_sample_is_multiplied_and_always_the_same():
    rows, weight = normal(3 * SAMPLE_ROWS, K), normal(2 * SAMPLE_OUTPUTS, K, seed=1)
    rows[:, SALIENT] *= 60
    largest = np.abs(rows).max(0)
    first = search_smoothing(rows, [weight], input_absmax=largest)
    again = search_smoothing(rows.copy(), [weight.copy()], input_absmax=largest)
    assert first.errors == again.errors
    np.testing.assert_array_equal(first.factors, again.factors)
    some = np.linspace(0, len(rows) - 1, SAMPLE_ROWS).round().astype(int)
    outputs = np.linspace(0, len(weight) - 1, SAMPLE_OUTPUTS).round().astype(int)
    assert len({*some}) == SAMPLE_ROWS
    alone = search_smoothing(rows[some], [weight[outputs]], input_absmax=largest)
    assert first.error_plain == alone.error_plain
    assert first.error_plain != search_smoothing(rows[:SAMPLE_ROWS], [weight]).error_plain
    # The weights' own statistics are of all outputs, though few are multiplied.
    left_out = np.setdiff1d(np.arange(len(weight)), outputs)[0]
    weight[left_out, 3] = 100
    changed = search_smoothing(rows, [weight], input_absmax=largest)
    assert changed.error_plain == first.error_plain
    assert changed.errors != first.errors


def test_sampled_errors_are_those_of_each_scheme():
    rows, (weight, _) = group(outliers=10)
    scale = activation_scale(np.abs(rows).max())
    sample = OutputSample.of(rows, [weight])
    exact = rows @ weight.T
    inputs = dequantise(quantise(rows, scale), scale)
    rounded = restored(*int8_weight(weight))
    w8a8, w8, w4 = sample.error_w8a8(scale), sample.error_w8(), sample.error_w4(block=32)
    assert w8a8 == pytest.approx(relative(exact, inputs @ rounded.T), rel=1e-3)
    assert w8 == pytest.approx(relative(exact, rows @ rounded.T), rel=1e-3)
    assert w4 == pytest.approx(w4_error(rows, [weight], np.ones(K, np.float32), 32), rel=1e-3)
    assert w8 < w8a8
    assert w8 < w4


def test_clipping_counts_in_sampled_errors():
    rows, (weight, _) = group(outliers=10)
    scale = activation_scale(np.abs(rows).max())
    sample = OutputSample.of(rows, [weight])
    assert sample.error_w8a8(scale / 8) > 10 * sample.error_w8a8(scale)
