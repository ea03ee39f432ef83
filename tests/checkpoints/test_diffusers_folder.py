"""Folders with their own pipeline.py: diffusers generates the images that we generate."""

from __future__ import annotations

import ast
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler  # noqa: E402
from diffusers.utils import dynamic_modules_utils  # noqa: E402
from parity import randomize  # noqa: E402
from test_convert import own_model  # noqa: E402

import unclip  # noqa: E402
from unclip.checkpoints.convert import convert  # noqa: E402
from unclip.checkpoints.formats import LoadedPrior  # noqa: E402
from unclip.diffusion.schedules import ScheduleConfig  # noqa: E402
from unclip.models.unclip.ar_prior import ARPrior, ARPriorConfig  # noqa: E402
from unclip.models.unclip.decoder import Decoder, DecoderConfig, LayoutConfig  # noqa: E402
from unclip.models.unclip.layout_prior import LayoutPrior, LayoutPriorConfig  # noqa: E402
from unclip.models.unclip.mlp_prior import MLPPrior, MLPPriorConfig  # noqa: E402
from unclip.models.unclip.prior import DiffusionPrior, PriorConfig  # noqa: E402
from unclip.models.unclip.upsampler import Upsampler, UpsamplerConfig  # noqa: E402
from unclip.models.unet import LevelSpec, UNetConfig  # noqa: E402
from unclip.pipelines.unclip.stages import EncodedPrompts  # noqa: E402
from unclip.types import StageOptions, UnCLIPOptions  # noqa: E402

D, OPTIONS = (
    16,
    UnCLIPOptions(
        prior=StageOptions(5, guidance=2.0),
        decoder=StageOptions(4, guidance=3.0),
        upsamplers=(StageOptions(2),),
        prior_candidates=2,
    ),
)
LEVELS = (LevelSpec(16, 1), LevelSpec(32, 2, attention=True))
Prior = Literal["mlp", "diffusion"]
assert_close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)


def make_prior(kind: Prior, bundled: bool) -> DiffusionPrior | MLPPrior:
    null: Any = "learned" if bundled else "empty_prompt"
    if kind == "diffusion":
        return DiffusionPrior(PriorConfig(D, D, 12, 32, depth=2, heads=4, null_text=null))
    config = MLPPriorConfig(
        *(D, D, 12, 32),
        depth=2,
        heads=4,
        mlp_ratio=2,
        null_text=null,
        kind="mlp",
        mlp_width=24,
        mlp_depth=2,
        text_states=not bundled,
    )
    return MLPPrior(config)


def make_layout_prior() -> LayoutPrior:
    network = LayoutPrior(
        LayoutPriorConfig(
            D,
            size=4,
            components=8,
            width=24,
            depth=2,
            steps=4,
            guidance=2.0,
            text_width=D,
            text_heads=3,
        )
    )
    network.fit_components(torch.rand(64, 3, 4, 4) * 4 - 2)
    network.set_stats(torch.randn(D) * 0.1, torch.rand(D) + 0.5)
    return network


def model(bundled: bool, kind: Prior = "mlp", layouts: bool = True) -> unclip.UnCLIPPipeline:
    """A model of the bundled one's structure, or of another that Karlo's layout does not fit.

    layouts: of the bundled one's structure, whether it has a layout prior.
    """
    null: Any = "learned" if bundled else "empty_prompt"
    resample: Any = "conv" if bundled else "residual"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        prior = make_prior(kind, bundled)
        unet = UNetConfig(
            in_channels=10 if bundled else 3,
            out_channels=3 if bundled else 6,
            levels=LEVELS,
            patch=2,
            head_dim=8,
            groups=8,
            context_dim=20,
            resample=resample,
            time_shift="scale_shift" if bundled else "additive",
        )
        decoder = Decoder(
            DecoderConfig(
                unet,
                16,
                D,
                D,
                null_text=null,
                prediction="v" if bundled else "eps",
                learned_variance=not bundled,
                layout=LayoutConfig(D, size=4, width=24, depth=2) if bundled else None,
                inpaints=bundled,
            )
        )
        low = UNetConfig(6, 3, LEVELS[:1], patch=2, head_dim=8, groups=8, resample=resample)
        upsampler = Upsampler(UpsamplerConfig(low, 16, 32, "x0" if bundled else "eps"))
        if bundled:
            upsampler = Upsampler(replace(upsampler.config, residual=True))
        decoder, upsampler = (randomize(network, 0.05) for network in (decoder, upsampler))
        prior = randomize(prior, 0.2)
        prior.set_stats(torch.randn(D) * 0.1, torch.rand(D) + 0.5)
        layout_prior = randomize(make_layout_prior(), 0.2) if bundled and layouts else None
    for network in (decoder.unet, upsampler.unet):
        network.head.weight.data *= 0.1
    schedules = {"prior": ScheduleConfig(), "decoder": ScheduleConfig(shift=2.0)}
    schedules["upsampler_0"] = ScheduleConfig("cosine" if bundled else "linear")
    return unclip.UnCLIPPipeline(
        *(own_model().clip, prior, decoder, [upsampler], OPTIONS),
        layout_prior=layout_prior,
        schedules=schedules,
        name="own",
        licence="MIT",
    )


