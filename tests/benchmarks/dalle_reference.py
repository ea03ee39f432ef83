"""References for DALL-E's sampling of image codes, sharing the weights of our networks."""

# B rows, n images, m codes sampled so far, N codes of an image, L text tokens, K vocabulary,
# C width, H heads, d head width

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.checkpoints.dalle_pytorch import plain_names, rules
from unclip.checkpoints.renaming import export_state
from unclip.models.dalle.sampling import guide, sample_code
from unclip.models.dalle.transformer import DALLE
from unclip.models.published.bart_dalle import BartDALLE, CrossAttention, GatedMLP, SelfAttention
from unclip.types import CodeOptions, OnStep

# Installed with pip install --no-deps.
PACKAGES = "dalle-pytorch axial-positional-embedding rotary-embedding-torch"
UNUSED_MODULES = {  # imported by DALLE-pytorch for codecs that are not used here, and its version
    "omegaconf": ("OmegaConf",),
    "taming.models.vqgan": ("VQModel", "GumbelVQ"),
    "requests": (),
    "pkg_resources": ("get_distribution",),
}
TOP_K_THRESHOLD = 0.5  # fraction of the logits left out, the default of DALLE-pytorch


class DallePytorch:
    """DALLE-pytorch's transformer; every tensor is shared with ours."""

    def __init__(self, ours: DALLE) -> None:
        self.package = import_dalle_pytorch()
        config = ours.config
        codec = self.package.DiscreteVAE(
            image_size=8 * config.grid[0],
            num_layers=3,
            num_tokens=config.image_vocab,
            codebook_dim=8,
            hidden_dim=8,
        )
        network = self.package.DALLE(
            vae=codec,
            dim=config.width,
            depth=config.depth,
            heads=config.heads,
            dim_head=config.head_dim,
            num_text_tokens=config.text_vocab,
            text_seq_len=config.context_length,
        )
        network = network.to(ours.start.device, ours.start.dtype)
        self.network = network.eval().requires_grad_(False)
        state = self.network.state_dict()
        names = [name for name in state if not name.startswith("vae.")]
        plain = plain_names({name: state[name] for name in names}, config)
        shared = export_state(ours.state_dict(), rules(config))
        pairs = zip(names, plain, strict=True)
        given = {name: shared[key] for name, key in pairs if key in shared}
        assert len(given) == len(shared)
        self.network.load_state_dict(given, strict=False, assign=True)

    def logits(self, tokens: Tensor, codes: Tensor) -> Tensor:
        """Text (B, L) and codes (B, m) -> logits of the next code (B, K)."""
        return self.network(tokens, codes)[:, -1, self.network.num_text_tokens :]

    def sample(self, tokens: Tensor, codes: Tensor) -> Tensor:
        """Sample the next code (B,) as `generate_images` does without guidance: without a cache."""
        logits = self.network(tokens, codes)[:, -1]
        logits = self.package.top_k(logits, thres=TOP_K_THRESHOLD)
        sampled = self.package.gumbel_sample(logits, temperature=1.0, dim=-1)
        return sampled - self.network.num_text_tokens


def import_dalle_pytorch() -> ModuleType:
    """Import DALLE-pytorch without the requirements that are not used here.

    Raises ValueError if it is not installed.
    """
    try:
        with _placeholders(UNUSED_MODULES):
            return importlib.import_module("dalle_pytorch.dalle_pytorch")
    except ImportError as error:
        raise ValueError(
            f"DALLE-pytorch is not installed ({error}); pip install --no-deps {PACKAGES}"
        ) from None


@contextlib.contextmanager
def _placeholders(modules: dict[str, Sequence[str]]) -> Iterator[None]:
    """Make modules that are not installed importable, with `object` as each attribute."""
    added: dict[str, ModuleType] = {}
    for name, attributes in modules.items():
        top = name.partition(".")[0]
        if top in sys.modules or importlib.util.find_spec(top) is not None:
            continue
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            added[".".join(parts[:depth])] = ModuleType(".".join(parts[:depth]))
        for attribute in attributes:
            setattr(added[name], attribute, object)
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


