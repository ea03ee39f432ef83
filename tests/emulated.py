"""A CUDA device without a GPU: tensors that claim to be on it and are computed on the CPU.

`FakeTensorMode` checks single networks here (`fake_networks`), but not samplers: they read values
(`.item()`, comparisons of images, tables on the CPU), which fake tensors do not have. Inside
`emulated_device` every tensor has values, so each pipeline runs to its end, and every operation
checks the rules of a real device: all tensors on one device (except 0-dimensional ones and indices
on the CPU), generators on the device that they fill, no NumPy access, and no mixed dtypes (which
the CPU kernels check themselves).

Autograd's engine needs the streams of a real accelerator, so training steps run the same emulation
under the name of the `meta` device, which has none.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

# diffusers uses torch.Generator in annotations, and must be imported before it is replaced.
import diffusers.schedulers.scheduling_dpmsolver_multistep  # noqa: F401
import diffusers.schedulers.scheduling_unipc_multistep  # noqa: F401
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Operations that accept tensors of two devices.
TRANSFERS = {aten._to_copy.default, aten.copy_.default, aten.index.Tensor, aten.index_put.default}
TRANSFERS |= {aten.index_put_.default}


HAS_GPU = torch.cuda.is_available()


class DeviceMismatch(RuntimeError):
    pass


class Emulated(torch.Tensor):
    """A tensor with a claimed device and an inner CPU tensor that holds its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> Emulated:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        tensor.inner = inner
        return tensor

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Emulated({tuple(self.shape)}, {self.dtype}, {self.device})"

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, new: Emulated) -> None:
        torch.Tensor.data.__set__(self, new)
        self.inner = new.inner

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"can't convert a tensor on {self.device} to numpy; use .cpu()")

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was called outside of `emulated_device`")


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to what an operation's arguments or results contain: they nest sequences."""
    if isinstance(value, (tuple, list)):
        return type(value)([map_leaves(function, x) for x in value])
    return function(value)


def leaves_of(args: Any, kwargs: dict[str, Any]) -> list[Any]:
    leaves: list[Any] = []
    map_leaves(leaves.append, [*args, *kwargs.values()])
    return leaves


def run(func: Any, args: Any, kwargs: dict[str, Any], leaves: list[Any]) -> Any:
    """Check the devices of an operation, run it on the inner tensors and wrap its results."""
    ours = [x for x in leaves if isinstance(x, Emulated)]
    plain = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, Emulated)]
    target = kwargs.get("device")
    target = torch.device(target) if target is not None else None
    claimed = target if target is not None else ours[0].device if ours else torch.device("cpu")
    if ours and func not in TRANSFERS and (found := [x for x in plain if x.dim() > 0]):
        shapes = [tuple(x.shape) for x in found]
        raise DeviceMismatch(f"{func}: tensors on {ours[0].device} and on cpu, of shapes {shapes}")
    if (generator := kwargs.get("generator")) is not None:
        generator_is_ours = generator._cdata in Generator.instances
        if generator_is_ours == (claimed.type == "cpu"):
            raise DeviceMismatch(f"{func}: a generator of another device than {claimed}")
    if func is aten.copy_.default and not isinstance(args[0], Emulated):
        claimed = torch.device("cpu")  # the destination decides
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}

    def inner(x: Any) -> Any:
        return x.inner if isinstance(x, Emulated) else x

    out = func(
        *map_leaves(inner, args), **{name: map_leaves(inner, x) for name, x in kwargs.items()}
    )
    if func._schema.is_mutable and args and isinstance(out, torch.Tensor):
        return args[0]
    if claimed.type == "cpu":
        return out
    return map_leaves(lambda x: Emulated(x, claimed) if isinstance(x, torch.Tensor) else x, out)


