"""The mode that runs the kernels' own tests on compiled code.

    PTX_CAPABILITY=89 python -m pytest tests/test_symmetric.py tests/test_muon_kernels.py

Compiles every launch for that architecture and executes it in ptx/; a race or another fault fails its test. Tests are
collected as for Triton's interpreter: they use CPU tensors, and none is skipped for want of a GPU.
"""

import os

import pytest

from bench.compiled_launches import CAPABILITIES, compiled_launches, faults_of
from kernels import configs

CAPABILITY = int(os.environ["PTX_CAPABILITY"])
if CAPABILITY not in CAPABILITIES or os.environ.get("TRITON_INTERPRET"):
    raise pytest.UsageError(f"PTX_CAPABILITY is one of {CAPABILITIES}, without TRITON_INTERPRET")
configs.INTERPRETED = True  # while tests are collected: their devices, marks and sizes follow it
executed = {"launches": 0}


def pytest_collection_finish(session):
    configs.INTERPRETED = False


@pytest.fixture(autouse=True)
def on_compiled_code():
    """As on a CPU unless the test asks for the kernels."""
    with compiled_launches(CAPABILITY, everywhere=False) as launches:
        yield
    executed["launches"] += len(launches)
    assert faults_of(launches) == []


def pytest_terminal_summary(terminalreporter):
    if executed["launches"]:  # in this process: workers of pytest-xdist have their own
        terminalreporter.write_line(f"{executed['launches']} launches executed as code for sm_{CAPABILITY}")
