"""One set of gloo processes for each test module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gloo_ranks import Ranks


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    made = Ranks(4)
    yield made
    made.close()
