"""Packages that only some uses need, imported when they are."""

import importlib
from typing import Any

__all__ = ["need"]


def need(name: str) -> Any:
    """The module `name`, of the extra `language`.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise ImportError(f'the package {package} is not installed: pip install "bayesinf[language]"') from error
