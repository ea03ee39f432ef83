"""The training losses of CLIP and the unCLIP networks: a batch in, a dict of scalars out.

Each loss is called as `loss(model, batch)`, where `model` is the network, possibly wrapped for
several processes; frozen networks and configs are in the loss object. A batch has "caption", and
"image" (B, 3, S, S) in [-1, 1] or a precomputed "image_emb" (B, D).
"""

# B batch, D CLIP embedding width, s image side of the network, S of the data

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.clip import CLIP, contrastive_loss
from unclip.config import DropRate, NonNegative, config
from unclip.data.corruption import CorruptionConfig, corrupt
from unclip.data.loader import Batch
from unclip.diffusion.losses import LossConfig, diffusion_loss
from unclip.diffusion.schedules import Prediction, Schedule, sample_timesteps
from unclip.embeddings import normalise, slerp
from unclip.image_io import resize
from unclip.models.unclip.ar_prior import ARPrior
from unclip.models.unclip.decoder import Decoder, Layout, masked_image
from unclip.models.unclip.layout_prior import LayoutPrior, layouts
from unclip.models.unclip.mlp_prior import MLPPrior, embedding_only
from unclip.models.unclip.one_shot_prior import OneShotPrior
from unclip.models.unclip.prior import DenoisingPrior, EmbeddingStats
from unclip.models.unclip.upsampler import Upsampler
from unclip.training.inpainting import HoleConfig, copy_paste, random_holes
from unclip.types import TextEncoding, full_precision


@config
class ConditionDropout:
    """Probabilities of replacing a condition by its null, for guidance (unCLIP 2.1, 2.2)."""

    text: DropRate = 0.1
    image: DropRate = 0.1


@dataclass(eq=False)
class CLIPLoss:
    """Symmetric InfoNCE between the images and captions of a batch, over all processes.

    CLIP, 2103.00020.
    """

    clip: CLIP

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        ids, mask = self.clip.tokenizer(batch["caption"])
        image_emb, text_emb, scale = model(batch["image"], ids, mask)
        return {"loss": contrastive_loss(image_emb, text_emb, scale), "scale": scale.detach()}


@dataclass(eq=False)
class PriorLoss:
    """MSE of the predicted image embedding, in the prior's normalised space (unCLIP 2.2)."""

    prior: DenoisingPrior
    clip: CLIP
    schedule: Schedule
    drop: ConditionDropout
    config: LossConfig
    noises: int = 1  # noised copies of each embedding; its caption is encoded once
    emb_noise: float = 0.0  # std of noise on the normalised embeddings, in training only
    text_noise: float = 0.0  # largest noise on text embeddings, in their std; in training only

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        image_emb = image_embeddings(self.clip, batch)
        text, drop_text = self._text(batch)
        if self.text_noise and model.training:
            text = replace(text, emb=add_noise(text.emb, text.emb.std(), self.text_noise))
        x_0 = self.prior.normalize(image_emb).repeat_interleave(self.noises, dim=0)  # B*noises D
        if self.emb_noise and model.training:
            x_0 = x_0 + self.emb_noise * torch.randn_like(x_0)
        return _denoising_loss(model, (text, drop_text), x_0, self.schedule, self.config, "x0")

    def _text(self, batch: Batch) -> tuple[TextEncoding, Tensor | None]:
        """Return captions and the rows to null; precomputed, if their embeddings are enough."""
        config = self.prior.config
        known = "text_emb" in batch and config.null_text == "learned"
        if not (known and isinstance(self.prior, MLPPrior) and not config.text_states):
            return _text(self.clip, batch, self.drop.text, config.null_text)[:2]
        text = embedding_only(batch["text_emb"].to(self.clip.device).float(), config.text_width)
        return text, (torch.rand(len(text)) < self.drop.text).to(self.clip.device)


