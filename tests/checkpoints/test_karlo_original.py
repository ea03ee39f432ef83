"""Karlo's own files load, and outputs match recordings of the original code."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from recorded import numbers, recording, sampled, weights
from torch import Tensor

import unclip
from unclip.checkpoints import karlo
from unclip.checkpoints.diffusers.export import save_for_diffusers
from unclip.checkpoints.openai.clip import read_clip
from unclip.checkpoints.registry import load_any
from unclip.checkpoints.renaming import export_state
from unclip.clip import CLIP, CLIPConfig
from unclip.types import TextEncoding

KARLO = recording("karlo")
D, L = 64, 6  # width of embeddings and of text states, text tokens
T = torch.tensor([999, 3])
TEXT = TextEncoding(
    emb=numbers("text.emb", (2, D)),
    states=numbers("text.states", (2, L, D)),
    mask=torch.arange(L) < torch.tensor([[5], [3]]),
)
FILES = {
    "prior": "prior-ckpt-step=01000000-of-01000000.ckpt",
    "decoder": "decoder-ckpt-step=01000000-of-01000000.ckpt",
    "upsampler": "improved-sr-ckpt-step=1.2M.ckpt",
}


def state(name: str) -> dict[str, Tensor]:
    return weights(KARLO[name]["shapes"])


def small_clip() -> CLIP:
    text_cfg = {"context_length": L, "vocab_size": 49408, "width": D, "heads": 1, "layers": 1}
    vision_cfg = {"image_size": 16, "layers": 1, "width": 128, "head_width": 64, "patch_size": 8}
    return CLIP(
        CLIPConfig(
            {"embed_dim": D, "vision_cfg": vision_cfg, "text_cfg": text_cfg, "quick_gelu": True}
        )
    ).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Karlo at toy width, laid out as published; tests must not change it."""
    folder = tmp_path_factory.mktemp("karlo")
    for name, file in FILES.items():
        torch.save({"epoch": 1, "state_dict": state(name)}, folder / file)
    torch.save((numbers("mean", (D,)), numbers("std", (D,)).abs() + 0.5), folder / karlo.STATS_FILE)
    torch.save(openai_state(small_clip()), folder / karlo.CLIP_FILE)
    return folder


def openai_state(clip: CLIP) -> dict[str, Tensor]:
    """A CLIP's state as OpenAI stores it: with its sizes as tensors."""
    sizes = {"input_resolution": 16, "context_length": L, "vocab_size": 49408}
    return {**clip.model.state_dict(), **{name: torch.tensor(size) for name, size in sizes.items()}}


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of `folder` that a test can damage."""
    return Path(shutil.copytree(folder, tmp_path / "karlo"))


def assert_matches(output: Tensor, expected: list[float]) -> None:
    assert sampled(output) == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_the_prior_matches_karlos_code(folder: Path) -> None:
    prior = karlo.read_prior(folder / FILES["prior"], folder / karlo.STATS_FILE)
    assert_matches(prior(numbers("x.prior", (2, D)), T, TEXT), KARLO["prior"]["output"])
    assert torch.equal(prior.emb_mean, numbers("mean", (D,)))
    assert torch.equal(prior.emb_std, numbers("std", (D,)).abs() + 0.5)


@torch.no_grad()
def test_the_decoder_matches_karlos_code(folder: Path) -> None:
    decoder = karlo.read_decoder(folder / FILES["decoder"])
    output = decoder(numbers("x.decoder", (2, 3, 8, 8)), T, numbers("image.emb", (2, D)), TEXT)
    assert_matches(output, KARLO["decoder"]["output"])
    assert torch.equal(decoder.null_image, state("decoder")["model.cf_param"])


@torch.no_grad()
@pytest.mark.parametrize("last", [False, True])
def test_the_upsampler_matches_karlos_code(last: bool, folder: Path) -> None:
    upsampler = karlo.read_upsampler(folder / FILES["upsampler"])
    low_res = numbers("low_res", (2, 3, 8, 8))
    denoise = upsampler.denoise_last if last else upsampler.denoise
    output = denoise(numbers("x.upsampler", (2, 3, 8, 8)), T, low_res)
    assert_matches(output, KARLO["upsampler"]["output"][last])


@torch.no_grad()
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # TorchScript is deprecated, its archives remain
def test_openais_clip_loads_from_its_torchscript_archive(tmp_path: Path) -> None:
    source = small_clip()

    class Archive(torch.nn.Module):  # what OpenAI traced: towers, and sizes as buffers
        def __init__(self) -> None:
            super().__init__()
            for name, child in source.model.named_children():
                self.add_module(name, child)
            for name, parameter in source.model.named_parameters(recurse=False):
                self.register_parameter(name, parameter)
            self.register_buffer("context_length", torch.tensor(L))

        def forward(self, images: Tensor) -> Tensor:
            return self.visual(images)

    images = numbers("images", (2, 3, 16, 16))
    torch.jit.trace(Archive(), images).save(str(tmp_path / "ViT-L-14.pt"))
    clip = read_clip(tmp_path / "ViT-L-14.pt")
    assert clip.config == source.config
    assert torch.equal(clip.encode_image(images), source.encode_image(images))
    ours, theirs = clip.encode_text(["a red fish", ""]), source.encode_text(["a red fish", ""])
    assert torch.equal(ours.emb, theirs.emb) and torch.equal(ours.states, theirs.states)


def test_the_folder_loads_as_a_pipeline(folder: Path) -> None:
    pipe = unclip.load(folder, device="cpu")
    options = pipe.options
    assert (options.prior.steps, options.decoder.steps, options.upsamplers[0].steps) == (25, 25, 7)
    assert (options.prior.guidance, options.decoder.guidance) == (4.0, 8.0)
    assert options.prior_candidates == 1
    assert pipe.prior.config.heads == 2 and pipe.decoder.config.image_size == 64


def test_clipping_and_preprocessing_are_those_of_karlos_code(folder: Path, tmp_path: Path) -> None:
    """diffusers clips x_0 at 5 and crops images; Karlo's code clips at 10 and squashes them."""
    assert unclip.load_prior(folder / FILES["prior"]).network.x0_limit == 10
    save_for_diffusers(load_any(folder), tmp_path / "diffusers")
    for path in (folder, tmp_path / "diffusers"):
        pipe = unclip.load(path, "cpu")
        assert pipe.prior.x0_limit == 10
        wide = Image.linear_gradient("L").resize((300, 100)).convert("RGB").rotate(90)
        assert torch.equal(pipe.encode_image(wide), pipe.encode_image(wide.resize((16, 16), 3)))


