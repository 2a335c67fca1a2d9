"""ONNX Runtime is there once, in the build that the machine wants, and finds its CUDA libraries.

A stand-in for its metadata, and for what is imported; the session on a GPU is tried as it is.
"""

import re
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import onnx
import onnx.printer
import pytest
from visistage.cli.show import doctor_view
from visistage.graphs.errors import BundleError, MissingDependencyError
from visistage.graphs.targets import find_target
from visistage.runtime.backends import onnx_runtime, ort_packages
from visistage.runtime.backends.onnx_runtime import find_cuda_libraries, ort
from visistage.runtime.backends.ort import CPU_PROVIDER, CUDA_PROVIDER, load_session, missing
from visistage.runtime.backends.registry import BackendRow
from visistage.runtime.device import cuda_session, engine_ort
from visistage.runtime.device.cuda_session import MODEL, why_no_session
from visistage.tests.support.stand_ins import GPU

BOTH = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}
ADVICE = (
    r"onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 .*pip uninstall -y onnxruntime "
    r"onnxruntime-gpu; then pip install -e '.\[gpu\]'"
)


@pytest.fixture
def both(monkeypatch):
    def version(name):
        if name not in BOTH:
            raise metadata.PackageNotFoundError(name)
        return BOTH[name]

    monkeypatch.setattr(ort_packages.metadata, "version", version)


@pytest.fixture
def preloads(monkeypatch):
    """Calls of ``preload_dlls``, which finds nothing and prints so."""
    calls = []

    def preload():
        calls.append("preload")
        print("Failed to load libcublasLt.so.13\nPlease follow a guide")

    monkeypatch.setattr(onnx_runtime.ort, "preload_dlls", preload)
    find_cuda_libraries.cache_clear()
    yield calls
    find_cuda_libraries.cache_clear()


def test_one_distribution_is_no_collision():
    assert ort_packages.collision() is None
    assert len(ort_packages.installed()) == 1


def test_two_distributions_are_named_with_what_to_type(both):
    (lacking,) = missing(find_target("cuda"), CUDA_PROVIDER)
    assert re.match(ADVICE, lacking)
    facts = doctor_view.doctor_facts()
    assert facts["onnxruntime_packages"] == BOTH
    assert facts["onnxruntime_collision"] == lacking
    assert engine_ort._why() == lacking


@pytest.mark.parametrize(("name", "first"), [("onnxruntime", True), ("onnxruntime-gpu", False)])
def test_the_build_for_a_gpu_is_not_put_over_the_other_one(monkeypatch, name, first):
    monkeypatch.setattr(ort_packages, "installed", lambda: {name: "1.32.0"})
    (lacking,) = missing(find_target("cuda"), "another provider")
    assert ("pip uninstall -y onnxruntime; then pip install -e '.[gpu]'" in lacking) == first
    assert "pip install -e '.[gpu]'" in lacking


@pytest.mark.parametrize("left", ["None", "type(sys)('onnxruntime')"], ids=["none", "a folder"])
def test_where_there_is_none_it_is_said_what_to_type(left):
    """Uninstalling one of two leaves a folder without code, which can be imported."""
    code = (
        f"import sys; sys.modules['onnxruntime'] = {left}\n"
        "from visistage.graphs.targets import find_target\n"
        "from visistage.runtime.backends.registry import BACKENDS\n"
        "print(BACKENDS['onnxruntime'].check(find_target('cpu')))\n"
        "import visistage.runtime.backends.ort\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ONNX Runtime is not installed. Type: pip install -e '.[cpu]'" in done.stdout
    assert "MissingDependencyError: ONNX Runtime is not installed" in done.stderr


def test_cuda_libraries_are_looked_for_before_the_first_session_on_a_gpu(
    preloads, tmp_path, capsys, monkeypatch
):
    file = tmp_path / "abs.onnx"
    file.write_bytes(MODEL)
    order = []
    real = ort.InferenceSession

    def session(*args, **options):
        order.append(len(preloads))
        return real(*args, **options)

    monkeypatch.setattr(onnx_runtime.ort, "InferenceSession", session)
    load_session(file, ort.SessionOptions(), [CPU_PROVIDER])
    for _ in range(2):
        with pytest.warns(UserWarning, match=CUDA_PROVIDER):
            load_session(file, ort.SessionOptions(), [(CUDA_PROVIDER, {}), CPU_PROVIDER])
    assert order == [0, 1, 1]  # not for a CPU, and once
    assert capsys.readouterr().out == ""  # answers are printed there
    with pytest.raises(BundleError, match="cannot load"):
        load_session(tmp_path / "none.onnx", ort.SessionOptions(), [CPU_PROVIDER])


def test_what_was_not_found_is_said_when_the_provider_does_not_start(preloads):
    assert engine_ort._why().startswith("Failed to load libcublasLt.so.13. Type: pip ")
    assert "guide" not in engine_ort._why()


def test_the_session_that_is_tried_is_of_one_node():
    floats = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Abs", ["x"], ["y"])],
        "a",
        [floats("x", onnx.TensorProto.FLOAT, [4])],
        [floats("y", onnx.TensorProto.FLOAT, [4])],
    )
    opset = [onnx.helper.make_opsetid("", 16)]
    made = onnx.helper.make_model(graph, ir_version=8, opset_imports=opset)
    text = onnx.printer.to_text
    assert text(onnx.load_from_string(MODEL)) == text(made)
    onnx.checker.check_model(made)
    session = ort.InferenceSession(MODEL, providers=[CPU_PROVIDER])
    assert session.run(None, {"x": [-1, 2, -3, 4]})[0].tolist() == [1, 2, 3, 4]