@dataclass(eq=False)
class ARPriorLoss:
    """Cross-entropy of the codes of an image embedding, in nats per code (unCLIP 2.2)."""

    prior: ARPrior
    clip: CLIP
    drop: ConditionDropout

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        image_emb = image_embeddings(self.clip, batch)
        text, drop_text, _ = _text(self.clip, batch, self.drop.text, self.prior.config.null_text)
        with torch.no_grad():  # the dot product is with the caption, even where it is dropped
            caption = text if drop_text is not None else self.clip.encode_captions(batch["caption"])
        codes = self.prior.codes.encode(image_emb)  # (B, K)
        dot = self.prior.codes.encode_dot(image_emb, caption.emb)
        logits = model(codes, dot, text, drop_text)  # (B, K, V)
        return {"loss": F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())}


@config
class OneShotLossConfig:
    contrastive: NonNegative = 0.2  # weight of InfoNCE, relative to the MSE (ECLIPSE, 2312.04655)


@dataclass(eq=False)
class OneShotPriorLoss:
    """MSE of the normalised image embedding, and InfoNCE with the captions (ECLIPSE, 2312.04655).

    InfoNCE uses CLIP's temperature and excludes the rows whose caption is dropped.
    """

    prior: OneShotPrior
    clip: CLIP
    drop: ConditionDropout
    config: OneShotLossConfig

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        x_0 = self.prior.normalize(image_embeddings(self.clip, batch))
        null_text = self.prior.config.null_text
        text, drop_text, dropped = _text(self.clip, batch, self.drop.text, null_text)
        predicted = model(text, torch.randn_like(x_0), drop_text).float()  # (B, D)
        mse = F.mse_loss(predicted, x_0)
        image_emb = self.prior.denormalize(predicted)[~dropped]
        text_emb = text.emb[~dropped].float()
        with full_precision(x_0):
            cosines = normalise(image_emb) @ normalise(text_emb).T
        scale = self.clip.logit_scale.detach().float().exp().clamp(max=100)
        rows = torch.arange(len(cosines), device=x_0.device)
        infonce = F.cross_entropy(scale * cosines, rows) if len(rows) else mse.new_zeros(())
        loss = mse + self.config.contrastive * infonce
        return {"loss": loss, "mse": mse.detach(), "contrastive": infonce.detach()}


@dataclass(eq=False)
class LayoutLoss:
    """MSE of the image at the layout's size, predicted from the embedding plus noise."""

    layout: Layout
    clip: CLIP
    emb_noise: float

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        image_emb = image_embeddings(self.clip, batch)
        image_emb = add_noise(image_emb, self.layout.emb_std, self.emb_noise)
        target = layouts(batch, self.layout.config.size).to(image_emb.device)
        return {"loss": F.mse_loss(model(image_emb).float(), target)}


@dataclass(eq=False)
class LayoutPriorLoss:
    """MSE of a layout's components; image embedding and caption are dropped independently."""

    network: LayoutPrior
    clip: CLIP
    schedule: Schedule
    drop: ConditionDropout
    config: LossConfig
    emb_noise: float = 0.0  # see `add_noise`
    text_noise: float = 0.0  # see `add_noise`; in training only

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        network = self.network
        image_emb = image_embeddings(self.clip, batch)
        image_emb = add_noise(image_emb, network.emb_std, self.emb_noise)
        text = self._text(batch)
        if self.text_noise and model.training:
            text = replace(text, emb=add_noise(text.emb, text.emb.std(), self.text_noise))
        x_0 = network.encode(layouts(batch, network.config.size).to(image_emb.device))
        B, device = len(x_0), x_0.device
        drop_image = torch.rand(B, device=device) < self.drop.image
        drop_text = torch.rand(B, device=device) < self.drop.text
        conditions = image_emb, text, drop_image, drop_text
        return _denoising_loss(model, conditions, x_0, self.schedule, self.config, "x0")

    @torch.no_grad()
    def _text(self, batch: Batch) -> TextEncoding:
        """Return the encoded captions; stored text embeddings do, if no states are read."""
        if self.network.text_pool is None and "text_emb" in batch:
            return embedding_only(batch["text_emb"].to(self.clip.device).float(), 0)
        text = self.clip.encode_captions(batch["caption"])
        return replace(text, emb=text.emb.float())


