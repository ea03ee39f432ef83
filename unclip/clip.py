"""CLIP models from open_clip."""

# B batch, L text tokens, W text width, D embedding width, S image size, C channels

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor, nn

from unclip.config import save_json, unknown_key
from unclip.files import printable, read_json, shorten
from unclip.image_io import resize
from unclip.open_clip_import import import_open_clip
from unclip.tokenizer import TOKENIZER_FILE, BPETokenizer, warn_truncated
from unclip.types import TextEncoding, full_precision
from unclip.weights import TensorFile, load_strictly, meta_device, write_tensors

open_clip = import_open_clip()

CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"

# open_clip cannot build a model without an image tower, so a minimal one is built and removed.
MINIMAL_VISION = {"layers": 1, "width": 64, "patch_size": 16, "image_size": 16}

Tokenize = Callable[[Sequence[str]], tuple[Tensor, Tensor]]  # B strings -> ids (B, L), mask (B, L)


@dataclass(frozen=True)
class CLIPConfig:
    """The two tables of an `open_clip_config.json`, in open_clip's own format.

    Raises ValueError for a key that open_clip does not know.
    """

    # embed_dim, vision_cfg (None = no image tower), text_cfg, quick_gelu, custom_text
    model_cfg: dict[str, Any]
    # size, mean, std, interpolation, resize_mode
    preprocess_cfg: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model = (*inspect.signature(open_clip.CLIP).parameters, "custom_text", "multimodal_cfg")
        _check_keys("model_cfg", self.model_cfg, model)
        vision, text = self.model_cfg.get("vision_cfg") or {}, self.model_cfg.get("text_cfg")
        _check_keys("model_cfg.vision_cfg", vision, _names(open_clip.CLIPVisionCfg))
        _check_keys("model_cfg.text_cfg", text, _names(open_clip.CLIPTextCfg))
        preprocess = _names(open_clip.transform.PreprocessCfg)
        _check_keys("preprocess_cfg", self.preprocess_cfg, preprocess)

    @property
    def context_length(self) -> int:
        return self.model_cfg["text_cfg"].get("context_length", 77)

    @property
    def plain(self) -> bool:
        """Return whether both towers are open_clip's own, not from timm or transformers."""
        vision, text = self.model_cfg.get("vision_cfg") or {}, self.model_cfg["text_cfg"]
        return not (vision.get("timm_model_name") or text.get("hf_model_name"))

    @property
    def causal(self) -> bool:
        """Return whether the text tower is open_clip's own and ignores what follows a text."""
        text = self.model_cfg["text_cfg"]
        other = text.get("hf_model_name") or text.get("no_causal_mask") or text.get("embed_cls")
        return not other and text.get("pool_type", "argmax") in ("argmax", "eos")


def _check_keys(section: str, given: Any, known: Sequence[str]) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"{section} is {shorten(given)}; expected a mapping")
    for key in given:
        if key not in known:
            raise ValueError(unknown_key(f"{section}.{printable(key)}", known))


def _names(cls: Any) -> list[str]:
    return [field.name for field in fields(cls)]


class OpenCLIPTokenizer:
    """The tokenizer of open_clip's text config, extended by a mask and a truncation warning."""

    def __init__(self, config: CLIPConfig) -> None:
        self.context_length, text_cfg = config.context_length, config.model_cfg["text_cfg"]
        if name := text_cfg.get("hf_tokenizer_name"):
            options = text_cfg.get("tokenizer_kwargs") or {}
            options = {**options, "trust_remote_code": False}  # no code of a model is executed
            self.tokenizer = open_clip.tokenizer.HFTokenizer(name, self.context_length, **options)
        else:
            self.tokenizer = open_clip.tokenizer.SimpleTokenizer(context_length=self.context_length)

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids = self.tokenizer(list(texts))  # (B, L)
        if isinstance(self.tokenizer, open_clip.tokenizer.HFTokenizer):
            return ids, ids != self.tokenizer.tokenizer.pad_token_id
        room = self.context_length - 2
        tokenized = [(text, self.tokenizer.encode(text)) for text in texts]
        long = [(text, tokens[room:]) for text, tokens in tokenized if len(tokens) > room]
        truncated = [(text, self.tokenizer.decode(rest)) for text, rest in long]
        warn_truncated(truncated, room)
        # CLIP pads with 0, which is also the token "!"; only the first end token delimits the text.
        end = (ids == self.tokenizer.eot_token_id).int().argmax(dim=-1, keepdim=True)
        return ids, torch.arange(ids.shape[1]) <= end