def test_a_session_on_a_gpu_is_tried_and_says_why_it_did_not_open():
    why = why_no_session()
    if CUDA_PROVIDER in ort.get_available_providers():
        assert why is None or len(why) > 10
    else:
        assert why == f"ONNX Runtime {ort.__version__} was built without {CUDA_PROVIDER}"


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (
            "\x1b[1;31m2026-12-01 08:12:55.4 [E:onnxruntime:Default, provider_bridge_ort.cc:2458 "
            "operator()] /src/provider_bridge_ort.cc:2043 Get() [ONNXRuntimeError] : 1 : FAIL : "
            "Failed to load library /lib/libonnxruntime_providers_cuda.so with error: "
            "libcublasLt.so.13: cannot open shared object file: No such file or directory\n"
            "\x1b[m\n\x1b[0;93m2026-12-01 08:12:55.4 [W:onnxruntime:Default, state.cc:1295 "
            "Create] Failed to create CUDAExecutionProvider. Install all\x1b[m\n",
            "libcublasLt.so.13: cannot open shared object file: No such file or directory",
        ),
        (
            "Traceback:\n\x1b[1;31m2026-12-01 08:12:55.4 [E:onnxruntime:Default, cuda.cc:1 Call] "
            "CUDA failure 100: no CUDA-capable device is detected\x1b[m\n\n",
            "CUDA failure 100: no CUDA-capable device is detected",
        ),
        ("", ""),
    ],
)
def test_the_cause_is_found_in_what_onnx_runtime_says(said, why):
    """The first text is that of 1.31.1, in an environment without cuBLAS."""
    assert cuda_session.reason(said) == why


@pytest.mark.parametrize(("why", "runs"), [(None, True), ("libcudart.so.13 is missing", False)])
def test_doctor_says_what_came_of_it(monkeypatch, why, runs):
    monkeypatch.setattr(engine_ort, "missing_provider", lambda target, provider: [])
    monkeypatch.setattr(engine_ort, "missing_cuda_core", lambda: [])
    monkeypatch.setattr(engine_ort, "why_no_session", lambda: why)
    monkeypatch.setattr(cuda_session, "why_no_session", lambda: why)
    monkeypatch.setattr(engine_ort, "find_gpu", lambda: GPU)
    monkeypatch.setattr(doctor_view, "find_gpu", lambda: GPU)
    monkeypatch.setattr(doctor_view, "_onnxruntime", lambda: ("1.31.1", [CUDA_PROVIDER]))
    facts = doctor_view.doctor_facts()
    assert facts["targets"]["cuda"]["run"] == runs
    assert ("no session computes: libcudart" in facts["cuda_session"]) != runs
    monkeypatch.setattr(engine_ort, "find_gpu", lambda: None)
    (lacking,) = engine_ort.missing(find_target("cuda"))
    assert lacking.startswith("an NVIDIA GPU and its driver")


def test_a_row_says_what_to_install_for_it(monkeypatch):
    def load(self):
        raise MissingDependencyError("Type: this")

    monkeypatch.setattr(BackendRow, "_load", load)
    assert BackendRow("any", ".any").check(SimpleNamespace()) == ["Type: this"]
