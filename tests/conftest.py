"""Shared set-up: shapes and dtypes of every public signature are checked while the tests run."""

from jaxtyping import install_import_hook

install_import_hook("bayesinf", "beartype.beartype")
