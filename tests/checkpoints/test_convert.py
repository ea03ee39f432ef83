"""Conversion between our layout and diffusers': lossless, and unsupported models are refused."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import karlo
import numpy as np
import pytest
import torch
from parity import randomize
from safetensors.torch import load_file
from test_karlo_diffusers import assert_same_image, generate, image

import unclip
from unclip.checkpoints.convert import convert
from unclip.checkpoints.diffusers import export as diffusers_export
from unclip.checkpoints.folders import bundled_models
from unclip.checkpoints.formats import Bundle
from unclip.checkpoints.registry import load_any
from unclip.cli.main import main
from unclip.clip import CLIP, CLIPConfig
from unclip.diffusion.schedules import Schedule, ScheduleConfig
from unclip.models.unclip.decoder import Decoder, DecoderConfig, LayoutConfig
from unclip.models.unclip.prior import DiffusionPrior, PriorConfig
from unclip.models.unclip.upsampler import Upsampler, UpsamplerConfig
from unclip.models.unet import LevelSpec, UNetConfig
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.tokenizer import BPETokenizer
from unclip.types import StageOptions, UnCLIPOptions

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
STAGE = StageOptions(8, guidance=3.0, sampler="ancestral")
OPTIONS = UnCLIPOptions(STAGE, STAGE, (StageOptions(7, sampler="ancestral"),), prior_candidates=1)


def tensors(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    files = (file for file in folder.rglob("*.safetensors"))
    return {
        (file.parent.name, name): tensor
        for file in files
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("make", [karlo.text_to_image, karlo.image_variation])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_round_trip_gives_the_same_tensors(tmp_path: Path, make: Any, dtype: torch.dtype) -> None:
    source = karlo.write(make().to(dtype), tmp_path / "theirs")
    convert(source, tmp_path / "ours", "unclip")
    convert(tmp_path / "ours", tmp_path / "again", "diffusers")
    convert(source, tmp_path / "direct", "diffusers")
    before = tensors(source)
    assert {tensor.dtype for tensor in before.values()} == {dtype}
    for folder in (tmp_path / "again", tmp_path / "direct"):
        after = tensors(folder)
        assert after.keys() == before.keys()
        assert all(
            torch.equal(after[k], x) and after[k].dtype == x.dtype for k, x in before.items()
        )
        vocab, again = (
            json.loads((place / "tokenizer" / "vocab.json").read_text())
            for place in (source, folder)
        )
        assert vocab == again
        merges = [(place / "tokenizer" / "merges.txt").read_bytes() for place in (source, folder)]
        assert merges[0] == merges[1]


def test_a_converted_model_gives_the_same_images(tmp_path: Path) -> None:
    reference = karlo.text_to_image()
    theirs = reference(
        "a fish", generator=torch.Generator().manual_seed(4), output_type="np"
    ).images[0]
    convert(karlo.write(reference, tmp_path / "theirs"), tmp_path / "ours", "unclip")
    pipe = unclip.load(tmp_path / "ours", "cpu")
    assert_same_image(theirs, generate(pipe, "a fish", 4))
    convert(tmp_path / "ours", tmp_path / "again", "diffusers")
    again = loaded_by_diffusers(tmp_path / "again")
    once_more = again(
        "a fish", generator=torch.Generator().manual_seed(4), output_type="np"
    ).images[0]
    np.testing.assert_allclose(
        once_more, theirs, rtol=0, atol=1e-4
    )  # rounding accumulates over the steps


def loaded_by_diffusers(folder: Path, kind: Any = karlo.UnCLIPPipeline) -> Any:
    return karlo.quiet(kind.from_pretrained(folder))


def own_model(**clip: Any) -> UnCLIPPipeline:
    """A model of Karlo's structure with another tokenizer, activation and schedules."""
    texts = ["a red apple", "a blue fish"]
    tokenizer = BPETokenizer.train(texts, vocab_size=270, context_length=12)
    text = {
        "context_length": 12,
        "vocab_size": tokenizer.vocab_size,
        "width": 16,
        "heads": 2,
        "layers": 1,
    }
    text |= {"eos_id": tokenizer.end_id, "pool_type": "eos"}
    vision = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    levels = (LevelSpec(16, 1), LevelSpec(32, 2, attention=True))
    unet = UNetConfig(3, 6, levels, head_dim=8, groups=8, context_dim=20, time_dim=48)
    low = UNetConfig(6, 3, (LevelSpec(16, 1), LevelSpec(32, 1)), groups=8, mid_attention=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_cfg = {
            "embed_dim": 16,
            "vision_cfg": vision,
            "text_cfg": text,
            "custom_text": True,
            **clip,
        }
        model = CLIP(CLIPConfig(model_cfg, {"resize_mode": "squash"}), tokenizer)
        prior = DiffusionPrior(
            PriorConfig(16, 16, 12, width=32, depth=2, heads=4, null_text="empty_prompt")
        )
        decoder = Decoder(
            DecoderConfig(unet, 16, 16, 16, null_text="empty_prompt", learned_variance=True)
        )
        networks = [
            randomize(module, 0.05)
            for module in (prior, decoder, Upsampler(UpsamplerConfig(low, 16, 32)))
        ]
    for network in (networks[1].unet, networks[2].unet):
        network.head.weight.data *= 0.1
    schedules = dict.fromkeys(
        ("prior", "decoder", "upsampler_0"), ScheduleConfig(precision="float32")
    )
    return UnCLIPPipeline(
        model,
        *networks[:2],
        networks[2:],
        OPTIONS,
        schedules=schedules,
        name="mine",
        licence='MIT, "mine"',
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[UnCLIPPipeline, Path]:
    pipe, folder = own_model(), tmp_path_factory.mktemp("exported")
    pipe.save_pretrained(folder / "ours")
    with pytest.warns(
        UserWarning, match="prior_num_inference_steps=8, prior_guidance_scale=3.0, decoder_num_inf"
    ):
        convert(folder / "ours", folder / "theirs", "diffusers")
    return pipe, folder / "theirs"


CALL = {"prior_num_inference_steps": 8, "decoder_num_inference_steps": 8}
CALL |= {"prior_guidance_scale": 3.0, "decoder_guidance_scale": 3.0, "output_type": "np"}


def test_diffusers_runs_an_exported_model(exported: tuple[UnCLIPPipeline, Path]) -> None:
    pipe, folder = exported
    theirs = loaded_by_diffusers(folder)
    for seed, prompt in enumerate(("a red apple", "A  blue\tfish!", "")):
        images = theirs(prompt, generator=torch.Generator().manual_seed(seed), **CALL).images
        assert_same_image(images[0], generate(pipe, prompt, seed))


def test_diffusers_makes_variations_from_the_same_folder(
    exported: tuple[UnCLIPPipeline, Path],
) -> None:
    pipe, folder = exported
    theirs = loaded_by_diffusers(folder, karlo.UnCLIPImageVariationPipeline)
    call = {"decoder_num_inference_steps": 8, "decoder_guidance_scale": 3.0, "output_type": "np"}
    images = theirs(image((16, 16)), generator=torch.Generator().manual_seed(2), **call).images
    generators = unclip.pipelines.request.generators_from([2])
    small = pipe.decode(pipe.encode_image(image((16, 16))), generators=generators)
    assert_same_image(images[0], pipe.upsample(small, generators=generators))


def test_an_exported_model_loads_again(exported: tuple[UnCLIPPipeline, Path]) -> None:
    pipe, folder = exported
    again = unclip.load(folder, "cpu")
    assert again.licence == pipe.licence and again.options == diffusers_export.KARLO_OPTIONS
    ours, theirs = generate(pipe, "a red apple", 1), generate(again, "a red apple", 1, OPTIONS)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    for ours, theirs in zip((pipe.prior, pipe.decoder), (again.prior, again.decoder), strict=True):
        assert ours.config == theirs.config
    first, last = again.upsamplers[0].unet.state_dict(), again.upsamplers[0].last_unet.state_dict()
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_a_model_that_does_not_fit_karlos_layout_is_refused(tmp_path: Path) -> None:
    bundle = load_any(bundled_models()["emoji"])
    with pytest.raises(ValueError) as error:
        diffusers_export.save_for_diffusers(bundle, tmp_path / "emoji")
    text = str(error.value)
    assert text.startswith("emoji cannot be written for diffusers: prior (it is a MLPPrior, not")
    for reason in (
        "it predicts v",
        "its variance is not learned",
        "patch is 2",
        "resample is 'conv'",
        "shifted",
    ):
        assert reason in text[text.index("decoder (") : text.index("upsampler_0 (")]
    assert "it predicts a residual" in text[text.index("upsampler_0 (") :] and "\n" not in text
    assert not list(tmp_path.iterdir())


UNEVEN = UNetConfig(
    6, 3, (LevelSpec(16, 1), LevelSpec(32, 2, attention=True)), groups=8, head_dim=8
)


def reconfigure(module: Any, **changes: Any) -> None:
    module.config = replace(module.config, **changes)


def with_layout(decoder: Decoder) -> Decoder:
    unet, layout = (
        replace(decoder.config.unet, in_channels=6),
        LayoutConfig(decoder.config.emb_dim, size=4, width=8),
    )
    return Decoder(replace(decoder.config, unet=unet, layout=layout))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda p: reconfigure(p.prior, mlp_ratio=2), "prior (mlp_ratio is 2, not 4)"),
        (
            lambda p: reconfigure(p.decoder, text_width=8),
            "decoder (text_width 8 is not emb_dim 16)",
        ),
        (
            lambda p: setattr(p, "decoder", with_layout(p.decoder)),
            "decoder (it is conditioned on a layout)",
        ),
        (
            lambda p: reconfigure(p.upsamplers[0], unet=UNEVEN),
            "upsampler_0 (attention, levels of different depth)",
        ),
        (lambda p: setattr(p, "upsamplers", ()), "upsamplers (there are 0; the pipeline has one)"),
        (
            lambda p: setattr(p, "decoder", p.upsamplers[0]),
            "decoder (it is a Upsampler, not a Decoder)",
        ),
        (
            lambda p: p.clip.config.model_cfg["text_cfg"].update(ls_init_value=0.1),
            "clip (text_cfg.ls_init_value is 0.1",
        ),
        (
            lambda p: p.clip.config.model_cfg["text_cfg"].update(eos_id=7),
            "its texts end with id 2, but text_cfg.eos_id is",
        ),
        (
            lambda p: (
                setattr(p, "prior", None) or setattr(p.clip.preprocess, "resize_mode", "longest")
            ),
            "are padded",
        ),
        (
            lambda p: p.schedules.update(prior=Schedule(ScheduleConfig("linear"))),
            "its schedule is linear, not cosine",
        ),
    ],
)
def test_every_reason_is_listed(change: Any, reason: str) -> None:
    pipe = own_model()
    parts = SimpleNamespace(
        clip=pipe.clip,
        prior=pipe.prior,
        decoder=pipe.decoder,
        upsamplers=pipe.upsamplers,
        schedules=pipe.schedules,
    )
    change(parts)
    upsamplers = {f"upsampler_{i}": network for i, network in enumerate(parts.upsamplers)}
    networks = {"clip": parts.clip, "prior": parts.prior, "decoder": parts.decoder, **upsamplers}
    networks = {name: network for name, network in networks.items() if network is not None}
    schedules = {name: schedule.config for name, schedule in parts.schedules.items()}
    bundle = Bundle("unclip", networks, schedules, OPTIONS, name="x", licence="")
    assert any(reason in reason for reason in diffusers_export.reasons_against(bundle))
    with pytest.raises(ValueError, match="x cannot be written for diffusers: "):
        diffusers_export.save_for_diffusers(bundle, "nowhere")
    assert diffusers_export.reasons_against(replace(bundle, kind="dalle")) == [
        "its kind is 'dalle'; diffusers has a pipeline for 'unclip' only"
    ]


