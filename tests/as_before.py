"""What commands change for a whole process, put back after each test that runs them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import transformers


@pytest.fixture(autouse=True)
def libraries_as_before() -> Iterator[None]:
    """The commands silence transformers for the whole process, which other tests must not notice."""
    level = transformers.utils.logging.get_verbosity()
    yield
    transformers.utils.logging.set_verbosity(level)
    transformers.utils.logging.enable_progress_bar()
