import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from visistage.graphs.errors import ModelError, PromptError
from visistage.runtime.text.sampling import Sampling, choose, eos_ids, stop_strings

V = 37


def hf_distribution(config: dict, logits: np.ndarray, history: list[int]) -> np.ndarray:
    """What transformers' own processors, in transformers' own order, make of the logits."""
    torch = pytest.importorskip("torch")
    from transformers import GenerationConfig
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    generation = GenerationConfig(**config)
    steps = LogitsProcessorList()
    if generation.repetition_penalty not in (None, 1.0):
        steps.append(RepetitionPenaltyLogitsProcessor(generation.repetition_penalty))
    steps.append(TemperatureLogitsWarper(generation.temperature or 1.0))
    top_k = 50 if generation.top_k is None else generation.top_k
    if top_k:
        steps.append(TopKLogitsWarper(top_k))
    if (generation.top_p or 1.0) < 1:
        steps.append(TopPLogitsWarper(generation.top_p))
    if generation.min_p:
        steps.append(MinPLogitsWarper(generation.min_p))
    scores = steps(torch.tensor([history]), torch.tensor(logits)[None])
    return torch.softmax(scores[0].double(), -1).numpy()


@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.05, 5),
    top_k=st.sampled_from([None, 0, 1, 2, 5, V - 1, V, 100]),
    top_p=st.sampled_from([None, 1.0, 0.95, 0.7, 0.3, 0.01]),
    min_p=st.sampled_from([None, 0.0, 0.02, 0.5, 1.0]),
    penalty=st.sampled_from([None, 1.0, 1.3, 0.7]),
)
@settings(max_examples=150, deadline=None)
def test_distribution_equals_transformers(seed, temperature, top_k, top_p, min_p, penalty):
    random = np.random.default_rng(seed)
    logits = random.normal(0, 4, V).astype(np.float32)
    history = random.integers(0, V, 6).tolist()
    config = {
        "do_sample": True,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": penalty,
    }
    ours = Sampling.from_generation_config(config).probabilities(logits, history)
    np.testing.assert_allclose(ours, hf_distribution(config, logits, history), atol=2e-6)


def test_order_of_the_steps_matches_transformers_generate():
    transformers = pytest.importorskip("transformers")
    config = transformers.GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_k=5,
        top_p=0.8,
        min_p=0.1,
        repetition_penalty=1.2,
        num_beams=1,
    )
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=V,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    steps = model._get_logits_processor(config, 1)
    assert [type(step).__name__ for step in steps] == [
        "RepetitionPenaltyLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
    ]


def test_draws_follow_the_distribution():
    logits = np.log(np.array([0.5, 0.25, 0.2, 0.05], np.float32))
    sampling = Sampling(temperature=1.0, top_k=3, seed=3)
    rng = sampling.rng()
    counts = np.bincount([choose(logits, sampling, (), rng) for _ in range(20_000)], minlength=4)
    assert counts[3] == 0
    expected = np.array([0.5, 0.25, 0.2]) / 0.95
    np.testing.assert_allclose(counts[:3] / 20_000, expected, atol=0.015)


def test_a_dropped_token_is_never_drawn_even_at_the_ends_of_the_unit_interval():
    class Fixed:
        def __init__(self, value):
            self.value = value

        def random(self):
            return self.value

    logits = np.array([-np.inf, 1.0, -np.inf, 2.0, -np.inf], np.float32)
    sampling = Sampling(temperature=1.0)
    assert choose(logits, sampling, (), Fixed(0.0)) == 1
    assert choose(logits, sampling, (), Fixed(np.nextafter(1, 0))) == 3


