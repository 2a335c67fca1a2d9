"""One thread a process: the tests' matrices are small, and pytest-xdist fills the cores.

Threads that wait for each other cost most of the time otherwise: a product of two small matrices
takes OpenBLAS three times as long on cores that somebody else needs, too.
"""

import os
from pathlib import Path

# Before NumPy is imported, and for the processes that tests start, too.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["VISISTAGE_THREADS"] = "1"
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # of tests that import ONNX Runtime themselves

import pytest
import torch
from visistage.tests.support import browser as headless

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _shared_traces(tmp_path_factory):
    """The processes of a run by pytest-xdist, or of a `make test`, share what they trace."""
    folder = os.environ.get("VISISTAGE_TRACES")
    if folder is None and "PYTEST_XDIST_WORKER" not in os.environ:
        return
    from visistage.compile.export import stitch
    from visistage.tests.support.traces import SharedTraces

    # The folders of all processes of one run lie side by side, those of other runs elsewhere.
    beside = tmp_path_factory.getbasetemp().parent / "traces"
    stitch._TRACED = SharedTraces(Path(folder) if folder else beside)


@pytest.fixture(scope="session")
def browser():
    """``tests.support.browser.look``, where there is a browser."""
    if headless.find() is None:
        pytest.skip(f"no browser: none of {', '.join(headless.NAMES)} is installed")
    return headless.look
