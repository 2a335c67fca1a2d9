"""Rounding equals the definition, ONNX's own operators and ONNX's own packing, bit for bit."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper
from visistage.compile.quantize import int_arithmetic as rounding
from visistage.compile.quantize.int_arithmetic import (
    HALF_TINY,
    TINY,
    activation_scale,
    blocked_weight,
    dequantise,
    fake_quantised_weight,
    int8_weight,
    pack_int4,
    quantise,
    restored,
    unpack_int4,
)
from visistage.graphs.errors import ModelError
from visistage.graphs.quantization import SCALE_BLOCK

FLOATS = st.floats(-(2.0**127), 2.0**127, width=32)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def by_definition(weight, levels, blocks, half=False):
    """Values (N, K) and scales (N, blocks), one number after the other."""
    values, scales = np.zeros(weight.shape, int), np.zeros((len(weight), len(blocks)), np.float32)
    for n, row in enumerate(weight):
        for b, (start, stop) in enumerate(blocks):
            largest = max(abs(float(x)) for x in row[start:stop])
            scale = np.float32(np.float32(largest) / np.float32(levels))
            if half:
                scale = np.float32(np.float16(min(scale, 65504)))
            scale = max(scale, np.float32(2.0**-14 if half else 2.0**-126)) if largest else 1
            scales[n, b] = scale
            for k in range(start, min(stop, len(row))):
                near = round(float(np.float32(row[k]) / np.float32(scale)))  # half to even
                values[n, k] = min(max(near, -levels), levels)
    return values, scales


def ort_round_trip(x: np.ndarray, scale: np.ndarray, **attributes) -> list[np.ndarray]:
    """What ONNX Runtime's QuantizeLinear and DequantizeLinear make of it."""
    ort = pytest.importorskip("onnxruntime")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], **attributes),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [
            helper.make_tensor_value_info("q", TensorProto.INT8, x.shape),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape),
        ],
        [
            numpy_helper.from_array(np.asarray(scale, np.float32), "scale"),
            numpy_helper.from_array(np.zeros(np.shape(scale), np.int8), "zero"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})


@pytest.mark.parametrize("threshold", [1.0, 127.0, 0.3, 1e-20, 1e20, 3e38])
def test_scale_is_a_127th_of_the_threshold(threshold):
    scale = activation_scale(threshold)
    assert scale.dtype == np.float32
    assert scale == np.float32(np.float32(threshold) / np.float32(127))
    assert quantise(np.float32([threshold, -threshold, 0]), scale).tolist() == [127, -127, 0]


@pytest.mark.parametrize("threshold", [1e-37, 1e-40, 1e-45])
def test_scale_is_never_subnormal(threshold):
    assert activation_scale(threshold) == np.float32(TINY)
    assert activation_scale(threshold, half=True) == np.float32(HALF_TINY)


def test_range_of_zeros_alone_stays_exactly_zero():
    scale = activation_scale(0.0)
    assert scale == 1
    values = quantise(np.zeros(5, np.float32), scale)
    assert not values.any()
    assert not dequantise(values, scale).any()


@pytest.mark.parametrize("threshold", [1.0, 0.3, 12.7, 1e3, 1e9])
def test_scale_for_fp16_is_an_fp16_number(threshold):
    scale = activation_scale(threshold, half=True)
    assert scale == np.float32(np.float16(min(threshold / 127, 65504)))
    assert np.isfinite(scale)


@pytest.mark.parametrize("threshold", [np.nan, np.inf])
def test_range_that_is_not_finite_is_refused(threshold):
    with pytest.raises(ModelError, match="a range holds NaN or infinity"):
        activation_scale(threshold)


def test_halves_go_to_the_even_neighbour():
    halves = np.float32([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5])
    assert quantise(halves, np.float32(1)).tolist() == [0, 2, 2, 0, -2, -2, 126]


@given(
    hnp.arrays(np.float32, st.integers(1, 40), elements=FLOATS),
    st.floats(2.0**-10, 2.0**10, width=32).map(np.float32),
)
@settings(max_examples=60, deadline=None)
def test_quantise_equals_onnx_runtime_except_below_minus_127(x, scale):
    ours = quantise(x, scale)
    theirs, _ = ort_round_trip(x, scale)
    np.testing.assert_array_equal(ours, np.maximum(theirs, -127))
    low = theirs == -128
    assert (x[low] <= -127.5 * scale).all()


def test_a_ratio_beyond_fp32_is_clipped_without_a_warning():
    assert quantise(np.float32([3e38, -3e38]), np.float32(1e-30)).tolist() == [127, -127]


@given(st.integers(1, 9), st.integers(1, 33), st.integers(0, 1000), st.booleans())
@settings(max_examples=60, deadline=None)
def test_int8_weight_equals_the_definition(outputs, inputs, seed, half):
    weight = normal(outputs, inputs, seed=seed) * np.float32(10.0 ** (seed % 9 - 5))
    weight[0] *= seed % 2  # a dead output now and then
    values, scales = int8_weight(weight, half=half)
    expected, expected_scales = by_definition(weight, 127, [(0, inputs)], half)
    assert values.dtype == np.int8
    assert scales.dtype == np.float32
    np.testing.assert_array_equal(values, expected.T)
    np.testing.assert_array_equal(scales, expected_scales[:, 0])


@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 16), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_blocked_weight_equals_the_definition(outputs, inputs, block, seed):
    weight = normal(outputs, inputs, seed=seed)
    weight[:, : seed % 20] = 0
    half = seed % 3 == 0
    values, scales = blocked_weight(weight, block, half=half)
    blocks = [(start, start + block) for start in range(0, inputs, block)]
    expected, expected_scales = by_definition(weight, 7, blocks, half)
    assert values.dtype == np.int8
    assert scales.shape == (len(blocks), outputs)
    np.testing.assert_array_equal(values, expected.T)
    np.testing.assert_array_equal(scales, expected_scales.T)


