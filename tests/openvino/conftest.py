"""What several tests of exports share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", params=["pixart", "dit"])
def name(request: pytest.FixtureRequest) -> str:
    """Of an architecture: with a text, and with classes."""
    return request.param
