"""Bundles of a stranger: nothing outside of one is read, written, run or removed."""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from visistage.compile.build import make_bundle
from visistage.compile.engines.worker_process import run_worker
from visistage.graphs.bundle import MANIFEST, Bundle
from visistage.graphs.errors import EngineError
from visistage.tests.support import toy
from visistage.tests.support.mutations import HOSTILE_NAMES
from visistage.tests.support.stand_ins import write_engines
from visistage.tests.support.watched import watch

PLAN = "visipruner:shallow=1,t=1,e=2,keep=4"
MOST_CHARACTERS = 2000
NAMES = {
    **{kind: name for kind, name in HOSTILE_NAMES.items() if kind not in ("missing", "folder")},
    "victim": "{victim}",
    "victim by ..": "../victim/precious.bin",
}
SETUP = """
from pytest import MonkeyPatch
from visistage.tests.support.stand_ins import stand_in, stand_in_compiler
stand_in(MonkeyPatch())
stand_in_compiler(MonkeyPatch())
"""
"""A machine with a GPU and a compiler of engines."""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A bundle for the CPU, one for RTX with engines, and a photo."""
    folder = tmp_path_factory.mktemp("built")
    checkpoint = str(toy.make_checkpoint(folder / "toy"))
    make_bundle(checkpoint, plan=PLAN, out=folder / "cpu").path.rename(folder / "b-cpu")
    rtx = make_bundle(checkpoint, plan=PLAN, target="rtx", contexts=(128,), out=folder / "rtx")
    write_engines(rtx).path.rename(folder / "b-rtx")
    noise = np.random.default_rng(0).integers(0, 256, (40, 52, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "photo.png")
    return folder


class Stage:
    """A folder with a victim, and hostile bundles beside it, each with the command to try."""

    def __init__(self, built, folder):
        self.built, self.folder = built, folder
        self.victim = folder / "victim"
        (self.victim / "photos").mkdir(parents=True)
        (self.victim / "precious.bin").write_bytes(b"precious")
        self.before = self._listing()
        self.cases, self.names = [], []

    def add(self, name, target="cpu", *, command="infer"):
        """Copy a good bundle; return it to be spoilt."""
        path = self.folder / f"case{len(self.cases)}"
        shutil.copytree(self.built / f"b-{target}", path)
        photo = self.built / "photo.png"
        commands = {
            "infer": ["infer", photo, "What?", "--bundle", path, "--max-tokens", 1],
            "inspect": ["inspect", path],
            "build": ["build", path],
            "estimate": ["estimate", "--bundle", path],
            "explain": ["explain", path, photo, "What?", "--out", path / "explain.html"],
            "verify": ["verify", path, "--samples", 1, "--max-tokens", 1],
        }
        self.cases.append([str(word) for word in commands[command]])
        self.names.append(f"{name} ({target}, {command})")
        return path

    def hidden(self, file):
        """Move a file of a bundle to the victim's, and return it: a link to it keeps its hash."""
        place = self.victim / f"{len(self.cases)}-{file.name}"
        if file.exists():
            file.rename(place)
        else:
            place.write_text("{}")
        self.before = self._listing()
        return place

    def run(self, codes=(2,)):
        """Run all commands; none may touch the victim's, or end otherwise than in ``codes``."""
        allowed = [*self.folder.glob("case*"), self.built / "photo.png", self.folder / "tmp"]
        allowed += [self.folder / f".{path.name}.lock" for path in self.folder.glob("case*")]
        (self.folder / "tmp").mkdir(exist_ok=True)
        found = watch(
            self.cases, allowed, self.victim, SETUP, TMPDIR=str(self.folder / "tmp"), COLUMNS="200"
        )
        wrong = [
            f"{name}: {one.touched[:3]} {one.code} {one.output[-300:]}"
            for name, one in zip(self.names, found, strict=True)
            if one.touched or one.code not in codes or len(one.message) > MOST_CHARACTERS
        ]
        assert not wrong, f"{len(wrong)} of {len(found)}\n" + "\n".join(wrong[:10])
        assert self._listing() == self.before
        return found

    def _listing(self):
        return sorted(str(path) for path in self.victim.rglob("*"))


@pytest.fixture
def stage(built, tmp_path):
    return Stage(built, tmp_path)