def test_an_unsupported_image_tower_is_left_out(tmp_path: Path) -> None:
    vision = {
        "image_size": 16,
        "layers": 1,
        "width": 32,
        "head_width": 16,
        "patch_size": 8,
        "no_ln_pre": True,
    }
    own_model(vision_cfg=vision).save_pretrained(tmp_path / "ours")
    with (
        pytest.warns(UserWarning, match="the image encoder is left out: .*no_ln_pre is True"),
        pytest.warns(UserWarning, match="a diffusers folder holds no sampling options"),
    ):
        convert(tmp_path / "ours", tmp_path / "theirs", "diffusers")
    assert not (tmp_path / "theirs" / "image_encoder").exists()
    loaded_by_diffusers(tmp_path / "theirs")


def test_a_failed_write_leaves_the_old_folder_unchanged(tmp_path: Path, monkeypatch) -> None:
    source = karlo.write(karlo.text_to_image(), tmp_path / "karlo")
    before = {file: file.read_bytes() for file in source.rglob("*") if file.is_file()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(diffusers_export, "write_safetensors", full)
    with pytest.raises(OSError, match="No space left on device.*untouched"):
        convert(source, source, "diffusers")
    assert {file: file.read_bytes() for file in source.rglob("*") if file.is_file()} == before
    monkeypatch.undo()
    weights = tensors(source)
    (source / "images").mkdir()
    kept = {source / name: b"mine" for name in ("README.md", "notes.txt", "images/apple.png")}
    for file, content in kept.items():
        file.write_bytes(content)
    convert(source, source, "diffusers")  # onto its own folder, whose files are mapped
    assert all(torch.equal(tensor, weights[name]) for name, tensor in tensors(source).items())
    assert {file: file.read_bytes() for file in kept} == kept


def test_convert_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = karlo.write(karlo.text_to_image(), tmp_path / "karlo")
    assert (
        main(["convert", str(source), str(tmp_path / "ours"), "--to", "unclip", "--dtype", "bf16"])
        == 0
    )
    assert capsys.readouterr().out == f"{tmp_path / 'ours'}\n"
    assert {tensor.dtype for tensor in tensors(tmp_path / "ours").values()} == {torch.bfloat16}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no warning for Karlo's own options
        assert (
            main(["convert", str(tmp_path / "ours"), str(tmp_path / "again"), "--to", "diffusers"])
            == 0
        )
    assert {tensor.dtype for tensor in tensors(tmp_path / "again").values()} == {torch.bfloat16}
    shutil.rmtree(tmp_path / "again")
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "thesis.txt").write_text("dear")
    for command, reason in {
        f"convert {source} {tmp_path / 'again'} --to diffusers": "is not a diffusers folder",
        f"convert {source} {tmp_path / 'x'} --to onnx": "invalid choice: 'onnx'",
        f"convert nothing {tmp_path / 'x'} --to unclip": "unknown model 'nothing'",
    }.items():
        capsys.readouterr()
        assert main(command.split()) == 2
        assert reason in capsys.readouterr().err
    with pytest.raises(ValueError, match="to is 'onnx'; expected unclip or diffusers"):
        convert(source, tmp_path / "x", "onnx")
