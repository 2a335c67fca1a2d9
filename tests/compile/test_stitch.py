"""Tracing: torch's table of translations is read once, and tests share what they traced."""

import pytest
import torch
from visistage.compile.build import make_bundle
from visistage.compile.export import stitch
from visistage.tests.support import toy
from visistage.tests.support.traces import SharedTraces


def graphs(out, **config):
    checkpoint = toy.make_checkpoint(out / "toy", layers=1, **config)
    bundle = make_bundle(str(checkpoint), plan="dense", out=out)
    return {file.name: file.read_bytes() for file in bundle.path.glob("*.onnx")}


def refuse(key, *_):
    raise AssertionError(f"traced again: {key[0]}")


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_the_table_is_made_once_for_each_opset_and_for_us_alone(monkeypatch):
    made = []
    registry = stitch.ONNXRegistry
    own = registry.__dict__["from_torchlib"]

    def make(opset_version=18):
        made.append(opset_version)
        return own.__get__(None, registry)(opset_version=opset_version)

    monkeypatch.setattr(registry, "from_torchlib", staticmethod(make))
    monkeypatch.setattr(stitch, "_REGISTRIES", {})

    def export(opset):
        layer, rows = torch.nn.Linear(2, 2), torch.zeros(1, 2)
        torch.onnx.export(layer, (rows,), dynamo=True, verbose=False, opset_version=opset)

    for opset in (24, 24, 20):
        with stitch.cached_torchlib_registry():
            export(opset)
    assert made == [24, 20]
    export(24)
    assert made == [24, 20, 24]


def test_without_torchs_table_nothing_is_changed(monkeypatch):
    monkeypatch.setattr(stitch, "ONNXRegistry", None)
    with stitch.cached_torchlib_registry():
        pass


def test_shared_traces_give_the_same_graphs_and_no_others(tmp_path, monkeypatch):
    alone = {}
    monkeypatch.setattr(stitch, "_TRACED", alone)
    expected = graphs(tmp_path / "alone")
    writer = SharedTraces(tmp_path / "traces")
    for key, traced in alone.items():
        writer[key] = traced

    monkeypatch.setattr(stitch, "_TRACED", SharedTraces(tmp_path / "traces"))
    monkeypatch.setattr(stitch, "_trace", refuse)
    assert graphs(tmp_path / "shared") == expected
    with pytest.raises(AssertionError, match="traced again: Head"):
        graphs(tmp_path / "other", kv_heads=2)
