"""The searches that most of these tests look at, made once."""

from __future__ import annotations

import pytest
from seed_searches import run


@pytest.fixture(scope="session")
def results():
    return run()
