"""Builds: equal bytes wherever they run, resumed after an interruption, refused before harm."""

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from visistage.compile import build as building
from visistage.compile import disk
from visistage.compile.build import make_bundle
from visistage.compile.checkpoint.checkpoint import open_checkpoint
from visistage.compile.disk import file_hash
from visistage.compile.export import weights
from visistage.compile.export.prefix import prefix_cache
from visistage.compile.steps import Staging
from visistage.graphs import targets
from visistage.graphs.bundle import MANIFEST, MANIFEST_FORMAT, Bundle, sha256
from visistage.graphs.errors import BundleError, CapacityError, TargetError
from visistage.graphs.presets.presets import preset
from visistage.graphs.progress import Progress
from visistage.runtime.session import load
from visistage.tests.support import toy

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("calib", "compile", "demo", "graphs", "pages", "runtime")
PLAN = "visipruner:shallow=1,t=1,e=2,keep=4"


class Notes(Progress):
    """Remembers every step, and interrupts before one of them."""

    def __init__(self, interrupt=None):
        self.interrupt, self.facts = interrupt, []

    def start(self, step, total):
        if step == self.interrupt:
            raise KeyboardInterrupt

    def done(self, fact):
        self.facts.append(fact)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return toy.make_checkpoint(tmp_path_factory.mktemp("models") / "toy")


def clone(folder: Path) -> Path:
    """The sources alone, importable as ``visistage`` from ``folder``."""
    package = folder / "visistage"
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("model", "pictures", "__pycache__")
        shutil.copytree(ROOT / name, package / name, ignore=ignored)
    shutil.copy(ROOT / "__init__.py", package)
    return folder


def build_in(home: Path, checkpoint: Path) -> tuple[Path, list[str]]:
    """Build with the clone in ``home``, in its own process; return the bundle and the steps."""
    script = (
        "import sys, visistage\n"
        "from visistage.compile.build import make_bundle\n"
        "from visistage.graphs.progress import Progress\n"
        "class Shown(Progress):\n"
        "    def done(self, fact): print(fact.name)\n"
        f"bundle = make_bundle(sys.argv[1], plan={PLAN!r}, out='out', progress=Shown())\n"
        "print(visistage.__file__)\n"
        "print(bundle.path)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(checkpoint)],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(home)},
        check=True,
        capture_output=True,
        text=True,
    )
    *steps, source, path = done.stdout.splitlines()
    assert Path(source).is_relative_to(home)
    return home / path, steps


def test_two_clones_give_equal_bytes_and_an_edited_decoder_builds_anew(checkpoint, tmp_path):
    homes = [clone(tmp_path / place) for place in ("one", "a/rather/deeper/two")]
    bundles = [build_in(home, checkpoint)[0] for home in homes]
    names = [sorted(p.name for p in bundle.iterdir() if p.name[0] != ".") for bundle in bundles]
    assert names[0] == names[1]
    assert {"vision.onnx", "stage0.onnx", "select0.onnx", MANIFEST} <= set(names[0])
    for name in names[0]:
        one, other = ((bundle / name).read_bytes() for bundle in bundles)
        assert one == other, name
        assert b"visistage/graphs" not in one, f"{name} names a source file"

    assert build_in(homes[0], checkpoint)[1] == []  # up to date
    decoder = homes[0] / "visistage" / "graphs" / "modules" / "decoder.py"
    decoder.write_text(decoder.read_text() + "# edited\n")
    again, steps = build_in(homes[0], checkpoint)
    assert "export stage0" in steps
    assert (again / MANIFEST).read_bytes() == (bundles[1] / MANIFEST).read_bytes()


