"""Names inside a bundle, stamps of its files, and what its graphs read."""

import os
import time

import onnx
import pytest
from onnx import TensorProto, helper
from visistage.graphs import bundle as bundles
from visistage.graphs.bundle import MANIFEST, FileFact, bundles_in, changed_files, sha256
from visistage.graphs.errors import BundleError
from visistage.graphs.inside import file_inside, folder_inside, is_plain
from visistage.graphs.onnx_locations import external_files
from visistage.tests.support.mutations import HOSTILE_NAMES

DEVICES = ("con", "NUL.txt", "com1", "Lpt9.onnx", "prn")
HARMLESS = {"missing", "folder"}  # plain names all the same


@pytest.mark.parametrize("kind", sorted(set(HOSTILE_NAMES) - HARMLESS))
def test_hostile_names_are_not_plain(kind, tmp_path):
    assert not is_plain(HOSTILE_NAMES[kind])
    with pytest.raises(BundleError, match="outside") as failure:
        file_inside(tmp_path, HOSTILE_NAMES[kind], BundleError, "")
    assert len(str(failure.value)) < 500


@pytest.mark.parametrize(
    "name", [*DEVICES, ".hidden", "dot.", "space ", "a*b", "a?b", 'a"b', "\x1b"]
)
def test_names_that_mean_something_else_on_another_system(name):
    assert not is_plain(name)


@pytest.mark.parametrize(
    "name",
    ["weights.bin", "model-00001-of-00003.safetensors", "stage0.part1.context128.onnx", "模型.bin"],
)
def test_plain_names(name, tmp_path):
    assert is_plain(name)
    assert file_inside(tmp_path, name, BundleError, "") == tmp_path / name


def test_a_folder_is_no_link_and_no_file(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "nothing").symlink_to("gone")
    (tmp_path / "file").write_text("")
    assert folder_inside(tmp_path, "real", BundleError, "") == tmp_path / "real"
    assert folder_inside(tmp_path, "new", BundleError, "") == tmp_path / "new"
    for name in ("link", "nothing", "file"):
        with pytest.raises(BundleError, match="expected a folder"):
            folder_inside(tmp_path, name, BundleError, "")
    (tmp_path / "bundle").symlink_to("real")  # the bundle itself may be reached by a link
    assert folder_inside(tmp_path / "bundle", "engines", BundleError, "")


# --- stamps ---------------------------------------------------------------------------------------


@pytest.fixture
def hashed(tmp_path, monkeypatch):
    """A file whose stamp is noted, and the list of files that are hashed from now on."""
    file = tmp_path / "weights.bin"
    file.write_bytes(b"good" * 100)
    facts = {file: FileFact(400, sha256(file))}
    counted = []
    monkeypatch.setattr(bundles, "sha256", lambda path: counted.append(path) or sha256(path))
    time.sleep(2 * bundles.SETTLED_NS / 1e9)
    assert changed_files(facts, tmp_path / ".stamp.json") == []
    assert counted == [file]
    counted.clear()
    assert changed_files(facts, tmp_path / ".stamp.json") == []
    assert counted == []
    return file, facts, counted


def test_bytes_changed_in_place_are_noticed_though_size_and_time_are_as_before(hashed):
    file, facts, _ = hashed
    before = file.stat()
    with file.open("r+b") as stream:
        stream.write(b"evil")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (
        400,
        before.st_mtime_ns,
        before.st_ino,
    )
    assert changed_files(facts, file.parent / ".stamp.json") == [file]


def test_a_file_that_just_changed_gets_no_stamp(hashed):
    file, facts, counted = hashed
    file.write_bytes(b"good" * 100)
    for _ in range(2):
        assert changed_files(facts, file.parent / ".stamp.json") == []
    assert counted == [file, file]


def test_stamps_are_for_one_hash(hashed):
    file, _, counted = hashed
    other = {file: FileFact(400, "0" * 64)}
    assert changed_files(other, file.parent / ".stamp.json") == [file]
    assert counted == [file]


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"weights.bin": 5}', "5", "\xff", ""])
def test_damaged_stamps_count_for_nothing(hashed, text):
    file, facts, counted = hashed
    (file.parent / ".stamp.json").write_text(text, encoding="latin-1")
    assert changed_files(facts, file.parent / ".stamp.json") == []
    assert counted == [file]


# --- what graphs read -----------------------------------------------------------------------------


def external(name, location):
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value=location)
    return tensor


def test_external_data_is_found_wherever_it_is(tmp_path):
    inner = helper.make_graph([], "inner", [], [], initializer=[external("a", "in-a-branch")])
    constant = helper.make_node("Constant", [], ["c"], value=external("v", "in-an-attribute"))
    many = helper.make_node("X", [], ["x"])
    many.attribute.add(name="many", type=onnx.AttributeProto.TENSORS).tensors.append(
        external("m", "in-a-list")
    )
    branch = helper.make_node("If", ["q"], ["y"], then_branch=inner)
    graph = helper.make_graph([constant, branch, many], "g", [], [])
    graph.initializer.append(external("w", "in-the-graph"))
    graph.sparse_initializer.add().values.CopyFrom(external("s", "in-a-sparse"))
    model = helper.make_model(graph)
    function = model.functions.add(name="f")
    function.node.append(
        helper.make_node("Constant", [], ["c"], value=external("v", "in-a-function"))
    )
    model.training_info.add().algorithm.initializer.append(external("t", "in-training"))
    file = tmp_path / "model.onnx"
    file.write_bytes(model.SerializeToString())
    assert external_files(file, "") == {
        *("in-a-branch", "in-an-attribute", "in-a-list", "in-the-graph", "in-a-sparse"),
        *("in-a-function", "in-training"),
    }


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 50, b"\x3a\xff\xff\xff\x7f", b"\x3b\x3c", b"\x3a"]
)
def test_what_is_no_graph_is_refused(content, tmp_path):
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    with pytest.raises(BundleError, match="no ONNX graph"):
        external_files(file, "")


def test_bundles_are_searched_for_a_few_levels_only(tmp_path):
    """A place such as / or the home would be walked for minutes."""
    places = [tmp_path / "/".join("abcdef"[:depth]) for depth in range(1, 6)]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        (place / MANIFEST).write_text("{}")
    assert set(bundles_in(tmp_path)) == set(places[:3])
    assert bundles_in(places[3]) == [places[3]]
