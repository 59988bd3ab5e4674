"""The toy world, trained once a session."""

import pytest
import torch

from tests.training.letters import World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    return World(tmp_path_factory.mktemp("letters"))
