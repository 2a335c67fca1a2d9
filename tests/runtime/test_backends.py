"""Every back end of the registry keeps the same promises; those that run here give one answer."""

import importlib
import re
from pathlib import Path

import pytest
from visistage.compile.build import make_bundle
from visistage.graphs.errors import TargetError
from visistage.graphs.targets import TARGETS, find_target
from visistage.runtime.backends.backend import Backend, BackendOptions
from visistage.runtime.backends.registry import (
    ASKABLE,
    BACKENDS,
    ROWS,
    BackendRow,
    backend_of,
    find_backend,
)
from visistage.runtime.session import load
from visistage.tests.support import toy
from visistage.tests.support.asking import picture

PLAN = "visipruner:shallow=1,t=1,e=2,keep=4"
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def own_targets(row):
    return [target for target in TARGETS.values() if backend_of(target) is row]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Bundles by target, each built once from one checkpoint."""
    folder, built = tmp_path_factory.mktemp("backends"), {}
    checkpoint = toy.make_checkpoint(folder / "toy", kv_heads=2)

    def get(target):
        if target not in built:
            out = folder / target
            built[target] = make_bundle(str(checkpoint), plan=PLAN, target=target, out=out)
        return built[target]

    return get


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_says_what_it_is(row):
    module = importlib.import_module(row.module, "visistage.runtime.backends")
    assert callable(module.open_bundle)
    assert callable(module.missing)
    assert BACKENDS[row.name] is row
    assert own_targets(row)
    assert all(row.runs(target) for target in own_targets(row))
    assert set(row.options) <= set(BackendOptions.__dataclass_fields__)
    extra = re.search(rf"^{row.extra} = \[", PYPROJECT.read_text(), re.MULTILINE)
    assert row.extra is None or extra


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_says_what_lacks_here(row):
    for target in own_targets(row):
        reasons = row.check(target)
        assert all(isinstance(reason, str) and reason for reason in reasons)
        assert reasons == row.check(target)


def test_a_module_that_cannot_be_imported_is_what_lacks():
    row = BackendRow("nowhere", ".nowhere", "cloud")
    (lacking,) = row.check(find_target("cpu"))
    assert lacking.startswith("nowhere (pip install -e '.[cloud]'")
    assert BackendRow("nowhere", ".nowhere").check(find_target("cpu")) == ["nowhere"]


def test_every_target_has_a_back_end_and_cuda_is_not_asked_for(bundles):
    assert {backend_of(target).name for target in TARGETS.values()} == set(BACKENDS)
    with pytest.raises(TargetError, match=f"unknown back end 'cuda'. Known: {', '.join(ASKABLE)}"):
        find_backend(bundles("cpu"), "cuda", BackendOptions())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_refuses_the_options_that_it_does_not_take(row, bundles, tmp_path):
    bundle = bundles(own_targets(row)[0].name)
    given = {"threads": 2, "memory_limit": 1 << 30, "profile": tmp_path, "capture": True}
    for name, value in given.items():
        options = BackendOptions(**{name: value})
        if name in row.options:
            assert find_backend(bundle, None, options) is row
            continue
        with pytest.raises(TargetError, match=f"--{name.replace('_', '-')} is for ONNX Runtime"):
            find_backend(bundle, None, options)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_back_end_that_runs_here_answers_like_onnx_runtime(row, bundles):
    usable = [target for target in own_targets(row) if not row.check(target)]
    if not usable:
        pytest.skip("; ".join(row.check(own_targets(row)[0])))
    if usable[0].engines:
        pytest.skip("test_gpu compiles engines and runs them")
    bundle = bundles(usable[0].name)
    asked = [(picture(1), "What is it?"), (None, "Hello"), ([picture(2), picture(1)], "Both?")]
    answers = []
    for backend in ("onnxruntime", None):
        with load(bundle.path, backend=backend, threads=1) as session:
            session.eos = frozenset()
            answers.append([session.infer(*one, max_tokens=8).tokens for one in asked])
            promised = {name for name in vars(Backend) if not name.startswith("_")}
            assert promised <= set(dir(session.executor))
    assert answers[0] == answers[1]
    assert len(set(answers[0][0])) > 2
