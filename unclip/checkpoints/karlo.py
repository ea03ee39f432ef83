"""Karlo (kakaobrain/karlo 1.0 alpha) as first published: Lightning checkpoints and OpenAI's CLIP.

The checkpoints come without configurations: sizes are inferred from the tensors, and the rest is
taken from Karlo's repository. Kandinsky 2.1's prior was trained with the same code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from unclip.checkpoints import adm
from unclip.checkpoints.diffusers.layout import KARLO_OPTIONS
from unclip.checkpoints.folders import only_file
from unclip.checkpoints.formats import Bundle, Format, LoadedPrior, States
from unclip.checkpoints.openai.clip import read_clip
from unclip.checkpoints.pickles import read_checkpoint
from unclip.checkpoints.renaming import Part, Rule, build, expecting, move, prefixed, without_prefix
from unclip.checkpoints.states import read_state
from unclip.diffusion.schedules import ScheduleConfig
from unclip.models.unclip.decoder import Decoder, DecoderConfig
from unclip.models.unclip.prior import DiffusionPrior, PriorConfig
from unclip.models.unclip.upsampler import Upsampler, UpsamplerConfig

CLIP_FILE, STATS_FILE = "ViT-L-14.pt", "ViT-L-14_stats.th"
PRIOR_FILE, ANY_PRIOR_FILE = "prior-ckpt*.ckpt", "prior*.ckpt"  # the latter fits Kandinsky's too
DECODER_FILE, UPSAMPLER_FILE = "decoder-ckpt*.ckpt", "improved-sr-ckpt*.ckpt"
LOW_SIZE, HIGH_SIZE = 64, 256
X0_LIMIT = 10.0  # of priors in Karlo's and Kandinsky's own code; diffusers' port of Karlo has 5
# The precision of diffusers' port: Karlo's own is higher, but the difference cannot be seen.
SCHEDULE = ScheduleConfig(precision="float32")
PRIOR_RULES = (
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
STATS_RULES = (move("clip_mean", "emb_mean", lead=1), move("clip_std", "emb_std", lead=1))
TEXT_RULES = (
    move("text_seq_proj.0", "text.proj"),
    move("text_seq_proj.1", "text.norm"),
    move("text_feat_proj", "text_to_time"),
    move("clip_emb", "image_to_time"),
    move("clip_tok_proj", "image_to_context"),
    move("cf_param", "null_image"),
)
# Some versions of the code also save derived tensors: masks, and the tokens of the empty prompt.
DERIVED = ("causal_mask", "cf_token", "cf_mask")
UPSAMPLER_UNETS = {"model_first_steps": "unet", "model_last_step": "last_unet"}


def recognise(folder: Path) -> bool:
    return folder.is_dir() and any(folder.glob(DECODER_FILE))


def load_bundle(folder: Path, dtype: torch.dtype = torch.float32) -> Bundle:
    """Load the folder that Karlo's own code reads; without a prior it makes variations only."""
    networks: dict[str, nn.Module] = {}
    if any(folder.glob(PRIOR_FILE)):
        stats = folder / STATS_FILE
        networks["prior"] = read_prior(only_file(folder, PRIOR_FILE), stats, dtype)
    networks["decoder"] = read_decoder(only_file(folder, DECODER_FILE), dtype)
    options = replace(KARLO_OPTIONS, upsamplers=())
    if any(folder.glob(UPSAMPLER_FILE)):
        networks["upsampler_0"] = read_upsampler(only_file(folder, UPSAMPLER_FILE), dtype)
        options = KARLO_OPTIONS
    return Bundle(
        kind="unclip",
        # Karlo's code squashes an image to a square; diffusers crops a square from it.
        components={"clip": read_clip(folder / CLIP_FILE, resize_mode="squash"), **networks},
        schedules=dict.fromkeys(networks, SCHEDULE),
        options=options,
        name="karlo-v1-alpha",
        licence="CreativeML Open RAIL-M",
    )


def probe(folder: Path) -> States:
    files = {
        "clip": CLIP_FILE,
        "prior": PRIOR_FILE,
        "decoder": DECODER_FILE,
        "upsampler_0": UPSAMPLER_FILE,
    }
    there = {name: pattern for name, pattern in files.items() if any(folder.glob(pattern))}
    return {name: read_state(only_file(folder, pattern)) for name, pattern in there.items()}


def recognise_prior(path: Path) -> bool:
    """Recognise a .ckpt file or a folder with prior*.ckpt."""
    return path.suffix == ".ckpt" or any(path.glob(ANY_PRIOR_FILE))


