"""The wheel holds every module and the demo's data, and nothing else; built without a network."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import visistage

ROOT = Path(__file__).parents[1]
NOT_INSTALLED = ("tests", "bench", "examples", "docs", "demo/training")


def tracked() -> list[str]:
    """Files of the checkout, those not yet added included; what git ignores is not ours to ship."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout: what belongs to the package is unknown")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """A wheel of a copy: in the checkout itself, leftovers in build/ would get into it."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in tracked():
        (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / "copy" / name)
    # fmt: off
    command = [
        sys.executable, "-m", "pip", "wheel", "./copy", "-w", ".", "-q",
        "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check",
    ]
    # fmt: on
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file)


@pytest.fixture(scope="module")
def installed(wheel) -> set[str]:
    """Paths below ``visistage/`` in the wheel."""
    start = "visistage/"
    return {name[len(start) :] for name in wheel.namelist() if name.startswith(start)}


def test_every_module_is_in_the_wheel(installed):
    modules = {
        name for name in tracked() if name.endswith(".py") and not name.startswith(NOT_INSTALLED)
    }
    assert {"cli/main.py", "runtime/session.py", "compile/build.py"} <= modules
    assert {name for name in installed if name.endswith(".py")} == modules


def test_data_is_in_the_wheel(installed):
    data = {name for name in tracked() if name.startswith(("demo/model/", "demo/pictures/"))}
    assert any(name.endswith(".png") for name in data)
    pages = ("calib/page", "serve/page", "tools/compare", "tools/explain", "tools/profile")
    data |= {f"{folder}/page.{kind}" for folder in pages for kind in ("css", "html")}
    data |= {
        "serve/page/page.js",
        "tools/explain/page.js",
        "pages/base.css",
        "pages/base.html",
        "pages/chart.css",
    }
    data |= {"pages/letters.html"}
    data |= {f"tools/profile/{name}.onnx" for name in ("matmul", "matmul-fp16")}
    data |= {"tools/estimate/measured.json"}
    assert {name for name in installed if not name.endswith(".py")} == data | {"py.typed"}


def test_the_larger_demo_stays_in_the_repository(wheel, installed):
    assert not any(name.startswith("demo/model-") for name in installed)
    assert sum(entry.compress_size for entry in wheel.infolist()) < 8_000_000


def test_nothing_else_is_installed(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"visistage", f"visistage-{visistage.__version__}.dist-info"}


def test_metadata(wheel):
    info = f"visistage-{visistage.__version__}.dist-info"
    texts = {name.split("/")[-1]: name for name in wheel.namelist() if name.startswith(info)}
    assert {"LICENSE", "NOTICE"} <= set(texts)
    assert "visistage = visistage.cli.main:main" in wheel.read(texts["entry_points.txt"]).decode()
    metadata = wheel.read(texts["METADATA"]).decode()
    required = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.M)
    assert "numpy" in required
    assert not {"torch", "onnx", "transformers"} & set(required)
    # Its builds for CPU and GPU write one folder: a machine wants one, and pip cannot know which.
    assert not any(name.startswith("onnxruntime") for name in required)
    extras = {}
    for extra in re.findall(r"^Provides-Extra: (\S+)$", metadata, re.M):
        wanted = rf"^Requires-Dist: (onnxruntime[\w-]*).*extra == .{extra}.$"
        extras[extra] = set(re.findall(wanted, metadata, re.M))
    assert "compile" in extras
    assert {extra: names for extra, names in extras.items() if names} == {
        "cpu": {"onnxruntime"},
        "gpu": {"onnxruntime-gpu"},
    }
