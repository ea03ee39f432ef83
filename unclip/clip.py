"""CLIP over open_clip: the one file that imports it."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from unclip.image_io import resize
from unclip.tokenizer import TOKENIZER_FILE, BPETokenizer, warn_cut
from unclip.types import TextEncoding
from unclip.weights import TensorFile, load_strictly, write_tensors


def _import_open_clip() -> Any:
    """Imports open_clip; where torchvision was built for another torch, its missing operators are declared first.

    A CPU build of torch beside the default torchvision wheel is common, and torchvision then stops at import because
    its compiled operators are absent. None of them is used here, so a declaration without a kernel is enough.
    """
    while True:
        try:
            import open_clip

            return open_clip
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            torch.library.define(f"torchvision::{missing[1]}", "(Tensor x) -> Tensor")
            for name in [n for n in sys.modules if n.split(".")[0] in ("torchvision", "open_clip")]:
                del sys.modules[name]


open_clip = _import_open_clip()

# B batch, L text tokens, W text width, D embedding width, S image size

CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"

NO_TOWER = {
    "layers": 1,
    "width": 64,
    "patch_size": 16,
    "image_size": 16,
}  # built in place of none, and thrown away

Tokenize = Callable[[Sequence[str]], tuple[Tensor, Tensor]]  # B strings -> ids (B, L), mask (B, L)


@dataclass(frozen=True)
class CLIPConfig:
    """open_clip's own two tables, as they stand in its `open_clip_config.json`."""

    model_cfg: dict[
        str, Any
    ]  # embed_dim, vision_cfg (None = no image tower), text_cfg, quick_gelu, custom_text
    preprocess_cfg: dict[str, Any] = field(
        default_factory=dict
    )  # size, mean, std, interpolation, resize_mode

    @property
    def context_length(self) -> int:
        return self.model_cfg["text_cfg"].get("context_length", 77)

    @property
    def plain(self) -> bool:
        """Both towers are open_clip's own, not timm's or transformers'."""
        vision, text = self.model_cfg.get("vision_cfg") or {}, self.model_cfg["text_cfg"]
        return not (vision.get("timm_model_name") or text.get("hf_model_name"))


class OpenCLIPTokenizer:
    """The tokenizer that open_clip's text config asks for, with the mask and the warning that it lacks."""

    def __init__(self, config: CLIPConfig) -> None:
        self.context_length, text_cfg = config.context_length, config.model_cfg["text_cfg"]
        if name := text_cfg.get("hf_tokenizer_name"):
            options = text_cfg.get("tokenizer_kwargs") or {}
            self.tokenizer = open_clip.tokenizer.HFTokenizer(
                name, context_length=self.context_length, **options
            )
        else:
            self.tokenizer = open_clip.tokenizer.SimpleTokenizer(context_length=self.context_length)

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids = self.tokenizer(list(texts))  # (B, L)
        if isinstance(self.tokenizer, open_clip.tokenizer.HFTokenizer):
            return ids, ids != self.tokenizer.tokenizer.pad_token_id
        room = self.context_length - 2
        for text in texts:
            if len(tokens := self.tokenizer.encode(text)) > room:
                warn_cut(text, self.tokenizer.decode(tokens[room:]), self.context_length)
        # CLIP pads with 0, which is also "!": what is real is told by the first end token, never by the id.
        end = (ids == self.tokenizer.eot_token_id).int().argmax(dim=-1, keepdim=True)
        return ids, torch.arange(ids.shape[1]) <= end


