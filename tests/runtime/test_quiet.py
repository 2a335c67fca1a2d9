"""An answer needs no network and leaves no traces outside its bundle."""

import os
import platform
import subprocess
import sys

import pytest
from PIL import Image
from visistage.compile.build import make_bundle
from visistage.tests.support import toy
from visistage.tests.support.asking import picture

SOCKET = {"x86_64": 41, "aarch64": 198}.get(platform.machine())
NO_SOCKETS = f"""
import ctypes
# BPF: load the call's number; if it is socket(), load its family; if not AF_UNIX, kill the process.
rows = [(0x20, 0, 0, 0), (0x15, 0, 3, {SOCKET}), (0x20, 0, 0, 16), (0x15, 1, 0, 1),
        (0x06, 0, 0, 0x80000000), (0x06, 0, 0, 0x7FFF0000)]
class Row(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte),
                ("k", ctypes.c_uint)]
class Program(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("rows", ctypes.POINTER(Row))]
program = Program(len(rows), (Row * len(rows))(*(Row(*row) for row in rows)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0, "no_new_privs"
assert libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0, "seccomp"
"""
ASK = """
import sys, time
from visistage.cli.main import main
try:
    main(["infer", sys.argv[2], "What is this?", "--bundle", sys.argv[1], "--max-tokens", "2"])
finally:
    time.sleep(1)  # for what reports from a thread of its own
"""
VARIABLES = ("ORT_DISABLE_TELEMETRY", "VISISTAGE_THREADS")


@pytest.fixture
def child(tmp_path):
    """Run code in a process with an empty home, in which a socket is the end."""
    if sys.platform != "linux" or SOCKET is None:
        pytest.skip("the filter is written for Linux on x86-64 and arm64")
    home = tmp_path / "home"
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    env = {name: value for name, value in kept.items() if not name.startswith("XDG_")}

    def run(code, *arguments, **more):
        return subprocess.run(
            [sys.executable, "-c", NO_SOCKETS + code, *map(str, arguments)],
            capture_output=True,
            text=True,
            env=env | {"HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"} | more,
            cwd=tmp_path,
        )

    yield run
    assert list(home.iterdir()) == []


def test_a_socket_is_the_end(child):
    code = "import socket\nsocket.socket(socket.AF_UNIX)\nprint('here', flush=True)\n"
    done = child(code + "socket.socket(socket.AF_INET)\nprint('there')")
    assert done.stdout == "here\n"
    assert done.returncode < 0


def test_an_answer_asks_nobody_and_leaves_nothing(child, tmp_path):
    checkpoint = toy.make_checkpoint(tmp_path / "toy")
    bundle = make_bundle(str(checkpoint), plan="dense", out=tmp_path / "engines").path
    Image.fromarray(picture(1)).save(tmp_path / "image.png")
    done = child(ASK, bundle, tmp_path / "image.png")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("given", "found"), [({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")])
def test_telemetry_is_off_unless_the_user_says_otherwise(child, given, found):
    code = (
        "import os, sys, types\n"
        "stand_in = types.ModuleType('onnxruntime')  # itself it would report now\n"
        "stand_in.InferenceSession = object\n"
        "sys.modules['onnxruntime'] = stand_in\n"
        "from visistage.runtime.backends.onnx_runtime import ort\n"
        "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    done = child(code, **given)
    assert (done.stdout.strip(), done.returncode) == (found, 0), done.stderr
