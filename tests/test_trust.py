"""Nothing here turns data into code, and no regular expression of ours is slow on hostile text."""

import ast
import re
import time

import pytest
from visistage.tests.test_layers import MODULES

FORBIDDEN = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
RUNS_CODE = {"eval", "exec", "compile", "__import__"}
HOSTILE = (
    "a",
    "0",
    " ",
    "\n",
    ":",
    "/",
    ".",
    "-",
    "{",
    "%",
    "<",
    "\\",
    "a.",
    "layers.1.",
    "0.",
    "é",
)


def unsafe(source):
    """Return what in ``source`` may run what it reads, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [(node.lineno, name) for name in names if name.split(".")[0] in FORBIDDEN]
        if not isinstance(node, ast.Call):
            continue
        options = {word.arg: ast.unparse(word.value) for word in node.keywords}
        called = ast.unparse(node.func)
        risky = called in RUNS_CODE or called in ("os.system", "yaml.load", "torch.jit.load")
        risky |= called == "torch.load" and options.get("weights_only") != "True"
        risky |= options.get("allow_pickle", "False") != "False"
        risky |= options.get("trust_remote_code", "False") != "False"
        risky |= options.get("shell", "False") != "False"
        found += [(node.lineno, called)] if risky else []
    return found


@pytest.mark.parametrize("module", sorted(MODULES), ids=lambda name: name or "visistage")
def test_data_stays_data(module):
    assert unsafe(MODULES[module].read_text("utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from marshal import loads",
        "import joblib.numpy_pickle",
        "eval(text)",
        "exec(code, {})",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "np.load(file, allow_pickle=True)",
        "yaml.load(text)",
        "subprocess.run(line, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "os.system(line)",
    ],
)
def test_a_planted_way_to_run_data_is_noticed(source):
    assert unsafe(source)


def patterns():
    """Return every constant pattern in the package, and how it is used, by module and line."""
    found = {}
    for module, file in MODULES.items():
        tree = ast.parse(file.read_text("utf-8"))
        used = {}  # methods by the name of a compiled pattern
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                used.setdefault(node.value.id, set()).add(node.attr)
        names = {
            id(node.value): node.targets[0].id
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("re."):
                first, way = node.args[0], ast.unparse(node.func).removeprefix("re.")
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    ways = used.get(names.get(id(node)), {"search"}) if way == "compile" else {way}
                    found[f"{module}:{node.lineno}"] = first.value, ways
    return found


PATTERNS = patterns()


def slowest(pattern, ways, size=100_000):
    """Return the most seconds that it takes on so many characters of one thing."""
    worst, made = 0.0, re.compile(pattern)
    whole = ways <= {"match", "fullmatch", "pattern"}
    for unit in HOSTILE:
        text = unit * (size // len(unit))
        for call in (made.match, made.fullmatch) if whole else (made.search,):
            start = time.process_time()
            call(text)
            worst = max(worst, time.process_time() - start)
    return worst


@pytest.mark.parametrize("at", PATTERNS)
def test_no_pattern_is_slow_on_hostile_text(at):
    """20 kB first: a quadratic one shows there, and would take a minute for 100 kB."""
    pattern, ways = PATTERNS[at]
    assert slowest(pattern, ways, 20_000) < 0.05
    assert slowest(pattern, ways) < 0.3


def test_patterns_are_found_and_a_slow_one_is_noticed():
    assert len(PATTERNS) > 10
    assert slowest(r":[^}]*\{", {"search"}, 20_000) > 0.05  # seconds for 100 kB
