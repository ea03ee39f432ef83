"""Old names that keep working for one release, with a DeprecationWarning that names the new one."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def renamed_fields(**new_names: str) -> Callable[[type[T]], type[T]]:
    """Accept the old names of a dataclass's fields: `@renamed_fields(old="new")`.

    The constructor and attribute access warn. Files with the old keys load silently.
    """

    def wrap(cls: type[T]) -> type[T]:
        init: Any = cls.__init__

        @functools.wraps(init)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            for old in new_names.keys() & kwargs.keys():
                _warn(f"{cls.__name__}({old}=...)", f"{cls.__name__}({new_names[old]}=...)")
            init(self, *args, **rename(kwargs))

        def rename(data: Any) -> Any:
            if not isinstance(data, dict):
                return data
            return {new_names.get(key, key): value for key, value in data.items()}

        def schema(source: Any, handler: Callable[[Any], Any]) -> Any:
            from pydantic_core import core_schema

            return core_schema.no_info_before_validator_function(rename, handler(source))

        def old_attribute(old: str, new: str) -> property:
            def get(self: Any) -> Any:
                _warn(f"{cls.__name__}.{old}", f"{cls.__name__}.{new}")
                return getattr(self, new)

            return property(get)

        cls.__init__ = __init__
        cls.__get_pydantic_core_schema__ = staticmethod(schema)  # type: ignore[attr-defined]
        for old, new in new_names.items():
            setattr(cls, old, old_attribute(old, new))
        return cls

    return wrap


def _warn(old: str, new: str) -> None:
    warnings.warn(
        f"{old} is deprecated and will be removed in the next release; use {new}",
        DeprecationWarning,
        stacklevel=3,
    )
