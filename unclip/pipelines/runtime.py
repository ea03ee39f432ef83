"""The runtime of networks: device, dtype, offloading, compilation, int8 weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from unclip.models.codecs.codec import ImageCodec
from unclip.models.cpu import int8
from unclip.pipelines import memory
from unclip.pipelines.inference import prepare_for_inference
from unclip.pipelines.offload import Offloader, parts

F = TypeVar("F", bound=Callable[..., Any])
V = TypeVar("V")


@contextlib.contextmanager
def torch_defaults() -> Iterator[None]:
    """Ignore the caller's autocast, default device and default dtype, which would change images."""
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if (dtype := torch.get_default_dtype()) != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        yield


class Runtime:
    """The networks of a pipeline and their placement. Call `use` before running a network."""

    def __init__(self, networks: dict[str, nn.Module], offloader: Offloader | None = None) -> None:
        """networks: by stage name or "clip"; the last one determines device and dtype."""
        self.networks, self.offloader = networks, offloader
        self.static_shapes = False  # pad all texts to the same length, for compiled networks
        quantized = any(int8.is_quantized(network) for network in networks.values())
        self.quantized = "int8" if quantized else None  # None: weights are as they were trained
        self._prepare: Callable[[nn.Module], None] | None = None  # see `prepare`
        self._cache: dict[str, tuple[Any, Any]] = {}
        for network in networks.values():
            prepare_for_inference(network, device=offloader.device if offloader else None)

    @property
    def device(self) -> torch.device:
        """The device on which the networks run."""
        return self._parameter.device if self.offloader is None else self.offloader.device

    @property
    def dtype(self) -> torch.dtype:
        return self._parameter.dtype

    @property
    def _parameter(self) -> nn.Parameter:
        *_, network = self.networks.values()
        return next(network.parameters())

    @property
    def offloaded(self) -> bool:
        return self.offloader is not None

    @property
    def compiled(self) -> bool:
        return self._prepare is not None

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Move all networks. A small CLIP and statistics stay in float32."""
        self.check_unmodified("to()")
        self._cache.clear()
        device = None if device is None else find_device(device)
        for network in self.networks.values():
            prepare_for_inference(network.to(device=device), dtype)

    def offload(self, device: torch.device | str | None = None) -> None:
        """Keep one network in memory at a time; see `Offloader`."""
        if self.compiled:
            raise ValueError("the networks are compiled and cannot be moved; use one or the other")
        device = find_device(self.device if device is None else device)
        if self.offloader is None:
            self.offloader = Offloader(device)
            for part in parts(self.networks.values()):
                self.offloader.add(part)
        elif device != self.device:
            raise ValueError(f"the networks are offloaded already, to compute on {self.device}")

    def quantize(self, kind: str = "int8") -> None:
        """Round weights to 8 bits, except those of CLIP and codecs."""
        if kind != "int8":
            raise ValueError(f"unknown kind of weights {kind!r}; expected 'int8'")
        self.check_unmodified("quantize()")
        for name, network in self.networks.items():
            if name != "clip" and not isinstance(network, ImageCodec):
                int8.quantize(network)
                self.quantized = kind

    def prepare(self, prepare: Callable[[nn.Module], None]) -> None:
        """Apply `prepare` to all networks but CLIP, and to those that are added later."""
        for name, network in self.networks.items():
            if name != "clip":
                prepare(network)
        self._prepare = prepare

    def add(self, name: str, network: nn.Module) -> None:
        """Add or replace a network; it is cast, moved, quantized, offloaded or compiled too."""
        dtype, device = self.dtype, self.device
        prepare_for_inference(network, dtype, device)
        self._cache.clear()
        if self.quantized:
            int8.quantize(network)
        if self.offloader is not None:
            self.offloader.add(network)
        else:
            network.to(device)
            if self._prepare is not None:
                self._prepare(network)
        first = {key: self.networks[key] for key in ("clip",) if key in self.networks}
        self.networks = {**first, name: network, **self.networks} | {name: network}

    def refresh(self, network: nn.Module) -> None:
        """Prepare a network again after its layers were changed in place."""
        prepare_for_inference(network.to(self.device), self.dtype, self.device)
        self._cache.clear()

    def use(self, module: nn.Module) -> None:
        """Load a network, or a U-Net of an upsampler, onto the device if it is offloaded."""
        if self.offloader is not None:
            self.offloader.use(module)

    def exclusive(self) -> contextlib.AbstractContextManager[Any]:
        """Let one thread at a time run the networks if they are offloaded."""
        return contextlib.nullcontext() if self.offloader is None else self.offloader.lock

    def bind(self, function: F, module: nn.Module) -> F:
        """Return `function`, with `use(module)` before each call if networks are offloaded."""
        if self.offloader is None:
            return function

        def call(*args: Any, **kwargs: Any) -> Any:
            self.use(module)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    def cached(self, name: str, modules: Sequence[nn.Module], compute: Callable[[], V]) -> V:
        """Return compute(), kept across calls until the weights of `modules` change."""
        versions = [module if self.offloader else _versions(module) for module in modules]
        if name not in self._cache or self._cache[name][0] != versions:
            self._cache[name] = versions, compute()
        return self._cache[name][1]

    def memory(self) -> contextlib.AbstractContextManager[None]:
        """Keep freed memory for the next step if that is enabled, unless offloaded."""
        reuse = memory.enabled and not self.offloaded
        return memory.kept_memory(self.device) if reuse else contextlib.nullcontext()

    def check_unmodified(self, call: str) -> None:
        """Raise ValueError if networks are offloaded or compiled, and so cannot be changed."""
        if self.offloaded:
            raise ValueError(f"the networks are offloaded; call {call} before offload()")
        if self.compiled:
            raise ValueError(f"the networks are compiled; call {call} before unclip.compile()")

    def check_saveable(self) -> None:
        """Raise ValueError unless all weights are in memory and as they were trained."""
        if self.offloaded:
            raise ValueError("the networks are offloaded; save a model before offload()")
        if self.quantized:
            raise ValueError("the weights are rounded to 8 bits; save a model before quantize()")


def _versions(module: nn.Module) -> list[tuple[int, int]]:
    """Return a list that changes whenever the weights change, except through `.data`."""
    tensors = (*module.parameters(), *module.buffers())
    return [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]


def find_device(device: torch.device | str | None = None) -> torch.device:
    """Return the device asked for, or the fastest one. ValueError if it does not exist."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device is None:
        return torch.device(next(name for name, there in available.items() if there))
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"unknown device {device!r}; expected cpu, cuda, cuda:1 or mps") from None
    exists = available.get(found.type, False)
    if found.type == "cuda":
        exists = exists and (found.index or 0) < torch.cuda.device_count()
    if not exists:
        names = ", ".join(name for name, there in available.items() if there)
        raise ValueError(f"device {device} is not available; available: {names}")
    return found


def default_dtype(device: torch.device) -> torch.dtype:
    """Return half precision where it is fast: bfloat16, or float16, whose range is smaller."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
