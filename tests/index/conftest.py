"""Both implementations of the block index; every contract test runs on each."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvindex.index.native import NativeIndex
from kvindex.index.protocol import BlockIndex
from kvindex.index.reference import ReferenceIndex

Make = Callable[..., BlockIndex]


@pytest.fixture(params=[ReferenceIndex, NativeIndex], ids=["reference", "native"])
def make(request: pytest.FixtureRequest) -> Make:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def index(make: Make) -> BlockIndex:
    return make()