def test_diffusers_layout_gives_the_same_model(folder: Path, tmp_path: Path) -> None:
    """Compare tensors, configurations, schedules and options after loading."""
    ours = load_any(folder)
    save_for_diffusers(ours, tmp_path / "diffusers")
    theirs = load_any(tmp_path / "diffusers")
    assert theirs.options == ours.options and theirs.schedules == ours.schedules
    assert list(theirs.components) == list(ours.components)
    for name, network in ours.components.items():
        other = theirs.components[name].state_dict()
        assert name == "clip" or theirs.components[name].config == network.config
        differ = [
            key
            for key, tensor in network.state_dict().items()
            if not torch.equal(tensor, other[key])
        ]
        assert differ == (
            ["model.logit_scale"] if name == "clip" else []
        )  # not in transformers' towers


def test_our_own_layout_gives_the_same_model(folder: Path, tmp_path: Path) -> None:
    pipe = unclip.load(folder, device="cpu")
    pipe.save_pretrained(tmp_path / "ours")
    again = unclip.load(tmp_path / "ours", device="cpu")
    for name, network in {"clip": pipe.clip, **pipe.networks()}.items():
        other = {"clip": again.clip, **again.networks()}[name].state_dict()
        assert all(torch.equal(tensor, other[key]) for key, tensor in network.state_dict().items())


@pytest.mark.parametrize("name", FILES)
def test_export_inverts_the_rules(name: str, folder: Path) -> None:
    """The strict loader checks names; this checks values."""
    readers = {"decoder": karlo.read_decoder, "upsampler": karlo.read_upsampler}
    rules = {
        "prior": karlo.prior_rules,
        "decoder": karlo.decoder_rules,
        "upsampler": karlo.upsampler_rules,
    }
    if name == "prior":
        network = karlo.read_prior(folder / FILES[name], folder / karlo.STATS_FILE)
    else:
        network = readers[name](folder / FILES[name])
    back = export_state(network.state_dict(), rules[name](network.config))
    assert all(torch.equal(back[key], tensor) for key, tensor in state(name).items())


def test_without_a_prior_the_model_makes_variations(copy: Path) -> None:
    (copy / FILES["prior"]).unlink()
    pipe = unclip.load(copy, device="cpu")
    assert pipe.prior is None
    with pytest.raises(ValueError, match=r"no prior.*use variations"):
        pipe("a red fish")


def change(file: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    content = torch.load(file, weights_only=True)
    edit(content["state_dict"])
    torch.save(content, file)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("prior", "model.final_ln.bias"),
        ("decoder", "model.out.2.bias"),
        ("upsampler", "model_last_step.out.2.bias"),
    ],
)
def test_a_wrong_tensor_is_named(name: str, key: str, copy: Path) -> None:
    file = copy / FILES[name]
    change(file, lambda tensors: tensors.update({"model.extra": torch.zeros(1)}))
    with pytest.raises(
        ValueError, match=rf"{re.escape(file.name)} does not fit: unexpected: model\.extra$"
    ):
        load_any(copy)
    change(file, lambda tensors: (tensors.pop("model.extra"), tensors.pop(key)))
    with pytest.raises(
        ValueError, match=rf"{re.escape(file.name)} does not fit: missing: {re.escape(key)}$"
    ):
        load_any(copy)
    change(file, lambda tensors: tensors.update({key: torch.zeros(7)}))
    with pytest.raises(
        ValueError, match=rf"does not fit: of another shape: {re.escape(key)} is \(7,\), expected"
    ):
        load_any(copy)


def test_a_missing_or_ambiguous_file_is_named(copy: Path) -> None:
    (copy / karlo.STATS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*ViT-L-14_stats\.th"):
        load_any(copy)
    shutil.copy(copy / FILES["prior"], copy / "prior-ckpt-2.ckpt")
    with pytest.raises(
        ValueError, match=r"expected one file prior-ckpt\*\.ckpt, found prior-ckpt-2\.ckpt, "
    ):
        load_any(copy)


@pytest.mark.parametrize("name", [*FILES.values(), karlo.STATS_FILE, karlo.CLIP_FILE])
def test_a_truncated_file_is_named(name: str, copy: Path) -> None:
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match=rf"{re.escape(name)} is truncated or not a PyTorch checkpoint"
    ) as error:
        load_any(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [*FILES.values(), karlo.STATS_FILE, karlo.CLIP_FILE])
def test_a_file_with_other_content_is_named(name: str, copy: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, copy / name)
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is (a dict|not an? )"):
        load_any(copy)
