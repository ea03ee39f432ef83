"""Packages that only some features need, which pyproject.toml lists as extras of ours."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def import_extra(module: str, extra: str, feature: str) -> Any:
    """Import a package of an extra. Raises ValueError that tells how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(f"{feature} needs {module}: {install(extra)} ({error})") from None


def install(extra: str) -> str:
    """Return the command that installs an extra, of a released package or in a checkout."""
    return f"pip install 'unclip[{extra}]', or '.[{extra}]' in a checkout"
