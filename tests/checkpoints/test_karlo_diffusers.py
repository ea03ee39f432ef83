"""Karlo in diffusers' layout: every kind of file loads, and seeds give diffusers' images."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import karlo
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import unclip
from unclip.checkpoints.diffusers import load as diffusers
from unclip.cli.main import main
from unclip.pipelines.request import generators_from
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.types import StageOptions, UnCLIPOptions

PROMPT = "A red, RED apple!"


@pytest.fixture(scope="module")
def reference() -> karlo.UnCLIPPipeline:
    return karlo.text_to_image()


@pytest.fixture(scope="module")
def folder(reference: karlo.UnCLIPPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return karlo.write(reference, tmp_path_factory.mktemp("text") / "karlo")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> UnCLIPPipeline:
    return unclip.load(folder, "cpu")


@pytest.fixture(scope="module")
def images() -> karlo.UnCLIPImageVariationPipeline:
    return karlo.image_variation()


@pytest.fixture(scope="module")
def variations(
    images: karlo.UnCLIPImageVariationPipeline, tmp_path_factory: pytest.TempPathFactory
) -> UnCLIPPipeline:
    return unclip.load(karlo.write(images, tmp_path_factory.mktemp("image") / "karlo"), "cpu")


def image(size: tuple[int, int]) -> Image.Image:
    blobs = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blobs).resize(size, Image.Resampling.BICUBIC)


def assert_same_image(theirs: np.ndarray, ours: torch.Tensor) -> None:
    """theirs (S, S, 3) in [0, 1], ours (1, 3, S, S) in [-1, 1]."""
    ours = (ours[0].permute(1, 2, 0) * 0.5 + 0.5).clamp(0, 1)
    difference = (torch.from_numpy(theirs) - ours).abs()
    assert difference.max() <= 1e-2 and difference.mean() <= 1e-3, (
        difference.max(),
        difference.mean(),
    )
    assert ours.std() > 0.1


def generate(
    pipe: UnCLIPPipeline, prompt: str, seed: int, options: UnCLIPOptions | None = None
) -> torch.Tensor:
    options, generators = options or pipe.options, generators_from([seed])
    text = pipe.encode_text(prompt)
    emb = pipe.sample_prior(text, generators=generators, options=options.prior)
    small = pipe.decode(emb, text, generators=generators, options=options.decoder)
    return pipe.upsample(small, generators=generators, options=options.upsamplers)


def test_options_and_schedules_are_those_of_karlo(pipe: UnCLIPPipeline) -> None:
    assert pipe.options == UnCLIPOptions(
        prior=StageOptions(25, guidance=4.0, sampler="ancestral"),
        decoder=StageOptions(25, guidance=8.0, sampler="ancestral"),
        upsamplers=(StageOptions(7, sampler="ancestral"),),
        prior_candidates=1,
    )
    assert {schedule.config.kind for schedule in pipe.schedules.values()} == {"cosine"}
    assert pipe.prior.x0_limit == 5.0 and pipe.decoder.config.learned_variance
    assert len(pipe.upsamplers) == 1 and pipe.upsamplers[0].last_unet is not None
    assert pipe.name == "karlo"


@torch.no_grad()
def test_every_network_matches_diffusers(
    reference: karlo.UnCLIPPipeline, pipe: UnCLIPPipeline
) -> None:
    inputs = reference.tokenizer(
        [PROMPT, ""], padding="max_length", max_length=karlo.CONTEXT, return_tensors="pt"
    )
    theirs, mask = reference.text_encoder(inputs.input_ids), inputs.attention_mask.bool()
    text = pipe.encode_text([PROMPT, ""])
    assert torch.equal(text.ids, inputs.input_ids) and torch.equal(text.mask, mask)
    close(text.emb, theirs.text_embeds)
    close(text.states, theirs.last_hidden_state)

    torch.manual_seed(0)
    t, x_t = torch.tensor([7, 990]), torch.randn(2, karlo.EMB_DIM)
    prior = reference.prior(x_t, t, text.emb, text.states, mask).predicted_image_embedding
    close(pipe.prior(x_t, t, text), prior)
    emb, x_t = reference.prior.post_process_latents(prior), torch.randn(2, 3, 16, 16)
    close(pipe.prior.denormalize(prior), emb)
    states, shift = reference.text_proj(
        image_embeddings=emb,
        prompt_embeds=text.emb,
        text_encoder_hidden_states=text.states,
        do_classifier_free_guidance=False,
    )
    padded = torch.nn.functional.pad(mask, (4, 0), value=True)
    close(
        pipe.decoder(x_t, t, emb, text),
        reference.decoder(x_t, t, states, shift, attention_mask=padded).sample,
    )
    x_t, low_res = torch.randn(2, 2, 3, 64, 64)
    for last, unet in enumerate((reference.super_res_first, reference.super_res_last)):
        upsampler = pipe.upsamplers[0]
        ours = (upsampler.denoise_last if last else upsampler.denoise)(x_t, t, low_res)
        close(ours, unet(torch.cat([x_t, low_res], dim=1), t).sample)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("prompt", "seed"), [(PROMPT, 5), ("", 1), ("fish", 2)])
def test_a_seed_gives_the_image_of_diffusers(reference, pipe, prompt: str, seed: int) -> None:
    theirs = reference(
        prompt, generator=torch.Generator().manual_seed(seed), output_type="np"
    ).images[0]
    assert_same_image(theirs, generate(pipe, prompt, seed))
    ours = pipe(prompt, seed=seed, progress=False).images[0]
    assert np.abs(np.asarray(ours) / 255 - theirs).max() <= 1e-2 + 1 / 255


@pytest.mark.parametrize(
    ("steps", "prior_guidance", "guidance"),
    [((10, 12, 8), 2.0, 3.5), ((8, 8, 9), 1.0, 1.0), ((8, 8, 9), 1.0, 8.0)],
)
def test_other_steps_and_scales_match_diffusers(
    reference, pipe, steps, prior_guidance, guidance
) -> None:
    theirs = reference(
        PROMPT,
        generator=torch.Generator().manual_seed(3),
        prior_num_inference_steps=steps[0],
        decoder_num_inference_steps=steps[1],
        super_res_num_inference_steps=steps[2],
        prior_guidance_scale=prior_guidance,
        decoder_guidance_scale=guidance,
        output_type="np",
    ).images[0]
    prior, decoder, upsampler = pipe.options.prior, pipe.options.decoder, pipe.options.upsamplers[0]
    options = replace(
        pipe.options,
        prior=replace(prior, steps=steps[0], guidance=prior_guidance),
        decoder=replace(decoder, steps=steps[1], guidance=guidance),
        upsamplers=(replace(upsampler, steps=steps[2]),),
    )
    assert_same_image(theirs, generate(pipe, PROMPT, 3, options))


def test_variations_match_diffusers(images, variations: UnCLIPPipeline) -> None:
    """Both halves of the guidance have the prompt ""."""
    theirs = images(
        image((32, 32)), generator=torch.Generator().manual_seed(1), output_type="np"
    ).images[0]
    generators, emb = generators_from([1]), variations.encode_image(image((32, 32)))
    small = variations.decode(emb, generators=generators)
    assert_same_image(theirs, variations.upsample(small, generators=generators))
    assert len(variations.variations(image((50, 41)), num_images=2, seed=0, progress=False)) == 2
    with pytest.raises(ValueError, match="has no prior"):
        variations("a red apple")


def test_variations_without_an_image_encoder_are_refused(pipe: UnCLIPPipeline) -> None:
    with pytest.raises(ValueError, match="has no image encoder.*give image_emb"):
        pipe.variations(image((32, 32)))
    emb = pipe.sample_prior(pipe.encode_text("fish"))
    assert len(pipe.variations(image_emb=emb, seed=0, progress=False)) == 1


@pytest.mark.parametrize(
    "kind",
    [
        {"safetensors": False},
        {"variant": "fp16"},
        {"shard_size": "100KB"},
        {"shard_size": "100KB", "safetensors": False, "variant": "fp16"},
    ],
    ids=str,
)
def test_every_weight_file_format_loads(
    reference, pipe, tmp_path: Path, kind: dict[str, Any], capsys
) -> None:
    loaded = unclip.load(karlo.write(reference, tmp_path / "karlo", **kind), "cpu")
    assert_equal(loaded, pipe)
    assert main(["info", str(tmp_path / "karlo")]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if " M parameters" in line}
    parameters = sum(p.numel() for p in reference.decoder.parameters())
    assert rows["decoder"][0] == f"{parameters / 1e6:.2f}" and rows["decoder"][-1] == "F32"
    assert set(rows) == {
        "prior",
        "text_encoder",
        "text_proj",
        "decoder",
        "super_res_first",
        "super_res_last",
        "all",
    }


def assert_equal(loaded: UnCLIPPipeline, pipe: UnCLIPPipeline) -> None:
    for name, module in {"clip": pipe.clip, **pipe.networks()}.items():
        state = {"clip": loaded.clip, **loaded.networks()}[name].state_dict()
        assert state.keys() == module.state_dict().keys()
        assert all(torch.equal(state[key], value) for key, value in module.state_dict().items())


def test_full_precision_is_preferred_to_a_variant(
    folder: Path, pipe: UnCLIPPipeline, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "karlo"))
    for file in copy.rglob("*.safetensors"):
        halves = {name: tensor.half() for name, tensor in load_file(file).items()}
        save_file(halves, file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    assert_equal(unclip.load(copy, "cpu"), pipe)
    (copy / "prior" / "diffusion_pytorch_model.safetensors").unlink()
    prior = unclip.load(copy, "cpu").prior
    assert torch.equal(prior.head.weight, pipe.prior.head.weight.half().float())


def test_folders_of_current_diffusers_load(reference, pipe: UnCLIPPipeline, tmp_path: Path) -> None:
    """They have another text_proj entry, and one tokenizer file that stores the last padding."""
    reference.save_pretrained(tmp_path / "karlo")
    loaded = unclip.load(tmp_path / "karlo", "cpu")
    assert_equal(loaded, pipe)
    assert torch.equal(loaded.encode_text(PROMPT).ids, pipe.encode_text(PROMPT).ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_cast_but_statistics_stay_float32(
    folder: Path, pipe: UnCLIPPipeline, dtype: torch.dtype
) -> None:
    loaded = unclip.load(folder, "cpu", dtype)
    for network in loaded.networks().values():
        assert {p.dtype for p in network.parameters()} == {dtype}
    assert torch.equal(loaded.prior.emb_std, pipe.prior.emb_std)
    assert torch.equal(loaded.decoder.unet.head.weight, pipe.decoder.unet.head.weight.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_independent_of_their_files(
    folder: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    """Nothing is in memory twice, and a file can be replaced while its model is in use."""
    copy = Path(shutil.copytree(folder, tmp_path / "karlo"))
    networks = diffusers.load_bundle(copy, dtype).components
    before = {
        name: network.state_dict()["unet.stem.weight"].clone()
        for name, network in list(networks.items())[2:]
    }
    for file in copy.rglob("*.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))
    for network in networks.values():
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in network.parameters())
    assert all(
        torch.equal(networks[name].unet.stem.weight, weight) for name, weight in before.items()
    )


def test_the_licence_is_read_from_the_card(folder: Path, tmp_path: Path, capsys) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "karlo"))
    (copy / "README.md").write_text(
        "---\nlicense: creativeml-openrail-m\ntags: [a]\n---\n# Karlo\n"
    )
    assert unclip.load(copy, "cpu").licence == "creativeml-openrail-m"
    main(["info", str(copy)])
    assert "licence: creativeml-openrail-m" in capsys.readouterr().out


def test_a_hub_snapshot_with_a_bin_component_loads(folder: Path, tmp_path, monkeypatch) -> None:
    import huggingface_hub

    snapshot = Path(
        shutil.copytree(folder, tmp_path / "models--someone--karlo" / "snapshots" / "0a1b")
    )
    weights = snapshot / "prior" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    names = [str(file.relative_to(snapshot)) for file in snapshot.rglob("*") if file.is_file()]
    requested = []

    def snapshot_download(hub_id: str, allow_patterns: list[str]) -> str:
        requested.extend(allow_patterns)
        return str(snapshot)

    listed = [{"rfilename": name} for name in (*names, "decoder/w.bin")]
    info = huggingface_hub.ModelInfo(id="someone/karlo", siblings=listed)
    monkeypatch.setattr(huggingface_hub, "model_info", lambda hub_id: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert unclip.load("someone/karlo", "cpu").name == "karlo"
    assert [name for name in requested if name.endswith(".bin")] == [
        "prior/diffusion_pytorch_model.bin"
    ]
    assert set(requested) == set(names)


def test_options_of_the_scheduler_reach_the_prior(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "karlo"))
    file = copy / "prior_scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "clip_sample_range": 10.0}))
    assert unclip.load(copy, "cpu").prior.x0_limit == 10.0
