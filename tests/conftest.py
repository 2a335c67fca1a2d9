"""One thread a process: the tests' tensors are small, and pytest-xdist fills the cores."""

import os

import pytest
import torch
from visistage.tests import browser as headless

torch.set_num_threads(1)
os.environ["VISISTAGE_THREADS"] = "1"  # for the processes that tests start, too


@pytest.fixture(scope="session")
def browser():
    """``tests.browser.look``, where there is a browser."""
    if headless.find() is None:
        pytest.skip(f"no browser: none of {', '.join(headless.NAMES)} is installed")
    return headless.look
