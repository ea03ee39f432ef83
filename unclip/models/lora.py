"""Low-rank adapters (LoRA, 2106.09685): small trained additions to the linear layers of a network.

peft makes the layers and defines the files: adapter_config.json and adapter_model.safetensors. A
new adapter is zero, so that the network's output is unchanged.
"""

# r rank, I and O inputs and outputs of a linear layer

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from unclip.config import DropRate, Positive, PositiveInt, config
from unclip.extras import import_extra
from unclip.files import read_json
from unclip.weights import load_strictly, read_tensors, write_safetensors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of peft's tensor names
TRAINED = "default"  # name of the adapter in training
A, B = ".lora_A.weight", ".lora_B.weight"


@config
class LoRAConfig:
    rank: PositiveInt = 16
    alpha: Positive | None = None  # the addition is scaled by alpha / rank; null: the rank
    dropout: DropRate = 0.0
    targets: tuple[str, ...] | None = None  # ends of layer names, e.g. qkv; null: all linear layers

    @property
    def scale(self) -> float:
        """alpha, or the rank if it is null."""
        return self.rank if self.alpha is None else self.alpha

    def check_continues(self, rank: int, alpha: float, source: str | Path) -> None:
        """Raise ValueError unless the adapter at `source`, of this rank and alpha, keeps both."""
        if (self.rank, self.scale) != (rank, alpha):
            raise ValueError(
                f"lora.rank is {self.rank} and lora.alpha is {self.scale:g}; expected {rank} and "
                f"{alpha:g}, as in {source}"
            )


@dataclass(frozen=True)
class Adapter:
    """A stored adapter: `<layer>.lora_A.weight` (r, I) and `<layer>.lora_B.weight` (O, r)."""

    source: str
    config: Any  # a peft.LoraConfig
    tensors: dict[str, Tensor]

    @property
    def layers(self) -> list[str]:
        return [name.removesuffix(A) for name in self.tensors if name.endswith(A)]

    def misfit(self, network: nn.Module) -> str | None:
        """Return a reason why the adapter does not fit `network`, or None."""
        modules = dict(network.named_modules())
        for name in self.layers:
            layer: Any = modules.get(name)
            layer = layer.get_base_layer() if is_lora(layer) else layer
            if not isinstance(layer, nn.Linear):
                return f"there is no linear layer {name}"
            sizes = self.tensors[name + A].shape[1], self.tensors[name + B].shape[0]
            if sizes != (layer.in_features, layer.out_features):
                expected = layer.in_features, layer.out_features
                return f"{name} has (inputs, outputs) {expected}, the adapter has {sizes}"
        return None


def add_lora(network: nn.Module, config: LoRAConfig) -> None:
    """Add a trainable adapter to `network`, in place, and freeze everything else.

    Layers of subclasses of nn.Linear, which have another purpose, get none. Raises ValueError if
    peft is not installed or no linear layer has one of the given names.
    """
    peft = _peft()
    linear = [name for name, module in network.named_modules() if type(module) is nn.Linear]
    ends = tuple(f".{target}" for target in config.targets or ())
    chosen = [name for name in linear if config.targets is None or f".{name}".endswith(ends)]
    if not chosen:
        raise ValueError(
            f"lora.targets is {list(config.targets or ())}; expected ends of names of linear "
            f"layers, such as {', '.join(linear[:3])}"
        )
    network.requires_grad_(False)
    lora = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.scale,
        lora_dropout=config.dropout,
        target_modules=chosen,
    )
    peft.inject_adapter_in_model(lora, network, TRAINED)


