"""The law of imports: a room imports the rooms below it, and loads the libraries of its row."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("demo", "graphs", "pages", "runtime", "serve", "compile", "calib", "tools", "cli", "bench")
"""From the ground up. The root holds the version, which every room may read."""
TORCH = {"numpy", "torch", "transformers"}
ONNX = {"onnx", "onnx_ir", "onnxscript"}
LIBRARIES = {  # of a room, a folder or a module; the longest name that fits counts
    "demo": {"PIL", "numpy"},
    "demo.training": TORCH | {"PIL", "safetensors", "tokenizers"},
    "graphs": set(),
    "graphs.chain": {"numpy"},
    "graphs.chain.torch_classes": TORCH,
    "graphs.chain.torch_encoder": TORCH,
    "graphs.chain.torch_reference": TORCH,
    "graphs.families": {"numpy"},
    "graphs.modules": TORCH,
    "graphs.plan.gains": {"numpy"},
    "graphs.plan.gates": {"numpy"},
    "graphs.plan.probing": {"numpy"},
    "graphs.selectors": {"numpy"},
    "pages": {"jinja2"},
    "runtime": {"PIL", "jinja2", "numpy", "tokenizers"},
    "runtime.backends": {"numpy", "openvino", "psutil"},
    "runtime.text.grammar": {"llguidance", "numpy"},
    "runtime.backends.onnx_runtime": {"onnxruntime"},  # nobody else: it turns telemetry off
    "runtime.device": {"cuda", "numpy"},
    "serve": {"prometheus_client", "starlette", "uvicorn"},
    "serve.ray": {"ray", "starlette"},
    "serve.triton": set(),
    "serve.triton_model": {"numpy", "triton_python_backend_utils"},
    "compile": TORCH | ONNX | {"psutil", "safetensors", "tokenizers", "yaml"},
    "compile.checkpoint": TORCH | {"huggingface_hub", "safetensors", "tokenizers"},
    "compile.disk": {"filelock"},
    "compile.engines": set(),
    "compile.known_builds": set(),
    "compile.ready_made": {"numpy"},
    "compile.steps": set(),
    "calib": TORCH | {"PIL", "safetensors", "tokenizers"},
    "tools": {"PIL", "jinja2", "numpy", "psutil"},
    "tools.profile.polygraphy_runs": {"numpy", "polygraphy"},
    "tools.verify": TORCH | ONNX | {"PIL", "psutil"},
    "cli": {"click", "numpy", "psutil", "rich"},
    "__main__": set(),
    "setup": {"setuptools"},
}
LIGHT = (
    *("runtime", "serve", "pages", "compile.engines", "compile.known_builds", "compile.ready_made"),
    *("tools.profile", "tools.explain", "tools.estimate"),
)
HEAVY = {"torch", "onnx", "onnx_ir", "onnxscript", "transformers", "safetensors"}


def sources() -> dict[str, Path]:
    """Return every module of the package by its name below ``visistage``; "" is the root."""
    found = {}
    files = [*ROOT.glob("*.py"), *(f for room in ROOMS for f in (ROOT / room).rglob("*.py"))]
    for file in files:
        if file.parent.name == "runners":  # of peers, in environments of their own
            continue
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = sources()


def imports(module: str, source: str, nodes: Iterator[ast.AST]) -> Iterator[tuple[int, str, bool]]:
    """Yield (line, name, whether it is ours) of every import among ``nodes``."""
    package = module.split(".") if module else []
    if MODULES.get(module, Path(f"{module}.py")).stem != "__init__":
        package = package[:-1]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, node.module or "", False
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            base += node.module.split(".") if node.module else []
            for alias in node.names:  # of `from . import plan`, the name is a module
                inner = ".".join([*base, alias.name])
                yield node.lineno, inner if inner in MODULES else ".".join(base), True


def violations(module: str, source: str) -> list[str]:
    """Return what ``source``, standing at ``module``, imports against the law, anywhere in it."""
    room = module.split(".")[0]
    names = [module.rsplit(".", cut)[0] for cut in range(module.count(".") + 1)]
    libraries = next((LIBRARIES[name] for name in names if name in LIBRARIES), None)
    below = ROOMS[: ROOMS.index(room) + 1] if room in ROOMS else ROOMS
    wrong = []
    for line, name, ours in imports(module, source, ast.walk(ast.parse(source))):
        top = name.split(".")[0]
        if ours:
            allowed = not top or top in below
        else:
            allowed = libraries is None or top in libraries or top in sys.stdlib_module_names
            allowed = allowed and top not in ("visistage", *ROOMS)
        if not allowed:
            wrong.append(f"{module or 'visistage'}:{line} imports {name or 'the root'}")
    return wrong


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that run when a module is imported: not functions, not type checking."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from at_import(node)


def graph() -> dict[str, set[str]]:
    """Return what each module imports while it is imported: modules of ours, and libraries."""
    edges = {}
    for module, file in MODULES.items():
        source = file.read_text(encoding="utf-8")
        found = imports(module, source, at_import(ast.parse(source)))
        edges[module] = {
            name if ours else f"library {name.split('.')[0]}" for _, name, ours in found
        }
        edges[module] -= {"", module}
    return edges


def reached(edges: dict[str, set[str]], start: str) -> set[str]:
    """Return everything that ``start`` leads to."""
    seen, new = set(), set(edges.get(start, ()))
    while new:
        seen |= new
        new = {to for one in new for to in edges.get(one, ())} - seen
    return seen


EDGES = graph()


@pytest.mark.parametrize("module", sorted(MODULES), ids=lambda name: name or "visistage")
def test_imports_obey_the_law(module):
    assert not violations(module, MODULES[module].read_text(encoding="utf-8"))


def test_no_module_imports_itself_by_a_detour():
    assert [name for name in MODULES if name in reached(EDGES, name)] == []


@pytest.mark.parametrize("room", LIGHT)
def test_light_rooms_lead_to_nothing_heavy(room):
    for module in (name for name in MODULES if name.startswith(room)):
        assert not reached(EDGES, module) & {f"library {name}" for name in HEAVY}, module


def test_one_module_alone_imports_onnx_runtime():
    """Not only by the law: ``bench`` may load anything, and would send telemetry just the same."""
    files = [*ROOT.glob("*.py"), *(f for room in ROOMS for f in (ROOT / room).rglob("*.py"))]
    text = re.compile(r"(import|from)\s+onnxruntime|import_module\(.onnxruntime")
    assert [f.name for f in files if text.search(f.read_text("utf-8"))] == ["onnx_runtime.py"]


def test_every_folder_with_code_is_a_room():
    assert {file.parent.name for file in ROOT.glob("*/__init__.py")} - {"tests"} == set(ROOMS) - {
        room for room in ROOMS if not (ROOT / room / "__init__.py").exists()
    }
    assert all((ROOT / room).is_dir() for room in ROOMS)


def test_rows_name_what_exists():
    assert set(LIBRARIES) <= set(MODULES)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("runtime.session", "import torch"),
        ("runtime.session", "def f():\n    from transformers import AutoTokenizer"),
        ("runtime.session", "import onnxruntime"),
        ("runtime.session", "from ..compile import build"),
        ("runtime.session", "from ..compile.build import build"),
        ("runtime.session", "import openvino"),
        ("runtime.backends.ort", "import onnxruntime"),
        ("tools.profile.roofline", "import onnxruntime"),
        ("runtime.device.executor", "import torch"),
        ("runtime.device.engine_trt", "import tensorrt"),
        ("runtime.text.detokenize", "from ... import calib"),
        ("graphs.plan.plan", "import numpy"),
        ("graphs.plan.plan", "from ...runtime.answer import Answer"),
        ("graphs.chain.chain", "import torch"),
        ("graphs.selectors.scope", "import torch"),
        ("graphs.modules.decoder", "import onnx"),
        ("graphs.modules.decoder", "import graphs.plan"),
        ("graphs.modules.decoder", "from visistage.graphs.plan import StagePlan"),
        ("pages.page", "from ..runtime.answer import Answer"),
        ("compile.build", "from ..calib.samples import Sample"),
        ("compile.build", "import huggingface_hub"),
        ("compile.engines.engines", "import onnx"),
        ("demo.heldout", "import torch"),
        ("demo.training.train", "from ...graphs.plan import StagePlan"),
        ("tools.explain.trace", "from ...cli.main import main"),
        ("tools.profile.timing", "import torch"),
        ("runtime.engine", "from ..serve.app import make_app"),
        ("serve.app", "import torch"),
        ("serve.app", "from ..compile.build import make_bundle"),
        ("cli.asking", "import torch"),
        ("cli.asking", "from ..bench.record import save"),
    ],
)
def test_a_planted_violation_is_caught(module, source):
    assert violations(module, source)


def test_a_planted_circle_and_a_planted_detour_are_caught():
    edges = EDGES | {"graphs.errors": {"graphs.plan.plan"}}
    assert "graphs.errors" in reached(edges, "graphs.errors")
    edges = EDGES | {"graphs.chain.chain": {"graphs.modules.decoder"}}
    assert "library torch" in reached(edges, "runtime.session")


@pytest.mark.parametrize("module", ["runtime", "runtime.session", "runtime.oneshot", "cli.main"])
def test_importing_loads_nothing_heavy(module):
    heavy = (*HEAVY, "huggingface_hub", "cuda", "openvino", "tensorrt", "tensorrt_rtx")
    heavy += () if module.startswith("runtime.") else ("onnxruntime", "numpy")
    code = (
        f"import sys, visistage.{module}\n"
        f"loaded = [name for name in {heavy!r} if name in sys.modules]\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_entry_points_that_others_use_stay_where_they_are():
    code = (
        "import sys\n"
        "from visistage.graphs.plan import StagePlan\n"
        "from visistage.graphs.presets import preset\n"
        "assert isinstance(preset('visipruner', 32, 576, t=14), StagePlan)\n"
        "import visistage.graphs.chain\n"
        "assert 'torch' not in sys.modules\n"
        "from visistage.graphs.chain import ChainResult, run\n"
        "assert run.__annotations__['return'] == 'ChainResult', run.__annotations__\n"
        "fields = {'logits', 'kept', 'trigger', 'exit', 'tokens'}\n"
        "assert fields <= set(ChainResult.__annotations__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
