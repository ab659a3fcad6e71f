"""Every test runs without Flower's telemetry, in a Flower home and a data cache of its own, on one PyTorch thread."""

import os
import signal

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import logging

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("fedwsa", deadline=None)  # how long an example takes is the machine's affair
hypothesis.settings.load_profile("fedwsa")


@pytest.fixture(autouse=True, scope="session")
def _quiet_flower(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["FLWR_HOME"] = str(tmp_path_factory.mktemp("flwr"))
    logging.getLogger("flwr").setLevel(logging.WARNING)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["FEDWSA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    """A shell has what it starts in the background ignore Ctrl-C, and so would every command that a test starts."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
