"""A calibration comes back as it was written, or says why not; it fits what it was made for."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from visistage.calib.sample_prompts import order_hash, prepare
from visistage.calib.samples import Sample
from visistage.compile.checkpoint.checkpoint import open_checkpoint
from visistage.compile.export.texts import text_facts
from visistage.compile.quantize.calibration_file import (
    ARRAYS,
    FACTS,
    MAX_BYTES,
    Calibration,
    SampleFacts,
    facts_of,
)
from visistage.compile.quantize.group_ranges import GroupRanges, best_observer
from visistage.graphs.errors import DataError
from visistage.graphs.presets.presets import preset
from visistage.graphs.quantization import OBSERVERS
from visistage.runtime.image.preprocessing import Preprocessing

from ..support import toy

FITS = {"model": "a" * 64, "template": "b" * 64, "preprocessing": "c" * 64}


def ranges(seed=0, width=8, **changes):
    random = np.random.default_rng(seed)

    def by_observer():
        return {name: float(random.random()) for name in OBSERVERS}

    def vector():
        return random.random(width, np.float32)

    fields = {
        "rows": 500,
        "rows_used": 400,
        "absmax": vector(),
        "alpha": 0.5,
        "factors": vector(),
        "aware_alpha": None,
        "aware": np.ones(width, np.float32),
        "thresholds": by_observer(),
        "smoothed_thresholds": by_observer(),
        "errors": by_observer(),
        "smoothed_errors": by_observer(),
        "weight_error": 0.01,
        "aware_error": 0.005,
        "sensitivity": {"q": {"w8a8": 1e-4, "w8": 1e-5, "w4": 0.01}},
    }
    return GroupRanges(**{**fields, **changes})


def calibration(**changes):
    fields = {
        "model": "demo",
        "fits": FITS,
        "plan": preset("visipruner", 8, 16),
        "rows": "stage",
        "include_prefix": False,
        "samples": SampleFacts(("q.jsonl",), ("q.jsonl:1", "q.jsonl:3"), "d" * 64, (("x", "y"),)),
        "groups": {"z.q_proj": ranges(1), "a.fc1": ranges(2, 5)},
        "versions": {"visistage": "0"},
        "dynamics": {"quantiles": [0.5], "none": None},
        "choice": {"reason": "größer"},
        "cache": np.random.default_rng(3).random((2, 8, 4), np.float32),
    }
    return Calibration(**{**fields, **changes})


def test_a_calibration_comes_back_bit_for_bit(tmp_path):
    one = calibration()
    assert one.save(tmp_path) == [ARRAYS, FACTS]
    again = Calibration.load(tmp_path)
    assert again.hash == one.hash
    assert list(again.groups) == ["z.q_proj", "a.fc1"]  # as a prompt meets them
    for name, group in one.groups.items():
        assert again.groups[name].facts() == group.facts()
        for key in ("absmax", "factors", "aware"):
            mine, theirs = getattr(group, key), getattr(again.groups[name], key)
            assert (mine.tobytes(), mine.dtype) == (theirs.tobytes(), theirs.dtype)
    for field in ("model", "fits", "plan", "rows", "include_prefix", "samples", "versions"):
        assert getattr(again, field) == getattr(one, field)
    assert (again.dynamics, again.choice) == (one.dynamics, one.choice)
    assert (again.cache.tobytes(), again.cache.shape) == (one.cache.tobytes(), one.cache.shape)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([ARRAYS, FACTS])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0, 2.0**127, width=32), min_size=len(OBSERVERS), max_size=len(OBSERVERS)),
    st.lists(st.floats(2.0**-120, 2.0**120, width=32), min_size=1, max_size=9),
)
def test_scales_survive_bit_for_bit(tmp_path_factory, limits, factors):
    folder = tmp_path_factory.mktemp("scales")
    limits = dict(zip(OBSERVERS, (np.float32(limit) for limit in limits), strict=True))
    vector = np.array(factors, np.float32)
    group = ranges(thresholds=limits, factors=vector, absmax=vector, aware=vector)
    calibration(groups={"g": group}).save(folder)
    again = Calibration.load(folder).groups["g"]
    assert {name: np.float32(limit) for name, limit in again.thresholds.items()} == limits
    assert again.factors.tobytes() == vector.tobytes()


def test_equal_inputs_give_equal_bytes(tmp_path):
    calibration().save(tmp_path / "a")
    calibration().save(tmp_path / "b")
    for name in (FACTS, ARRAYS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"rows": "dense"},
        {"include_prefix": True},
        {"plan": preset("dense", 8, 16)},
        {"groups": {"z.q_proj": ranges(1)}},
        {"groups": {"z.q_proj": ranges(1), "a.fc1": ranges(3, 5)}},
        {"groups": {"a.fc1": ranges(2, 5), "z.q_proj": ranges(1)}},
        {"dynamics": {}},
        {"cache": np.ones((2, 8, 4), np.float32)},
        {"cache": None},
        {"fits": {**FITS, "model": "0" * 64}},
    ],
)
def test_the_hash_names_the_contents(change):
    assert calibration().hash == calibration().hash
    assert calibration(**change).hash != calibration().hash


def test_facts_are_readable_json_with_sorted_keys(tmp_path):
    calibration().save(tmp_path)
    text = (tmp_path / FACTS).read_text(encoding="utf-8")
    assert "größer" in text
    data = json.loads(text)
    assert list(data) == sorted(data)
    assert data["samples"]["count"] == 2
    assert data["samples"]["unreadable"] == [{"sample": "x", "reason": "y"}]


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        (FACTS, lambda old: old[: len(old) // 2], "is not JSON"),
        (FACTS, lambda old: b"", "is not JSON"),
        (FACTS, lambda old: b"[1]", r"has format \[1\]"),
        (FACTS, lambda old: b"\xff\xfe", "is not JSON"),
        (FACTS, lambda old: b"[" * 200_000, "is not JSON"),
        (FACTS, lambda old: old.replace(b'"format": 2', b'"format": 3'), "has format 3"),
        (FACTS, lambda old: old.replace(b'"order"', b'"z"'), "z: found an unknown key"),
        (FACTS, lambda old: old.replace(b'"rows_used"', b'"used"'), "rows_used|used"),
        (FACTS, lambda old: old.replace(b'"entropy"', b'"antropy"'), "observer"),
        (
            FACTS,
            lambda old: old.replace(b'"rows": "stage"', b'"rows": "all"'),
            "rows: found 'all', expected one of stage, dense",
        ),
        (FACTS, lambda old: old.replace(b'"alpha": 0.5', b'"alpha": NaN'), "NaN"),
        (
            FACTS,
            lambda old: re.sub(rb'"minmax": [\d.]+', b'"minmax": 1' + b"0" * 400, old, count=1),
            "or not finite",
        ),
        (FACTS, lambda old: old.replace(b'"layers": 8', b'"layers": 9'), "stages"),
        (FACTS, lambda old: old.replace(b'"count": 2', b'"count": 3'), "count is 3"),
        (ARRAYS, lambda old: old[:-1], "its hash is not the one noted"),
        (ARRAYS, lambda old: old[:-1] + bytes([old[-1] ^ 1]), "its hash is not the one noted"),
        (ARRAYS, lambda old: b"", "its hash is not the one noted"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, damage, words):
    calibration().save(tmp_path)
    file = tmp_path / name
    new = damage(file.read_bytes())
    assert new != file.read_bytes()
    file.write_bytes(new)
    with pytest.raises(DataError, match=words) as error:
        Calibration.load(tmp_path)
    assert str(file) in str(error.value)
    assert "visistage calibrate" in str(error.value)


def test_arrays_that_are_none_are_refused_even_with_a_right_hash(tmp_path):
    import hashlib

    calibration().save(tmp_path)
    foreign = b"\xff" * 64
    (tmp_path / ARRAYS).write_bytes(foreign)
    facts = (tmp_path / FACTS).read_text(encoding="utf-8")
    hashed = hashlib.sha256(foreign).hexdigest()
    facts = re.sub(r'"arrays": "\w+"', f'"arrays": "{hashed}"', facts)
    (tmp_path / FACTS).write_text(facts, encoding="utf-8")
    with pytest.raises(DataError, match=re.escape(str(tmp_path / ARRAYS))):
        Calibration.load(tmp_path)


def test_a_missing_or_huge_file_is_named(tmp_path):
    with pytest.raises(DataError, match=rf"{FACTS} cannot be read.*--calib"):
        Calibration.load(tmp_path)
    calibration().save(tmp_path)
    with (tmp_path / ARRAYS).open("wb") as stream:
        stream.truncate(MAX_BYTES + 1)  # sparse: takes no room
    with pytest.raises(DataError, match=f"{ARRAYS}: found .* expected at most"):
        Calibration.load(tmp_path)


def test_numbers_that_are_not_finite_are_not_saved(tmp_path):
    bad = ranges(errors={name: float("nan") for name in OBSERVERS})
    with pytest.raises(DataError, match="not finite"):
        calibration(groups={"g": bad}).save(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "spoilt",
    [
        {"thresholds": dict.fromkeys(OBSERVERS, -1.0)},
        {"smoothed_thresholds": dict.fromkeys(OBSERVERS, 1e39)},
        {"errors": dict.fromkeys(OBSERVERS, -1.0)},
        {"absmax": np.full(8, np.nan, np.float32)},
        {"factors": np.zeros(8, np.float32)},
        {"aware": np.full(8, -1, np.float32)},
    ],
)
def test_thresholds_and_factors_that_no_weight_could_take_are_refused(tmp_path, spoilt):
    calibration(groups={"g": ranges(**spoilt)}).save(tmp_path)
    with pytest.raises(DataError, match=rf"{FACTS} is damaged or no calibration"):
        Calibration.load(tmp_path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_ranges_of_caches_that_are_none_are_not_saved(tmp_path, bad):
    with pytest.raises(DataError, match="negative, or not finite"):
        calibration(cache=np.full((2, 8, 4), bad, np.float32)).save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_older_format_is_read_and_keeps_its_hash(tmp_path):
    """Bundles name the hash of what they rest on."""
    old = calibration(cache=None)
    old.save(tmp_path)
    assert '"format": 1' in (tmp_path / FACTS).read_text(encoding="utf-8")
    again = Calibration.load(tmp_path)
    assert again.cache is None
    assert again.hash == old.hash


@pytest.mark.parametrize("shape", [(8, 4), (3, 8, 4)])
def test_ranges_of_caches_in_another_shape_are_refused(tmp_path, shape):
    calibration(cache=np.ones(shape, np.float32)).save(tmp_path)
    with pytest.raises(DataError, match="ranges of caches are float32 of shape"):
        Calibration.load(tmp_path)


def test_an_interrupted_save_leaves_what_was_there(tmp_path, monkeypatch):
    calibration().save(tmp_path)
    before = Calibration.load(tmp_path).hash

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        calibration(model="other").save(tmp_path)
    assert Calibration.load(tmp_path).hash == before


@pytest.mark.parametrize("name", FITS)
def test_what_does_not_fit_is_named(name):
    one = calibration()
    one.check_fits(FITS)
    others = [other for other in FITS if other != name]
    with pytest.raises(DataError) as error:
        one.check_fits({**FITS, name: "f" * 64})
    message = str(error.value)
    assert f"{name} {FITS[name][:12]}" in message
    assert f"{name} ffffffffffff" in message
    assert not any(f"{other} {FITS[other][:12]}" in message for other in others)
    assert "visistage calibrate" in message


def test_facts_change_with_what_they_are_of(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    arguments = [{"layers": 8}, [file], "template", (1, 2), {"size": 3}]
    base = facts_of(*arguments)
    changes = {
        0: ({"layers": 9}, "model"),
        2: ("another", "template"),
        3: ((1, 3), "template"),
        4: ({"size": 4}, "preprocessing"),
    }
    for place, (value, name) in changes.items():
        changed = facts_of(*arguments[:place], value, *arguments[place + 1 :])
        assert {key for key in base if base[key] != changed[key]} == {name}
    read = []
    file.write_bytes(b"Weights")
    changed = facts_of(*arguments, read.append)
    assert {key for key in base if base[key] != changed[key]} == {"model"}
    assert read == [7]


def test_the_best_observer_has_the_least_summed_error():
    errors = {"minmax": 0.5, "percentile": 0.1, "entropy": 0.3, "mse": 0.2}
    other = {"minmax": 0.1, "percentile": 0.5, "entropy": 0.3, "mse": 0.2}
    groups = {"a": ranges(smoothed_errors=errors), "b": ranges(smoothed_errors=other)}
    assert calibration(groups=groups).best_observer == "mse"
    equal = dict.fromkeys(OBSERVERS, 0.1)
    assert best_observer([ranges(smoothed_errors=equal)]) == "minmax"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    checkpoint = open_checkpoint(str(toy.make_checkpoint(tmp_path_factory.mktemp("toy"))))
    facts = text_facts(checkpoint)
    return facts.encoder, Preprocessing.from_dict(facts.preprocessing), checkpoint.config, facts


def picture(folder, name, shade):
    Image.new("RGB", (40, 30), (shade, 80, 200)).save(folder / name)
    return folder / name


def test_samples_become_ids_and_pixels_in_order(tmp_path, texts):
    encoder, preprocessing, config, facts = texts
    samples = [
        Sample(f"{tmp_path}/data.jsonl:1", picture(tmp_path, "a.png", 9), "What?", "a dog"),
        Sample(f"{tmp_path}/data.jsonl:2", picture(tmp_path, "b.png", 99), "Where?", ""),
    ]
    ticks = []
    prompts, unreadable = prepare(samples, encoder, preprocessing, config, ticks.append)
    assert [prompt.name for prompt in prompts] == ["data.jsonl:1", "data.jsonl:2"]
    assert (unreadable, len(ticks)) == ([], 2)
    for prompt, sample in zip(prompts, samples, strict=True):
        head, image, tail = prompt.parts
        assert tuple(head[: len(facts.prefix_ids)]) == facts.prefix_ids
        assert (image.pixels.shape, image.pixels.dtype) == ((1, 3, 32, 32), np.float32)
        assert image.layout.rows == 16
        written = encoder.encode(sample.prompt, images=1).segments
        assert (head, tail) == (written[0].ids, written[2].ids)
    assert encoder.tokenizer.decode(list(prompts[0].answer_ids)).strip() == "a dog"
    assert prompts[1].answer_ids == ()
    text = encoder.encode("What?", images=1).text
    whole = encoder.tokenizer.encode(f"{text} a dog", add_special_tokens=False).ids
    assert tuple(whole[-len(prompts[0].answer_ids) :]) == prompts[0].answer_ids
    assert encoder.tokenizer.decode(whole).count("dog") == 1


def test_broken_pictures_are_named_without_folders_and_counted(tmp_path, texts):
    encoder, preprocessing, config, _ = texts
    broken, good = tmp_path / "broken.png", picture(tmp_path, "a.png", 9)
    broken.write_bytes(b"no picture")
    samples = [
        Sample(f"{tmp_path}/d.jsonl:1", broken, "What?", "a"),
        Sample(f"{tmp_path}/d.jsonl:2", good, "What?", "a"),
        Sample(f"{tmp_path}/d.jsonl:3", tmp_path / "absent.png", "What?", "a"),
    ]
    prompts, unreadable = prepare(samples, encoder, preprocessing, config)
    assert [prompt.name for prompt in prompts] == ["d.jsonl:2"]
    assert [name for name, _ in unreadable] == ["d.jsonl:1", "d.jsonl:3"]
    assert all(str(tmp_path) not in reason for _, reason in unreadable)
    assert "broken.png" in unreadable[0][1]
    assert "absent.png" in unreadable[1][1]
    with pytest.raises(DataError, match="none of 2 samples could be read, the first because"):
        prepare([samples[0], samples[2]], encoder, preprocessing, config)


def test_the_order_hash_follows_picture_prompt_answer_and_order(tmp_path, texts):
    encoder, preprocessing, config, _ = texts
    a, b = picture(tmp_path, "a.png", 9), picture(tmp_path, "b.png", 99)
    base = [Sample("x:1", a, "What?", "yes"), Sample("x:2", b, "Where?", "no")]

    def hashed(samples):
        return order_hash(prepare(samples, encoder, preprocessing, config)[0])

    assert hashed(base) == hashed(base)
    copied = picture(tmp_path, "copy.png", 9)
    assert hashed([replace(base[0], image=copied), base[1]]) == hashed(base)
    others = [
        base[::-1],
        base[:1],
        [replace(base[0], image=b), base[1]],
        [replace(base[0], prompt="Why?"), base[1]],
        [replace(base[0], answer="no"), base[1]],
    ]
    assert len({hashed(samples) for samples in [base, *others]}) == 6


@pytest.mark.parametrize(
    ("prompt", "answer", "words"),
    [
        ("a <image> b", "yes", "x:1: the prompt contains the image token"),
        ("What?", "yes</s>", "x:1: the answer contains the control token '</s>'"),
        ("  ", "yes", "x:1: the prompt is empty"),
    ],
)
def test_texts_that_cannot_be_used_are_named(tmp_path, texts, prompt, answer, words):
    encoder, preprocessing, config, _ = texts
    sample = Sample("x:1", picture(tmp_path, "a.png", 9), prompt, answer)
    with pytest.raises(DataError, match=re.escape(words)):
        prepare([sample], encoder, preprocessing, config)
    good = replace(sample, name="x:2", prompt="What?", answer="yes")
    prompts, unreadable = prepare([sample, good], encoder, preprocessing, config)
    assert [prompt.name for prompt in prompts] == ["x:2"]
    assert [f"{name}: {reason}"[: len(words)] for name, reason in unreadable] == [words]


def test_a_prompt_without_room_is_named(tmp_path, texts):
    encoder, preprocessing, config, _ = texts
    picture(tmp_path, "a.png", 9)
    long, short = (Sample(f"x:{n}", tmp_path / "a.png", "What? " * n, "a") for n in (40, 1))
    prompts, ((name, reason),) = prepare(
        [long, short], encoder, preprocessing, config, most_rows=60
    )
    assert (name, [prompt.name for prompt in prompts]) == ("x:40", ["x:1"])
    assert "room for 60" in reason
