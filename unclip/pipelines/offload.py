"""Offloading: one network in memory at a time; the others wait on the CPU, or on the disk."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unclip.models.cpu.kernels import use_kernels
from unclip.models.unclip.upsampler import Upsampler
from unclip.pipelines.inference import parameter_conversion, prepare_for_inference
from unclip.pipelines.memory import give_back


class Offloader:
    """Keep at most one of several modules on `device`; `use` replaces it by another one.

    On an accelerator the others wait in main memory. On the CPU they wait in files of a temporary
    folder, which is deleted with this object and its copies. Hold `lock` while modules are used.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """dtype: of the parameters; None = unchanged."""
        self.device, self.dtype = device, dtype
        self.lock = threading.RLock()
        self._folder = _Folder(prefix="unclip-offload-") if device.type == "cpu" else None
        self._waiting: dict[nn.Module, InMemory | OnDisk] = {}
        self._here: nn.Module | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, lock=threading.RLock())

    def add(self, module: nn.Module) -> None:
        """Offload a module until `use`, if it is not offloaded already."""
        if module in self._waiting:
            return
        use_kernels(module, self.device)
        if self._folder is None:
            prepare_for_inference(module, self.dtype, self.device)
            self._waiting[module] = InMemory(module, self.device)
        else:
            file = Path(self._folder.name) / str(len(self._waiting))
            self._waiting[module] = OnDisk(module, file, parameter_conversion(module, self.dtype))
            give_back(self.device)

    def use(self, module: nn.Module) -> None:
        """Load a module, and offload the one that was loaded before."""
        if module is self._here or module not in self._waiting:
            return
        if self._here is not None:
            self._waiting[self._here].drop()
            give_back(self.device)
        self._waiting[module].fetch()
        self._here = module


class _Folder(tempfile.TemporaryDirectory[str]):
    """The files of offloaded modules. They do not change, so that copies of a pipeline share them.

    Raises ValueError when it is pickled: another process may outlive the files.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> _Folder:
        return self

    def __reduce__(self) -> Any:
        raise ValueError("an offloaded pipeline cannot be pickled; load the model where it is used")


class InMemory:
    """A module in main memory that `fetch` moves to an accelerator."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module, self.device = module.to("cpu"), device

    def fetch(self) -> None:
        self.module.to(self.device)

    def drop(self) -> None:
        self.module.to("cpu")


class OnDisk:
    """A module whose state is in a file, and in memory after `fetch`."""

    def __init__(self, module: nn.Module, file: Path, convert: Callable[[Tensor], Tensor]) -> None:
        """convert: applied to each parameter in turn, so that little of a file is in memory."""
        self.module, self.file = module, file
        # Name -> first byte, and the tensor without its data
        self.places: dict[str, tuple[int, Tensor]] = {}
        with file.open("wb") as out:
            for name in list(module.state_dict()):
                owner, leaf = self._place(name)
                tensor = getattr(owner, leaf).detach()
                if leaf in owner._parameters:
                    tensor = convert(tensor)
                # "meta" keeps dtype and memory format.
                self.places[name] = out.tell(), tensor.to("meta")
                out.write(_bytes(tensor))
                del tensor
                self._give(name, self.places[name][1])

    def fetch(self) -> None:
        with self.file.open("rb", buffering=0) as source:
            for name, (start, like) in self.places.items():
                tensor = torch.empty_like(like, device="cpu")
                source.seek(start)
                if source.readinto(_bytes(tensor)) < tensor.nbytes:
                    raise OSError(f"{self.file} was truncated while in use; load the model again")
                self._give(name, tensor)

    def drop(self) -> None:
        for name, (_, like) in self.places.items():
            self._give(name, like)

    def _place(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.module.get_submodule(path), leaf

    def _give(self, name: str, tensor: Tensor) -> None:
        owner, leaf = self._place(name)
        if leaf in owner._parameters:
            tensor = nn.Parameter(tensor, requires_grad=False)
        setattr(owner, leaf, tensor)


def _bytes(x: Tensor) -> memoryview:
    """Return the bytes of a dense tensor in memory order."""
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    return x.permute(order).reshape(-1).view(torch.uint8).numpy().data


def parts(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the units that are offloaded separately: modules, and the U-Nets of upsamplers."""
    found: list[nn.Module] = []
    for module in modules:
        if isinstance(module, Upsampler):
            found += [unet for unet in (module.unet, module.last_unet) if unet is not None]
        else:
            found.append(module)
    return found
