"""What DALL-E's code-by-code drawing is compared with, on the weights of ours."""

# B rows, n pictures, m codes drawn so far, N codes of a picture, L text tokens, K codes of the codec, C width, H heads,
# d width of a head

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
from unclip.models.dalle.sampling import draw_code, guide
from unclip.models.dalle.transformer import DALLE, DALLEConfig
from unclip.models.published.bart_dalle import BartDALLE, CrossAttention, GatedMLP, SelfAttention
from unclip.types import CodeOptions, OnStep

DALLE_PYTORCH = (
    "dalle-pytorch axial-positional-embedding rotary-embedding-torch"  # pip install --no-deps
)
NEEDLESS = {  # that DALLE-pytorch imports for codecs which are not used here, and for its own version
    "omegaconf": ("OmegaConf",),
    "taming.models.vqgan": ("VQModel", "GumbelVQ"),
    "requests": (),
    "pkg_resources": ("get_distribution",),
}
FILTER = 0.5  # fraction of the logits that it leaves out, its default


class DallePytorch:
    """DALLE-pytorch's transformer, of which every tensor is shared with ours."""

    def __init__(self, ours: DALLE) -> None:
        self.package = import_dalle_pytorch()
        config, dtype, device = ours.config, ours.start.dtype, ours.start.device
        codec = self.package.DiscreteVAE(
            image_size=8 * config.grid[0],
            num_layers=3,
            num_tokens=config.image_vocab,
            codebook_dim=8,
            hidden_dim=8,
        )
        sizes = {
            "dim": config.width,
            "depth": config.depth,
            "heads": config.heads,
            "dim_head": config.head_dim,
        }
        text = {"num_text_tokens": config.text_vocab, "text_seq_len": config.context_length}
        self.network = (
            self.package.DALLE(vae=codec, **sizes, **text)
            .to(device, dtype)
            .eval()
            .requires_grad_(False)
        )
        state = {
            name: x for name, x in self.network.state_dict().items() if not name.startswith("vae.")
        }
        there = export_state(ours.state_dict(), rules(config))
        given = {
            name: there[plain]
            for name, plain in _by_plain_name(state, config).items()
            if plain in there
        }
        assert len(given) == len(there)
        self.network.load_state_dict(given, strict=False, assign=True)

    def logits(self, tokens: Tensor, codes: Tensor) -> Tensor:
        """Text (B, L) and codes (B, m) -> logits of the next code (B, K)."""
        return self.network(tokens, codes)[:, -1, self.network.num_text_tokens :]

    def draw(self, tokens: Tensor, codes: Tensor) -> Tensor:
        """The next code (B,), as its `generate_images` draws one without guidance: nothing is kept from the last."""
        logits = self.network(tokens, codes)[:, -1]
        drawn = self.package.gumbel_sample(
            self.package.top_k(logits, thres=FILTER), temperature=1.0, dim=-1
        )
        return drawn - self.network.num_text_tokens


def _by_plain_name(state: dict[str, Tensor], config: DALLEConfig) -> dict[str, str]:
    return dict(zip(state, plain_names(state, config), strict=True))


def import_dalle_pytorch() -> ModuleType:
    """The module with its transformer; ValueError if it is not installed, of its requirements only some are needed."""
    try:
        with _in_place_of(NEEDLESS):
            return importlib.import_module("dalle_pytorch.dalle_pytorch")
    except ImportError as error:
        raise ValueError(
            f"DALLE-pytorch is not here ({error}); pip install --no-deps {DALLE_PYTORCH}"
        ) from None


@contextlib.contextmanager
def _in_place_of(modules: dict[str, Sequence[str]]) -> Iterator[None]:
    """Lets those that are not installed be imported, as empty ones."""
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
    """A decoder like DALL-E mega's with the usual cache, of its own keys and values only.

    Those of the text are computed anew for every code, and all N places are attended to, as in min-dalle.
    """

    def __init__(self, ours: BartDALLE) -> None:
        self.ours = ours

    @torch.inference_mode()
    def draw(
        self,
        tokens: Tensor,
        generators: Sequence[torch.Generator],
        options: CodeOptions,
        on_step: OnStep,
    ) -> Tensor:
        """Pictures of one text (1, L), guided, a generator for each -> their codes (n, N)."""
        n, N = len(generators), self.ours.config.num_codes
        uniform = torch.stack([torch.rand(N, generator=g) for g in generators]).to(tokens.device)
        states, mask = self.read(torch.cat([tokens, self.ours.null_tokens(1)]))
        states, mask = (x.repeat_interleave(n, dim=0) for x in (states, mask))
        cache, last = self.start(states), None
        codes = torch.empty(n, N, dtype=torch.long, device=tokens.device)
        for place in range(N):
            logits = guide(self.step(last, place, cache, states, mask), options.guidance)
            codes[:, place] = draw_code(logits, uniform[:, place], options)
            last = codes[:, place].repeat(2)
            on_step(None)
        return codes

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Texts (B, L) -> what the encoder says of them (B, L, C), and where they are no padding (B, 1, 1, L)."""
        return self.ours.encode(tokens), (tokens != self.ours.config.pad_id)[:, None, None]

    def start(self, states: Tensor) -> Tensor:
        """Room for keys and values, (layers, 2, B, N, C)."""
        config = self.ours.config
        return states.new_zeros(
            config.decoder_depth, 2, len(states), config.num_codes, config.width
        )

    def step(
        self, codes: Tensor | None, place: int, cache: Tensor, states: Tensor, mask: Tensor
    ) -> Tensor:
        """The code (B,) before `place`, none before 0 -> logits of the code at `place` (B, K)."""
        ours = self.ours
        emb = ours.start.expand(cache.shape[2], -1) if codes is None else ours.code_emb(codes)
        x = ours.code_norm(emb + ours.code_positions.weight[place])[:, None]  # B 1 C
        seen = (torch.arange(cache.shape[3], device=x.device) <= place)[None, None, None]  # 1 1 1 N
        for layer, kept in zip(ours.decoder, cache, strict=True):
            x = x + self._itself(layer.attention, x, kept, place, seen)
            x = x + self._text(layer.cross, x, states, mask)
            x = x + self._mlp(layer.mlp, x)
        return ours.code_head(ours.decoder_norm(x))[:, 0]

    def _itself(
        self, part: SelfAttention, x: Tensor, kept: Tensor, place: int, seen: Tensor
    ) -> Tensor:
        h = part.norm(x)
        q, k, v = (F.linear(h, weight) for weight in part.qkv.weight.chunk(3))
        kept[0, :, place], kept[1, :, place] = k[:, 0], v[:, 0]
        return _attended(part, q, kept[0], kept[1], seen)

    def _text(self, part: CrossAttention, x: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        k, v = (F.linear(states, weight) for weight in part.kv.weight.chunk(2))
        return _attended(part, part.q(part.norm(x)), k, v, mask)

    def _mlp(self, part: GatedMLP, x: Tensor) -> Tensor:
        h = part.norm(x)
        gate, value = (F.linear(h, weight) for weight in part.fc1.weight.chunk(2))
        return part.fc2(part.norm_in(F.gelu(gate) * value))


def _attended(part: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Queries (B, 1, C), keys and values (B, n, C) -> what the branch adds (B, 1, C)."""
    q, k, v = (y.unflatten(-1, (part.heads, -1)).transpose(1, 2) for y in (q, k, v))  # B H n d
    out: Tensor = part.norm_out(
        part.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
    )
    return out
