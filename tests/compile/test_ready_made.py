"""The demo's graphs in the package are what a build writes today, and make its bundle."""

import json
import shutil

import pytest
from visistage.compile import ready_made
from visistage.compile.build import make_bundle
from visistage.compile.build_spec import versions
from visistage.compile.ready_made import READY, TABLE, TARGET, WEIGHTS, unpack
from visistage.graphs.bundle import MANIFEST
from visistage.graphs.errors import BundleError
from visistage.tests.support.ready_made import table

AGAIN = "python tests/support/ready_made.py writes demo/ready anew"


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    return make_bundle("demo", target=TARGET, out=tmp_path_factory.mktemp("fresh"))


@pytest.fixture
def ready(tmp_path, monkeypatch):
    """A copy of the package's folder, to be changed."""
    folder = shutil.copytree(READY, tmp_path / "ready")
    monkeypatch.setattr(ready_made, "READY", folder)
    return folder


def test_what_is_put_together_is_what_a_build_writes(fresh, tmp_path):
    """Exporters of other versions may write other bytes: then all but these is compared."""
    made = unpack(tmp_path)
    assert made.path == tmp_path / "demo" / fresh.path.name
    old, new = (json.loads((path / MANIFEST).read_text()) for path in (made.path, fresh.path))
    known = old.pop("versions") == versions()
    facts = new.pop("versions"), new.pop("source"), old.pop("source")
    assert all(facts)
    if not known:
        for manifest in (old, new):
            files = manifest["files"]
            for name in [name for name in files if name.endswith(".onnx")]:
                del files[name]
    assert old == new, AGAIN
    for name in old["files"]:
        assert (made.path / name).read_bytes() == (fresh.path / name).read_bytes(), AGAIN


def test_the_table_of_weights_is_that_of_a_build():
    assert json.loads((READY / TABLE).read_text("utf-8")) == table(), AGAIN


def test_it_is_unpacked_once(tmp_path):
    first = unpack(tmp_path).path / WEIGHTS
    inode = first.stat().st_ino
    assert (unpack(tmp_path).path / WEIGHTS).stat().st_ino == inode
    first.write_bytes(b"damaged")
    assert (unpack(tmp_path).path / WEIGHTS).stat().st_size > 14_000_000


@pytest.mark.parametrize("name", [TABLE, "stage0.onnx"])
def test_a_planted_change_is_refused(name, ready, tmp_path):
    text = (ready / name).read_bytes()
    (ready / name).write_bytes(text.replace(b"float32", b"float16", 1).replace(b"rows", b"cows", 1))
    assert (ready / name).read_bytes() != text
    with pytest.raises(BundleError, match=r"weights\.bin|stage0"):
        unpack(tmp_path)
    assert not (tmp_path / "demo" / f"visipruner-fp32-{TARGET}").exists()


def test_it_is_for_the_demo_without_torch_alone(monkeypatch):
    assert not ready_made.ready_made("demo", "cpu", ())  # torch is here
    monkeypatch.setattr(ready_made, "find_spec", lambda name: None)
    assert ready_made.ready_made("demo", "cpu", ())
    assert ready_made.ready_made("demo", TARGET, ())
    for wrong in (("llava-7b", "cpu", ()), ("demo", "rtx", ()), ("demo", "cpu", ("plan",))):
        assert not ready_made.ready_made(*wrong)
