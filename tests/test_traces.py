"""Tracing: torch's table of translations is read once, and tests share what they traced."""

import pytest
import torch
from visistage.compile import stitch, translations
from visistage.compile.build import build
from visistage.tests import toy
from visistage.tests.traces import SharedTraces

PLAN = "visipruner:shallow=1,t=1,e=2,keep=4"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return toy.make_checkpoint(tmp_path_factory.mktemp("toy"))


def graphs(checkpoint, out):
    bundle = build(str(checkpoint), plan=PLAN, out=out)
    return {file.name: file.read_bytes() for file in bundle.path.glob("*.onnx")}


def test_the_table_is_made_once_for_each_opset_and_for_us_alone(monkeypatch):
    made = []
    registry = translations.ONNXRegistry
    own = registry.__dict__["from_torchlib"]

    def make(opset_version=18):
        made.append(opset_version)
        return own.__get__(None, registry)(opset_version=opset_version)

    monkeypatch.setattr(registry, "from_torchlib", staticmethod(make))
    monkeypatch.setattr(translations, "_TABLES", {})

    def export(opset):
        layer, rows = torch.nn.Linear(2, 2), torch.zeros(1, 2)
        torch.onnx.export(layer, (rows,), dynamo=True, verbose=False, opset_version=opset)

    for opset in (24, 24, 20):
        with translations.read_once():
            export(opset)
    assert made == [24, 20]
    export(24)
    assert made == [24, 20, 24]


def test_without_torchs_table_nothing_is_changed(monkeypatch):
    monkeypatch.setattr(translations, "ONNXRegistry", None)
    with translations.read_once():
        pass


def test_shared_traces_give_the_same_graphs(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(stitch, "_TRACED", {})
    alone = graphs(checkpoint, tmp_path / "alone")
    monkeypatch.setattr(stitch, "_TRACED", SharedTraces(tmp_path / "traces"))
    assert graphs(checkpoint, tmp_path / "first") == alone

    def refuse(*_):
        raise AssertionError("traced again")

    monkeypatch.setattr(stitch, "_TRACED", SharedTraces(tmp_path / "traces"))
    monkeypatch.setattr(stitch, "_trace", refuse)
    assert graphs(checkpoint, tmp_path / "second") == alone


def test_a_piece_of_another_kind_is_not_taken_for_a_shared_one(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(stitch, "_TRACED", SharedTraces(tmp_path / "traces"))
    narrow = graphs(checkpoint, tmp_path / "out")
    other = toy.make_checkpoint(tmp_path / "other", kv_heads=2)
    assert graphs(other, tmp_path / "out")["stage0.onnx"] != narrow["stage0.onnx"]
