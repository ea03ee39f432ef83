"""Karlo (kakaobrain/karlo 1.0 alpha) as it was first published: Lightning checkpoints, OpenAI's CLIP, its statistics.

The configurations don't ship with them: the tensors tell the sizes, Karlo's repository the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from unclip.checkpoints import adm
from unclip.checkpoints.diffusers.layout import KARLO_OPTIONS
from unclip.checkpoints.openai.clip import read_clip
from unclip.checkpoints.pickles import read_checkpoint, read_state
from unclip.checkpoints.renaming import Rule, build, move, under
from unclip.checkpoints.store import Bundle
from unclip.diffusion.schedules import ScheduleConfig
from unclip.models.unclip.decoder import Decoder, DecoderConfig
from unclip.models.unclip.prior import DiffusionPrior, PriorConfig
from unclip.models.unclip.upsampler import Upsampler, UpsamplerConfig

PRIOR_FILE, DECODER_FILE, UPSAMPLER_FILE = (
    "prior-ckpt*.ckpt",
    "decoder-ckpt*.ckpt",
    "improved-sr-ckpt*.ckpt",
)
CLIP_FILE, STATS_FILE = "ViT-L-14.pt", "ViT-L-14_stats.th"
LOW_SIZE, HIGH_SIZE = 64, 256
SCHEDULE = ScheduleConfig(
    precision="float32"
)  # diffusers'; Karlo's own is finer, but both routes shall draw the same
PRIOR = (
    move("time_embed.0", "time.fc1"),
    move("time_embed.2", "time.fc2"),
    move("text_enc_proj", "state_proj"),
    move("text_emb_proj", "emb_proj"),
    move("clip_img_proj", "x_proj"),
    move("positional_embedding", "positions", lead=1),
    move("prd_emb", "query", lead=2),
    move("final_ln", "norm"),
    move("out_proj", "head"),
)
STATS = (move("clip_mean", "emb_mean", lead=1), move("clip_std", "emb_std", lead=1))
# Other versions of the same code save what they compute themselves: masks, and the tokens of the empty prompt.
DERIVED = ("causal_mask", "cf_token", "cf_mask")
TEXT = (
    move("text_seq_proj.0", "text.proj"),
    move("text_seq_proj.1", "text.norm"),
    move("text_feat_proj", "text_to_time"),
    move("clip_emb", "image_to_time"),
    move("clip_tok_proj", "image_to_context"),
    move("cf_param", "null_image"),
)
UPSAMPLER_UNETS = {"model_first_steps": "unet", "model_last_step": "last_unet"}


def recognise(folder: Path) -> bool:
    return folder.is_dir() and any(folder.glob(DECODER_FILE))


def load_bundle(folder: Path, dtype: torch.dtype = torch.float32) -> Bundle:
    """The folder that Karlo's own code reads; without a prior in it, the model draws variations only."""
    networks: dict[str, nn.Module] = {}
    if any(folder.glob(PRIOR_FILE)):
        networks["prior"] = read_prior(only(folder, PRIOR_FILE), folder / STATS_FILE, dtype)
    networks["decoder"] = read_decoder(only(folder, DECODER_FILE), dtype)
    if any(folder.glob(UPSAMPLER_FILE)):
        networks["upsampler_0"] = read_upsampler(only(folder, UPSAMPLER_FILE), dtype)
    return Bundle(
        kind="unclip",
        components={"clip": read_clip(folder / CLIP_FILE), **networks},
        schedules=dict.fromkeys(networks, SCHEDULE),
        options=KARLO_OPTIONS
        if "upsampler_0" in networks
        else replace(KARLO_OPTIONS, upsamplers=()),
        name="karlo-v1-alpha",
        licence="CreativeML Open RAIL-M",
    )


