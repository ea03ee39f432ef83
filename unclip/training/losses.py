"""What each network is trained on: a batch of pictures and captions in, a dict of losses out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unclip.clip import CLIP, contrastive_loss
from unclip.data.corruption import CorruptionConfig, corrupt
from unclip.diffusion.losses import LossConfig, diffusion_loss
from unclip.diffusion.schedules import Schedule, sample_timesteps
from unclip.embeddings import normalise, slerp
from unclip.models.codecs.quantizers import full_precision
from unclip.models.unclip.ar_prior import ARPrior
from unclip.models.unclip.decoder import Decoder, masked_image
from unclip.models.unclip.embedding_stats import EmbeddingStats
from unclip.models.unclip.layout import Layout
from unclip.models.unclip.one_shot_prior import OneShotPrior
from unclip.models.unclip.prior import DiffusionPrior
from unclip.models.unclip.upsampler import Upsampler
from unclip.image_io import resize
from unclip.training.inpainting import HoleConfig, copy_paste, random_holes
from unclip.types import TextEncoding

# B batch, D CLIP embedding, s picture side

Batch = dict[
    str, Any
]  # "image" (B, 3, S, S) in [-1, 1] and "caption", or precomputed "image_emb" (B, D)


@dataclass(frozen=True)
class DropConfig:
    """How often a condition gives way to its null in training, so that guidance has a second half (unCLIP 2.1, 2.2)."""

    text: float = 0.1
    image: float = 0.1

    def __post_init__(self) -> None:
        for name in ("text", "image"):
            if not 0 <= (p := getattr(self, name)) < 1:
                raise ValueError(f"drop.{name} is {p}; expected a probability in [0, 1)")


class CLIPLoss:
    """Symmetric InfoNCE between the pictures and captions of a batch, over all processes (CLIP, 2103.00020)."""

    def __init__(self, clip: CLIP) -> None:
        self.clip = clip

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        ids, mask = self.clip.tokenizer(batch["caption"])
        image_emb, text_emb, scale = model(batch["image"], ids, mask)
        return {"loss": contrastive_loss(image_emb, text_emb, scale), "scale": scale.detach()}


class PriorLoss:
    """MSE of the predicted clean image embedding, in the prior's normalised space (unCLIP 2.2)."""

    def __init__(
        self,
        prior: DiffusionPrior,
        clip: CLIP,
        schedule: Schedule,
        drop: DropConfig,
        config: LossConfig,
    ):
        self.prior, self.clip, self.schedule, self.drop, self.config = (
            prior,
            clip,
            schedule,
            drop,
            config,
        )

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        image_emb = _image_emb(self.clip, batch)
        text, drop_text, _ = _text(self.clip, batch, self.drop.text, self.prior.config.null_text)
        x_0 = self.prior.normalize(image_emb)
        t = sample_timesteps(len(x_0), self.schedule, device=x_0.device)
        noise = torch.randn_like(x_0)
        x_t = self.schedule.add_noise(x_0, noise, t)
        output = model(x_t, t, text, drop_text)  # (B, D)
        losses = diffusion_loss(output, x_0, x_t, noise, t, self.schedule, "x0", config=self.config)
        return _means(losses)


class ARPriorLoss:
    """Cross-entropy of the codes of an image embedding, in nats a code (unCLIP 2.2)."""

    def __init__(self, prior: ARPrior, clip: CLIP, drop: DropConfig) -> None:
        self.prior, self.clip, self.drop = prior, clip, drop

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        image_emb = _image_emb(self.clip, batch)
        text, drop_text, _ = _text(self.clip, batch, self.drop.text, self.prior.config.null_text)
        with torch.no_grad():  # the dot product is that with the caption, even where it is dropped
            told = text if drop_text is not None else self.clip.encode_text(batch["caption"])
        codes, dot = (
            self.prior.codes.encode(image_emb),
            self.prior.codes.encode_dot(image_emb, told.emb),
        )
        logits = model(codes, dot, text, drop_text)  # (B, K, V)
        return {"loss": nn.functional.cross_entropy(logits.float().flatten(0, 1), codes.flatten())}


@dataclass(frozen=True)
class OneShotLossConfig:
    contrastive: float = 0.2  # weight beside the mean squared error (ECLIPSE, 2312.04655)

    def __post_init__(self) -> None:
        if not self.contrastive >= 0:
            raise ValueError(f"loss.contrastive is {self.contrastive}; expected 0 or more")


