"""Who imports whom, read off the sources; planted violations must be caught."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "calib",
    "commands",
    "compile",
    "console",
    "demo",
    "explain",
    "graphs",
    "pages",
    "parity",
)
PACKAGES += ("runtime", "trt")
PACKAGES += ("estimate", "profiling")
PURE = {"graphs", "graphs.bundle", "graphs.config", "graphs.contract", "graphs.plan.cost"}
PURE |= {
    "graphs.errors",
    "graphs.linears",
    "graphs.plan.plan",
    "graphs.precision",
    "graphs.presets.presets",
    "graphs.targets",
}
PURE |= {"graphs.plan.plan_checks", "graphs.plan.plan_fields", "graphs.plan.stages"}
PURE |= {"graphs.presets.request", "graphs.presets.probing_presets", "graphs.presets.static"}
PURE |= {"graphs.quantization", "graphs.config_fields", "graphs.plan.call_cost"}
RUNTIME_MAY = {
    *PURE,
    "graphs.chain.executor",
    "graphs.plan.gates",
    "graphs.plan.probing",
    "graphs.chain.chain",
}
RUNTIME_MAY |= {"runtime.*"}
HEAVY = ("torch", "onnx", "onnx_ir", "onnxscript", "transformers", "safetensors", "huggingface_hub")
HEAVY += ("cuda", "openvino", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")

# Module or package -> (what of ours it may import, which libraries). The longest name that fits
# counts; "x.*" is package x with its modules, "" is the root package with the version.
RULES = {
    "graphs": (PURE, set()),
    **dict.fromkeys(PURE, (PURE, set())),
    "graphs.chain.executor": (set(), {"numpy"}),
    "graphs.chain.chain": (
        PURE | {"graphs.chain.executor", "graphs.plan.gates", "graphs.plan.probing"},
        {"numpy"},
    ),
    "graphs.plan.gates": (PURE, {"numpy"}),
    "graphs.plan.probing": (PURE, {"numpy"}),
    "graphs.*": ({"graphs.*"}, {"numpy", "torch"}),
    "graphs.modules.rope": ({"graphs.*"}, {"torch", "transformers"}),
    "runtime": (RUNTIME_MAY, set()),
    "runtime.*": (RUNTIME_MAY, {"PIL", "jinja2", "numpy", "tokenizers"}),
    "runtime.backends.ort": (RUNTIME_MAY, {"numpy", "onnxruntime", "psutil"}),
    "runtime.backends.ort_stage": (RUNTIME_MAY, {"numpy", "onnxruntime"}),
    "runtime.backends.openvino": (RUNTIME_MAY, {"numpy", "openvino"}),
    "runtime.backends.openvino_calls": (RUNTIME_MAY, {"numpy"}),
    "runtime.device.cuda": (RUNTIME_MAY, {"cuda", "numpy"}),
    "runtime.device.engine_ort": (RUNTIME_MAY, {"numpy", "onnxruntime"}),
    "runtime.device.engine_trt": (RUNTIME_MAY | {"runtime.device.tensorrt"}, {"numpy"}),
    "runtime.device.opening": (
        RUNTIME_MAY
        | {"runtime.device.probe", "compile.engines.engines", "runtime.device.tensorrt"},
        set(),
    ),
    "calib.*": ({"calib.*", "graphs.*", "runtime"}, {"PIL", "numpy"}),
    "compile.quantize.calibration_file": ({"calib.*", "graphs.*"}, {"numpy", "safetensors"}),
    **dict.fromkeys(
        (
            "calib.page.charts",
            "calib.page.warnings",
            "calib.page.range_charts",
            "calib.page.calibration_page",
            "calib.page.series",
        ),
        (PURE | {"calib.*", "pages.*"}, set()),
    ),
    # Choosing a plan runs bundles of it, so these alone see the compiler and the runtime.
    **dict.fromkeys(
        ("calib.calibrate", "calib.plan_search.chooser", "calib.plan_search.measure_plans"),
        ({"calib.*", "compile.*", "graphs.*", "runtime", "runtime.image.preprocessing"}, {"numpy"}),
    ),
    "calib.run.observers": (PURE | {"compile.quantize.int_arithmetic"}, {"numpy"}),
    "compile.quantize.int_arithmetic": (PURE, {"numpy"}),
    "calib.run.smoothing": (
        PURE | {"calib.run.observers", "compile.quantize.int_arithmetic"},
        {"numpy"},
    ),
    # Calibration sees what the runtime will: the same pictures, the same ids.
    "calib.sample_prompts": (
        {
            "calib.*",
            "graphs.*",
            "runtime.image.image",
            "runtime.image.preprocessing",
            "runtime.text.prompt",
        },
        {"numpy", "tokenizers"},
    ),
    # The compiler asks the runtime's own code for prefix and preprocessing, so that both agree.
    "compile.*": (
        {"", "calib.*", "compile.*", "graphs.*"}
        | {
            "runtime.image.image",
            "runtime.image.preprocessing",
            "runtime.text.prompt",
            "runtime.text.template",
        },
        {"numpy", "onnx", "onnx_ir", "onnxscript", "psutil", "rich"}
        | {"safetensors", "tokenizers", "torch", "transformers", "yaml"},
    ),
    "compile.checkpoint.checkpoint": ({"compile.*", "graphs.*"}, {"huggingface_hub", "torch"}),
    "demo.*": ({"demo.*"}, {"PIL", "numpy", "tokenizers", "torch", "transformers"}),
    "demo.gallery": ({"demo.questions", "demo.scenes"}, {"PIL", "numpy"}),
    "demo.heldout": ({"demo.questions", "demo.scenes"}, {"PIL", "numpy"}),
    "demo.questions": ({"demo.scenes"}, set()),
    "demo.scenes": (set(), {"PIL", "numpy"}),
    "console.*": (
        PURE
        | {"", "calib.*", "console.*", "demo.heldout", "runtime.answer", "runtime.backends.cpu"}
        | {
            "compile.planfile",
            "compile.checkpoint.known_models",
            "compile.steps",
            "compile.engines.engines",
        },
        {"click", "psutil", "rich"},
    ),
    "cli.show.doctor_view": (
        PURE | {"", "console.*", "runtime.backends.cpu", "trt.*"},
        {"onnxruntime", "psutil", "rich"},
    ),
    "cli.show.engines_view": (PURE | {"console.*", "compile.engines.engines"}, {"numpy", "rich"}),
    "cli.show.precision_view": (PURE | {"compile.checkpoint.names", "cli.show.units"}, set()),
    "cli.show.verify_view": (
        PURE
        | {
            "cli.show.bar",
            "cli.show.units",
            "tools.verify.verify_report",
            "tools.verify.check_steps",
        },
        {"rich"},
    ),
    "cli.show.build_view": (PURE | {"trt.*"}, {"rich"}),
    "cli.show.estimate_view": (
        PURE | {"compile.planfile", "console.*", "tools.estimate.estimate_target"},
        {"rich"},
    ),
    # Runs wherever a bundle runs, and looks further into it than the public runtime lets others.
    "explain.*": (
        PURE
        | {
            "",
            "cli.show.units",
            "explain.*",
            "graphs.chain.executor",
            "graphs.chain.chain",
            "pages.*",
        }
        | {
            "runtime.answer",
            "runtime.image.image",
            "runtime.image.preprocessing",
            "runtime.session",
        }
        | {"runtime.tensors"},
        {"PIL", "jinja2", "numpy"},
    ),
    "explain": (set(), set()),
    # What pages share; it knows nothing of what they show.
    "pages.*": ({"cli.show.units", "graphs.errors", "pages.*"}, {"jinja2"}),
    "pages": (set(), set()),
    # Runs wherever a bundle runs, engines included.
    "profiling.*": (
        PURE
        | {"", "cli.show.profile_view", "tools.explain.dense", "pages.*", "profiling.*"}
        | {"runtime.reuse", "runtime.backends.cpu", "runtime.session"}
        | {"compile.engines.engines", "compile.engines.engine_spec"},
        {"PIL", "numpy", "psutil"},
    ),
    "profiling": (set(), set()),
    "tools.profile.peaks": (PURE, {"numpy", "onnxruntime"}),
    "tools.profile.rails": (set(), set()),
    "tools.profile.spread": (set(), set()),
    # Needs nothing of a bundle but its manifest, and of this machine its peaks.
    "estimate.*": (
        PURE | {"estimate.*", "tools.profile.machine", "tools.profile.peaks"},
        {"numpy"},
    ),
    "estimate": (set(), set()),
    # Runs on the device: of the compiler only what needs neither torch nor onnx.
    "trt.*": (PURE | {"trt.*", "compile.disk", "compile.steps"}, set()),
    "trt": (set(), set()),
    # The ladder sees every rung; what torch and onnx are not needed for runs without them.
    "parity.*": (
        {
            "compile.quantize.calibration_file",
            "compile.quantize.int_arithmetic",
            "calib.samples",
            "compile.*",
            "graphs.*",
        }
        | {"parity.*", "runtime", "runtime.backends.ort_int8"},
        {"PIL", "numpy", "onnx", "onnx_ir", "onnxruntime", "torch", "transformers"},
    ),
    "parity": (set(), set()),
    "tools.verify.answer_checks": (
        {"calib.samples", "tools.verify.verify_report", "runtime"},
        {"numpy"},
    ),
    "tools.verify.compare": ({"graphs.bundle", "tools.verify.verify_report"}, {"numpy"}),
    "tools.verify.engine_runs": (
        {"calib.samples", "tools.verify.compare", "tools.verify.verify_report", "runtime"},
        set(),
    ),
    "tools.verify.verify": (PURE | {"", "calib.samples", "parity.*", "trt.*"}, {"psutil"}),
    "tools.verify.checks": (PURE | {"parity.*", "runtime"}, set()),
    "tools.verify.verify_target": (
        PURE
        | {
            "compile.quantize.calibration_file",
            "calib.samples",
            "compile.checkpoint.checkpoint",
            "parity.*",
            "runtime",
        },
        {"psutil"},
    ),
    "tools.verify.verify_prompts": (
        {"calib.samples", "compile.checkpoint.known_models", "demo.gallery", "demo.heldout"},
        set(),
    ),
    "tools.verify.verify_report": (PURE, set()),
    "tools.verify.check_steps": (PURE | {"tools.verify.verify_report"}, set()),
    "tools.verify.stored": (
        PURE | {"tools.verify.verify_report", "tools.verify.check_steps", "trt.*"},
        set(),
    ),
    "commands": (set(), set()),
    "commands.*": ({"", "*"}, {"click"}),
    "cli.group": ({"graphs.errors"}, {"click"}),
    "cli": ({"", "commands.*"}, {"click"}),
    "__main__": ({"cli"}, set()),
    "": (set(), set()),
}


def sources() -> dict[str, Path]:
    """Every module of the package by its name below ``visistage``; "" is the root."""
    found = {}
    for file in [*ROOT.glob("*.py"), *(f for p in PACKAGES for f in (ROOT / p).rglob("*.py"))]:
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = sources()


def rule_of(module: str) -> tuple[set[str], set[str]]:
    package = module.split(".")[0] + ".*"
    return RULES[module] if module in RULES else RULES[package]


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """What ``source``, standing at ``module``, imports against the rules; anywhere in the file."""
    own, libraries = rule_of(module)
    wrong = []
    for node in ast.walk(ast.parse(source)):
        for name, ours in _imported(node, module, is_package):
            if not ours:
                library = name.split(".")[0]
                allowed = library in libraries or library in sys.stdlib_module_names
                allowed = allowed and library not in ("visistage", *PACKAGES)
            else:
                allowed = name in own or name.split(".")[0] + ".*" in own or "*" in own
            if not allowed:
                wrong.append(f"{module or 'visistage'}:{node.lineno} imports {name or 'the root'}")
    return wrong


def _imported(node: ast.AST, module: str, is_package: bool) -> list[tuple[str, bool]]:
    """(name, whether it is ours) of what one statement imports."""
    if isinstance(node, ast.Import):
        return [(alias.name, False) for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    if not node.level:
        return [(node.module or "", False)]
    parts = module.split(".") if module else []
    parts = parts[: len(parts) - node.level + is_package]
    parts += (node.module or "").split(".") if node.module else []
    base = ".".join(parts)
    names = []
    for alias in node.names:  # of `from . import plan`, the name is a module
        inner = f"{base}.{alias.name}" if base else alias.name
        names.append((inner if inner in MODULES else base, True))
    return names


@pytest.mark.parametrize("module", sorted(MODULES), ids=lambda name: name or "visistage")
def test_imports_follow_the_rules(module):
    file = MODULES[module]
    source = file.read_text(encoding="utf-8")
    assert not violations(module, source, is_package=file.name == "__init__.py")


def test_every_directory_with_code_is_under_the_rules():
    found = {file.parent.name for file in ROOT.glob("*/__init__.py")} - {"tests"}
    assert found == set(PACKAGES)


def test_the_rules_name_modules_that_exist():
    concrete = {name for name in RULES if not name.endswith(".*")}
    named = {one for own, _ in RULES.values() for one in own if not one.endswith("*")}
    assert concrete | named <= set(MODULES)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("runtime.session", "import torch"),
        ("runtime.session", "def f():\n    from transformers import AutoTokenizer"),
        ("runtime.session", "import onnxruntime"),
        ("runtime.session", "from ..compile import build"),
        ("runtime.session", "from ..compile.build import build"),
        ("runtime.session", "from ..graphs.decoder import DecoderStage"),
        ("runtime.session", "from ..graphs import decoder"),
        ("runtime.backends.ort", "import onnx"),
        ("runtime.backends.ort", "import openvino"),
        ("runtime.session", "from ..trt.engines import Engines"),
        ("runtime.device.device_executor", "import cuda.core"),
        ("runtime.device.cuda", "import torch"),
        ("runtime.device.engine_trt", "import tensorrt"),
        ("runtime.text.detokenize", "from .. import demo"),
        ("graphs.plan.plan", "import numpy"),
        ("graphs.plan.plan", "from .rows import Chain"),
        ("graphs.plan.plan", "from ..runtime.answer import Answer"),
        ("graphs.chain.chain", "import torch"),
        ("graphs.modules.decoder", "import transformers"),
        ("graphs.modules.decoder", "import graphs.plan.plan"),
        ("graphs.modules.decoder", "from visistage.graphs.plan.plan import StagePlan"),
        ("calib.evaluate", "from ..runtime.session import Session"),
        ("calib.evaluate", "from ..compile.build import build"),
        ("compile.build", "from ..runtime.session import load"),
        ("compile.build", "import huggingface_hub"),
        ("demo.heldout", "import torch"),
        ("demo.training.train", "from ..graphs.plan import StagePlan"),
        ("cli.show.answer_view", "import torch"),
        ("cli.show.answer_view", "from ..compile.build import build"),
        ("cli.show.answer_view", "import onnxruntime"),
        ("tools.explain.readings", "import torch"),
        ("tools.explain.trace", "from ..runtime.ort import OrtExecutor"),
        ("tools.profile.timing", "from ..runtime.ort import OrtExecutor"),
        ("tools.profile.timing", "import torch"),
        ("tools.estimate.predict", "from ..runtime.session import Session"),
        ("graphs.plan.call_cost", "import numpy"),
        ("cli.asking", "import torch"),
        ("cli", "from .compile.build import build"),
    ],
)
def test_a_planted_violation_is_caught(module, source):
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("runtime.session", "import numpy as np\nfrom ..graphs.rows import Chain\nimport json"),
        ("runtime.session", "from . import cache"),
        ("compile.build", "from .. import __version__\nimport torch"),
        ("calib.evaluate", "from ..runtime import Session"),
        ("graphs.modules.rope", "import torch, transformers"),
    ],
)
def test_what_is_allowed_passes(module, source):
    assert not violations(module, source)


@pytest.mark.parametrize("module", ["runtime", "runtime.session", "runtime.oneshot", "cli"])
def test_importing_loads_nothing_heavy(module):
    heavy = HEAVY if module.startswith("runtime.") else (*HEAVY, "onnxruntime", "numpy")
    code = (
        f"import sys, visistage.{module}\n"
        f"loaded = [name for name in {heavy!r} if name in sys.modules]\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
