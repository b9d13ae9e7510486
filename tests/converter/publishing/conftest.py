from collections.abc import Iterator

import pytest

from tests.converter.publishing.publishing import ALICE, TOKEN, here
from tests.converter.publishing.writable_hub import WritableHub


@pytest.fixture
def hub(monkeypatch) -> Iterator[WritableHub]:
    """A Hub with the source model, and alice logged in."""
    with here(monkeypatch, {TOKEN: ALICE}) as server:
        yield server
