"""Karlo's pipelines in diffusers at toy width with random weights, and their folders.

pipe = text_to_image()                    # diffusers' UnCLIPPipeline
folder = write(pipe, tmp_path / "karlo")  # as published: what `unclip.load` reads
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import randomize
from torch import nn

import unclip.clip  # noqa: F401 - before whatever imports torchvision, which may need its help

transformers = pytest.importorskip("transformers")

from diffusers import PriorTransformer, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel  # noqa: E402
from diffusers.pipelines.deprecated.unclip import UnCLIPImageVariationPipeline, UnCLIPPipeline  # noqa: E402
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel  # noqa: E402
from open_clip.tokenizer import SimpleTokenizer  # noqa: E402

EMB_DIM, CONTEXT, CONTEXT_DIM, IMAGE_SIZE = 16, 16, 20, 32
MERGES = 200  # of CLIP's 48,894: a smaller vocabulary
SPECIAL = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "!",
}

Pipeline = UnCLIPPipeline | UnCLIPImageVariationPipeline


def text_to_image(seed: int = 0, **sizes: Any) -> UnCLIPPipeline:
    """Build a pipeline like Karlo's; sizes: `widths` of the U-Nets, `vocabulary` in merges."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        prior = PriorTransformer(
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=2,
            embedding_dim=EMB_DIM,
            num_embeddings=CONTEXT,
        )
        randomize(prior)
        with torch.no_grad():
            prior.clip_std.uniform_(0.5, 1.5)
        scheduler = UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0)
        return quiet(UnCLIPPipeline(prior=prior, prior_scheduler=scheduler, **_shared(**sizes)))


def image_variation(seed: int = 0, **sizes: Any) -> UnCLIPImageVariationPipeline:
    """Build the pipeline without a prior and with an image encoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vision = transformers.CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=96,
            projection_dim=EMB_DIM,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=IMAGE_SIZE,
            patch_size=8,
        )
        side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        extractor = transformers.CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE}, crop_size=side
        )
        encoder = randomize(transformers.CLIPVisionModelWithProjection(vision).eval())
        shared = _shared(**sizes)
        return quiet(
            UnCLIPImageVariationPipeline(
                image_encoder=encoder, feature_extractor=extractor, **shared
            )
        )


def _shared(widths: tuple[int, ...] = (16, 32), vocabulary: int = MERGES) -> dict[str, Any]:
    """Return the components of both pipelines."""
    attended = len(widths) - 1
    decoder = UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=6,
        layers_per_block=1,
        block_out_channels=widths,
        down_block_types=("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * attended),
        up_block_types=(*("SimpleCrossAttnUpBlock2D",) * attended, "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        cross_attention_dim=CONTEXT_DIM,
        class_embed_type="identity",
        attention_head_dim=8,
        resnet_time_scale_shift="scale_shift",
        norm_num_groups=8,
    )
    super_res = [
        UNet2DModel(
            sample_size=64,
            in_channels=6,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=widths,
            down_block_types=("ResnetDownsampleBlock2D",) * len(widths),
            up_block_types=("ResnetUpsampleBlock2D",) * len(widths),
            add_attention=False,
            norm_num_groups=8,
        )
        for _ in range(2)
    ]
    text_proj = UnCLIPTextProjModel(
        clip_embeddings_dim=EMB_DIM, time_embed_dim=4 * widths[0], cross_attention_dim=CONTEXT_DIM
    )
    vocab, merges = clip_vocabulary(vocabulary)
    text = transformers.CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=EMB_DIM,
        intermediate_size=4 * EMB_DIM,
        projection_dim=EMB_DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=len(vocab) - 2,
        eos_token_id=len(vocab) - 1,
    )
    tokenizer = transformers.CLIPTokenizer(
        vocab=vocab, merges=[tuple(m.split()) for m in merges], model_max_length=CONTEXT, **SPECIAL
    )
    return {
        "decoder": scale_output(randomize(decoder, 0.03)),
        "text_proj": randomize(text_proj),
        "text_encoder": randomize(transformers.CLIPTextModelWithProjection(text).eval()),
        "tokenizer": tokenizer,
        "super_res_first": scale_output(randomize(super_res[0], 0.03)),
        "super_res_last": scale_output(randomize(super_res[1], 0.03)),
        "decoder_scheduler": UnCLIPScheduler(variance_type="learned_range"),
        "super_res_scheduler": UnCLIPScheduler(),
    }


def scale_output(unet: nn.Module, scale: float = 0.3) -> nn.Module:
    """Scale the output down: random predictions would amplify rounding errors at every step."""
    with torch.no_grad():
        for parameter in unet.conv_out.parameters():
            parameter *= scale
    return unet


def clip_vocabulary(merges: int = MERGES) -> tuple[dict[str, int], list[str]]:
    """Return the first merges of CLIP's tokenizer and their vocabulary for transformers."""
    theirs = SimpleTokenizer()
    words = [*list(theirs.encoder)[: 512 + merges], SPECIAL["bos_token"], SPECIAL["eos_token"]]
    return {word: i for i, word in enumerate(words)}, [
        " ".join(pair) for pair in list(theirs.bpe_ranks)[:merges]
    ]


def write(
    pipe: Pipeline,
    folder: Path,
    *,
    safetensors: bool = True,
    variant: str | None = None,
    shard_size: str = "10GB",
) -> Path:
    """Save a pipeline in the layout of the published Karlo; current diffusers has another."""
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            kinds = {
                "safe_serialization": safetensors,
                "variant": variant,
                "max_shard_size": shard_size,
            }
            if isinstance(part, transformers.PreTrainedModel):
                kinds.pop("variant")
                kinds.pop("safe_serialization")
            part.save_pretrained(folder / name, **kinds)
            if isinstance(part, transformers.PreTrainedModel):
                _as(folder / name, safetensors, variant)
        elif name != "tokenizer":
            part.save_pretrained(folder / name)
    index = {"_class_name": type(pipe).__name__, "_diffusers_version": "0.12.0"}
    for name, part in pipe.components.items():
        library = type(part).__module__.split(".")[0]
        index[name] = ["unclip" if name == "text_proj" else library, type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    write_tokenizer(pipe.tokenizer, folder / "tokenizer")
    return folder


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write vocab.json and merges.txt, as transformers did up to version 4."""
    folder.mkdir(parents=True, exist_ok=True)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *map(" ".join, model["merges"]), ""])
    )
    settings = {
        **SPECIAL,
        "model_max_length": tokenizer.model_max_length,
        "tokenizer_class": "CLIPTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps(SPECIAL))


def _as(folder: Path, safetensors: bool, variant: str | None) -> None:
    """Turn a safetensors file of transformers into a .bin, or rename it to a variant."""
    from safetensors.torch import load_file

    file = folder / "model.safetensors"
    infix = f".{variant}" if variant else ""
    if not safetensors:
        torch.save(load_file(file), folder / f"pytorch_model{infix}.bin")
        file.unlink()
    elif variant:
        file.rename(folder / f"model{infix}.safetensors")


def quiet(pipe: Pipeline) -> Pipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe
