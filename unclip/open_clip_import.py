"""A fast import of open_clip: timm, transformers and torch._dynamo follow when they are used."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import sys
import threading
from collections.abc import Iterator
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import nn

_completing = threading.RLock()


def import_open_clip() -> Any:
    """Return open_clip, imported without the packages that take most of the time of its import.

    timm and transformers are imported when one of their towers is made. If open_clip is imported
    already, it stays as it is. Raises ImportError if torchvision does not fit torch.
    """
    is_first = "open_clip" not in sys.modules
    try:
        with _slow_imports_left_out():
            open_clip = _import()
    except ImportError:  # a version of torchvision or open_clip that needs more of them
        open_clip = _import()
    if is_first:
        for module in (open_clip.timm_model, open_clip.hf_model, open_clip.coca_model):
            _postpone(module)
    return open_clip


def _import() -> Any:
    """Import open_clip, which needs torchvision for its image transforms.

    pip may pair a CPU build of torch with a torchvision that was compiled for CUDA, whose import
    fails because its operators cannot be loaded. The transforms use no operator, so a declaration
    without an implementation is enough. Any other mismatch raises one ImportError.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        fault = f"the installed torchvision does not fit torch {torch.__version__} ({error})"
        try:
            for name in ("nms", "qnms"):
                torch.library.define(f"torchvision::{name}", "(Tensor x) -> Tensor")
            import torchvision  # noqa: F401
        except RuntimeError:
            raise ImportError(f"{fault}; install both as pytorch.org describes") from None
    import open_clip

    return open_clip


@contextlib.contextmanager
def _slow_imports_left_out() -> Iterator[None]:
    """Import none of three packages that take most of the time of open_clip's import.

    timm and transformers are needed for their own towers alone, which import them: see
    `_postpone`. torchvision asks torch._dynamo which devices it compiles for, but only when an
    operator runs.
    """

    def is_compile_supported(device: str) -> bool:
        return importlib.import_module("torch._dynamo.utils").is_compile_supported(device)

    dynamo: Any = ModuleType("torch._dynamo.utils")
    dynamo.is_compile_supported = is_compile_supported
    modules: dict[str, Any] = {"timm": None, "transformers": None, dynamo.__name__: dynamo}
    left_out = {name: module for name, module in modules.items() if name not in sys.modules}
    sys.modules.update(left_out)
    try:
        yield
    finally:
        for name in left_out:
            del sys.modules[name]


class _PostponedModule(ModuleType):
    """A module of open_clip that imports timm or transformers when one of their names is read."""

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("__") and name in _optional_imports(self).co_names:
            _complete(self)
        return ModuleType.__getattribute__(self, name)


def _postpone(module: ModuleType) -> None:
    """Let a module whose optional imports failed repeat them when one of its networks is made.

    Its classes stay the same objects, also where other modules have imported them.
    """

    def new(cls: Any, *args: Any, **kwargs: Any) -> Any:  # also called to copy and to unpickle
        _complete(module)
        return object.__new__(cls)

    for value in vars(module).values():
        own = isinstance(value, type) and value.__module__ == module.__name__
        if own and issubclass(value, nn.Module):
            value.__new__ = new
    module.__class__ = _PostponedModule


@functools.cache
def _optional_imports(module: ModuleType) -> CodeType:
    """Compile the `try` statements of a module, in which open_clip imports optional packages."""
    statements = ast.parse(inspect.getsource(module)).body
    tries: list[ast.stmt] = [node for node in statements if isinstance(node, ast.Try)]
    return compile(ast.Module(tries, []), str(module.__file__), "exec")


def _complete(module: ModuleType) -> None:
    """Repeat the optional imports of a module, unless that is done."""
    with _completing:
        if module.__class__ is _PostponedModule:
            with _dynamo_left_out():
                exec(_optional_imports(module), vars(module))
            module.__class__ = ModuleType


@contextlib.contextmanager
def _dynamo_left_out() -> Iterator[None]:
    """Import timm without torch._dynamo, which takes as long as torch.

    timm disables the compilation of some functions at import. Here this is postponed until such a
    function is called after an import of torch._dynamo.
    """
    original = torch.compiler.disable

    def disable(function: Any = None, *args: Any, **options: Any) -> Any:
        if "torch._dynamo" in sys.modules or not inspect.isfunction(function):
            return original(function, *args, **options)

        @functools.wraps(function)
        def disabled(*inputs: Any, **keywords: Any) -> Any:
            if "torch._dynamo" in sys.modules:
                return original(function, *args, **options)(*inputs, **keywords)
            return function(*inputs, **keywords)

        vars(disabled)["_torchdynamo_disable"] = True
        return disabled

    torch.compiler.disable = disable
    try:
        yield
    finally:
        torch.compiler.disable = original