def test_a_linked_file_is_hashed_once_until_it_changes(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(disk, "sha256", lambda file: read.append(file) or sha256(file))
    stored, linked = tmp_path / "stored", tmp_path / "linked"
    stored.write_bytes(b"weights")
    os.link(stored, linked)
    assert file_hash(stored) == file_hash(linked) == sha256(stored)
    assert read == [stored]
    stored.write_bytes(b"other weights")
    assert file_hash(linked) == sha256(stored)
    assert read == [stored, linked]


def test_an_interrupted_build_goes_on(checkpoint, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make_bundle(str(checkpoint), plan=PLAN, out=tmp_path, progress=Notes("export stage1"))
    assert not list(tmp_path.rglob(MANIFEST))
    with pytest.raises(BundleError, match="no bundle"):
        Bundle.open(tmp_path)

    notes = Notes()
    bundle = make_bundle(str(checkpoint), plan=PLAN, out=tmp_path, progress=notes)
    cached = {fact.name for fact in notes.facts if fact.cached}
    assert cached == {"weights", "export vision", "export stage0", "export select0"}
    bundle.check(rehash=True)
    assert not list(tmp_path.rglob("*.partial"))

    again = Notes()
    assert make_bundle(str(checkpoint), plan=PLAN, out=tmp_path, progress=again).path == bundle.path
    assert again.facts == []  # up to date: nothing was done

    (bundle.path / "stage1.onnx").unlink()
    make_bundle(str(checkpoint), plan=PLAN, out=tmp_path, progress=again)
    assert len(again.facts) == len(notes.facts)


def test_a_changed_checkpoint_is_built_anew(tmp_path):
    path = toy.make_checkpoint(tmp_path / "toy")
    first = make_bundle(str(path), plan="dense", out=tmp_path / "out")
    prefix = (first.path / "prefix.bin").read_bytes()
    toy.make_checkpoint(path, seed=1)
    second = make_bundle(str(path), plan="dense", out=tmp_path / "out")
    assert second.path == first.path
    assert (second.path / "prefix.bin").read_bytes() != prefix


def test_two_builds_at_once_are_refused(tmp_path):
    with (
        Staging(tmp_path / "bundle", "key", Progress()),
        pytest.raises(CapacityError, match="another build"),
        Staging(tmp_path / "bundle", "key", Progress()),
    ):
        pass


def test_a_weight_beyond_fp16_is_named(checkpoint, tmp_path):
    path = shutil.copytree(checkpoint, tmp_path / "toy")
    tensors = load_file(path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.2.mlp.up_proj.weight"))
    tensors[name][3, 5] = 7e4
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TargetError, match=r"model\.layers\.2\.mlp\.up_proj"):
        make_bundle(str(path), plan="dense", target="cuda", out=tmp_path / "out")
    assert not list((tmp_path / "out").rglob(MANIFEST))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_weights_become_fp32_on_a_cpu(tmp_path, dtype):
    """The same values, so the same answer as from a checkpoint that stores them as FP32."""
    half = toy.make_checkpoint(tmp_path / "half", dtype=dtype)
    wide = shutil.copytree(half, tmp_path / "wide")
    tensors = load_file(wide / "model.safetensors")
    save_file(
        {name: tensor.float() for name, tensor in tensors.items()},
        wide / "model.safetensors",
        metadata={"format": "pt"},
    )
    image = np.random.default_rng(3).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    answers = []
    for path in (half, wide):
        bundle = make_bundle(str(path), plan="dense", out=tmp_path / "out")
        assert (bundle.path / weights.CONVERTED).exists() == (path == half)
        with load(bundle.path) as session:
            session.eos = frozenset()
            answers.append(session.infer(image, "What is it?", max_tokens=16).tokens)
    assert answers[0] == answers[1]


def test_the_prefix_is_what_the_model_computes(checkpoint):
    from transformers import LlavaForConditionalGeneration

    opened = open_checkpoint(str(checkpoint))
    ids = [1, 40, 50, 60, 70]
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        cache = model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
    plan = preset("dense", opened.config.text.layers, opened.config.visual_tokens)
    mine = prefix_cache(opened, plan, ids)
    for layer in range(opened.config.text.layers):
        theirs = cache.layers[layer]
        assert torch.allclose(mine[0, layer], theirs.keys[0], atol=1e-4)
        assert torch.allclose(mine[1, layer], theirs.values[0], atol=1e-4)


def test_room_is_checked_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    half = toy.make_checkpoint(tmp_path / "half", dtype="float16")
    full = SimpleNamespace(free=1000, total=10**12, used=0)
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda _: full)
    with pytest.raises(CapacityError, match="--out DIR"):
        make_bundle(str(half), plan="dense", out=tmp_path / "out")
    monkeypatch.undo()
    memory = SimpleNamespace(total=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(CapacityError, match="this machine has"):
        make_bundle(str(checkpoint), plan="dense", out=tmp_path / "out")
    assert not list(tmp_path.rglob("weights.bin"))


def test_a_7b_on_this_cpu_is_refused_before_it_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=24 << 30))

    def fetch(*_, **__):
        raise AssertionError("nothing may be fetched or made")

    monkeypatch.setattr(building, "open_checkpoint", fetch)
    with pytest.raises(CapacityError, match=r"26\.\d GiB.*--target cuda.*int8"):
        make_bundle("llava-7b", out=tmp_path, dummy_weights=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "precision", "message"),
    [
        ("cpuu", None, "Did you mean 'cpu'"),
        ("openvino", "w4", "no scales in blocks"),
        ("cuda", "int8", "not ones this project has seen run"),
        ("cpu-portable", "w4", "no scales in blocks"),
        ("cpu", "fp16", "computes FP16 graphs in FP32"),
    ],
)
def test_targets_that_cannot_be_honoured(name, precision, message):
    with pytest.raises(TargetError, match=message):
        targets.resolve_target(name, precision)


