"""A model repository of Triton: read by Triton's own schema, its model run under a stand-in."""

import importlib.util
import json
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2
from visistage import runtime
from visistage.cli.main import main
from visistage.serve.images import image_bytes
from visistage.serve.requests import ImageAddress
from visistage.tests.support import toy
from visistage.tests.support.asking import picture
from visistage.tests.support.built import built_once
from visistage.tests.support.served import data_uri


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    checkpoint = toy.make_checkpoint(tmp_path_factory.mktemp("triton") / "toy")
    return built_once(checkpoint, tmp_path_factory)("visipruner:shallow=1,t=1,e=2,keep=4")


@pytest.fixture(scope="module")
def folder(bundle, tmp_path_factory):
    repository = tmp_path_factory.mktemp("repository")
    command = [
        "export-triton",
        str(bundle.path),
        str(repository),
        "--name",
        "my toy",
        "--lanes",
        "2",
    ]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert CliRunner().invoke(main, command).exit_code != 0, "it is there already"
    (found,) = repository.iterdir()
    assert done.stdout.strip() == str(found)
    return found


def config_of(folder):
    text = (folder / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_the_configuration_is_tritons(folder):
    config = config_of(folder)
    assert config.name == folder.name == "my-toy"
    assert config.backend == "python"
    assert config.model_transaction_policy.decoupled
    found = {
        entry.name: (entry.data_type, list(entry.dims), entry.optional) for entry in config.input
    }
    string, number = model_config_pb2.TYPE_STRING, model_config_pb2.TYPE_INT32
    assert found == {
        "PROMPT": (string, [1], False),
        "IMAGE": (string, [-1], True),
        "MAX_TOKENS": (number, [1], True),
    }
    assert [(entry.name, entry.data_type) for entry in config.output] == [("TEXT", string)]
    (group,) = config.instance_group
    assert group.kind == model_config_pb2.ModelInstanceGroup.KIND_CPU


def test_a_wrong_configuration_would_be_noticed():
    with pytest.raises(text_format.ParseError):
        text_format.Parse('inputs [ { name: "X" } ]', model_config_pb2.ModelConfig())


def test_nothing_in_it_leads_out(folder, bundle):
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    assert {path.name for path in (folder / "1" / "bundle").iterdir()} >= {"manifest.json"}
    assert len(files) > len(bundle.manifest.files)


# --- the model ------------------------------------------------------------------------------------


class Sender:
    """What Triton gives a request to answer with."""

    def __init__(self, cancelled=False):
        self.texts, self.error, self.over = [], None, threading.Event()
        self.cancelled = cancelled

    def is_cancelled(self):
        return self.cancelled

    def send(self, response=None, flags=0):
        assert not self.over.is_set(), "sent behind the end"
        if response is not None:
            self.texts += [t.as_numpy()[0].decode() for t in response.outputs]
            self.error = response.error or self.error
        if flags:
            self.over.set()


class Request(dict):
    """Tensors by name."""

    def __init__(self, **tensors):
        super().__init__(tensors)
        self.sender = Sender()

    def get_response_sender(self):
        return self.sender


@pytest.fixture
def model(folder, monkeypatch):
    """The repository's own model.py, under a stand-in for Triton's module."""

    class Tensor:
        def __init__(self, name, array):
            self.name, self.array = name, array

        def as_numpy(self):
            return self.array

    stand_in = SimpleNamespace(
        Tensor=Tensor,
        TritonError=lambda text: text,
        InferenceResponse=lambda outputs, error=None: SimpleNamespace(outputs=outputs, error=error),
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
        get_input_tensor_by_name=lambda request, name: (
            Tensor(name, request[name]) if name in request else None
        ),
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stand_in)
    monkeypatch.delitem(sys.modules, "visistage.serve.triton_model", raising=False)
    spec = importlib.util.spec_from_file_location("model", folder / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.TritonPythonModel()
    config = json_format.MessageToDict(config_of(folder), preserving_proto_field_name=True)
    made.initialize(
        {
            "model_config": json.dumps(config),
            "model_repository": str(folder),
            "model_version": "1",
        }
    )
    made.engine.eos = frozenset()
    yield made
    made.finalize()
    monkeypatch.delitem(sys.modules, "visistage.serve.triton_model")


def test_it_answers_in_pieces_as_a_session_does(model, bundle):
    with runtime.load(bundle.path, threads=1) as session:
        session.eos = frozenset()
        expected = [session.infer(picture(s), "Why?", max_tokens=8).text for s in range(3)]
    files = [image_bytes(ImageAddress(data_uri(seed), ""), (), 10**6) for seed in range(3)]
    requests = [
        Request(
            PROMPT=np.array([b"Why?"], object),
            IMAGE=np.array([file], object),
            MAX_TOKENS=np.array([8], np.int32),
        )
        for file in files
    ]
    assert model.execute(requests) is None
    for request, text in zip(requests, expected, strict=True):
        assert request.sender.over.wait(30)
        assert "".join(request.sender.texts).strip() == text
        assert len(request.sender.texts) > 3
    assert model.engine.lanes == 2


def test_errors_and_cancelled_requests_end(model):
    bad = Request(PROMPT=np.array([b"Why?"], object), IMAGE=np.array([b"no image"], object))
    gone = Request(PROMPT=np.array([b"Go on"], object), MAX_TOKENS=np.array([1500], np.int32))
    gone.sender.cancelled = True
    model.execute([bad, gone])
    assert bad.sender.over.wait(10)
    assert "not an image" in bad.sender.error
    assert gone.sender.over.wait(10)
    assert "cancelled" in gone.sender.error
    assert len(gone.sender.texts) < 10