class CLIP(nn.Module):
    """An open_clip model with its tokenizer and preprocessing (CLIP, 2103.00020).

    Embeddings are not normalised, except in `forward`.
    """

    def __init__(self, config: CLIPConfig, tokenizer: Tokenize | None = None) -> None:
        super().__init__()
        model_cfg = dict(config.model_cfg)
        if "multimodal_cfg" in model_cfg:
            raise ValueError("the configuration is a captioner (multimodal_cfg); expected a CLIP")
        has_hf_text = "hf_model_name" in model_cfg["text_cfg"]
        custom_text = model_cfg.pop("custom_text", False) or has_hf_text
        has_images = bool(model_cfg.get("vision_cfg"))
        model_cfg["vision_cfg"] = model_cfg["vision_cfg"] if has_images else MINIMAL_VISION
        self.model = (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**model_cfg)
        if custom_text:
            self.model.text.output_tokens = True  # return the states as well
        self.config = config
        self.tokenizer = tokenizer or OpenCLIPTokenizer(config)
        self.preprocess = open_clip.transform.PreprocessCfg(
            **{"size": self.model.visual.image_size, **config.preprocess_cfg}
        )
        if not has_images:
            self.model.visual = None

    @classmethod
    def from_open_clip(cls, architecture: str, pretrained: str | None = None) -> CLIP:
        """Build an open_clip architecture with the weights of a pretrained tag or file, or random.

        The activation follows the weights: GELU architectures load weights that were trained with
        QuickGELU as a QuickGELU model. The reverse mismatch raises ValueError.
        """
        if (model_cfg := open_clip.get_model_config(architecture)) is None:
            raise ValueError(
                f"unknown open_clip architecture {architecture!r}; "
                "expected one of open_clip.list_models()"
            )
        tag = (open_clip.get_pretrained_cfg(architecture, pretrained) if pretrained else None) or {}
        if pretrained and not tag and not Path(pretrained).is_file():
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
            raise ValueError(f"{architecture} has no weights {pretrained!r}; its tags: {tags}")
        quick_gelu = model_cfg.get("quick_gelu", False)
        if tag and quick_gelu and not tag.get("quick_gelu", False):
            other = architecture.removesuffix("-quickgelu")
            fault = f"{architecture} computes QuickGELU but {pretrained!r} was trained without it"
            raise ValueError(f"{fault}; use {other!r}")
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
        """Load a folder in open_clip's layout.

        A `tokenizer.json` in the folder replaces the tokenizer of the config.
        """
        folder = Path(folder)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} is not a CLIP folder: {name} is missing")
        raw = read_json(folder / CONFIG_FILE)
        try:
            config = CLIPConfig(raw.get("model_cfg", {}), raw.get("preprocess_cfg", {}))
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG_FILE}: {error}") from None
        own = folder / TOKENIZER_FILE
        tokenizer = BPETokenizer.load(own, config.context_length) if own.is_file() else None
        return cls.from_tensors(config, TensorFile(folder / WEIGHTS_FILE), folder, tokenizer)

    @classmethod
    def from_tensors(
        cls,
        config: CLIPConfig,
        tensors: Mapping[str, Tensor],
        source: str | Path,
        tokenizer: Tokenize | None = None,
    ) -> CLIP:
        """Build a float32 model from tensors with open_clip's names; errors refer to `source`.

        No other weights are read, and nothing is downloaded: the config's flags for pretrained
        towers are switched off, and models of transformers are folders or in the Hub's cache.
        """
        try:
            config = _without_downloads(config, source)
            # The meta device skips initialisation; timm and transformers do not support it.
            with meta_device(source) if config.plain else contextlib.nullcontext():
                clip = cls(_with_local_models(config, source, tokenizer is None), tokenizer)
            clip.config = config
        except (
            *(ArithmeticError, AssertionError, ImportError, LookupError),
            *(OSError, RuntimeError, TypeError),
        ) as error:
            reason = " ".join(str(error).split())  # open_clip and torch check no size beforehand
            raise ValueError(f"{source}: its model_cfg cannot be built: {reason}") from error
        load_strictly(clip.model, tensors, source)
        tower = clip._text_tower
        if config.plain and tower.attn_mask is not None:  # not in the checkpoint
            tower.attn_mask = torch.full(tower.attn_mask.shape, -torch.inf).triu(1)
        assert not any(buffer.is_meta for buffer in clip.buffers())
        return clip.eval()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the config, the weights (in `dtype` if given) and a BPETokenizer."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_json(self.config, folder / CONFIG_FILE)
        write_tensors(self.model, folder / WEIGHTS_FILE, dtype)
        if isinstance(self.tokenizer, BPETokenizer):
            self.tokenizer.save(folder / TOKENIZER_FILE)

    @property
    def emb_dim(self) -> int:
        return self.config.model_cfg["embed_dim"]

    @property
    def _text_tower(self) -> Any:
        return self.model.text if isinstance(self.model, open_clip.CustomTextCLIP) else self.model

    @property
    def text_width(self) -> int:
        text = self._text_tower
        if isinstance(text, open_clip.hf_model.HFTextEncoder):
            return text.transformer.config.hidden_size
        return text.ln_final.normalized_shape[0]

    @property
    def context_length(self) -> int:
        return self.config.context_length

    @property
    def image_size(self) -> int:
        """Side of the image tower's square input, in pixels."""
        size = self.preprocess.size
        return size if isinstance(size, int) else size[0]

    @property
    def logit_scale(self) -> nn.Parameter:
        """Natural logarithm of the inverse temperature."""
        return self.model.logit_scale

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    def encode_text(self, texts: Sequence[str]) -> TextEncoding:
        """Encode B captions. Captions longer than the context are truncated with a warning."""
        return self.encode_tokens(*self.tokenizer(texts))

    def encode_captions(self, texts: Sequence[str], batch_size: int = 128) -> TextEncoding:
        """Encode N captions as `encode_text` does, up to the end of the longest one.

        Captions of similar length are encoded together. If the tower is causal, their padding is
        not computed, which is several times faster for short captions.
        """
        ids, mask = self.tokenizer(texts)
        order = mask.sum(dim=1).argsort(stable=True)
        parts = [self._encode_short(ids[rows], mask[rows]) for rows in order.split(batch_size)]
        length = max(part.mask.shape[1] for part in parts)
        encoding = TextEncoding.cat([part.pad(length) for part in parts])
        return encoding[order.argsort().to(self.device)]

    def _encode_short(self, ids: Tensor, mask: Tensor) -> TextEncoding:
        """Encode token ids (B, L) -> states (B, l, W), l <= L without padding in every row."""
        if not (self.config.causal and isinstance(self.model, open_clip.CustomTextCLIP)):
            return self.encode_tokens(ids, mask).trim()
        length = max(1, int(mask.sum(dim=1).max()))
        ids, mask = ids[:, :length].to(self.device), mask[:, :length].to(self.device)
        tower = copy.copy(self.model.text)  # with the same weights
        short_mask = tower.attn_mask[:length, :length]  # which open_clip does not cut
        tower._buffers = {**tower._buffers, "attn_mask": short_mask}
        emb, states = tower(ids)
        return TextEncoding(emb, states, mask, ids)

    def encode_tokens(self, ids: Tensor, mask: Tensor) -> TextEncoding:
        """Encode token ids (B, L) with their mask (B, L), on the model's device."""
        ids, mask = ids.to(self.device), mask.to(self.device)
        if isinstance(self.model, open_clip.CustomTextCLIP):
            emb, states = self.model.text(ids)  # (B, D), (B, L, W)
        else:
            out = self.model.forward_intermediates(
                text=ids, text_indices=1, normalize=False, normalize_intermediates=True
            )
            emb, states = out["text_features"], out["text_intermediates"][-1]  # (B, D), (B, L, W)
        length = states.shape[1]  # a tower that pools its first token returns only the others
        return TextEncoding(emb, states, mask[:, -length:], ids[:, -length:])

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return normalised image and text embeddings (B, D) and the inverse temperature ().

        The inverse temperature is clamped to 100, as in the paper.
        """
        image_emb = F.normalize(self.encode_image(images).float(), dim=-1)  # (B, D)
        text_emb = F.normalize(self.encode_tokens(ids, mask).emb.float(), dim=-1)  # (B, D)
        with torch.no_grad():  # outside the graph, where the clamp would stop the gradient
            self.logit_scale.clamp_(max=math.log(100))
        return image_emb, text_emb, self.logit_scale.float().exp()

    def encode_image(self, images: Tensor | Sequence[Image.Image]) -> Tensor:
        """Encode PIL images or a tensor (B, 3, H, W) in [-1, 1] of any size: -> (B, D)."""
        return self.model.encode_image(self.prepare(images))

    def image_features(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps of the image tower: (B, 3, H, W) -> list of (B, C, h, w).

        Images are in [-1, 1], of any size.
        """
        stages = self.model.visual.forward_intermediates(
            self.prepare(images), output_fmt="NCHW", intermediates_only=True
        )
        return stages["image_intermediates"]

    def prepare(self, images: Tensor | Sequence[Image.Image]) -> Tensor:
        """Resize, crop and normalise images for the image tower: -> (B, 3, S, S).

        Raises ValueError if the model has no image tower.
        """
        if self.model.visual is None:
            raise ValueError("this model has no image encoder; give image_emb or a prompt")
        cfg, size = self.preprocess, self.image_size
        if not isinstance(images, Tensor):
            if cfg.resize_mode == "shortest":
                images = [_center_crop(image, size, cfg.interpolation) for image in images]
            transform = open_clip.transform.image_transform_v2(cfg, is_train=False)
            pixels = torch.stack([transform(image) for image in images])
            return pixels.to(self.device, self.logit_scale.dtype)
        x = images.to(self.device)
        if x.shape[-2:] != (size, size):
            if cfg.resize_mode == "longest":
                raise ValueError(
                    "this CLIP pads its images (resize_mode 'longest'); expected PIL, got a tensor"
                )
            height, width = x.shape[-2:]
            squash = cfg.resize_mode == "squash"
            target = (size, size) if squash else _resized_size(height, width, size)
            x = resize(x.float(), target, cfg.interpolation).clamp(-1, 1)
            top, left = (target[0] - size) // 2, (target[1] - size) // 2
            x = x[..., top : top + size, left : left + size]
        mean, std = (
            torch.tensor(v, device=x.device, dtype=x.dtype).view(3, 1, 1)
            for v in (cfg.mean, cfg.std)
        )
        return ((x * 0.5 + 0.5 - mean) / std).to(self.logit_scale.dtype)