def rename(data, old, new):
    """Plain data with a name replaced wherever it is, as a key too."""
    if isinstance(data, dict):
        return {new if k == old else k: rename(v, old, new) for k, v in data.items()}
    if isinstance(data, list):
        return [rename(item, old, new) for item in data]
    return new if data == old else data


def manifest_of(path):
    return json.loads((path / MANIFEST).read_text())


def write_json(file, data):
    file.write_text(json.dumps(data))


def note_hash(path, name, content=None):
    """Put a file's hash, as it is now, into the manifest: what a careful forger would do."""
    data = manifest_of(path)
    content = (path / name).read_bytes() if content is None else content
    digest = hashlib.sha256(content).hexdigest()
    data["files"][name] = {"nbytes": len(content), "sha256": digest}
    write_json(path / MANIFEST, data)


def test_names_in_a_manifest(stage):
    """Each name that the manifest holds, in all its places; its hash goes with it."""
    commands = ["infer", "inspect", "estimate", "explain", "verify"]
    names = list(Bundle.open(stage.built / "b-cpu").manifest.files)
    for number, (kind, hostile) in enumerate(NAMES.items()):
        for old in names:
            command = commands[(number + len(stage.cases)) % len(commands)]
            path = stage.add(f"{old} is {kind}", command=command)
            hostile_name = hostile.replace("{victim}", str(stage.victim / "precious.bin"))
            write_json(path / MANIFEST, rename(manifest_of(path), old, hostile_name))
    path = stage.add("a variant", "rtx", command="build")
    variant = next(iter(manifest_of(path)["graphs"]["stage0"]["variants"].values()))
    write_json(path / MANIFEST, rename(manifest_of(path), variant, "../victim/precious.bin"))
    stage.run()


@pytest.mark.parametrize("command", ["infer", "inspect", "verify"])
def test_files_that_are_links_or_no_files(stage, command):
    """A link's hash may be right; a pipe would be waited for."""
    for old in (MANIFEST, *Bundle.open(stage.built / "b-cpu").manifest.files):
        path = stage.add(f"{old} is a link", command=command)
        (path / old).symlink_to(stage.hidden(path / old))
        path = stage.add(f"{old} is a relative link", command=command)
        (path / old).symlink_to(os.path.relpath(stage.hidden(path / old), path))
        path = stage.add(f"{old} is a folder", command=command)
        (path / old).unlink()
        (path / old).mkdir()
        path = stage.add(f"{old} is a pipe", command=command)
        (path / old).unlink()
        os.mkfifo(path / old)
        path = stage.add(f"{old} is a link to a device", command=command)
        (path / old).unlink()
        (path / old).symlink_to("/dev/zero")
    stage.run()