class OneShotPriorLoss:
    """MSE of the normalised image embedding, and InfoNCE towards the captions at CLIP's temperature (2312.04655).

    Captions that were dropped cannot be found, and are left out of the second.
    """

    def __init__(
        self, prior: OneShotPrior, clip: CLIP, drop: DropConfig, config: OneShotLossConfig
    ) -> None:
        self.prior, self.clip, self.drop, self.config = prior, clip, drop, config

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        x_0 = self.prior.normalize(_image_emb(self.clip, batch))
        text, null_text, dropped = _text(
            self.clip, batch, self.drop.text, self.prior.config.null_text
        )
        predicted = model(text, torch.randn_like(x_0), null_text).float()  # (B, D)
        mse = nn.functional.mse_loss(predicted, x_0)
        image_emb, text_emb = (
            self.prior.denormalize(predicted)[~dropped],
            text.emb[~dropped].float(),
        )
        with full_precision(x_0):
            cosines = normalise(image_emb) @ normalise(text_emb).T  # of those that were not dropped
        scale = self.clip.logit_scale.detach().float().exp().clamp(max=100)
        rows = torch.arange(len(cosines), device=x_0.device)
        contrastive = (
            nn.functional.cross_entropy(scale * cosines, rows) if len(rows) else mse.new_zeros(())
        )
        loss = mse + self.config.contrastive * contrastive
        return {"loss": loss, "mse": mse.detach(), "contrastive": contrastive.detach()}


class LayoutLoss:
    """MSE of the picture at the layout's size, told from its embedding under up to `emb_noise` of noise."""

    def __init__(self, layout: Layout, clip: CLIP, emb_noise: float) -> None:
        self.layout, self.clip, self.emb_noise = layout, clip, emb_noise

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        image_emb = noised(_image_emb(self.clip, batch), self.layout, self.emb_noise)
        truth = nn.functional.adaptive_avg_pool2d(
            batch["image"].to(image_emb.device), self.layout.config.size
        )
        return {"loss": nn.functional.mse_loss(model(image_emb).float(), truth)}


def noised(image_emb: Tensor, stats: EmbeddingStats, most: float) -> Tensor:
    """Embeddings (B, D) with noise of 0 to `most` standard deviations, another share of it in each row.

    What a prior predicts is off by about half of one: what is trained on noised ones doesn't take it too exactly.
    """
    share = most * torch.rand(len(image_emb), 1, device=image_emb.device)
    return image_emb + share * stats.emb_std * torch.randn_like(image_emb)


def mixed(image_emb: Tensor, rows: Tensor, most: float) -> Tensor:
    """Embeddings (B, D) turned by 0 to `most` of the way to the next row's, where `rows` (B,) is True.

    Who paints into a picture asks for something else than it shows: an inpainter learns to reconcile the two.
    """
    share = most * torch.rand(len(image_emb), device=image_emb.device) * rows
    return slerp(image_emb, image_emb.roll(-1, dims=0), share)


