"""The wheel holds every module and the demo's data, nothing else, and works where nothing else is.

Built without a network, from a source distribution that was built from a copy of the checkout.
"""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import visistage
import yaml
from visistage.tests.support.clean_environment import CleanEnvironment
from visistage.tests.support.page_commands import runnable

ROOT = Path(__file__).parents[1]
NOT_INSTALLED = ("tests", "bench", "examples", "docs", "demo/training", "setup.py")
REPOSITORY = "https://github.com/visistage/visistage"


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


def python(*words: object, cwd: Path) -> str:
    """Return the stdout of ``python -m ...``, which must succeed."""
    command = [sys.executable, "-m", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with both distributions of a copy: leftovers in the checkout's build/ stay out."""
    folder = tmp_path_factory.mktemp("built")
    for name in tracked():
        (folder / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / "checkout" / name)
    python("build", "--no-isolation", "--outdir", "dist", "checkout", cwd=folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(built) -> zipfile.ZipFile:
    (file,) = built.glob("*.whl")
    return zipfile.ZipFile(file)


@pytest.fixture(scope="module")
def clean(built, tmp_path_factory) -> CleanEnvironment:
    (file,) = built.glob("*.whl")
    return CleanEnvironment(tmp_path_factory.mktemp("clean"), file, "cpu")


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
    data = {
        name
        for name in tracked()
        if name.startswith(("demo/model/", "demo/pictures/", "demo/ready/"))
    }
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


def test_an_index_takes_both_distributions(built):
    assert {file.suffix for file in built.iterdir()} == {".whl", ".gz"}
    said = python("twine", "check", "--strict", *sorted(built.iterdir()), cwd=built)
    assert said.count("PASSED") == 2


def test_links_of_the_index_page_lead_into_the_repository(wheel):
    metadata = wheel.read(f"visistage-{visistage.__version__}.dist-info/METADATA").decode()
    readme = metadata.partition("\n\n")[2]
    links = re.findall(r"\]\(([^)\s]+)", readme)
    assert f"{REPOSITORY}/blob/main/docs/security.md" in links
    assert "https://raw.githubusercontent.com/visistage/visistage/main/docs/explain.png" in links
    assert not [link for link in links if not re.match(r"https://|#", link)]
    for link in links:
        inside = link.partition("/main/")[2] if "visistage/visistage" in link else ""
        assert (ROOT / inside.partition("#")[0]).exists(), link


def test_commands_of_the_pages_work_where_torch_is_not(clean, tmp_path):
    """From the wheel: doctor, then what docs/index.md says is run, in the tutorial's order."""
    absent = "import importlib.util as u; print([n for n in ('torch', 'onnx') if u.find_spec(n)])"
    assert clean.output(f'python -c "{absent}"', tmp_path) == "[]\n"
    facts = json.loads(clean.output("visistage doctor --json", tmp_path))
    assert facts["onnxruntime"]
    assert facts["compiler"]["torch"] is None
    line = {"image": "photo.png", "prompt": "Count the orange objects."}
    (tmp_path / "questions.jsonl").write_text(json.dumps(line))
    said = {command: clean.output(command, tmp_path) for command in runnable()}
    assert len(said) > 12
    assert said["visistage build demo"] == "engines/demo/visipruner-fp32-cpu-portable\n"
    assert said['visistage infer photo.png "Count the orange objects."'] == "1\n"
    assert "<html" in (tmp_path / "page.html").read_text("utf-8")
    assert json.loads((tmp_path / "answers.jsonl").read_text("utf-8"))["text"].strip() == "1"
    assert clean.output("visistage build demo", tmp_path) == said["visistage build demo"]


def test_what_takes_torch_says_so_where_torch_is_not(clean, tmp_path):
    done = clean.run("visistage build demo --plan dense", tmp_path)
    assert done.returncode == 2
    assert "onnx_ir is not installed" in done.stderr
    assert "Type: pip install 'visistage[compile]'" in done.stderr


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == visistage.__version__
    assert citation["repository-code"] == REPOSITORY
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    dates = dict(re.findall(r"^## (\S+) \((\S+)\)", (ROOT / "CHANGELOG.md").read_text(), re.M))
    assert dates[visistage.__version__] == str(citation["date-released"])


def test_templates_ask_for_the_machine():
    templates = sorted((ROOT / ".github").rglob("*.md"))
    assert len(templates) == 3
    for template in templates:
        assert "`visistage doctor --json`" in template.read_text("utf-8"), template


def test_constraints_name_no_place():
    lines = (ROOT / "constraints-tested.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins), pins
    assert {"numpy", "onnxruntime", "torch", "transformers"} <= {p.partition("=")[0] for p in pins}