def load_prior(path: Path, dtype: torch.dtype = torch.float32) -> LoadedPrior:
    """Load a prior of Karlo or Kandinsky 2.1; CLIP's statistics are a file next to it."""
    file = _prior_file(path)
    return LoadedPrior(read_prior(file, file.parent / STATS_FILE, dtype), SCHEDULE)


def _prior_file(path: Path) -> Path:
    return path if path.is_file() else only_file(path, ANY_PRIOR_FILE)


def read_prior(file: Path, stats: Path, dtype: torch.dtype = torch.float32) -> DiffusionPrior:
    """Load a prior; stats: the mean and standard deviation of CLIP's image embeddings."""
    state = read_state(file)
    config = prior_config(state, file)
    match read_checkpoint(stats):
        case (Tensor() as mean, Tensor() as std):
            state |= {"clip_mean": mean.reshape(1, -1), "clip_std": std.reshape(1, -1)}
        case other:
            raise ValueError(f"{stats} is a {type(other).__name__}; expected mean and deviation")
    return build(DiffusionPrior, config, [Part(state, prior_rules(config), file)], dtype, DERIVED)


def prior_config(state: Mapping[str, Tensor], source: Path) -> PriorConfig:
    """Infer the sizes of a prior from its tensors."""
    with expecting("a prior of Karlo or Kandinsky 2.1", source):
        width, text_width = state["model.text_enc_proj.weight"].shape
        return PriorConfig(
            emb_dim=state["model.clip_img_proj.weight"].shape[1],
            text_width=text_width,
            context_length=state["model.positional_embedding"].shape[1] - 4,
            width=width,
            depth=adm.transformer_depth(state, "model.transformer."),
            heads=width // adm.HEAD_DIM,
            null_text="empty_prompt",
            x0_limit=X0_LIMIT,
        )


def prior_rules(config: PriorConfig) -> list[Rule]:
    """PriorDiffusionModel -> DiffusionPrior."""
    transformer = adm.transformer_rules(config.depth, config.heads)
    return [
        *prefixed("model.", "", PRIOR_RULES),
        *prefixed("model.transformer.", "", transformer),
        *STATS_RULES,
    ]


def read_decoder(file: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """Load a Text2ImProgressiveModel, which generates 64 x 64 images."""
    state = read_state(file)
    unet = adm.unet_config(without_prefix(state, "model."), file)
    with expecting("a decoder of Karlo", file):
        text_width = state["model.text_seq_proj.0.weight"].shape[1]
        config = DecoderConfig(
            unet,
            LOW_SIZE,
            emb_dim=len(state["model.cf_param"]),
            text_width=text_width,
            context_tokens=len(state["model.clip_tok_proj.bias"])
            // len(state["model.text_seq_proj.0.bias"]),
            null_text="empty_prompt",
            learned_variance=True,
        )
    return build(Decoder, config, [Part(state, decoder_rules(config), file)], dtype, DERIVED)


def decoder_rules(config: DecoderConfig) -> list[Rule]:
    """Text2ImProgressiveModel -> Decoder."""
    unet = adm.unet_rules(config.unet)
    return [*prefixed("model.", "unet.", unet), *prefixed("model.", "", TEXT_RULES)]


def read_upsampler(file: Path, dtype: torch.dtype = torch.float32) -> Upsampler:
    """Load an ImprovedSupRes64to256ProgressiveModel, which has another U-Net for the last step."""
    state = read_state(file)
    first, last = (adm.unet_config(without_prefix(state, f"{u}."), file) for u in UPSAMPLER_UNETS)
    config = UpsamplerConfig(first, LOW_SIZE, HIGH_SIZE, last_unet=last)
    return build(Upsampler, config, [Part(state, upsampler_rules(config), file)], dtype)


def upsampler_rules(config: UpsamplerConfig) -> list[Rule]:
    """ImprovedSupRes64to256ProgressiveModel -> Upsampler."""
    assert config.last_unet is not None
    unets = zip(UPSAMPLER_UNETS.items(), (config.unet, config.last_unet), strict=True)
    return [
        rule
        for (foreign, ours), unet in unets
        for rule in prefixed(f"{foreign}.", f"{ours}.", adm.unet_rules(unet))
    ]


FORMAT = Format("Karlo's own", "unclip", recognise, load_bundle, probe)
PRIOR = Format(
    "Karlo's and Kandinsky's own",
    "prior",
    recognise_prior,
    load_prior,
    lambda path: {"prior": read_state(_prior_file(path))},
)