class _Factories(TorchDispatchMode):
    """Run every operation that involves the emulated device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.emulated = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (aten.pin_memory.default, aten._pin_memory.default):
            return args[0]
        leaves = leaves_of(args, kwargs)
        # A device without an index takes it from the guard, which is that of `meta`.
        names = {self.emulated.type, "meta"}
        on_device = any(isinstance(x, torch.device) and x.type in names for x in leaves)
        if not on_device and not any(isinstance(x, Emulated) for x in leaves):
            return func(*args, **kwargs)
        if func._can_decompose():  # in inference mode, composite operations arrive whole
            with self:
                if (out := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return out
        if on_device:
            kwargs = {**kwargs, "device": self.emulated}
        return run(func, args, kwargs, leaves)


class Generator(torch.Generator):
    """A generator that claims the emulated CUDA device."""

    device = torch.device("cuda:0")  # type: ignore[assignment]
    instances: set[int] = set()

    def __init__(self, device: Any = "cuda:0") -> None:
        if torch.device(device).type == "cuda":
            self.instances.add(self._cdata)

    def __new__(cls, device: Any = "cuda:0") -> Generator:
        return super().__new__(cls)


def _generator(device: Any = "cpu") -> torch.Generator:
    is_cpu = torch.device(device).type == "cpu"
    return _CPUGenerator() if is_cpu else Generator(device)


def _tensor(data: Any, *, dtype: Any = None, device: Any = None, **options: Any) -> torch.Tensor:
    """`torch.tensor`, whose values are lost on `meta`."""
    return _cpu_tensor(data, dtype=dtype, **options).to(device or "cpu")


def _autocast(device_type: str, *args: Any, **options: Any) -> Any:
    """`torch.autocast`, which does not support `meta`."""
    return _supported_autocast("cpu" if device_type == "meta" else device_type, *args, **options)


_CPUGenerator, _cpu_tensor, _supported_autocast = torch.Generator, torch.tensor, torch.autocast


def _register_cuda_guard() -> None:
    """Give a CPU build of torch a device guard for CUDA that does nothing, as `meta` has.

    A CUDA build without a GPU gets its guard from `_ensureCUDADeviceGuardSet`.
    """
    torch._C._ensureCUDADeviceGuardSet()
    c10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 32).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # c10::DeviceType
    if not guards[cuda]:
        register = c10[
            "_ZN3c104impl19registerDeviceGuardENS_10DeviceTypeEPKNS0_24DeviceGuardImplInterfaceE"
        ]
        register.argtypes, register.restype = [ctypes.c_int8, ctypes.c_void_p], None
        register(cuda, guards[meta])


@contextlib.contextmanager
def emulated_device(name: str = "cuda:0") -> Iterator[torch.device]:
    """Emulate the device `name` ("cuda:0" or "meta"); with a GPU, use that instead."""
    if HAS_GPU:
        with torch.backends.cudnn.flags(allow_tf32=False):
            yield torch.device("cuda:0")
        return
    device = torch.device(name)
    if device.type == "cuda":
        _register_cuda_guard()
    lift_only_cpu = torch._C._only_lift_cpu_tensors()
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # in `Module.to`
    torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device=) is intercepted
    try:
        with (
            mock.patch.multiple(
                torch.cuda,
                _lazy_init=lambda: None,
                is_available=lambda: True,
                device_count=lambda: 1,
            ),
            # Views of normal tensors cannot be wrapped in inference mode.
            mock.patch.object(
                torch._C,
                "_InferenceMode",
                lambda mode: torch.no_grad() if mode else torch.enable_grad(),
            ),
            mock.patch.multiple(torch, Generator=_generator, tensor=_tensor, autocast=_autocast),
            _Factories(device),
        ):
            yield device
    finally:
        torch._C._set_only_lift_cpu_tensors(lift_only_cpu)
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)


@contextlib.contextmanager
def fake_networks(*networks: nn.Module) -> Iterator[torch.device]:
    """Put networks on a fake CUDA device, under torch's own `FakeTensorMode`."""
    _register_cuda_guard()
    device = torch.device("cuda:0")
    with FakeTensorMode(allow_non_fake_inputs=False), torch.no_grad():
        for module in (part for network in networks for part in network.modules()):
            for table in (module._parameters, module._buffers):
                for name, x in table.items():
                    if x is not None:
                        fake = torch.empty(x.shape, dtype=x.dtype, device=device)
                        is_parameter = isinstance(x, nn.Parameter)
                        table[name] = nn.Parameter(fake, False) if is_parameter else fake
        yield device