class PlainMega:
    """The decoder of DALL-E mega with the usual cache: keys and values of self-attention only.

    As in min-dalle, those of the text are recomputed for every code, and attention covers all N
    positions.
    """

    def __init__(self, ours: BartDALLE) -> None:
        self.ours = ours

    @torch.inference_mode()
    def sample(
        self,
        tokens: Tensor,
        generators: Sequence[torch.Generator],
        options: CodeOptions,
        on_step: OnStep,
    ) -> Tensor:
        """Sample the codes (n, N) of n images of one text (1, L) with guidance."""
        n, N = len(generators), self.ours.config.num_codes
        uniform = torch.stack([torch.rand(N, generator=g) for g in generators]).to(tokens.device)
        states, mask = self.encode(torch.cat([tokens, self.ours.null_tokens(1)]))
        states, mask = (x.repeat_interleave(n, dim=0) for x in (states, mask))
        cache, last = self.start_cache(states), None
        codes = torch.empty(n, N, dtype=torch.long, device=tokens.device)
        for position in range(N):
            logits = guide(self.step(last, position, cache, states, mask), options.guidance)
            codes[:, position] = sample_code(logits, uniform[:, position], options)
            last = codes[:, position].repeat(2)
            on_step(None)
        return codes

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Texts (B, L) -> encoder states (B, L, C) and the mask of real tokens (B, 1, 1, L)."""
        return self.ours.encode(tokens), (tokens != self.ours.config.pad_id)[:, None, None]

    def start_cache(self, states: Tensor) -> Tensor:
        """Allocate keys and values (layers, 2, B, N, C)."""
        config = self.ours.config
        return states.new_zeros(
            config.decoder_depth, 2, len(states), config.num_codes, config.width
        )

    def step(
        self, codes: Tensor | None, position: int, cache: Tensor, states: Tensor, mask: Tensor
    ) -> Tensor:
        """The previous code (B,), None at the start -> logits of the code at a position (B, K)."""
        ours = self.ours
        emb = ours.start.expand(cache.shape[2], -1) if codes is None else ours.code_emb(codes)
        x = ours.code_norm(emb + ours.code_positions.weight[position])[:, None]  # B 1 C
        visible = (torch.arange(cache.shape[3], device=x.device) <= position)[
            None, None, None
        ]  # 1 1 1 N
        for layer, layer_cache in zip(ours.decoder, cache, strict=True):
            x = x + self._self_attention(layer.attention, x, layer_cache, position, visible)
            x = x + self._cross_attention(layer.cross, x, states, mask)
            x = x + self._mlp(layer.mlp, x)
        return ours.code_head(ours.decoder_norm(x))[:, 0]

    def _self_attention(
        self, part: SelfAttention, x: Tensor, layer_cache: Tensor, position: int, visible: Tensor
    ) -> Tensor:
        h = part.norm(x)
        q, k, v = (F.linear(h, weight) for weight in part.qkv.weight.chunk(3))
        layer_cache[0, :, position], layer_cache[1, :, position] = k[:, 0], v[:, 0]
        return _attention(part, q, layer_cache[0], layer_cache[1], visible)

    def _cross_attention(
        self, part: CrossAttention, x: Tensor, states: Tensor, mask: Tensor
    ) -> Tensor:
        k, v = (F.linear(states, weight) for weight in part.kv.weight.chunk(2))
        return _attention(part, part.q(part.norm(x)), k, v, mask)

    def _mlp(self, part: GatedMLP, x: Tensor) -> Tensor:
        h = part.norm(x)
        gate, value = (F.linear(h, weight) for weight in part.fc1.weight.chunk(2))
        return part.fc2(part.norm_in(F.gelu(gate) * value))


def _attention(part: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Queries (B, 1, C), keys and values (B, n, C) -> residual (B, 1, C)."""
    q, k, v = (y.unflatten(-1, (part.heads, -1)).transpose(1, 2) for y in (q, k, v))  # B H n d
    out: Tensor = part.norm_out(
        part.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
    )
    return out
