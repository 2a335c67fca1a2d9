"""Every JSON of a bundle, mutated: an error of ours, or a load that works; never anything else."""

import hashlib
import io
import itertools
import json
import os
import random
import shutil
import time
from unittest.mock import Mock

import numpy as np
import pytest
from rich.console import Console
from visistage import runtime
from visistage.cli.show.bundle_view import bundle_facts, bundle_table
from visistage.cli.show.engines_view import engine_facts, engine_table
from visistage.compile.build import make_bundle
from visistage.graphs.bundle import MANIFEST, SETTLED_NS, Bundle
from visistage.graphs.errors import ModelError, VisistageError
from visistage.runtime import autotune
from visistage.tests.support import toy
from visistage.tests.support.mutations import json_mutations
from visistage.tests.support.stand_ins import stand_in, write_engines

PLAN = "visipruner:shallow=1,t=1,e=2,keep=4"
MOST_CHARACTERS = 2000
CASES = int(os.environ.get("VISISTAGE_MUTATIONS", "150"))
"""Mutations of each file; VISISTAGE_MUTATIONS=100000 tries all."""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """A bundle for the CPU and one for RTX with engines, to be spoilt and mended."""
    folder = tmp_path_factory.mktemp("mutated")
    checkpoint = str(toy.make_checkpoint(folder / "toy"))
    cpu = make_bundle(checkpoint, plan=PLAN, out=folder / "cpu")
    rtx = make_bundle(checkpoint, plan=PLAN, target="rtx", contexts=(128,), out=folder / "rtx")
    dense = make_bundle(checkpoint, plan="dense", out=folder / "dense")
    return {"cpu": cpu, "rtx": write_engines(rtx), "dense": dense}


def load(bundle):
    """Load a bundle as far as its JSON reaches, ask it, and show it."""
    opened = Bundle.open(bundle.path)
    json.dumps(bundle_facts(opened))
    Console(file=io.StringIO()).print(bundle_table(opened))
    with runtime.load(bundle.path) as session:
        session.infer(np.zeros((8, 24, 3), np.uint8), "What?", max_tokens=2)


def show_engines(bundle):
    """Read the index of engines as the device's runtime and as ``inspect`` do."""
    opened = Bundle.open(bundle.path)
    json.dumps(engine_facts(opened))
    Console(file=io.StringIO()).print(engine_table(opened))


def outcomes(bundle, name, read, *, hashed=False, seed=0, cases=CASES):
    """Yield what went wrong, by mutation; the file is as it was in the end."""
    file, manifest = bundle.path / name, bundle.path / MANIFEST
    good, text = file.read_bytes(), manifest.read_text()
    try:
        mutated = json_mutations(json.loads(good), random.Random(f"{name} {seed}"))
        for mutation, content in itertools.islice(mutated, cases):
            file.write_bytes(content)
            if hashed:
                manifest.write_text(with_hash(json.loads(text), name, content))
            try:
                read(bundle)
            except VisistageError as error:
                if len(str(error)) > MOST_CHARACTERS:
                    yield f"{mutation}: {len(str(error))} characters"
            except BaseException as error:  # panics of other languages are no Exception
                yield f"{mutation}: {type(error).__name__}: {error}"[:300]
    finally:
        file.write_bytes(good)
        manifest.write_text(text)


def with_hash(data, name, content):
    digest = hashlib.sha256(content).hexdigest()
    data["files"][name] = {"nbytes": len(content), "sha256": digest}
    return json.dumps(data)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "processor_config.json"]
)
def test_text_files(bundles, name):
    assert list(outcomes(bundles["cpu"], name, load, hashed=True, cases=CASES // 3)) == []


@pytest.mark.parametrize("target", ["cpu", "rtx"])
def test_manifests(bundles, target, monkeypatch):
    if target == "rtx":
        stand_in(monkeypatch)
    read = load if target == "cpu" else show_engines
    assert list(outcomes(bundles[target], MANIFEST, read)) == []


def test_indexes_of_engines(bundles):
    assert list(outcomes(bundles["rtx"], "engines/engines.json", show_engines)) == []


@pytest.fixture
def measured(monkeypatch):
    """Nothing is measured: all takes the same time."""
    monkeypatch.delenv("VISISTAGE_THREADS")
    monkeypatch.setattr(autotune, "cores", lambda: 4)
    monkeypatch.setattr(autotune, "TrialPrompt", Mock())
    monkeypatch.setattr(autotune, "fastest", lambda calls: [1.0] * len(calls))


def check_threads(bundle):
    assert autotune.choose_threads(bundle, "it", lambda count: Mock()) in (1, 2, 4)


def check_fused(bundle):
    note = autotune.choose_fused_prefill(bundle, Mock(device_name="it"))
    assert note is not None
    assert note.fused in (True, False)


NOTES = [(".threads.json", check_threads), (".merging.json", check_fused)]
NOTES += [(".stamp.json", Bundle.check)]


@pytest.mark.parametrize(("name", "read"), NOTES)
def test_damaged_notes_count_for_nothing(bundles, name, read, measured):
    """Measure, or hash, again what they are for: not even an error of ours comes."""
    bundle = bundles["dense"]
    time.sleep(2 * SETTLED_NS / 1e9)  # before that there is no stamp
    read(bundle)
    noted = json.loads((bundle.path / name).read_text())
    assert noted

    def reread(bundle):
        try:
            read(bundle)
        except VisistageError as error:
            raise AssertionError from error

    assert list(outcomes(bundle, name, reread)) == []


def test_a_note_of_foreign_numbers_is_measured_again(bundles, measured):
    bundle = bundles["cpu"]
    check_threads(bundle)
    file = bundle.path / ".threads.json"
    noted = json.loads(file.read_text())
    for answers in ({"1": 9.0, "2": 8.0, "4": 7.0, "4096": 0.1}, {"4096": 0.1}, {"4": 0.0}, {}):
        file.write_text(json.dumps(noted | {"answer_ms": answers}))
        check_threads(bundle)
        assert json.loads(file.read_text()) == noted


def test_a_post_processor_that_cannot_work(bundles, tmp_path, capfd):
    """The tokenizers library would panic, in words of its own."""
    folder = shutil.copytree(bundles["cpu"].path, tmp_path / "bundle")
    data = json.loads((folder / "tokenizer.json").read_text())
    data["post_processor"]["single"][0]["SpecialToken"]["id"] = "<x>"
    content = json.dumps(data).encode()
    (folder / "tokenizer.json").write_bytes(content)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(with_hash(manifest, "tokenizer.json", content))
    with pytest.raises(ModelError, match="post-processor adds '<x>'"):
        load(Bundle.open(folder))
    assert capfd.readouterr().err == ""