def save_lora(network: nn.Module, folder: str | Path) -> None:
    """Write the adapter that `add_lora` added to `folder`, in peft's layout."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _peft().get_peft_model_state_dict(network, adapter_name=TRAINED)
    named = {f"{PREFIX}{name}": x.detach().cpu().contiguous() for name, x in tensors.items()}
    write_safetensors(named, folder / WEIGHTS_FILE)
    configs: Any = network.peft_config
    config = configs[TRAINED]
    config.target_modules = sorted(config.target_modules)  # a set has no fixed order
    config.save_pretrained(folder)


def read_lora(folder: str | Path) -> Adapter:
    """Read an adapter in peft's layout. Raises ValueError or FileNotFoundError if it is not one.

    Only the scale is used from the config: other settings could change the base weights.
    """
    peft, folder = _peft(), Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"no LoRA in {folder}; expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    data = read_json(folder / CONFIG_FILE)
    if data.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: peft_type is {data.get('peft_type')!r}; expected 'LORA'")
    tensors = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in read_tensors(folder / WEIGHTS_FILE).items()
    }
    names = {name.removesuffix(A).removesuffix(B) for name in tensors}
    expected = {name + end for name in names for end in (A, B)}
    if not tensors or (wrong := expected ^ tensors.keys()):
        found = min(wrong) if tensors else "nothing"
        raise ValueError(
            f"{folder / WEIGHTS_FILE}: {found} has no counterpart; expected pairs of LoRA tensors"
        )
    ranks = {name: len(tensors[name + A]) for name in names}
    r, alpha, scaled = data.get("r"), data.get("lora_alpha"), data.get("use_rslora", False)
    patterns = data.get("rank_pattern") or data.get("alpha_pattern") or data.get("use_dora")
    if patterns or set(ranks.values()) != {r} or type(alpha) not in (int, float):
        raise ValueError(
            f"{folder}: rank {r}, alpha {alpha} and tensors of rank {sorted(set(ranks.values()))}; "
            "expected a plain LoRA of one rank"
        )
    config = peft.LoraConfig(
        r=r, lora_alpha=alpha, use_rslora=bool(scaled), target_modules=sorted(names)
    )
    return Adapter(str(folder), config, tensors)


def load_lora(network: nn.Module, config: LoRAConfig, adapter: Adapter) -> None:
    """Load a stored adapter into the one that `add_lora` added; ValueError if they differ."""
    stored = adapter.config
    alpha = stored.lora_alpha * (stored.r**0.5 if stored.use_rslora else 1)
    config.check_continues(stored.r, alpha, adapter.source)
    tensors = {f"{n.removesuffix('weight')}{TRAINED}.weight": x for n, x in adapter.tensors.items()}
    load_strictly(network, network.state_dict() | tensors, Path(adapter.source) / WEIGHTS_FILE)


def attach(network: nn.Module, adapter: Adapter, name: str, scale: float = 1.0) -> None:
    """Add an adapter's output, times `scale`, to that of its layers, in place.

    `name` identifies it among the adapters of a network. The layers must have its sizes.
    """
    peft = _peft()
    assert adapter.misfit(network) is None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        peft.inject_adapter_in_model(adapter.config, network, name)
    peft.set_peft_model_state_dict(network, adapter.tensors, adapter_name=name)
    for _, layer in lora_layers(network):
        layer.set_adapter(list(layer.lora_A))
        layer.set_scale(name, scale)
    network.requires_grad_(False)


def merge(network: nn.Module, name: str) -> None:
    """Add an attached adapter to the weights themselves, in place, and remove its layers."""
    for _, layer in lora_layers(network):
        if name in layer.lora_A:
            weight = layer.get_base_layer().weight
            weight.data += layer.get_delta_weight(name).to(weight)
    detach(network, name)


def detach(network: nn.Module, name: str) -> None:
    """Remove an attached adapter; without the last one, the network is as it was before."""
    for path, layer in list(lora_layers(network)):
        if name in layer.lora_A:
            layer.delete_adapter(name)
        if not layer.lora_A:
            parent, _, leaf = path.rpartition(".")
            setattr(network.get_submodule(parent), leaf, layer.get_base_layer())
    configs: Any = network.peft_config
    del configs[name]
    if not configs:
        del network.peft_config


def lora_layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """Iterate over the layers that peft made, with their names."""
    return ((name, module) for name, module in network.named_modules() if is_lora(module))


def is_lora(module: Any) -> bool:
    return isinstance(module, _peft().tuners.lora.LoraLayer)


def _peft() -> Any:
    return import_extra("peft", "finetune", "LoRA")