def add_noise(emb: Tensor, std: Tensor, most: float) -> Tensor:
    """Add noise of 0 to `most` standard deviations, uniform per row, to embeddings (B, D).

    std: (D,), or () for all dimensions. With noise on text embeddings, captions of similar meaning
    have similar effects. With noise on image embeddings, a network becomes robust to the error of
    a prior, which is about half a standard deviation.
    """
    scale = most * torch.rand(len(emb), 1, device=emb.device)
    return emb + scale * std * torch.randn_like(emb)


def mix_embeddings(image_emb: Tensor, rows: Tensor, most: float) -> Tensor:
    """Interpolate embeddings (B, D) by 0 to `most` to the next row's, where `rows` (B,) is True.

    In inpainting, the prompt describes something that the known part does not show. Training on
    such pairs makes the decoder consistent with both.
    """
    weight = most * torch.rand(len(image_emb), device=image_emb.device) * rows
    return slerp(image_emb, image_emb.roll(-1, dims=0), weight)


@dataclass(eq=False)
class DecoderLoss:
    """The decoder's diffusion loss; image and caption are dropped independently (unCLIP 2.1)."""

    decoder: Decoder
    clip: CLIP
    schedule: Schedule
    drop: ConditionDropout
    config: LossConfig
    # Train to inpaint random holes; the loss is over the whole image (GLIDE 2.4).
    holes: HoleConfig | None = None
    emb_noise: float = 0.0  # see `add_noise`; needs a layout, or `stats`
    emb_mix: float = 0.0  # see `mix_embeddings`; for images with holes but nothing pasted
    # Fraction of images with holes that get the object of another image and its conditions.
    copy_paste: float = 0.0
    agreement: float = 0.0  # largest weight of `Layout.guide_embedding`; needs a layout
    # With a layout prior, half of the layouts are those of the images, with noise.
    layout_prior: LayoutPrior | None = None
    layout_noise: float = 0.5  # largest, on scaled components
    stats: EmbeddingStats | None = None  # for `emb_noise`; None = those of the layout network

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        config = self.decoder.config
        image_emb = image_embeddings(self.clip, batch)  # from the images as loaded, at CLIP's size
        text, drop_text, _ = _text(self.clip, batch, self.drop.text, config.null_text)
        x_0 = resize_square(batch["image"].to(self.clip.device), config.image_size)
        drop_image, known = torch.rand(len(x_0), device=x_0.device) < self.drop.image, None
        if self.holes is not None:
            x_0, image_emb, text, known = self._with_holes(x_0, image_emb, text, self.holes)
        if self.emb_noise:
            stats = self.decoder.layout if self.stats is None else self.stats
            assert stats is not None
            image_emb = add_noise(image_emb, stats.emb_std, self.emb_noise)
        layout = self._true_layouts(x_0, image_emb)
        conditions = image_emb, text, drop_image, drop_text, known, layout
        kind = config.prediction, config.learned_variance
        return _denoising_loss(model, conditions, x_0, self.schedule, self.config, *kind)

    @torch.no_grad()
    def _true_layouts(self, x_0: Tensor, image_emb: Tensor) -> Tensor | None:
        """Return layouts (B, 3, h, h): for half of the rows those of the images, with noise."""
        if self.layout_prior is None:
            return None
        assert self.decoder.layout is not None
        prior, B = self.layout_prior, len(x_0)
        codes = prior.encode(F.adaptive_avg_pool2d(x_0, prior.config.size))
        codes += self.layout_noise * torch.rand(B, 1).to(codes) * torch.randn_like(codes)
        use = torch.rand(B, 1, 1, 1).to(codes) < 0.5
        return torch.where(use, prior.decode(codes).clamp(-1, 1), self.decoder.layout(image_emb))

    def _with_holes(
        self, x_0: Tensor, image_emb: Tensor, text: TextEncoding, config: HoleConfig
    ) -> tuple[Tensor, Tensor, TextEncoding, Tensor]:
        """Return images, conditions, and the images with holes (B, 4, s, s)."""
        B, device = len(x_0), x_0.device
        holes = random_holes(B, x_0.shape[-1], config).to(device)
        own = partial = ~holes.flatten(1).all(dim=1)  # (B,): something is known
        if self.copy_paste:
            pasted = partial & (torch.rand(B, device=device) < self.copy_paste)
            own = partial & ~pasted
            rows = torch.arange(B, device=device)
            source = torch.where(pasted, rows.roll(-1), rows)  # of the object and the conditions
            x_0, objects = x_0.clone(), x_0[source[pasted]]
            image_emb, text = image_emb[source], text[source]
            x_0[pasted], holes[pasted] = copy_paste(x_0[pasted], objects)
        if self.emb_mix:
            image_emb = mix_embeddings(image_emb, own, self.emb_mix)
        known = masked_image(x_0, holes)
        if self.agreement:
            assert self.decoder.layout is not None
            weight = self.agreement * torch.rand(B, device=device)
            image_emb = self.decoder.layout.guide_embedding(image_emb, known, weight)
        return x_0, image_emb, text, known