class CLIP(nn.Module):
    """An open_clip model with its tokenizer and preprocessing; embeddings are not normalised (CLIP, 2103.00020)."""

    def __init__(self, config: CLIPConfig, tokenizer: Tokenize | None = None) -> None:
        super().__init__()
        model_cfg = dict(config.model_cfg)
        if "multimodal_cfg" in model_cfg:
            raise ValueError(
                "this open_clip configuration is a captioner (multimodal_cfg); expected a plain CLIP"
            )
        custom_text = (
            model_cfg.pop("custom_text", False) or "hf_model_name" in model_cfg["text_cfg"]
        )
        has_images = bool(model_cfg.get("vision_cfg"))
        model_cfg["vision_cfg"] = model_cfg["vision_cfg"] if has_images else NO_TOWER
        self.model = (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**model_cfg)
        if custom_text:
            self.model.text.output_tokens = True  # it returns its states beside the embedding
        self.config = config
        self.tokenizer = tokenizer or OpenCLIPTokenizer(config)
        self.preprocess = open_clip.transform.PreprocessCfg(
            **{"size": self.model.visual.image_size, **config.preprocess_cfg}
        )
        if not has_images:
            self.model.visual = None

    @classmethod
    def from_open_clip(cls, architecture: str, pretrained: str | None = None) -> CLIP:
        """An architecture that open_clip knows, with the weights of a pretrained tag or file (or random ones).

        Weights that were trained with QuickGELU get a model that computes it; the reverse mismatch is refused.
        """
        if (model_cfg := open_clip.get_model_config(architecture)) is None:
            raise ValueError(
                f"unknown open_clip architecture {architecture!r}; open_clip.list_models() lists them"
            )
        tag = (open_clip.get_pretrained_cfg(architecture, pretrained) if pretrained else None) or {}
        if pretrained and not tag and not Path(pretrained).is_file():
            known = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
            raise ValueError(
                f"{architecture} has no pretrained tag or file {pretrained!r}; tags: {known}"
            )
        quick_gelu = model_cfg.get("quick_gelu", False)
        if tag and quick_gelu and not tag.get("quick_gelu", False):
            raise ValueError(
                f"{architecture} computes QuickGELU but {pretrained!r} was trained without it; "
                f"use {architecture.removesuffix('-quickgelu')!r}"
            )
        model_cfg["quick_gelu"] = quick_gelu or tag.get("quick_gelu", False)
        source = open_clip.create_model(
            architecture,
            pretrained=pretrained,
            force_quick_gelu=model_cfg["quick_gelu"],
            weights_only=True,
        )
        preprocess = {k: v for k, v in source.visual.preprocess_cfg.items() if k != "mode"}
        clip = cls(CLIPConfig(model_cfg, preprocess))
        clip.model.load_state_dict(source.state_dict())
        return clip.eval()

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> CLIP:
        """A folder in open_clip's layout; a `tokenizer.json` in it replaces the tokenizer that the config asks for."""
        folder = Path(folder)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} is not a CLIP folder: {name} is missing")
        raw = json.loads((folder / CONFIG_FILE).read_text())
        config = CLIPConfig(raw["model_cfg"], raw.get("preprocess_cfg", {}))
        own = folder / TOKENIZER_FILE
        tokenizer = BPETokenizer.load(own, config.context_length) if own.is_file() else None
        return cls.from_tensors(
            config, TensorFile(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE, tokenizer
        )

    @classmethod
    def from_tensors(
        cls,
        config: CLIPConfig,
        tensors: Mapping[str, Tensor],
        source: str | Path,
        tokenizer: Tokenize | None = None,
    ) -> CLIP:
        """A model of given weights in open_clip's names, in float32; source is what an error calls them."""
        # On the meta device nothing is initialised in vain; timm's and transformers' towers are not made for it.
        with torch.device("meta") if config.plain else contextlib.nullcontext():
            clip = cls(config, tokenizer)
        load_strictly(clip.model, tensors, source)
        tower = clip.model.text if isinstance(clip.model, open_clip.CustomTextCLIP) else clip.model
        if config.plain and tower.attn_mask is not None:  # not among the weights
            tower.attn_mask = torch.full(tower.attn_mask.shape, -torch.inf).triu(1)
        assert not any(buffer.is_meta for buffer in clip.buffers())
        return clip.eval()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes config, weights (in `dtype` if given) and, if it is our own, the tokenizer."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = {"model_cfg": self.config.model_cfg, "preprocess_cfg": self.config.preprocess_cfg}
        (folder / CONFIG_FILE).write_text(json.dumps(text, indent=2) + "\n")
        write_tensors(self.model, folder / WEIGHTS_FILE, dtype)
        if isinstance(self.tokenizer, BPETokenizer):
            self.tokenizer.save(folder / TOKENIZER_FILE)

    @property
    def emb_dim(self) -> int:
        return self.config.model_cfg["embed_dim"]

    @property
    def text_width(self) -> int:
        text = self.model.text if isinstance(self.model, open_clip.CustomTextCLIP) else self.model
        if isinstance(text, open_clip.hf_model.HFTextEncoder):
            return text.transformer.config.hidden_size
        return text.ln_final.normalized_shape[0]

    @property
    def context_length(self) -> int:
        return self.config.context_length

    @property
    def image_size(self) -> int:
        """Side of the square picture that the image tower sees, in pixels."""
        size = self.preprocess.size
        return size if isinstance(size, int) else size[0]

    @property
    def logit_scale(self) -> nn.Parameter:
        """ln of the inverse temperature."""
        return self.model.logit_scale

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    def encode_text(self, texts: Sequence[str]) -> TextEncoding:
        """B captions -> embedding, states and mask; a caption longer than the context is cut with a warning."""
        return self.encode_tokens(*self.tokenizer(texts))

    def encode_tokens(self, ids: Tensor, mask: Tensor) -> TextEncoding:
        """Token ids (B, L) and their mask (B, L) -> TextEncoding on the model's device."""
        ids, mask = ids.to(self.device), mask.to(self.device)
        if isinstance(self.model, open_clip.CustomTextCLIP):
            emb, states = self.model.text(ids)  # (B, D), (B, L, W)
        else:
            out = self.model.forward_intermediates(
                text=ids, text_indices=1, normalize=False, normalize_intermediates=True
            )
            emb, states = out["text_features"], out["text_intermediates"][-1]  # (B, D), (B, L, W)
        length = states.shape[1]  # a tower that pools at its first token returns the others only
        return TextEncoding(emb, states, mask[:, -length:], ids[:, -length:])

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What contrastive training needs: normalised embeddings (B, D) of both kinds, and the inverse temperature."""
        image_emb = F.normalize(self.encode_image(images).float(), dim=-1)  # (B, D)
        text_emb = F.normalize(self.encode_tokens(ids, mask).emb.float(), dim=-1)  # (B, D)
        with (
            torch.no_grad()
        ):  # not in the graph: beyond the limit there would be no gradient to come back by
            self.logit_scale.clamp_(max=math.log(100))
        return image_emb, text_emb, self.logit_scale.float().exp()

    def encode_image(self, images: Tensor | Sequence[Image.Image]) -> Tensor:
        """Pictures -> (B, D): a tensor (B, 3, H, W) in [-1, 1] of any size, or PIL pictures."""
        return self.model.encode_image(self.prepare(images))

    def image_features(self, images: Tensor) -> list[Tensor]:
        """Feature maps (B, C, h, w) of the image tower's stages: a tensor (B, 3, H, W) in [-1, 1] of any size."""
        stages = self.model.visual.forward_intermediates(
            self.prepare(images), output_fmt="NCHW", intermediates_only=True
        )
        return stages["image_intermediates"]

    def prepare(self, images: Tensor | Sequence[Image.Image]) -> Tensor:
        """Resized, cropped and normalised as the model asks: (B, 3, S, S). ValueError without an image tower."""
        if self.model.visual is None:
            raise ValueError(
                "this model has no image encoder, so it cannot see pictures; give image_emb, or a prompt"
            )
        cfg, size = self.preprocess, self.image_size
        if not isinstance(images, Tensor):
            if cfg.resize_mode == "shortest":
                images = [_centre(image, size, cfg.interpolation) for image in images]
            transform = open_clip.transform.image_transform_v2(cfg, is_train=False)
            return torch.stack([transform(image) for image in images]).to(
                self.device, self.logit_scale.dtype
            )
        x = images.to(self.device)
        if x.shape[-2:] != (size, size):
            if cfg.resize_mode == "longest":
                raise ValueError(
                    "this CLIP pads pictures (resize_mode 'longest'); give PIL pictures, not a tensor"
                )
            target = (size, size) if cfg.resize_mode == "squash" else _resized(*x.shape[-2:], size)
            x = resize(x.float(), target, cfg.interpolation).clamp(-1, 1)
            top, left = (target[0] - size) // 2, (target[1] - size) // 2
            x = x[..., top : top + size, left : left + size]
        mean, std = (
            torch.tensor(v, device=x.device, dtype=x.dtype).view(3, 1, 1)
            for v in (cfg.mean, cfg.std)
        )
        return ((x * 0.5 + 0.5 - mean) / std).to(self.logit_scale.dtype)


def _resized(height: int, width: int, shortest: int) -> tuple[int, int]:
    """Height and width of a picture whose shortest side becomes `shortest`."""
    return tuple(int(shortest * side / min(height, width)) for side in (height, width))


def _centre(image: Image.Image, size: int, interpolation: str) -> Image.Image:
    """The square in the middle. Where it is half a pixel off, to the left or top, as in transformers."""
    height, width = _resized(image.height, image.width, size)
    bilinear = interpolation == "bilinear"  # all else is bicubic, as in open_clip
    image = image.resize(
        (width, height), Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC
    )
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def contrastive_loss(image_emb: Tensor, text_emb: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE over normalised embeddings (B, D), gathered over all processes (CLIP, 2103.00020, figure 3)."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world_size = (
        (torch.distributed.get_rank(), torch.distributed.get_world_size())
        if distributed
        else (0, 1)
    )
    loss = open_clip.ClipLoss(
        local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size
    )
    return loss(image_emb, text_emb, scale)
