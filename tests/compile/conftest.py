"""Fixtures for the tests of compiled steps."""

import pytest
import torch


@pytest.fixture
def inductor_noise():
    """Let inductor draw torch's own random numbers, so that its steps can be compared with eager ones."""
    with torch._inductor.config.patch(fallback_random=True):
        yield