@pytest.mark.parametrize("block", [None, 16, 24])
@pytest.mark.parametrize("half", [False, True])
def test_rounding_moves_no_weight_by_more_than_half_a_step(block, half):
    weight = normal(33, 70)
    parts = blocked_weight(weight, block, half=half) if block else int8_weight(weight, half=half)
    values, scales = parts
    step = scales[:, None] if not block else np.repeat(scales, block, axis=0)[:70].T
    # FP16 scales may be smaller by one part in 2048: the largest weight is then cut by that much.
    slack = 7 / 2048 if half and block else 127 / 2048 if half else 1e-5
    assert (np.abs(restored(values, scales, block) - weight) <= step * (0.5 + slack)).all()


@pytest.mark.parametrize("block", [None, 16, 24, SCALE_BLOCK])
def test_rounded_weight_equals_restored_bit_for_bit(block):
    weight = normal(19, 200)
    weight[3] = 0
    parts = int8_weight(weight) if block is None else blocked_weight(weight, block)
    np.testing.assert_array_equal(fake_quantised_weight(weight, block), restored(*parts, block))


def test_restored_weight_is_what_onnx_runtime_dequantises():
    weight = normal(6, 40)
    values, scales = int8_weight(weight)
    theirs, dequantised = ort_round_trip(np.ascontiguousarray(weight.T), scales, axis=1)
    np.testing.assert_array_equal(values, theirs)
    np.testing.assert_array_equal(restored(values, scales), dequantised.T)


@pytest.mark.parametrize("largest", [1e-6, 1e7])
def test_fp16_scales_stay_normal_and_finite(largest):
    weight = np.full((2, 8), largest, np.float32)
    for _, scales in (int8_weight(weight, half=True), blocked_weight(weight, half=True)):
        assert (scales >= HALF_TINY).all()
        assert np.isfinite(scales.astype(np.float16)).all()
        np.testing.assert_array_equal(scales, scales.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rounded", [int8_weight, blocked_weight])
def test_weight_that_is_not_finite_is_refused_by_name(bad, rounded):
    weight = normal(4, 8)
    weight[2, 3] = bad
    with pytest.raises(ModelError, match=r"layers\.3\.down_proj holds NaN or infinity"):
        rounded(weight, name="layers.3.down_proj")


@pytest.mark.parametrize("rounded", [int8_weight, blocked_weight])
def test_half_precision_weights_give_what_their_values_give(rounded):
    narrow = normal(5, 40).astype(np.float16)
    for ours, wide in zip(rounded(narrow), rounded(narrow.astype(np.float32)), strict=True):
        np.testing.assert_array_equal(ours, wide)


@pytest.mark.parametrize("shape", [(4, 6), (3, 5), (1, 1), (7,), (2, 3, 4)])
def test_packing_is_onnx_own(shape):
    values = np.random.default_rng(1).integers(-8, 8, shape).astype(np.int8)
    packed = pack_int4(values)
    made = helper.make_tensor("w", TensorProto.INT4, shape, values.reshape(-1).tolist())
    raw = helper.make_tensor("w", TensorProto.INT4, shape, packed.tobytes(), raw=True)
    as_onnx = numpy_helper.to_array(made)
    np.testing.assert_array_equal(as_onnx.astype(np.int8), values)
    np.testing.assert_array_equal(numpy_helper.to_array(raw), as_onnx)
    assert numpy_helper.from_array(as_onnx, "w").raw_data == packed.tobytes()
    np.testing.assert_array_equal(unpack_int4(packed, shape), values)


def test_packing_does_not_change_what_it_packs():
    values = np.int8([[1, -2], [3, -4]])
    pack_int4(values)
    assert values.tolist() == [[1, -2], [3, -4]]


def test_pieces_change_nothing(monkeypatch):
    weight = normal(37, 50)
    whole = [int8_weight(weight), blocked_weight(weight, 16)]
    monkeypatch.setattr(rounding, "_WEIGHT_CHUNK", 120)
    for (values, scales), (v, s) in zip(
        whole, [int8_weight(weight), blocked_weight(weight, 16)], strict=True
    ):
        np.testing.assert_array_equal(values, v)
        np.testing.assert_array_equal(scales, s)
    np.testing.assert_array_equal(restored(*whole[1], 16), fake_quantised_weight(weight, 16))


@pytest.mark.parametrize("rounded", [int8_weight, blocked_weight])
def test_temporaries_do_not_grow_with_the_matrix(rounded, monkeypatch):
    monkeypatch.setattr(rounding, "_WEIGHT_CHUNK", 1 << 16)
    weight = normal(2048, 512)
    tracemalloc.start()
    try:
        kept = rounded(weight)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    results = sum(array.nbytes for array in kept)
    assert peak - results < 8 * (4 << 16) < weight.nbytes


@pytest.mark.parametrize("half", [False, True])
def test_int8_in_blocks_fills_its_own_range(half):
    """As INT4 in blocks, with 127 steps to a side and not 7."""
    weight = normal(3, 10, seed=5)
    values, scales = blocked_weight(weight, 4, levels=127, half=half)
    expected, of_blocks = by_definition(weight, 127, [(0, 4), (4, 8), (8, 12)], half)
    assert (values == expected.T).all()
    assert (scales == of_blocks.T).all()
    assert np.abs(values).max() >= 126