@dataclass(eq=False)
class UpsamplerLoss:
    """The upsampler's diffusion loss on crops, its low-resolution input corrupted (unCLIP 2.1)."""

    upsampler: Upsampler
    schedule: Schedule
    corruption: CorruptionConfig
    config: LossConfig

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        config = self.upsampler.config
        x_0 = batch["image"].to(next(self.upsampler.parameters()).device)
        low_side = x_0.shape[-1] * config.low_size // config.high_size
        low_res = corrupt(resize_square(x_0, low_side), self.corruption)
        kind = config.prediction, config.learned_variance
        return _denoising_loss(model, (low_res,), x_0, self.schedule, self.config, *kind)


def resize_square(images: Tensor, side: int) -> Tensor:
    """Resize images (B, 3, S, S) in [-1, 1] to (B, 3, side, side), bicubic and antialiased."""
    if images.shape[-1] == side:
        return images
    return resize(images, (side, side)).clamp(-1, 1)


def _denoising_loss(
    model: nn.Module,
    conditions: tuple,
    x_0: Tensor,
    schedule: Schedule,
    config: LossConfig,
    prediction: Prediction,
    learned_variance: bool = False,
) -> dict[str, Tensor]:
    t = sample_timesteps(len(x_0), schedule, device=x_0.device)
    noise = torch.randn_like(x_0)
    x_t = schedule.add_noise(x_0, noise, t)
    output = model(x_t, t, *conditions)
    losses = diffusion_loss(
        output, x_0, x_t, noise, t, schedule, prediction, learned_variance, config
    )
    return {name: values.mean() for name, values in losses.items()}


@torch.no_grad()
def image_embeddings(clip: CLIP, batch: Batch) -> Tensor:
    """Return the CLIP image embeddings (B, D), precomputed or computed here."""
    if "image_emb" in batch:
        return batch["image_emb"].to(clip.device).float()
    return clip.encode_image(batch["image"]).float()


@torch.no_grad()
def _text(
    clip: CLIP, batch: Batch, p: float, null_text: str
) -> tuple[TextEncoding, Tensor | None, Tensor]:
    """Return encoded captions, the rows that the network must null, and the dropped rows.

    The second is None if the null is the empty prompt, which is then encoded in their place.
    """
    captions, drop = batch["caption"], torch.rand(len(batch["caption"])) < p
    if null_text == "empty_prompt":
        rows = zip(captions, drop, strict=True)
        captions = ["" if dropped else caption for caption, dropped in rows]
    text, drop = clip.encode_captions(captions), drop.to(clip.device)
    return text, None if null_text == "empty_prompt" else drop, drop