class DecoderLoss:
    """The decoder's diffusion loss, picture and caption dropped independently (unCLIP 2.1).

    With `holes`, the decoder is told what is known around random ones; the loss is over the whole picture (GLIDE 2.4).
    copy_paste: share of the pictures of which something is known that another's thing is put into: see `copy_paste`;
    what is asked for is the thing. emb_mix: see `mixed`; of the other pictures of which something is known.
    For a decoder that is shown a layout: agreement, at most, see `Layout.agreeing`, as in painting; emb_noise: see
    `noised`.
    """

    def __init__(
        self,
        decoder: Decoder,
        clip: CLIP,
        schedule: Schedule,
        drop: DropConfig,
        config: LossConfig,
        holes: HoleConfig | None = None,
        emb_noise: float = 0.0,
        emb_mix: float = 0.0,
        copy_paste: float = 0.0,
        agreement: float = 0.0,
    ):
        self.decoder, self.clip, self.schedule, self.drop, self.config = (
            decoder,
            clip,
            schedule,
            drop,
            config,
        )
        self.holes, self.emb_noise, self.emb_mix = holes, emb_noise, emb_mix
        self.copy_paste, self.agreement = copy_paste, agreement

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        model_config = self.decoder.config
        image_emb = _image_emb(
            self.clip, batch
        )  # of the pictures as they are loaded: CLIP may want them larger
        text, drop_text, _ = _text(self.clip, batch, self.drop.text, model_config.null_text)
        x_0 = resized(batch["image"].to(self.clip.device), model_config.image_size)
        drop_image, known = torch.rand(len(x_0), device=x_0.device) < self.drop.image, None
        if self.holes is not None:
            x_0, image_emb, text, known = self._with_holes(x_0, image_emb, text)
        if self.emb_noise:
            image_emb = noised(image_emb, self.decoder.layout, self.emb_noise)
        conditions = image_emb, text, drop_image, drop_text, known
        return _denoising_loss(model, conditions, x_0, self.schedule, model_config, self.config)

    def _with_holes(
        self, x_0: Tensor, image_emb: Tensor, text: TextEncoding
    ) -> tuple[Tensor, Tensor, TextEncoding, Tensor]:
        """The pictures, what is asked for in them, and what is known around their holes."""
        B, device = len(x_0), x_0.device
        holes = random_holes(B, x_0.shape[-1], self.holes).to(device)
        own = partly = ~holes.flatten(1).all(dim=1)
        if self.copy_paste:
            pasted, rows = (
                partly & (torch.rand(B, device=device) < self.copy_paste),
                torch.arange(B, device=device),
            )
            told, own = torch.where(pasted, rows.roll(-1), rows), partly & ~pasted
            x_0, things, image_emb, text = (
                x_0.clone(),
                x_0[told[pasted]],
                image_emb[told],
                text[told],
            )
            x_0[pasted], holes[pasted] = copy_paste(x_0[pasted], things)
        if self.emb_mix:
            image_emb = mixed(image_emb, own, self.emb_mix)
        known = masked_image(x_0, holes)
        if self.agreement:
            image_emb = self.decoder.layout.agreeing(
                image_emb, known, self.agreement * torch.rand(B, device=device)
            )
        return x_0, image_emb, text, known


class UpsamplerLoss:
    """The upsampler's diffusion loss on crops, its low-res input corrupted (unCLIP 2.1)."""

    def __init__(
        self,
        upsampler: Upsampler,
        schedule: Schedule,
        corruption: CorruptionConfig,
        config: LossConfig,
    ):
        self.upsampler, self.schedule, self.corruption, self.config = (
            upsampler,
            schedule,
            corruption,
            config,
        )

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        model_config = self.upsampler.config
        x_0 = batch["image"].to(next(self.upsampler.parameters()).device)
        low_side = x_0.shape[-1] * model_config.low_size // model_config.high_size
        low_res = corrupt(resized(x_0, low_side), self.corruption)
        return _denoising_loss(model, (low_res,), x_0, self.schedule, model_config, self.config)


def resized(images: Tensor, side: int) -> Tensor:
    """Square pictures (B, 3, S, S) in [-1, 1] -> (B, 3, side, side), bicubic and antialiased."""
    if images.shape[-1] == side:
        return images
    return resize(images, (side, side)).clamp(-1, 1)


def _denoising_loss(
    model: nn.Module,
    conditions: tuple,
    x_0: Tensor,
    schedule: Schedule,
    model_config: Any,
    config: LossConfig,
) -> dict[str, Tensor]:
    t = sample_timesteps(len(x_0), schedule, device=x_0.device)
    noise = torch.randn_like(x_0)
    x_t = schedule.add_noise(x_0, noise, t)
    output = model(x_t, t, *conditions)  # (B, 3 or 6, s, s)
    losses = diffusion_loss(
        output,
        x_0,
        x_t,
        noise,
        t,
        schedule,
        model_config.prediction,
        model_config.learned_variance,
        config,
    )
    return _means(losses)


@torch.no_grad()
def _image_emb(clip: CLIP, batch: Batch) -> Tensor:
    """CLIP's embedding of the pictures (B, D), precomputed or computed now."""
    return (
        batch["image_emb"].to(clip.device)
        if "image_emb" in batch
        else clip.encode_image(batch["image"])
    ).float()


@torch.no_grad()
def _text(
    clip: CLIP, batch: Batch, p: float, null_text: str
) -> tuple[TextEncoding, Tensor | None, Tensor]:
    """The captions' encoding, which rows the network is to null, and which were dropped.

    The second is None if the null is the empty prompt: it is in their place already.
    """
    captions, drop = batch["caption"], torch.rand(len(batch["caption"])) < p
    if null_text == "empty_prompt":
        captions = [
            "" if dropped else caption for caption, dropped in zip(captions, drop, strict=True)
        ]
    text, drop = clip.encode_text(captions).trim(), drop.to(clip.device)
    return text, None if null_text == "empty_prompt" else drop, drop


def _means(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.mean() for name, values in losses.items()}