def only(folder: Path, pattern: str) -> Path:
    """The one file in a folder that has such a name."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        told = ", ".join(file.name for file in found) or "none"
        raise ValueError(f"{folder} should hold one file {pattern}, but holds {told}")
    return found[0]


def read_prior(file: Path, stats: Path, dtype: torch.dtype = torch.float32) -> DiffusionPrior:
    """A prior, and from a file of its own the mean and standard deviation of CLIP's image embeddings."""
    state = read_state(file)
    config = prior_config(state, file)
    match read_checkpoint(stats):
        case (Tensor() as mean, Tensor() as std):
            state |= {"clip_mean": mean.reshape(1, -1), "clip_std": std.reshape(1, -1)}
        case other:
            raise ValueError(
                f"{stats} holds a {type(other).__name__}; expected mean and standard deviation"
            )
    return build(DiffusionPrior, config, state, prior_rules(config), file, dtype, ignored=DERIVED)


def prior_config(state: Mapping[str, Tensor], source: Path) -> PriorConfig:
    """The sizes of a prior as its tensors tell them."""
    try:
        width, text_width = state["model.text_enc_proj.weight"].shape
        return PriorConfig(
            emb_dim=state["model.clip_img_proj.weight"].shape[1],
            text_width=text_width,
            context_length=state["model.positional_embedding"].shape[1] - 4,
            width=width,
            depth=adm.transformer_depth(state, "model.transformer."),
            heads=width // adm.HEAD_DIM,
            null_text="empty_prompt",
        )
    except KeyError as error:
        raise ValueError(
            f"{source} holds no prior of Karlo's: {error.args[0]} is missing"
        ) from None


def prior_rules(config: PriorConfig) -> list[Rule]:
    """PriorDiffusionModel -> DiffusionPrior."""
    transformer = adm.transformer_rules(config.depth, config.heads)
    return [*under("model.", "", PRIOR), *under("model.transformer.", "", transformer), *STATS]


def read_decoder(file: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """Text2ImProgressiveModel: 64 x 64 pictures."""
    state = read_state(file)
    unet = adm.unet_config(under_prefix(state, "model."), file)
    try:
        emb_dim, text_width = (
            len(state["model.cf_param"]),
            state["model.text_seq_proj.0.weight"].shape[1],
        )
        context_tokens = len(state["model.clip_tok_proj.bias"]) // len(
            state["model.text_seq_proj.0.bias"]
        )
    except KeyError as error:
        raise ValueError(
            f"{file} holds no decoder of Karlo's: {error.args[0]} is missing"
        ) from None
    config = DecoderConfig(
        unet,
        LOW_SIZE,
        emb_dim,
        text_width,
        context_tokens,
        null_text="empty_prompt",
        learned_variance=True,
    )
    return build(Decoder, config, state, decoder_rules(config), file, dtype, ignored=DERIVED)


def decoder_rules(config: DecoderConfig) -> list[Rule]:
    """Text2ImProgressiveModel -> Decoder."""
    return [*under("model.", "unet.", adm.unet_rules(config.unet)), *under("model.", "", TEXT)]


def read_upsampler(file: Path, dtype: torch.dtype = torch.float32) -> Upsampler:
    """ImprovedSupRes64to256ProgressiveModel: one U-Net for the last step, another for those before."""
    state = read_state(file)
    first, last = (
        adm.unet_config(under_prefix(state, f"{name}."), file) for name in UPSAMPLER_UNETS
    )
    config = UpsamplerConfig(first, LOW_SIZE, HIGH_SIZE, last_unet=last)
    return build(Upsampler, config, state, upsampler_rules(config), file, dtype)


def upsampler_rules(config: UpsamplerConfig) -> list[Rule]:
    """ImprovedSupRes64to256ProgressiveModel -> Upsampler."""
    unets = zip(UPSAMPLER_UNETS.items(), (config.unet, config.last_unet), strict=True)
    return [
        rule
        for (there, here), unet in unets
        for rule in under(f"{there}.", f"{here}.", adm.unet_rules(unet))
    ]


def under_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
