"""ONNX Runtime's CUDA provider as it is, over libraries that note what they are asked to do.

Needs no GPU, but a Python with onnxruntime-gpu and cuda-core: this one, or the one that
VISISTAGE_GPU_PYTHON names (``make test GPU_PYTHON=...``), and a C compiler. It shows where nodes
are placed, what is allocated, copied, waited for and captured; it cannot show numbers and times.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import visistage
from visistage.compile.build import make_bundle
from visistage.runtime.device.cuda_session import reason
from visistage.tests.support import toy
from visistage.tests.support.fake_cuda.build import build, lacking

PYTHON = os.environ.get("VISISTAGE_GPU_PYTHON") or sys.executable
ROOT = Path(visistage.__file__).parent
ASKED = ROOT / "tests" / "support" / "fake_cuda" / "asked.py"
SITE = "import sysconfig; print(sysconfig.get_path('purelib'))"
PLANS = {
    "dense": "dense",
    "pruned": "visipruner:shallow=1,t=1,e=2,keep=4",
    "adaptive": ("visipruner-adaptive:boundaries=1-2,cosine=0.95,contribution=0.5,exit_cosine=0.9"),
}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """The folder of the libraries."""
    if sys.platform != "linux":
        pytest.skip("the libraries are written for Linux")
    if shutil.which("cc") is None or shutil.which("nm") is None:
        pytest.skip("apt install gcc: there is no C compiler")
    done = subprocess.run([PYTHON, "-c", SITE], capture_output=True, text=True)
    site = Path(done.stdout.strip())
    why = lacking(site)
    if why is not None:
        pytest.skip(f"{why}: make test GPU_PYTHON=... with onnxruntime-gpu[cuda] and cuda-core")
    folder = tmp_path_factory.mktemp("cuda")
    build(folder, site)
    return folder


@pytest.fixture(scope="module")
def asked(libraries, tmp_path_factory):
    """Notes of what bundles ask of CUDA, each run once: ``asked.main``."""
    folder = tmp_path_factory.mktemp("asked")
    checkpoint, found = toy.make_checkpoint(folder / "toy", kv_heads=2), {}
    (folder / "visistage").symlink_to(ROOT)

    def get(name, *options):
        if (name, options) not in found:
            out = folder / "-".join([name, *options])
            bundle = make_bundle(str(checkpoint), plan=PLANS[name], target="cuda", out=out)
            env = {
                **os.environ,
                "PYTHONPATH": str(folder),
                "LD_LIBRARY_PATH": str(libraries),
                "FAKE_CUDA_LOG": str(out / "calls.log"),
            }
            command = [PYTHON, str(ASKED), str(bundle.path), *options]
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr[-4000:]
            found[name, options] = json.loads(done.stdout.splitlines()[-1])
        return found[name, options]

    return get


def kinds(lines):
    """Count calls of each kind."""
    found = {}
    for line in lines:
        kind = " ".join(line.split()[: 3 if line.startswith("copy") else 1])
        found[kind] = found.get(kind, 0) + 1
    return found


def fresh_waits(lines):
    """Waits for events that were recorded in the same section."""
    recorded = {line.split()[1] for line in lines if line.startswith("record")}
    return [line for line in lines if line.startswith("wait") and line.split()[1] in recorded]


def test_the_session_that_doctor_tries_opens_and_computes(libraries, tmp_path):
    (tmp_path / "visistage").symlink_to(ROOT)
    code = (
        "import onnxruntime\nonnxruntime.preload_dlls = lambda: None  # the real ones\n"
        "from visistage.runtime.device.cuda_session import main\nmain()"
    )
    log = tmp_path / "calls.log"
    env = {"PYTHONPATH": str(tmp_path), "LD_LIBRARY_PATH": str(libraries)}
    for path, found in ((str(libraries), ["true"]), ("", ["false"])):
        env |= {"LD_LIBRARY_PATH": path, "FAKE_CUDA_LOG": str(log)}
        done = subprocess.run(
            [PYTHON, "-c", code], env=os.environ | env, capture_output=True, text=True
        )
        assert done.stdout.splitlines()[-1:] == found, done.stderr
    assert "kernel" in log.read_text()
    why = reason(done.stderr)
    assert "cannot open shared object file" in why
    assert not why.startswith("20")  # no time, no place in a source


@pytest.mark.parametrize("name", PLANS)
def test_no_node_copies_between_host_and_device(asked, name):
    assert asked(name)["memcpy"] == []


@pytest.mark.parametrize("name", PLANS)
def test_a_warm_step_allocates_nothing_and_waits_for_its_logits_alone(asked, name):
    facts = asked(name)
    stages = len(facts["refused"])
    for step in ("step 1", "step 2"):
        lines = facts["sections"][step]
        found = kinds(lines)
        assert found["kernel"] > 0
        assert not found.keys() & {
            "allocate",
            "free",
            "set",
            "order",
            "host",
            "unsupported",
            "wrong",
        }
        assert len(fresh_waits(lines)) == 1  # others are for blocks that were read long ago
        assert not {"wait stream", "wait device", "wait context", "wait copy"} & set(lines)
        assert found["copy device pinned"] == stages + 1  # a block of numbers for each, and a row
        assert found["copy pinned device"] == 1
        assert not [line for line in lines if line.startswith("copy") and "pageable" in line]


@pytest.mark.parametrize("name", PLANS)
def test_all_kernels_run_on_our_stream(asked, name):
    facts = asked(name)
    streams = set()
    for section, lines in facts["sections"].items():
        if section != "start":  # sessions copy their weights on streams of their own
            streams |= {line.split()[1] for line in lines if line.startswith("kernel")}
    assert streams == {facts["stream"]}


@pytest.mark.parametrize("name", PLANS)
def test_another_thread_may_ask_and_read(asked, name):
    facts = asked(name)
    assert facts["errors"] == []
    lines = [line for lines in facts["sections"].values() for line in lines]
    assert not [line for line in lines if line.startswith(("wrong", "captured wrong"))]


def test_probes_of_fifty_sizes_take_one_context(asked):
    assert asked("adaptive")["contexts"] == 1


@pytest.mark.parametrize("name", ["dense", "pruned"])
def test_steps_are_captured_where_that_is_asked_for(asked, name):
    assert asked(name)["captured"] == [False] * len(asked(name)["captured"])
    facts = asked(name, "capture")
    assert all(facts["captured"])
    assert facts["refused"] == [None] * len(facts["captured"])
    lines = [line for lines in facts["sections"].values() for line in lines]
    captured = [line.removeprefix("captured ") for line in lines if line.startswith("captured ")]
    assert set(kinds(captured)) <= {"kernel", "library", "copy device device"}
    assert any(line.startswith("kernel") for line in captured)
    for step in ("step 1", "step 2"):
        found = kinds(facts["sections"][step])
        assert found["launch"] == len(facts["captured"])
        assert "kernel" not in found


def test_a_step_that_allocates_or_waits_is_noticed():
    """The counts are of what happens: lines as they would be."""
    lines = ["record 0x10", "copy device pinned 8", "wait 0x10", "wait 0x20", "allocate device 4"]
    assert kinds(lines) == {"record": 1, "copy device pinned": 1, "wait": 2, "allocate": 1}
    assert fresh_waits(lines) == ["wait 0x10"]
