"""Every benchmark finds what it imports: nothing else of the project runs most of them."""

import importlib
import pkgutil

import pytest
from visistage import bench

MODULES = [m.name for m in pkgutil.walk_packages(bench.__path__, "visistage.bench.")]
COMMANDS = [name for name in MODULES if ".runners." not in name]  # runners have environments


def test_there_are_benchmarks():
    assert "visistage.bench.peers" in COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_imports(name):
    importlib.import_module(name)
