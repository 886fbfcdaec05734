"""Fixtures for the tests."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def float64(fresh_state: None) -> Iterator[None]:
    """Make float64 the default dtype for one test: for `pytestmark = pytest.mark.usefixtures("float64")`."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def inductor_noise() -> Iterator[None]:
    """Let inductor draw torch's own random numbers, so that its steps can be compared with eager ones."""
    with torch._inductor.config.patch(fallback_random=True):
        yield