@pytest.fixture(autouse=True)
def modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def load(folder: Path) -> Any:
    pipe = DiffusionPipeline.from_pretrained(
        str(folder), custom_pipeline=str(folder), trust_remote_code=True
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def difference(ours: list[Any], theirs: list[Any]) -> int:
    pairs = zip(ours, theirs, strict=True)
    return max(int(np.abs(np.int16(np.array(a)) - np.array(b)).max()) for a, b in pairs)


@pytest.mark.parametrize("kind", ["mlp", "diffusion"])
@pytest.mark.parametrize("bundled", [True, False])
def test_diffusers_generates_our_images(bundled: bool, kind: Prior, tmp_path: Path) -> None:
    ours = model(bundled, kind, layouts=kind == "mlp")
    ours.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", "diffusers")
    with pytest.raises(ValueError, match="the pipeline has code of its own"):
        unclip.load(tmp_path / "theirs")
    theirs = load(tmp_path / "theirs")
    expected = ours(["a red apple", "a fish"], num_images=2, seed=3, progress=False).images
    generators = [torch.Generator().manual_seed(seed) for seed in range(3, 7)]
    images = theirs(["a red apple", "a fish"], 2, generators).images
    assert difference(expected, images) <= 2
    assert difference(expected[:2], expected[2:]) > 20  # prompts and seeds matter
    one = theirs("a fish", generator=torch.Generator().manual_seed(5)).images
    assert difference(expected[2:3], one) <= 2

    decoder = replace(OPTIONS.decoder, steps=2, guidance=1.0)
    prior = replace(OPTIONS.prior, guidance=1.0)
    options = replace(OPTIONS, prior=prior, decoder=decoder)
    expected = ours("a fish", seed=3, options=options, progress=False).images
    images = theirs(
        "a fish",
        generator=torch.Generator().manual_seed(3),
        prior_guidance_scale=1.0,
        decoder_guidance_scale=1.0,
        decoder_num_inference_steps=2,
    ).images
    assert difference(expected, images) <= 2


@pytest.mark.parametrize(
    ("kind", "prior"), [("mlp", "MLPPrior"), ("diffusion", "PriorTransformer")]
)
def test_classes_and_schedulers_of_diffusers_are_used(
    kind: Prior, prior: str, tmp_path: Path
) -> None:
    model(True, kind).save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", "diffusers", "bf16")
    theirs = load(tmp_path / "theirs")
    names = {name: type(part).__name__ for name, part in theirs.components.items() if part}
    assert names["prior"] == prior and names["layout_prior"] == "LayoutPrior"
    assert names["prior_scheduler"] == names["layout_prior_scheduler"] == "DDIMScheduler"
    assert names["text_encoder"].startswith("CLIPTextModel")
    theirs.decoder_scheduler = DPMSolverMultistepScheduler.from_config(
        theirs.decoder_scheduler.config
    )
    images = theirs("a fish", output_type="pt", decoder_num_inference_steps=3).images
    assert images.shape == (1, 3, 32, 32) and images.isfinite().all()


@pytest.mark.parametrize("bundled", [True, False])
def test_mlp_prior_and_layout_prior_sample_our_numbers(bundled: bool, tmp_path: Path) -> None:
    ours = model(bundled)
    ours.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", "diffusers")
    theirs, prompts = load(tmp_path / "theirs"), ["a red apple", "a fish"]
    generators, same = ([torch.Generator().manual_seed(i) for i in range(2)] for _ in range(2))
    with torch.inference_mode():
        text = ours.encode_text(prompts)
        emb = ours.sample_prior(text, generators=generators)
        their_text = theirs._encode(prompts)
        assert_close(theirs._sample_prior(their_text, same, 5, 2.0), emb)
        if bundled:
            stage = ours.decoder_stage.layout_stage
            assert stage is not None
            expected = stage.sample(emb, EncodedPrompts(text), generators)
            assert_close(theirs._sample_layout(emb, their_text, same), expected)


def test_the_folder_does_not_need_this_package(tmp_path: Path) -> None:
    model(True).save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", "diffusers")
    for part in ("prior", "null_text", "layout_prior", "decoder", "upsampler_0"):
        assert (tmp_path / "theirs" / part / "networks.py").is_file()
    for file in (tmp_path / "theirs").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        modules = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        modules += [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
        packages = {module.split(".")[0] for module in modules if module}
        assert packages - sys.stdlib_module_names <= {"torch", "diffusers"}


def test_differences_are_reported(tmp_path: Path) -> None:
    pipe = model(True)
    sampled = replace(OPTIONS.decoder, steps=7, eta=0.5)
    pipe.options = replace(OPTIONS, decoder=sampled)
    pipe.save_pretrained(tmp_path / "ours")
    message = "decoder is sampled by plain DDIM; diffusers spaces 7 steps of decoder differently"
    with pytest.warns(UserWarning, match=message):
        convert(tmp_path / "ours", tmp_path / "theirs", "diffusers")
    layouts, pipe.options = pipe.decoder_stage.layout_stage, OPTIONS
    assert layouts is not None
    layouts.network.config = replace(layouts.network.config, steps=3)
    pipe.save_pretrained(tmp_path / "three_steps")
    with pytest.warns(UserWarning, match="diffusers spaces 3 steps of layout_prior differently"):
        convert(tmp_path / "three_steps", tmp_path / "theirs", "diffusers")
    pipe.prior = LoadedPrior(ARPrior(ARPriorConfig(D, D, 12, 32, 2, 4, components=4, buckets=8)))
    pipe.save_pretrained(tmp_path / "ar")
    with pytest.raises(ValueError, match="prior .it is a ARPrior, not a DiffusionPrior or ML"):
        convert(tmp_path / "ar", tmp_path / "nowhere", "diffusers")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.slow
def test_the_bundled_model_gives_the_same_image(tmp_path: Path) -> None:
    convert("emoji", tmp_path / "emoji", "diffusers")
    prompt = "red apple, noto emoji"
    images = load(tmp_path / "emoji")(prompt, generator=torch.Generator().manual_seed(3)).images
    ours = unclip.load("emoji", "cpu")(prompt, seed=3, progress=False).images
    assert difference(ours, images) <= 3
