"""Shared set-up: shapes and dtypes of every public signature are checked while the tests run."""

import pytest
from jaxtyping import config, install_import_hook

install_import_hook("bayesinf", "beartype.beartype")


@pytest.fixture
def unchecked():
    """Without the run-time type checks, as in a user's run: what bad arguments say there."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
