"""Weights laid out once as the CPU's kernels want them (oneDNN), which else happens at every call."""

# B batch, C channels, h w height and width, O outputs, I inputs

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from unclip.models.layers import Linear
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
ANY_ROWS, ANY_SIZE = (
    1,
    64,
)  # the kernels ask what they will be given; here the answer makes no difference
PLAIN = ("none", [], "")  # nothing is fused behind the layer


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this PyTorch has oneDNN, with operators that it does not promise to keep, and this CPU the arithmetic."""
    ops = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and all(hasattr(ops, name) for name in OPERATORS)):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported())


def pack(network: nn.Module) -> None:
    """Replaces layers in place, by such as give the same answers (see `PackedUpConv2d`) and save the same tensors.

    For good; the network can then neither be trained nor moved, and is not to be compiled.
    """
    for name, layer in list(network.named_modules()):
        if (kind := _kind(layer)) is not None:
            network.set_submodule(name, kind(layer))


def _kind(layer: nn.Module) -> type[Packed] | None:
    if type(layer) in (nn.Linear, Linear):
        # In float32 the usual library (MKL) is as quick, and its sums have another order.
        return PackedLinear if layer.weight.dtype == torch.bfloat16 else None
    if type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros":
        return None if isinstance(layer.padding, str) else PackedConv2d
    return PackedUpConv2d if type(layer) is UpConv2d else None


class Packed(nn.Module):
    """Stands in for a layer whose weight it keeps in oneDNN's own layout; in its state the weight is as it was."""

    packed: torch.Tensor
    _pack: Callable[[torch.Tensor], torch.Tensor]

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.bias = layer.bias
        self.packed = self._pack(layer.weight.detach())

    @property
    def weight(self) -> torch.Tensor:
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
        return {**self.__dict__, "packed": self.weight}  # what is packed can't be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.packed = self._pack(state["packed"])

    def _apply(
        self, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> nn.Module:
        before = torch.empty(1, 1, 1, 1, dtype=self.packed.dtype)
        after = change(before)
        if (after.device, after.dtype) != (before.device, before.dtype):
            raise ValueError(
                "the network is compiled for the CPU and can't be moved or cast; load the model again"
            )
        return self


class PackedLinear(Packed):
    def _pack(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight, ANY_ROWS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, *PLAIN)


class PackedConv2d(Packed):
    def __init__(self, layer: nn.Conv2d) -> None:
        self.__dict__["shape"] = [
            list(layer.padding),
            list(layer.stride),
            list(layer.dilation),
            layer.groups,
        ]
        super().__init__(layer)

    def _pack(self, weight: torch.Tensor) -> torch.Tensor:
        size = [1, weight.shape[1], ANY_SIZE, ANY_SIZE]
        return torch.ops.mkldnn._reorder_convolution_weight(weight, *self.shape, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.packed, self.bias, *self.shape, *PLAIN
        )


class PackedUpConv2d(Packed):
    """Doubling and the 3x3 convolution after it as one transposed convolution, which costs 4/9 of them.

    Where a kernel of 3x3 meets pixels that are equal in pairs, sums of its weights can meet each pixel once. The sums
    are rounded to the network's dtype, so that the answer differs by about as much as that dtype can't tell.
    """

    def __init__(self, layer: UpConv2d) -> None:
        self.__dict__["original"] = layer.weight.detach()
        super().__init__(layer)

    @property
    def weight(self) -> torch.Tensor:
        return self.original

    def _pack(self, weight: torch.Tensor) -> torch.Tensor:
        self.original = weight
        kernel = F.pad(weight.float().flip(2, 3), (1, 1, 1, 1))  # O I 5 5
        kernel = sum(
            kernel[:, :, i : i + 4, j : j + 4] for i in range(2) for j in range(2)
        )  # O I 4 4
        kernel = kernel.transpose(0, 1).to(weight.dtype).contiguous()  # I O 4 4
        size = [1, len(kernel), ANY_SIZE, ANY_SIZE]
        return torch.ops.mkldnn._reorder_convolution_transpose_weight(
            kernel, [1, 1], [0, 0], [2, 2], [1, 1], 1, size
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = ([1, 1], [0, 0], [2, 2], [1, 1], 1)
        return torch.ops.mkldnn._convolution_transpose_pointwise(
            x, self.packed, self.bias, *shape, *PLAIN
        )
