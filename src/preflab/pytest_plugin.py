"""For pytest in other projects: the fixture `conforms`.

    def test_my_dpo(conforms):
        conforms(my_loss, against="dpo", beta=0.1)

It is `llm_bridge.conformance.assert_conforms`, imported when a test asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def conforms() -> Callable[..., Any]:
    """assert_conforms(loss, against="dpo", **parameters): fails with the report and the likely cause."""
    from .llm_bridge.conformance import assert_conforms

    return assert_conforms
