"""Weights packed once into the layout of oneDNN's kernels, instead of at every call."""

# B batch, C channels, h w height and width, O output channels, I input channels

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.models.cpu.kernels import FewRowsLinear
from unclip.models.unet import UpConv2d

OPERATORS = (
    "_is_mkldnn_bf16_supported",
    "_reorder_linear_weight",
    "_linear_pointwise",
    "_reorder_convolution_weight",
    "_convolution_pointwise",
    "_reorder_convolution_transpose_weight",
    "_convolution_transpose_pointwise",
)
ROWS_HINT, SIZE_HINT = 1, 64  # expected input; makes no difference to the layouts here
NOTHING_FUSED = ("none", [], "")


def can_pack(dtype: torch.dtype) -> bool:
    """Return whether PyTorch has the oneDNN operators used here and the CPU supports `dtype`."""
    ops = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and all(hasattr(ops, name) for name in OPERATORS)):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported())


def pack(network: nn.Module) -> None:
    """Replace the layers of a network in place; outputs and state dict stay the same.

    Only `PackedUpConv2d` rounds differently. This is permanent: the network can then not be
    trained, moved, cast or compiled.
    """
    for name, layer in list(network.named_modules()):
        if (packed := _packed_type(layer)) is not None:
            network.set_submodule(name, packed(layer))


def _packed_type(layer: nn.Module) -> Callable[..., PackedLayer] | None:
    if type(layer) in (nn.Linear, FewRowsLinear):
        # In float32, PyTorch's default MKL is as fast, and sums in another order.
        return PackedLinear if layer.weight.dtype == torch.bfloat16 else None
    if type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros":
        return None if isinstance(layer.padding, str) else PackedConv2d
    return PackedUpConv2d if type(layer) is UpConv2d else None


class PackedLayer(nn.Module):
    """Layer with a weight in oneDNN's layout. Its state dict has the original weight."""

    packed: Tensor
    _pack: Callable[[Tensor], Tensor]

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.bias = layer.bias
        self.packed = self._pack(layer.weight.detach())

    @property
    def weight(self) -> Tensor:
        return self.packed.to_dense()

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if (weight := state_dict.pop(f"{prefix}weight", None)) is not None:
            self.packed = self._pack(weight)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": self.weight}  # packed tensors cannot be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.packed = self._pack(state["packed"])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = torch.empty(1, 1, 1, 1, dtype=self.packed.dtype)
        after = fn(before)
        if (after.device, after.dtype) != (before.device, before.dtype):
            raise ValueError(
                "the network is compiled for the CPU and cannot be moved or cast; load it again"
            )
        return self


class PackedLinear(PackedLayer):
    def _pack(self, weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, *NOTHING_FUSED)


class PackedConv2d(PackedLayer):
    shape: list[Any]  # padding, stride, dilation, groups

    def __init__(self, layer: nn.Conv2d) -> None:
        shape = [list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups]
        self.__dict__["shape"] = shape  # `_pack` needs it before nn.Module.__init__
        super().__init__(layer)

    def _pack(self, weight: Tensor) -> Tensor:
        size = [1, weight.shape[1], SIZE_HINT, SIZE_HINT]
        return torch.ops.mkldnn._reorder_convolution_weight(weight, *self.shape, size)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.packed, self.bias, *self.shape, *NOTHING_FUSED
        )


class PackedUpConv2d(PackedLayer):
    """Nearest-neighbour upsampling and a 3x3 convolution as one transposed 4x4 convolution.

    A 3x3 kernel on upsampled pixels multiplies an original pixel by up to four weights; this layer
    multiplies it once by their sum, at 4/9 of the cost. The sums are rounded to the network's
    dtype, so that the output differs by about the precision of that dtype.
    """

    def __init__(self, layer: UpConv2d) -> None:
        self.__dict__["original"] = layer.weight.detach()
        super().__init__(layer)

    @property
    def weight(self) -> Tensor:
        return self.original

    def _pack(self, weight: Tensor) -> Tensor:
        self.original = weight
        kernel = F.pad(weight.float().flip(2, 3), (1, 1, 1, 1))  # O I 5 5
        parts = [kernel[:, :, i : i + 4, j : j + 4] for i in range(2) for j in range(2)]
        kernel = parts[0] + parts[1] + parts[2] + parts[3]  # O I 4 4
        kernel = kernel.transpose(0, 1).to(weight.dtype).contiguous()  # I O 4 4
        size = [1, len(kernel), SIZE_HINT, SIZE_HINT]
        return torch.ops.mkldnn._reorder_convolution_transpose_weight(
            kernel, [1, 1], [0, 0], [2, 2], [1, 1], 1, size
        )

    def forward(self, x: Tensor) -> Tensor:
        shape = ([1, 1], [0, 0], [2, 2], [1, 1], 1)
        return torch.ops.mkldnn._convolution_transpose_pointwise(
            x, self.packed, self.bias, *shape, *NOTHING_FUSED
        )
