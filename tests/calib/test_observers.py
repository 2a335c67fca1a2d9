"""Histograms count exactly, however data is cut; thresholds equal brute force on the samples."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from visistage.calib.run.observers import BINS, PERCENTILE, Histogram, threshold
from visistage.graphs.errors import ModelError
from visistage.graphs.quantization import OBSERVERS

SAMPLES = 100_000
RANDOM = np.random.default_rng(7)
DISTRIBUTIONS = {
    "gaussian": RANDOM.normal(size=SAMPLES),
    "laplace": RANDOM.laplace(size=SAMPLES),
    "uniform": RANDOM.uniform(-1, 1, size=SAMPLES),
    "two spikes": np.repeat([-1.0, 10.0], SAMPLES // 2),
    "one huge outlier": np.append(RANDOM.normal(size=SAMPLES - 1), 1000.0),
    "heavy tails": RANDOM.standard_t(3, size=SAMPLES),
    "few": RANDOM.normal(size=20),
    "single value": np.full(5, 3.3),
    "mostly zeros": np.append(np.zeros(SAMPLES), RANDOM.normal(size=1000)),
    "tiny": RANDOM.normal(size=SAMPLES) * 1e-20,
    "huge": RANDOM.normal(size=SAMPLES) * 1e20,
}
DATA = {name: values.astype(np.float32) for name, values in DISTRIBUTIONS.items()}

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
BATCHES = st.lists(
    hnp.arrays(np.float32, hnp.array_shapes(max_dims=2, max_side=6), elements=FINITE), max_size=6
)


def observed(*batches: np.ndarray) -> Histogram:
    histogram = Histogram("layers.3.down_proj")
    for batch in batches:
        histogram.add(batch)
    return histogram


def same(one: Histogram, other: Histogram) -> bool:
    return one.maximum == other.maximum and np.array_equal(one.counts, other.counts)


def squared_error(values: np.ndarray, clip: float) -> float:
    """Mean (x - Q(x))², on the samples themselves."""
    values = np.abs(values, dtype=np.float64)
    step = clip / 127
    return float(np.mean((values - step * np.minimum(np.rint(values / step), 127)) ** 2))


def divergence(counts: list[int], i: int) -> float:
    """KL(P || Q) for the first ``i`` bins, transcribed from the definition in plain loops."""
    p = [float(count) for count in counts[:i]]
    p[-1] += sum(counts[i:])
    levels = [[] for _ in range(128)]
    for j in range(i):
        levels[j * 128 // i].append(j)
    q = [0.0] * i
    for level in levels:
        filled = [j for j in level if counts[j]]
        for j in filled:
            q[j] = sum(counts[j] for j in level) / len(filled)
    if not any(q):
        return math.inf
    if not q[-1] and p[-1]:
        q[-1] = 1e-4
    p_total, q_total = sum(p), sum(q)
    terms = ((a / p_total, b / q_total) for a, b in zip(p, q, strict=True) if a)
    return sum(a * math.log(a / b) for a, b in terms)


@given(BATCHES)
@settings(max_examples=200, deadline=None)
def test_counts_do_not_depend_on_how_the_data_is_cut(batches):
    values = np.concatenate([np.float32([]), *(batch.reshape(-1) for batch in batches)])
    at_once = observed(values)
    assert same(observed(*batches), at_once)
    assert same(observed(*reversed(batches)), at_once)
    assert same(observed(*(values[i : i + 1] for i in range(len(values)))), at_once)


@given(BATCHES)
@settings(max_examples=100, deadline=None)
def test_every_bin_holds_what_lies_between_its_edges(batches):
    values = np.concatenate([np.float32([]), *(batch.reshape(-1) for batch in batches)])
    histogram = observed(*batches)
    bins = np.abs(values.astype(np.float64)) // histogram.width  # exact: powers of two
    assert histogram.total == len(values)
    assert histogram.maximum == (np.abs(values).max() if len(values) else 0)
    np.testing.assert_array_equal(histogram.counts, np.bincount(bins.astype(int), minlength=BINS))


@pytest.mark.parametrize("name", DATA)
def test_the_maximum_lies_in_the_upper_half_of_the_bins(name):
    histogram = observed(DATA[name])
    assert BINS / 2 <= histogram.maximum / histogram.width < BINS


def test_a_much_larger_value_merges_all_before_it_into_one_bin():
    histogram = observed(np.float32([1e-30, 2e-30]), np.float32([5.0]))
    assert histogram.counts[0] == 2
    assert histogram.counts[histogram.counts.nonzero()[0][-1]] == 1


def test_large_batches_are_counted_in_pieces():
    values = np.resize(DATA["gaussian"], 3_000_000)
    expected = sum(observed(part).total for part in np.array_split(values, 7))
    histogram = observed(values.reshape(1000, 3000))
    assert histogram.total == expected == 3_000_000
    assert histogram.counts[0] == (np.abs(values) < histogram.width).sum()


def test_half_precision_values_are_counted_as_they_are():
    narrow = DATA["gaussian"].astype(np.float16)
    assert same(observed(narrow), observed(narrow.astype(np.float32)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_and_nothing_is_counted(bad):
    histogram = observed(np.float32([1, 2]))
    with pytest.raises(ModelError, match=r"layers\.3\.down_proj takes the value NaN or infinity"):
        histogram.add(np.float32([9, bad, 9]))
    assert same(histogram, observed(np.float32([1, 2])))


def test_no_values_have_no_threshold():
    histogram = observed(np.zeros((0, 4), np.float32))
    for observer in OBSERVERS:
        with pytest.raises(ValueError, match="without values"):
            threshold(histogram, observer)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_all_zeros_have_threshold_zero(observer):
    assert threshold(observed(np.zeros(9, np.float32)), observer) == 0


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("value", [3.3, 1e-40, 1e-20, 1e20, 3.4e38])
def test_a_single_value_is_kept_to_within_a_bin(observer, value):
    histogram = observed(np.float32([value]))
    found = threshold(histogram, observer)
    assert abs(found - float(np.float32(value))) <= histogram.width


@pytest.mark.parametrize("name", DATA)
def test_minmax_is_exact(name):
    assert threshold(observed(DATA[name]), "minmax") == np.abs(DATA[name]).max()


@pytest.mark.parametrize("name", DATA)
def test_percentile_equals_the_quantile_to_within_a_bin(name):
    histogram = observed(DATA[name])
    magnitudes = np.abs(DATA[name])
    found = threshold(histogram, "percentile")
    quantile = np.quantile(magnitudes, PERCENTILE / 100, method="inverted_cdf")
    assert 0 <= found - quantile <= histogram.width
    assert (magnitudes <= found).mean() >= PERCENTILE / 100


@pytest.mark.parametrize("name", DATA)
def test_entropy_equals_a_slow_transcription(name):
    """Against every eighth candidate, and all near the one that was found."""
    histogram = observed(DATA[name])
    counts = histogram.counts.tolist()
    all_bins = 1 + int(histogram.counts.nonzero()[0][-1])
    clip = threshold(histogram, "entropy")
    found = all_bins if clip == histogram.maximum else round(clip / histogram.width)
    candidates = {*range(128, all_bins + 1, 8), *range(found - 8, found + 9), all_bins}
    least = min(divergence(counts, i) for i in candidates if 128 <= i <= all_bins)
    assert divergence(counts, found) <= least + 1e-7


def test_entropy_does_not_clip_half_of_the_values_for_nothing():
    """Clipping 10 into the bin of 1 diverges by 0, as does clipping nothing."""
    values = np.repeat(np.float32([1, 10]), 1000)
    histogram = observed(values)
    at_one = 1 + int(histogram.counts.nonzero()[0][0])
    assert at_one >= 128
    assert divergence(histogram.counts.tolist(), at_one) == 0
    assert threshold(histogram, "entropy") == 10


@pytest.mark.parametrize("name", DATA)
def test_mse_is_as_good_as_an_exhaustive_search_on_the_samples(name):
    """Of 3 000 thresholds; what a bin cannot tell apart may cost half its width."""
    values = DATA[name]
    if len(values) > 5000:
        values = np.append(values[::20], values[np.abs(values).argmax()])
    histogram = observed(values)
    found = threshold(histogram, "mse")
    candidates = np.linspace(histogram.width / 2, histogram.maximum, 3000)
    best = min(squared_error(values, candidate) for candidate in candidates)
    assert 0 < found <= histogram.maximum
    assert squared_error(values, found) <= 1.02 * best + (histogram.width / 2) ** 2


@pytest.mark.parametrize(
    ("name", "density", "published"),
    [
        ("gaussian", lambda x: np.exp(-x * x / 2), 3.92),
        ("laplace", lambda x: np.exp(-x), 9.89),
    ],
)
def test_mse_of_known_densities_equals_integration(name, density, published):
    """Thresholds in sigma and b; Banner et al. 2019 give them for 256 levels."""
    x = np.linspace(0, 30, 600_001)
    weights = density(x)
    clips = np.linspace(published - 0.6, published + 0.6, 121)

    def expected(clip):
        step = clip / 127
        return ((x - step * np.minimum(np.rint(x / step), 127)) ** 2 * weights).sum()

    best = clips[np.argmin([expected(clip) for clip in clips])]
    histogram = Histogram()
    rng = np.random.default_rng(3)
    draw = rng.normal if name == "gaussian" else rng.laplace
    for _ in range(4):
        histogram.add(draw(size=1_000_000).astype(np.float32))
    found = threshold(histogram, "mse")
    assert best == pytest.approx(published, abs=0.05)
    assert found == pytest.approx(best, rel=0.015)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_thresholds_scale_with_powers_of_two(observer):
    values = DATA["laplace"]
    found = threshold(observed(values), observer)
    assert threshold(observed(values * np.float32(2.0**-40)), observer) == found * 2.0**-40
