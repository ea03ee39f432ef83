"""Priors on their own: published ones match their own code and work in fitting pipelines."""

from __future__ import annotations

import json
from pathlib import Path

import karlo
import pytest
import torch
from conftest import EMB_DIM, tiny_prior
from diffusers import (
    KandinskyPriorPipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    UnCLIPScheduler,
)
from parity import randomize
from recorded import numbers, recording, sampled, weights

import unclip
from unclip.checkpoints.store import save_component
from unclip.diffusion.schedules import ScheduleConfig
from unclip.models.unclip.prior import DiffusionPrior
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.types import StageOptions, TextEncoding

RECORDED = recording("kandinsky")["prior"]


def write_scheduler(folder: Path, limit: float) -> None:
    UnCLIPScheduler(prediction_type="sample", clip_sample_range=limit).save_pretrained(folder)


@pytest.fixture
def transformer(tmp_path: Path) -> Path:
    """Kandinsky's prior in diffusers' layout, with another width and limit than Karlo's."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
    prior = randomize(PriorTransformer(**sizes, embedding_dim=20, num_embeddings=7))
    with torch.no_grad():
        prior.clip_std.uniform_(0.5, 1.5)
    prior.save_pretrained(tmp_path / "kandinsky" / "prior")
    write_scheduler(tmp_path / "kandinsky" / "scheduler", limit=10.0)
    index = {"_class_name": "KandinskyV22PriorPipeline", "prior": ["diffusers", "PriorTransformer"]}
    (tmp_path / "kandinsky" / "model_index.json").write_text(json.dumps(index))
    return tmp_path / "kandinsky"


@torch.no_grad()
@pytest.mark.parametrize("part", ["", "prior"])
def test_a_prior_transformer_matches_diffusers(part: str, transformer: Path) -> None:
    prior = unclip.load_prior(transformer / part).network
    theirs = PriorTransformer.from_pretrained(transformer / "prior")
    text = TextEncoding(
        numbers("e", (2, 20)), numbers("s", (2, 7, 20)), torch.arange(7) < torch.tensor([[7], [2]])
    )
    x, t = numbers("x", (2, 20)), torch.tensor([999, 5])
    expected = theirs(x, t, text.emb, text.states, text.mask).predicted_image_embedding
    torch.testing.assert_close(prior(x, t, text), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(prior.denormalize(x), theirs.post_process_latents(x))
    assert prior.x0_limit == 10.0 and prior.config.null_text == "empty_prompt"


@pytest.mark.parametrize("kind", [KandinskyPriorPipeline, KandinskyV22PriorPipeline])
def test_embeddings_match_kandinskys_pipeline(kind: type, tmp_path: Path) -> None:
    """Same seed, steps and guidance; the pipeline's CLIP has an equal text encoder."""
    text_to_image, variation = karlo.text_to_image(), karlo.image_variation()
    parts = {name: getattr(text_to_image, name) for name in ("prior", "text_encoder", "tokenizer")}
    scheduler = UnCLIPScheduler(
        prediction_type="sample", clip_sample_range=0.7
    )  # small enough to make a difference
    theirs = kind(
        **parts,
        image_encoder=variation.image_encoder,
        image_processor=variation.feature_extractor,
        scheduler=scheduler,
    )
    theirs.set_progress_bar_config(disable=True)
    theirs.prior.save_pretrained(tmp_path / "kandinsky" / "prior")
    scheduler.save_pretrained(tmp_path / "kandinsky" / "scheduler")
    pipe = unclip.load(karlo.write(text_to_image, tmp_path / "karlo"), device="cpu")
    expected = theirs(
        "a red fish", num_inference_steps=5, generator=torch.Generator().manual_seed(3)
    ).image_embeds

    def sampled_embedding() -> torch.Tensor:
        options = StageOptions(steps=5, guidance=4.0, sampler="ancestral")
        generators = [torch.Generator().manual_seed(3)]
        return pipe.sample_prior(
            pipe.encode_text("a red fish"), generators=generators, options=options, candidates=1
        )

    assert (sampled_embedding() - expected).abs().max() > 0.1
    pipe.prior = unclip.load_prior(tmp_path / "kandinsky" / "prior")
    torch.testing.assert_close(sampled_embedding(), expected, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("wrapped", [False, True])
def test_kandinskys_own_checkpoint_matches_its_code(wrapped: bool, tmp_path: Path) -> None:
    state = weights(RECORDED["shapes"]) | {"causal_mask": torch.zeros(1, 10, 10)}
    torch.save({"state_dict": state} if wrapped else state, tmp_path / "prior_fp16.ckpt")
    torch.save((torch.zeros(24), torch.ones(24)), tmp_path / "ViT-L-14_stats.th")
    text = TextEncoding(
        numbers("text.emb", (2, 24)),
        numbers("text.states", (2, 6, 40)),
        torch.arange(6) < torch.tensor([[5], [3]]),
    )
    for path in (tmp_path, tmp_path / "prior_fp16.ckpt"):
        prior = unclip.load_prior(path).network
        output = prior(numbers("x.prior", (2, 24)), torch.tensor([999, 3]), text)
        assert sampled(output) == pytest.approx(RECORDED["output"], abs=1e-5)


def test_our_own_prior_has_its_schedule(
    tmp_path: Path, tiny_pipe: UnCLIPPipeline, tiny_folder: Path
) -> None:
    other = tiny_prior()
    save_component(other, tmp_path / "prior", schedule=ScheduleConfig("linear", 500))
    prior = unclip.load_prior(tmp_path / "prior")
    assert all(
        torch.equal(tensor, prior.network.state_dict()[name])
        for name, tensor in other.state_dict().items()
    )
    pipe = unclip.load(tiny_folder, device="cpu")
    pipe.prior = prior
    assert pipe.prior is prior.network and pipe.schedules["prior"].config == ScheduleConfig(
        "linear", 500
    )
    pipe.save_pretrained(tmp_path / "changed")
    assert unclip.load_prior(tmp_path / "changed").schedule == ScheduleConfig("linear", 500)


def test_the_prior_of_a_whole_model_is_loaded(tiny_pipe: UnCLIPPipeline, tiny_folder: Path) -> None:
    prior = unclip.load_prior(tiny_folder, dtype=torch.bfloat16)
    network = prior.network
    assert network.query.dtype == torch.bfloat16 and network.emb_mean.dtype == torch.float32
    assert prior.schedule == ScheduleConfig()
    assert torch.equal(network.query, tiny_pipe.prior.query.bfloat16())


def test_a_prior_takes_the_dtype_of_its_pipeline(tiny_folder: Path) -> None:
    pipe = unclip.load(tiny_folder, device="cpu", dtype=torch.bfloat16)
    pipe.prior = unclip.load_prior(tiny_folder)
    assert pipe.prior.query.dtype == torch.bfloat16 and pipe.prior.emb_std.dtype == torch.float32
    assert not pipe.prior.query.requires_grad


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"emb_dim": 20}, "prior has emb_dim 20, but CLIP has 16"),
        ({"text_width": 5}, "prior has text_width 5, but"),
    ],
)
def test_a_prior_of_another_clip_is_refused(
    sizes: dict[str, int], message: str, tiny_folder: Path
) -> None:
    pipe = unclip.load(tiny_folder, device="cpu")
    kept = pipe.prior
    with pytest.raises(ValueError, match=message):
        pipe.prior = tiny_prior(**sizes)
    with pytest.raises(ValueError, match=r"prior is a str; expected a prior, .*load_prior"):
        pipe.prior = "kandinsky"
    assert pipe.prior is kept and kept.config.emb_dim == EMB_DIM


def test_paths_without_a_prior_are_refused(
    tmp_path: Path, tiny_folder: Path, transformer: Path
) -> None:
    with pytest.raises(ValueError, match="is not a prior of a known format"):
        unclip.load_prior(tmp_path)
    with pytest.raises(ValueError, match="decoder is a Decoder; expected a prior"):
        unclip.load_prior(tiny_folder / "decoder")
    with pytest.raises(ValueError, match="unknown model 'kandinsky'"):
        unclip.load_prior("kandinsky")
    (transformer / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"scheduler_config\.json is missing"):
        unclip.load_prior(transformer)


def test_a_prior_is_not_a_whole_model(tmp_path: Path) -> None:
    torch.save(weights(RECORDED["shapes"]), tmp_path / "prior_fp16.ckpt")
    with pytest.raises(
        ValueError, match=r"is a prior, not a whole model; load it with unclip\.load_prior"
    ):
        unclip.load(tmp_path)


def test_the_limit_of_x0_is_checked() -> None:
    assert isinstance(tiny_prior(x0_limit=None), DiffusionPrior)
    with pytest.raises(ValueError, match="x0_limit is 0; expected more than 0"):
        tiny_prior(x0_limit=0)