def test_external_data_of_a_graph(stage):
    """The graph's own hash is right, but it reads its weights from elsewhere."""
    for kind, hostile in (NAMES | {"unlisted": "unlisted.bin", "dotted": "./weights.bin"}).items():
        hostile = hostile.replace("{victim}", str(stage.victim / "precious.bin"))
        path = stage.add(kind)
        shutil.copy(path / "model.safetensors", path / "unlisted.bin")
        model = onnx.load(path / "stage1.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    try:
                        entry.value = hostile
                    except (ValueError, UnicodeError):  # no text of protocol buffers
                        entry.value = "../victim/precious.bin"
        onnx.save(model, path / "stage1.onnx")
        note_hash(path, "stage1.onnx")
    stage.run()


def test_the_folder_of_engines_is_a_link(stage):
    for command in ("build", "inspect", "infer"):
        path = stage.add("to the engines' own", "rtx", command=command)
        (path / "engines").symlink_to(stage.hidden(path / "engines"))
        path = stage.add("to something else", "rtx", command=command)
        shutil.rmtree(path / "engines")
        (path / "engines").symlink_to("../victim")
        path = stage.add("to nothing", "rtx", command=command)
        shutil.rmtree(path / "engines")
        (path / "engines").symlink_to("../victim/nothing")
        path = stage.add("a file", "rtx", command=command)
        shutil.rmtree(path / "engines")
        (path / "engines").write_text("")
    stage.run()


def test_names_in_the_index_of_engines(stage):
    for command in ("inspect", "infer"):
        for kind, hostile in NAMES.items():
            path = stage.add(kind, "rtx", command=command)
            index = path / "engines" / "engines.json"
            data = json.loads(index.read_text())
            data["engines"][1]["file"] = hostile.replace("{victim}", str(stage.victim))
            data["bundle"] = hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
            write_json(index, data)
        for name in ("engines.json", "stage0.context128.engine"):
            path = stage.add(f"{name} is a link", "rtx", command=command)
            file = path / "engines" / name
            file.symlink_to(stage.hidden(file))
    stage.run()


def test_notes_and_leftovers_of_a_compilation(stage):
    """They are compiled over, or refused; what they name or lead to is left alone."""
    for old in (
        *("engines.json", "engines.json.partial", ".stamp.json", ".stamp.json.partial"),
        *(".build.json", ".build.json.partial", "vision.log", "stage0.context128.log"),
        *("stage0.context128.engine", "stage0.context128.engine.partial", ".lock"),
        *("stage0.context128.json", "stage0.context128.json.partial"),
    ):
        path = stage.add(f"{old} is a link", "rtx", command="build")
        file = path / "engines" / old
        target = stage.hidden(file)
        file.symlink_to(target)
    path = stage.add("the lock", "rtx", command="build")
    (path / ".engines.lock").symlink_to(stage.hidden(path / ".engines.lock"))
    for kind, hostile in NAMES.items():
        path = stage.add(f"an engine's note names {kind}", "rtx", command="build")
        index = json.loads((path / "engines" / "engines.json").read_text())
        for fact in index["engines"]:
            fact["file"] = hostile.replace("{victim}", str(stage.victim / "precious.bin"))
            write_json(path / "engines" / f"{fact['name']}.json", fact)
    stage.run(codes=(0, 2))


def test_names_in_the_notes_of_a_build(stage):
    """With the right key, so that the notes count."""
    good = stage.add("good", "rtx", command="build")
    stage.run(codes=(0,))
    noted = json.loads((good / "engines" / ".build.json").read_text())
    assert noted["steps"]
    stage.cases.clear()
    stage.names.clear()
    for number, (kind, hostile) in enumerate(NAMES.items()):
        path = shutil.copytree(good, stage.folder / f"case-{number}")
        hostile = hostile.replace("{victim}", str(stage.victim / "precious.bin"))
        spoilt = rename(noted, "vision.engine", hostile)
        assert spoilt != noted
        write_json(path / "engines" / ".build.json", spoilt)
        stage.cases.append(["build", str(path)])
        stage.names.append(kind)
    stage.run(codes=(0, 2))


def test_notes_of_measurements(stage, monkeypatch):
    """They choose among what a measurement here could have chosen, or count for nothing."""
    monkeypatch.delenv("VISISTAGE_THREADS")
    for name in (".threads.json", ".threads.json.partial", ".stamp.json", ".stamp.json.partial"):
        path = stage.add(f"{name} is a link")
        (path / name).symlink_to(stage.hidden(path / name))
    for name in (".merging.json", ".merging.json.partial"):
        path = stage.add(f"{name} is a link", "rtx")
        (path / name).symlink_to(stage.hidden(path / name))
    stage.run(codes=(0, 2))


def test_files_without_a_hash_are_not_run(stage):
    for old in Bundle.open(stage.built / "b-cpu").manifest.files:
        path = stage.add(f"no hash of {old}")
        data = manifest_of(path)
        del data["files"][old]
        write_json(path / MANIFEST, data)
    path = stage.add("no hash at all")
    write_json(path / MANIFEST, manifest_of(path) | {"files": {}})
    for found in stage.run():
        assert "hash" in found.output


def test_the_watch_notices(stage):
    """A planted mistake, or this file shows nothing."""
    stage.add("reads")
    stage.cases[-1][1] = str(stage.victim / "precious.bin")
    with pytest.raises(AssertionError, match=r"1 of 1[^\0]*precious\.bin"):
        stage.run()


def test_the_compiler_imports_nothing_from_where_it_is_started(tmp_path, monkeypatch):
    """The folder of a bundle has modules named as the standard library's and as those it needs."""
    for name in ("ctypes", "json", "tensorrt", "visistage", "sitecustomize", "encodings"):
        (tmp_path / f"{name}.py").write_text(
            f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})"
        )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), "", ".", *sys.path])
    monkeypatch.setenv("PYTHONPATH", os.pathsep + ".")
    with pytest.raises(EngineError, match="tensorrt cannot be loaded"):
        run_worker({"backend": "tensorrt"}, "engine 'x'", tmp_path / "log")
    assert not (tmp_path / "ran").exists()
    assert not list(Path(tmp_path).glob("__pycache__"))
