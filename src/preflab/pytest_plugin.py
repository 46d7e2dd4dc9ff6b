"""For pytest in other projects: the fixture `conforms`.

    def test_my_dpo(conforms):
        conforms(my_loss, against="dpo", beta=0.1)

    def test_my_trainer(conforms):
        conforms(MyAdapter, levels=(2, 3))

It is `llm_bridge.conformance.assert_conforms` for a loss and `assert_trainer_conforms` for the adapter of a whole
trainer, imported when a test asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def conforms() -> Callable[..., Any]:
    """conforms(loss or adapter, **options): fails with the report and the likely cause."""
    from .llm_bridge.conformance import assert_conforms, assert_trainer_conforms, is_whole

    def held(trainer: Any, **options: Any) -> Any:
        return (assert_trainer_conforms if is_whole(trainer) else assert_conforms)(trainer, **options)

    return held