def test_an_old_onnx_runtime_gets_the_portable_lowering(monkeypatch):
    assert targets.resolve_target("cpu", None)[0].lowering == targets.LLM_CONDITIONAL
    monkeypatch.setattr(targets.metadata, "version", lambda _: "1.23.2")
    target, precision = targets.resolve_target("cpu", None)
    assert (target.name, target.lowering, precision) == ("cpu-portable", "portable", "fp32")


def test_a_changed_or_missing_file_is_noticed(checkpoint, tmp_path):
    bundle = make_bundle(str(checkpoint), plan="dense", out=tmp_path)
    load(bundle.path).close()
    target = bundle.path / "prefix.bin"
    data = bytearray(target.read_bytes())
    data[100] ^= 1
    target.write_bytes(data)
    with pytest.raises(BundleError, match=r"prefix\.bin is not the file that was built"):
        load(bundle.path)
    make_bundle(str(checkpoint), plan="dense", out=tmp_path)  # what the message says to type
    load(bundle.path).close()
    target.unlink()
    with pytest.raises(BundleError, match=r"prefix\.bin is missing"):
        load(bundle.path)


def test_manifests_are_read_strictly(checkpoint, tmp_path):
    bundle = make_bundle(str(checkpoint), plan="dense", out=tmp_path)
    file = bundle.path / MANIFEST
    good = file.read_text()
    older = good.replace(f'"format": {MANIFEST_FORMAT}', '"format": 1')
    assert older != good
    for bad in ("", "[]", "{}", older, good[:500]):
        file.write_text(bad)
        with pytest.raises(BundleError, match=MANIFEST):
            Bundle.open(bundle.path)
    file.write_text(good.replace('"prefix.bin"', '"../prefix.bin"'))
    with pytest.raises(BundleError, match="outside the bundle"):
        load(bundle.path)


def test_ctrl_c_ends_with_130_and_the_next_run_goes_on(checkpoint, tmp_path):
    """The real signal, in a real process, in the middle of a build."""
    command = [sys.executable, "-m", "visistage", "engines", "--model", str(checkpoint)]
    command += ["--plan", PLAN, "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A suite started in the background hands down an ignored signal.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("vision.onnx")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "interrupted" in said
    assert not list(tmp_path.rglob(MANIFEST))

    again = subprocess.run(command, capture_output=True, text=True, check=True)
    path = Path(again.stdout.splitlines()[-1])
    assert (path / MANIFEST).is_file()
    assert "cached" in again.stderr
