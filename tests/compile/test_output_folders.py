"""Folders of bundles and calibrations: some cannot be, names collide, weights are shared."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import onnx
import pytest
from click.testing import CliRunner
from visistage.cli.main import main
from visistage.compile import disk
from visistage.compile.build import make_bundle
from visistage.compile.export import weights
from visistage.graphs.bundle import MANIFEST, Bundle
from visistage.graphs.errors import CapacityError, ModelError
from visistage.graphs.progress import Progress
from visistage.tests.support import toy


class Facts(Progress):
    def __init__(self):
        self.outcomes = {}

    def done(self, fact):
        self.outcomes[fact.name] = fact.outcome


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return toy.make_checkpoint(tmp_path_factory.mktemp("models") / "toy", layers=1)


def built(model, out, **options):
    facts = Facts()
    bundle = make_bundle(str(model), plan="dense", out=out, progress=facts, **options)
    return bundle, facts.outcomes.get("weights")


# --- folders --------------------------------------------------------------------------------------


def file_in_the_way(folder):
    (folder / "file").write_text("mine")
    return folder / "file"


def below_a_file(folder):
    return file_in_the_way(folder) / "deep" / "er"


def a_link_in_circles(folder):
    (folder / "a").symlink_to(folder / "b")
    (folder / "b").symlink_to(folder / "a")
    return folder / "a" / "x"


PLACES = {
    "a file": file_in_the_way,
    "below a file": below_a_file,
    "below a device": lambda folder: "/dev/null/x",
    "a device": lambda folder: "/dev/null",
    "too long a name": lambda folder: folder / ("x" * 300),
    "too long a path": lambda folder: folder / "/".join(["x" * 200] * 30),
    "links in circles": a_link_in_circles,
    "a system that cannot be written": lambda folder: "/proc/x",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "command", [["engines", "--model", "demo"], ["calibrate", "demo", "--samples", "1"]]
)
def test_an_impossible_out_is_refused_before_any_work(tmp_path, monkeypatch, place, command):
    out = str(PLACES[place](tmp_path))
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(
        "visistage.compile.checkpoint.checkpoint.open_folder", lambda *_, **__: pytest.fail("work")
    )
    done = CliRunner().invoke(main, [*command, "--out", out])
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.stderr
    assert "cannot be written" in done.stderr
    assert "--out" in done.stderr
    assert out[:40] in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(not hasattr(os, "fork") or os.getuid() != 0, reason="drops the rights of root")
def test_a_folder_of_somebody_else_is_refused(tmp_path):
    (locked := tmp_path / "locked").mkdir(mode=0o555)
    script = (
        "import os; from pathlib import Path\n"
        "from visistage.compile.disk import OUT, check_folder\n"
        "os.setgid(65534); os.setuid(65534)\n"
        f"check_folder(Path({str(locked / 'x')!r}), OUT)"
    )
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and folder.name.startswith("pytest"):
            folder.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert f"CapacityError: {locked / 'x'} cannot be written: Permission denied" in done.stderr


def test_a_file_or_foreign_folder_under_the_final_name_stays(model, tmp_path):
    final = tmp_path / "toy" / "dense-fp32-cpu"
    final.parent.mkdir()
    final.write_text("mine")
    with pytest.raises(CapacityError, match=r"a file is in the way.*--out"):
        built(model, tmp_path)
    assert final.read_text() == "mine"
    final.unlink()
    final.mkdir()
    (final / "thesis.tex").write_text("mine")
    with pytest.raises(CapacityError, match=r"holds other files \(thesis.tex\).*--out"):
        built(model, tmp_path)
    assert (final / "thesis.tex").read_text() == "mine"


# --- names ----------------------------------------------------------------------------------------


def test_another_checkpoint_of_the_same_name_replaces_nothing(model, tmp_path):
    other = toy.make_checkpoint(tmp_path / "elsewhere" / "toy", layers=1, seed=1)
    first, _ = built(model, tmp_path)
    manifest = (first.path / MANIFEST).read_bytes()
    with pytest.raises(CapacityError, match=r"another checkpoint.*--name toy-2"):
        built(other, tmp_path)
    assert (first.path / MANIFEST).read_bytes() == manifest
    first.check(rehash=True)
    second, _ = built(other, tmp_path, name="toy-2")
    assert second.path == tmp_path / "toy-2" / "dense-fp32-cpu"
    assert second.manifest.model == "toy-2"
    assert built(other, tmp_path, name="toy-2")[1] is None  # up to date

    toy.make_checkpoint(other, layers=1, seed=2)  # trained further, in its place
    again, _ = built(other, tmp_path, name="toy-2")
    assert again.manifest.files != second.manifest.files
    assert built(shutil.copytree(model, tmp_path / "copied" / "toy"), tmp_path)[1] is None


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "/a", "-x", "a\nb", "x" * 101])
def test_names_that_are_no_folders_are_refused(model, tmp_path, name):
    with pytest.raises(ModelError, match="cannot name a folder of bundles"):
        built(model, tmp_path, name=name)


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["cpu", "cpu-portable", "openvino", "cuda", "rtx"])
@pytest.mark.parametrize("how", ["auto", "copy"])
def test_other_tools_open_every_graph(tmp_path, target, how):
    dtype = "float16" if target in ("cuda", "rtx") else "float32"
    model = toy.make_checkpoint(tmp_path / "toy", layers=2, dtype=dtype)
    bundle = make_bundle(str(model), plan="dense", target=target, out=tmp_path, weights=how)
    assert (bundle.path / "model.safetensors").stat().st_nlink == 1
    for file in bundle.path.glob("*.onnx"):
        onnx.load(file)
        onnx.checker.check_model(file)
    if how == "copy":
        return
    polygraphy = shutil.which("polygraphy", path=os.path.dirname(sys.executable))
    for file in bundle.path.glob("*.onnx"):
        done = subprocess.run(
            [polygraphy, "inspect", "model", file], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def room(free):
    return lambda _: SimpleNamespace(free=free, total=10**12, used=0)


@pytest.mark.parametrize(
    ("how", "free", "clones", "links", "said", "names"),
    [
        ("auto", 10**9, True, True, "cloned", 1),
        ("auto", 10**9, False, True, "copied", 1),
        ("auto", 700_000, True, True, "cloned", 1),
        ("auto", 700_000, False, True, "hard links: onnx and polygraphy refuse", 2),
        ("auto", 700_000, False, False, "copied", 1),
        ("auto", 70_000, False, True, "hard links: onnx and polygraphy refuse", 2),
        ("auto", 70_000, False, False, None, 0),
        ("copy", 700_000, False, True, "copied", 1),
        ("copy", 70_000, True, True, "cloned", 1),
        ("copy", 70_000, False, True, None, 0),
        ("link", 70_000, True, True, "hard links", 2),
        ("link", 10**9, True, False, "copied", 1),
        ("link", 70_000, True, False, None, 0),
    ],
)
def test_files_are_cloned_copied_or_linked_as_room_allows(
    model, tmp_path, monkeypatch, how, free, clones, links, said, names
):
    stored = model / "model.safetensors"
    assert 350_000 < stored.stat().st_size < 700_000

    def ioctl(copy, request, source):
        if not clones:
            raise OSError(95, "Operation not supported")
        os.sendfile(copy, source, 0, 1 << 30)

    def link(source, destination, real=os.link):
        if not links:
            raise OSError(18, "Invalid cross-device link")
        real(source, destination)

    monkeypatch.setattr("fcntl.ioctl", ioctl)
    monkeypatch.setattr(weights.os, "link", link)
    monkeypatch.setattr(disk.shutil, "disk_usage", room(free))
    if said is None:
        with pytest.raises(CapacityError, match=r"needs \d+\.\d KiB in .*68\.4 KiB are free"):
            built(model, tmp_path, weights=how)
        return
    bundle, outcome = built(model, tmp_path, weights=how)
    assert outcome.startswith(said)
    assert ("--weights copy" in outcome) == (how == "auto" and names == 2)
    mine = bundle.path / "model.safetensors"
    assert mine.samefile(stored) == (names == 2)
    assert mine.read_bytes() == stored.read_bytes()


def test_an_explicit_copy_mends_a_bundle_of_links(model, tmp_path):
    linked, said = built(model, tmp_path, weights="link")
    assert said == "hard links"
    with pytest.raises(Exception, match="hard link"):
        onnx.load(linked.path / "stage0.onnx")
    copied, said = built(model, tmp_path, weights="copy")
    assert said is None  # nothing was built
    onnx.load(copied.path / "stage0.onnx")
    Bundle.open(copied.path).check(rehash=True)


def test_bringing_a_file_never_writes_through_a_link(model, tmp_path):
    """Expect the checkpoint's own file under the name, left by an interrupted run."""
    stored = tmp_path / "model.safetensors"
    data = (model / "model.safetensors").read_bytes()
    stored.write_bytes(data)
    for way in (weights.clone, weights.hard_link, weights.copy):
        (tmp_path / "there").unlink(missing_ok=True)
        os.link(stored, tmp_path / "there")
        way(stored, tmp_path / "there")
        assert stored.read_bytes() == data


def test_a_clone_is_not_hashed_again(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.write_bytes(b"weights")
    monkeypatch.setattr("fcntl.ioctl", lambda to, _, of: os.sendfile(to, of, 0, 7))
    known = disk.file_hash(source)
    monkeypatch.setattr(disk, "sha256", lambda _: pytest.fail("hashed again"))
    assert weights.clone(source, tmp_path / "clone")
    assert disk.file_hash(tmp_path / "clone") == known