def test_a_seed_repeats_and_another_differs():
    logits = np.zeros(1000, np.float32)

    def draws(seed):
        sampling = Sampling(temperature=1.0, seed=seed)
        rng = sampling.rng()
        return [choose(logits, sampling, (), rng) for _ in range(5)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    with pytest.raises(TypeError, match="rng"):
        choose(logits, Sampling(temperature=1.0))


def test_greedy_takes_the_lowest_of_tied_ids_and_obeys_the_penalty():
    logits = np.array([1, 3, 3, 2], np.float32)
    assert choose(logits, Sampling()) == 1
    assert choose(logits, Sampling(repetition_penalty=2.0), [1]) == 2
    # A negative logit is multiplied: -1 * 4 falls behind -2.
    assert choose(-logits, Sampling(repetition_penalty=4.0), [0]) == 3
    assert Sampling().probabilities(logits).tolist() == [0, 1, 0, 0]
    assert logits.tolist() == [1, 3, 3, 2]


def test_a_tiny_temperature_is_greedy_not_nan():
    logits = np.array([1, 5, 4.999], np.float32)
    sampling = Sampling(temperature=1e-30, seed=0)
    assert choose(logits, sampling, (), sampling.rng()) == 1


@pytest.mark.parametrize(
    "logits", [[0, np.nan, 1], [np.nan] * 3, [0, np.inf, 1], [-np.inf, -np.inf, -np.inf]]
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_an_error_not_token_zero(logits, temperature):
    sampling = Sampling(temperature=temperature, seed=0)
    with pytest.raises(ModelError, match=r"NaN|inf"):
        choose(np.array(logits, np.float32), sampling, (), sampling.rng())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", None),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("seed", -1),
        ("seed", 0.5),
    ],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(PromptError, match=f"{field} is .*must be"):
        Sampling(**{field: value})


def test_generation_config_defaults():
    assert Sampling.from_generation_config(None) == Sampling()
    # Without do_sample the rest is not used, as in transformers.
    vicuna = {"temperature": 0.9, "top_p": 0.6, "max_length": 4096, "pad_token_id": 0}
    assert Sampling.from_generation_config(vicuna) == Sampling()
    assert Sampling.from_generation_config({**vicuna, "do_sample": True}) == Sampling(
        temperature=0.9, top_p=0.6, top_k=50
    )
    assert Sampling.from_generation_config(
        {**vicuna, "do_sample": True}, temperature=0.2, top_p=None, seed=7
    ) == Sampling(temperature=0.2, top_p=0.6, top_k=50, seed=7)


@pytest.mark.parametrize(
    "field",
    [
        {"num_beams": 4},
        {"no_repeat_ngram_size": 3},
        {"bad_words_ids": [[5]]},
        {"suppress_tokens": [1]},
        {"typical_p": 0.5},
        {"min_new_tokens": 3},
        {"guidance_scale": 1.5},
    ],
)
def test_fields_that_would_change_the_output_are_refused_by_name(field):
    with pytest.raises(PromptError, match=next(iter(field))):
        Sampling.from_generation_config(field)


def test_switched_off_fields_pass_and_unknown_ones_are_reported(caplog):
    Sampling.from_generation_config({"num_beams": 1, "bad_words_ids": None, "typical_p": 1.0})
    assert not caplog.records
    Sampling.from_generation_config({"tempreature": 0.5, "_from_model_config": True})
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "tempreature" in caplog.text
    assert "temperature" in caplog.text


def test_transformers_own_defaults_are_not_refused():
    transformers = pytest.importorskip("transformers")
    defaults = transformers.GenerationConfig()._get_default_generation_params()
    assert Sampling.from_generation_config(defaults) == Sampling()
    assert Sampling.from_generation_config(transformers.GenerationConfig().to_dict()) == Sampling()


def test_eos_ids():
    assert eos_ids({"eos_token_id": 2}) == (2,)
    assert eos_ids({"eos_token_id": [7, 2, 7]}, {"eos_token_id": 9}) == (2, 7)
    assert eos_ids(None, {"text_config": {"eos_token_id": 3}}) == (3,)
    assert eos_ids({}, {"eos_token_id": 0}) == (0,)
    for bad in ("</s>", [2, "x"], True, -1):
        with pytest.raises(ModelError, match="eos_token_id"):
            eos_ids({"eos_token_id": bad})
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        eos_ids(None, {})


def test_stop_strings():
    assert stop_strings(None) == ()
    assert stop_strings({"stop_strings": "END"}) == ("END",)
    assert stop_strings({"stop_strings": ["a", "b"]}) == ("a", "b")