def _without_downloads(config: CLIPConfig, source: str | Path) -> CLIPConfig:
    """Return a config whose towers are built without pretrained weights.

    Raises ValueError for a timm tower whose architecture would be downloaded.
    """
    towers = {name: config.model_cfg.get(name) for name in ("vision_cfg", "text_cfg")}
    flags = "timm_model_pretrained", "hf_model_pretrained"
    for name, tower in towers.items():
        timm = (tower or {}).get("timm_model_name")
        if timm and ":" in timm:
            fault = f"{source}: model_cfg.{name}.timm_model_name is {printable(timm)}"
            raise ValueError(f"{fault}; expected an architecture of timm, not one to download")
        if tower:
            towers[name] = {**tower, **{flag: False for flag in flags if flag in tower}}
    return CLIPConfig({**config.model_cfg, **towers}, config.preprocess_cfg)


def _with_local_models(config: CLIPConfig, source: str | Path, tokenized: bool) -> CLIPConfig:
    """Replace the Hub ids of a config by their folders in the Hub's cache.

    tokenized: whether the config's tokenizer is needed. Raises ValueError for what is not cached.
    """
    text = dict(config.model_cfg["text_cfg"])
    for key in ("hf_model_name", "hf_tokenizer_name")[: 2 if tokenized else 1]:
        if (name := text.get(key)) and not Path(name).is_dir():
            try:
                text[key] = snapshot_download(name, local_files_only=True)
            except Exception:  # not cached, or not an id
                fault = f"{source}: model_cfg.text_cfg.{key} is {printable(name)}"
                advice = "expected a folder, or a model that `hf download` has stored"
                raise ValueError(f"{fault}; {advice}") from None
    return CLIPConfig({**config.model_cfg, "text_cfg": text}, config.preprocess_cfg)


def _resized_size(height: int, width: int, shortest: int) -> tuple[int, int]:
    """Return the height and width of an image after its shorter side becomes `shortest`."""
    scale = min(height, width)
    return int(shortest * height / scale), int(shortest * width / scale)


def _center_crop(image: Image.Image, size: int, interpolation: str) -> Image.Image:
    """Resize the shorter side to `size` and crop the central square, as transformers does.

    An offset of half a pixel is rounded towards the top left.
    """
    height, width = _resized_size(image.height, image.width, size)
    bilinear = interpolation == "bilinear"  # all other modes are bicubic, as in open_clip
    resampling = Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC
    image = image.resize((width, height), resampling)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def contrastive_loss(image_emb: Tensor, text_emb: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE over normalised embeddings (B, D) of all processes (CLIP, figure 3).

    Not under autocast: in bfloat16, logits near 100 are multiples of 0.5.
    """
    rank, world_size = 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    loss = open_clip.ClipLoss(True, gather_with_grad=True, rank=rank, world_size=world_size)
    with full_precision(image_emb):
        return loss(image_emb.float(), text_emb.float(), scale.float())
