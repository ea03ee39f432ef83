"""GLIDE: networks and sampling match recordings of the original code."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import box_mask
from PIL import Image
from recorded import numbers, recording, sampled, weights
from tokenizers import pre_tokenizers
from torch import Tensor

import unclip
from unclip.checkpoints import glide
from unclip.checkpoints.renaming import export_state
from unclip.cli.main import main
from unclip.diffusion.schedules import ScheduleConfig
from unclip.image_io import read_metadata
from unclip.models.published.glide import GLIDE, GLIDEConfig
from unclip.pipelines.glide import GLIDEPipeline
from unclip.pipelines.provenance import regenerate
from unclip.tokenizer import GPT2Tokenizer
from unclip.types import GLIDEOptions, StageOptions, UnCLIPOptions

RECORDED = recording("glide")
FILES = ("base", "upsample", "base_inpaint", "upsample_inpaint")
L = 6  # text slots
MASK = torch.arange(L) < torch.tensor([[4], [0]])
IDS = torch.where(MASK, (numbers("ids", (2, L)).abs() * 20).long() % 50, 49)
T = torch.tensor([999, 3])
LOW_RES = numbers("low_res", (2, 3, 4, 4))


def state(name: str) -> dict[str, Tensor]:
    """Return a recorded state; only differences from the first one are stored."""
    return weights({**RECORDED["base"]["shapes"], **RECORDED[name]["shapes"]})


def network(name: str, folder: Path) -> GLIDE:
    torch.save(state(name), folder / f"{name}.pt")
    return glide.read_network(folder / f"{name}.pt")


def known() -> Tensor:
    mask = (numbers("mask", (2, 1, 8, 8)) > 0).float()
    return torch.cat([numbers("known", (2, 3, 8, 8)) * mask, mask], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("name", FILES)
def test_networks_match_glides_code(name: str, tmp_path: Path) -> None:
    net = network(name, tmp_path)
    inputs = [{"known": known()}, {}] if "inpaint" in name else [{}]
    for given, expected in zip(inputs, RECORDED[name]["output"], strict=True):
        given |= {"low_res": LOW_RES} if "upsample" in name else {}
        output = net(numbers("x.glide", (2, 3, 8, 8)), T, IDS, MASK, **given)
        assert sampled(output) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", FILES)
def test_export_inverts_the_rules(name: str, tmp_path: Path) -> None:
    net = network(name, tmp_path)
    back = export_state(net.state_dict(), glide.glide_rules(net.config))
    assert all(torch.equal(back[key], tensor) for key, tensor in state(name).items())


@pytest.mark.parametrize(
    ("name", "size", "low_size", "inpaints"),
    [("base", 64, None, False), ("upsample", 256, 64, False), ("upsample_inpaint", 256, 64, True)],
)
def test_the_kind_of_network_is_inferred_from_its_channels(
    name: str, size: int, low_size: int | None, inpaints: bool, tmp_path: Path
) -> None:
    config = network(name, tmp_path).config
    assert (config.image_size, config.low_size, config.inpaints) == (size, low_size, inpaints)


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """50 tokens: letters, some merges, and the end of text."""
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789", "Ġ", "Ã", "ł", "!"]
    merges = [
        ("r", "e"),
        ("re", "d"),
        ("Ġ", "re"),
        ("Ġre", "d"),
        ("f", "i"),
        ("fi", "s"),
        ("Ġ", "a"),
        ("s", "h"),
    ]
    tokens = [*letters, *("".join(pair) for pair in merges), "'", "<|endoftext|>"]
    assert len(tokens) == 50
    return {token: i for i, token in enumerate(tokens)}, merges


def bpe(text: str) -> list[int]:
    """GPT-2's encoder by definition: merge the earliest merge of a word until none is left."""
    vocab, merges = vocabulary()
    ids = []
    for word, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text.lower()):
        parts = list(word)
        while pairs := [pair for pair in zip(parts, parts[1:], strict=False) if pair in merges]:
            first = min(pairs, key=merges.index)
            i = next(i for i in range(len(parts)) if tuple(parts[i : i + 2]) == first)
            parts[i : i + 2] = ["".join(first)]
        ids += [vocab[part] for part in parts]
    return ids


@pytest.mark.parametrize(
    "text", ["a red fish", " Red  FISH", "", "rered", "it's 2 à", "<|endoftext|>"[2:11]]
)
def test_the_tokenizer_matches_gpt2s(text: str) -> None:
    ids, mask = GPT2Tokenizer(*vocabulary(), context_length=24)([text])
    assert ids[0][mask[0]].tolist() == bpe(text)
    assert (ids[0][~mask[0]] == 49).all() and not mask[0, len(bpe(text)) :].any()


def test_a_long_caption_is_truncated_with_a_warning() -> None:
    tokenizer = GPT2Tokenizer(*vocabulary(), context_length=L)
    with pytest.warns(UserWarning, match="truncated by 'edfish'"):
        ids, mask = tokenizer(["abcdefedfish"])
    assert ids[0].tolist() == bpe("abcdef") and mask.all()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """All of GLIDE at toy width, as published, with its vocabulary."""
    folder = tmp_path / "glide"
    folder.mkdir()
    for name in ("base", "upsample"):
        torch.save(state(name), folder / f"{name}.pt")
    write_vocabulary(folder)
    return folder


def write_vocabulary(folder: Path) -> None:
    vocab, merges = vocabulary()
    (folder / glide.VOCAB_FILE).write_bytes(gzip.compress(json.dumps(vocab).encode()))
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    (folder / glide.MERGES_FILE).write_bytes(gzip.compress("\n".join(lines).encode()))


class FixedTokenizer(GPT2Tokenizer):
    """Return the recorded ids for any text that is not empty."""

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        mask = torch.stack([MASK[0] if text else MASK[1] for text in texts])
        return torch.where(mask, IDS[0], 49), mask


def small_pipe(folder: Path, names: Sequence[str] = ("base", "upsample")) -> GLIDEPipeline:
    """Images of 8 and 16 px, as in the recording."""
    nets = [glide.read_network(folder / f"{name}.pt") for name in names]
    nets[0].config = replace(nets[0].config, image_size=8)
    nets[1].config = replace(nets[1].config, image_size=16, low_size=8)
    options = GLIDEOptions(
        StageOptions(steps=5, guidance=3.0, sampler="ancestral"),
        (StageOptions(steps=4, sampler="ancestral"),),
    )
    tokenizer = FixedTokenizer(*vocabulary(), context_length=L)
    return GLIDEPipeline(
        tokenizer, nets[0], nets[1:], options, schedules={"upsampler_0": ScheduleConfig("linear")}
    )


def test_the_pipeline_matches_glides_sampling(folder: Path) -> None:
    pipe, recorded = small_pipe(folder), RECORDED["picture"]
    generators = [torch.Generator().manual_seed(recorded["seed"])]
    small = pipe.decode(["a red fish"], generators=generators)
    assert sampled(small) == pytest.approx(recorded["output"][0], abs=1e-4)
    large = pipe.upsample(small, ["a red fish"], generators=generators)
    # The linear schedule ends at α = 0.006: rounding errors of x_0 are 160 times as large there.
    assert sampled(large) == pytest.approx(recorded["output"][1], abs=2e-3)


def test_the_upsampler_samples_as_glides_code_does(folder: Path) -> None:
    """Use "fast27" with noise of standard deviation 0.997; other step counts are evenly spaced."""
    pipe = small_pipe(folder)
    [options] = unclip.load(folder, "cpu").options.upsamplers
    stage, (x_T, steps) = pipe.stages[1], ([], [])

    def denoise(x_t: Tensor, t: float, **_: Any) -> Tensor:
        x_T.append(x_t)
        steps.append(t)
        return torch.zeros(len(x_t), 6, 16, 16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage.network, "denoise", denoise)
        generators = [torch.Generator().manual_seed(0)]
        pipe.upsample(torch.zeros(1, 3, 8, 8), ["a"], generators=generators, options=[options])
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(x_T[0], 0.997 * noise)
    # ADM's sections of 10, 10, 3, 2 and 2, of which 999 is moved to 997.
    fifths = [np.linspace(0, 199, n).round() + 200 * i for i, n in enumerate((10, 10, 3, 2, 2))]
    assert sorted(steps) == [*np.concatenate(fifths)[:-1], 997]
    with pytest.raises(ValueError, match="got 27 timesteps, but steps is 10"):
        replace(options, steps=10)
    assert pipe.preset("fast").upsamplers[0].timesteps is None


def test_every_prompt_has_its_own_seed(folder: Path) -> None:
    pipe, steps = small_pipe(folder), []
    options = {"num_images": 2, "batch_size": 3, "on_step": steps.append, "progress": False}
    result = pipe(["a fish", "a dish"], seed=7, **options)
    assert result.seeds == [7, 8, 9, 10]
    assert result.prompts == ["a fish", "a fish", "a dish", "a dish"]
    assert [image.size for image in result.images] == [(16, 16)] * 4
    assert len(steps) == 2 * (5 + 4) and {step.stage for step in steps} == {
        "decoder",
        "upsampler_0",
    }
    alone = pipe("a dish", seed=9, progress=False)
    assert alone.images[0].tobytes() == result.images[2].tobytes()
    assert (
        regenerate(pipe, result.metadata[2], progress=False).images[0].tobytes()
        == result.images[2].tobytes()
    )


def test_guidance_applies_to_decoder_and_upsampler(folder: Path) -> None:
    pipe = small_pipe(folder)

    def generated(options: GLIDEOptions) -> bytes:
        return pipe("a fish", seed=1, options=options, progress=False).images[0].tobytes()

    free = replace(pipe.options, decoder=replace(pipe.options.decoder, guidance=1.0))
    guided = replace(pipe.options, upsamplers=(replace(pipe.options.upsamplers[0], guidance=2.0),))
    assert len({generated(pipe.options), generated(free), generated(guided)}) == 3


def test_negative_prompts_replace_the_null_of_guidance(folder: Path) -> None:
    pipe = small_pipe(folder)
    stages = pipe.options.decoder, *pipe.options.upsamplers
    decoder, upsampler = (replace(stage, guidance=2.0) for stage in stages)
    options = replace(pipe.options, decoder=decoder, upsamplers=(upsampler,))
    call: dict[str, Any] = {"options": options, "progress": False}
    negative = ["a dish", ""]
    result = pipe("a fish", negative_prompt="a dish", seed=1, **call)
    both = pipe(["a fish", "a red"], negative_prompt=negative, num_images=2, seed=1, **call)
    plain = pipe(["a fish", "a red"], num_images=2, seed=1, **call)
    images, without = ([image.tobytes() for image in x.images] for x in (both, plain))
    assert images[0] == result.images[0].tobytes() and images[:2] != without[:2]
    assert images[2:] == without[2:]  # the null is the empty caption
    again = regenerate(pipe, both.metadata[1], progress=False)
    assert again.images[0].tobytes() == images[1]

    def upsampled(*negative: str) -> Tensor:
        small, generators = torch.zeros(1, 3, 8, 8), [torch.Generator().manual_seed(0)]
        call = {"negative": negative, "generators": generators, "options": [upsampler]}
        return pipe.upsample(small, ["a fish"], **call)

    assert not torch.equal(upsampled("a dish"), upsampled(""))
    free = replace(decoder, guidance=1.0)
    with pytest.raises(ValueError, match="guidance is 1 in decoder and upsampler_0"):
        pipe("a", negative_prompt="b", options=GLIDEOptions(free, (free,)))
    with pytest.raises(ValueError, match="2 negative captions for 1 captions"):
        pipe.decode(["a fish"], negative=negative)


def test_the_published_folder_loads_as_a_pipeline(folder: Path) -> None:
    pipe = unclip.load(folder, device="cpu")
    assert (pipe.options.decoder.steps, pipe.options.decoder.guidance) == (100, 3.0)
    assert (
        pipe.schedules["decoder"].config.kind == "cosine"
        and pipe.schedules["upsampler_0"].config.kind == "linear"
    )
    assert pipe.tokenizer(["a red fish"])[0][0, :3].tolist() == bpe("a red fish")[:3]
    (folder / "upsample.pt").unlink()
    assert unclip.load(folder, device="cpu").options.upsamplers == ()


def test_saving_in_our_format_keeps_everything(folder: Path, tmp_path: Path) -> None:
    pipe = unclip.load(folder, device="cpu")
    pipe.save_pretrained(tmp_path / "ours")
    again = unclip.load(tmp_path / "ours", device="cpu")
    assert isinstance(again, GLIDEPipeline) and again.options == pipe.options
    assert again.schedules["upsampler_0"].config == ScheduleConfig("linear")
    assert torch.equal(again.tokenizer(["a red fish"])[0], pipe.tokenizer(["a red fish"])[0])
    for name, net in pipe.networks().items():
        other = again.networks()[name]
        assert other.config == net.config
        assert all(
            torch.equal(tensor, other.state_dict()[key]) for key, tensor in net.state_dict().items()
        )


def test_the_inpainting_pair_generates_from_nothing_known(folder: Path) -> None:
    for name in ("base_inpaint", "upsample_inpaint"):
        torch.save(state(name), folder / f"{name}.pt")
    pipe = unclip.load(folder / "base_inpaint.pt", device="cpu")
    assert [net.config.inpaints for net in pipe.networks().values()] == [True, True]
    assert not unclip.load(folder, device="cpu").decoder.config.inpaints
    pipe.decoder.config = replace(pipe.decoder.config, image_size=8)
    options = GLIDEOptions(StageOptions(steps=2), upsamplers=())
    assert pipe("a fish", seed=0, options=options, progress=False).images[0].size == (8, 8)


@pytest.fixture
def inpainting_pipe(folder: Path) -> GLIDEPipeline:
    for name in FILES[2:]:
        torch.save(state(name), folder / f"{name}.pt")
    return small_pipe(folder, FILES[2:])


def scene(width: int, height: int) -> tuple[Image.Image, Image.Image]:
    """Return an image, and a mask of a box in it that is half the image."""
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    return image, box_mask(width, height, (width // 4, height // 4, width, height))


@pytest.mark.parametrize("size", [(16, 16), (20, 31), (9, 12)])
def test_inpainting_keeps_known_pixels(
    inpainting_pipe: GLIDEPipeline, size: tuple[int, int]
) -> None:
    (image, mask), call = scene(*size), {"seed": 3, "progress": False}
    steps: list[Any] = []
    result = inpainting_pipe.inpaint(
        [image, image], [mask, mask], ["a fish", "a dish"], on_step=steps.append, **call
    )
    kept = np.asarray(mask) == 0
    for one in result.images:
        assert one.size == size
        assert (np.asarray(one)[kept] == np.asarray(image)[kept]).all()
        assert (np.asarray(one)[~kept] != np.asarray(image)[~kept]).any()
    assert [step.stage for step in steps] == (["decoder"] * 5 + ["upsampler_0"] * 4) * (
        len(steps) // 9
    )
    alone = inpainting_pipe.inpaint(image, mask, "a dish", **{**call, "seed": 4})
    assert alone.metadata == result.metadata[1:]
    assert alone.images[0].tobytes() == result.images[1].tobytes()
    again = regenerate(inpainting_pipe, result.metadata[1], progress=False)
    assert again.images[0].tobytes() == result.images[1].tobytes()


def test_both_networks_receive_the_known_pixels(inpainting_pipe: GLIDEPipeline) -> None:
    """With and without guidance, at their own sizes; the hole's content is hidden from them."""
    (image, mask), seen = scene(16, 16), {}
    for stage in inpainting_pipe.stages:
        denoise = stage.network.denoise

        def recorded(
            x_t: Tensor, t: float, context: Any, cache: Any = None, denoise: Any = denoise
        ) -> Tensor:
            seen.setdefault(x_t.shape[-1], []).append(context.extra_channels)
            return denoise(x_t, t, context, cache)

        stage.network.denoise = recorded
    call = {"prompt": "a fish", "seed": 3, "progress": False}
    result = inpainting_pipe.inpaint(image, mask, **call)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    hole = torch.from_numpy(np.array(mask))[None, None] > 0
    for size, rows in ((8, 2), (16, 1)):  # only the first stage is guided
        known = (~hole)[:, :, :: 16 // size, :: 16 // size]
        pixels = torch.nn.functional.avg_pool2d(x, 16 // size) * known
        for channels in seen[size]:
            assert len(channels) == rows
            torch.testing.assert_close(channels[:, 3:4], known.float().expand(rows, -1, -1, -1))
            torch.testing.assert_close(channels[:, :3], pixels.expand(rows, -1, -1, -1))
    painted_over = image.copy()
    painted_over.paste("blue", mask=mask)
    other = inpainting_pipe.inpaint(painted_over, mask, **call)
    assert (np.asarray(other.images[0]) == np.asarray(result.images[0]))[np.asarray(mask) > 0].all()


def test_a_base_network_without_known_pixels_cannot_inpaint(folder: Path) -> None:
    with pytest.raises(ValueError, match="cannot inpaint: .* load base_inpaint.pt") as error:
        small_pipe(folder).inpaint(*scene(16, 16), "a fish")
    assert "\n" not in str(error.value)


def test_an_upsampler_without_known_pixels_keeps_them(
    inpainting_pipe: GLIDEPipeline, folder: Path
) -> None:
    pipe, (image, mask) = small_pipe(folder, ("base_inpaint", "upsample")), scene(16, 16)
    result = pipe.inpaint(image, mask, "a fish", seed=3, progress=False)
    kept = np.asarray(mask) == 0
    assert (np.asarray(result.images[0])[kept] == np.asarray(image)[kept]).all()


def test_edits_of_the_command_line_and_the_server(
    inpainting_pipe: GLIDEPipeline,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from unclip.serving.tasks import Task, generate, operations

    (image, mask), files = scene(16, 16), [str(tmp_path / f"{name}.png") for name in "abc"]
    image.save(files[0])
    mask.save(files[1])
    texts = {"prompt": "a fish", "negative": "a dish"}
    task = Task("edits", "glide", 2, 3, **texts, images=(image,), mask=mask)
    (served,) = generate(inpainting_pipe, [task], lambda _: None, 16)
    call = {"num_images": 2, "seed": 3, "progress": False}
    plain = inpainting_pipe.inpaint(image, mask, "a fish", **call)
    call["negative_prompt"] = "a dish"
    expected = inpainting_pipe.inpaint(image, mask, "a fish", **call)
    assert [x.tobytes() for x in served.images] == [x.tobytes() for x in expected.images]
    assert served.images[0].tobytes() != plain.images[0].tobytes()
    assert expected.metadata[0]["arguments"]["negative_prompt"] == "a dish"
    again = regenerate(inpainting_pipe, expected.metadata[1], progress=False)
    assert again.images[0].tobytes() == expected.images[1].tobytes()
    assert operations(inpainting_pipe) == ["generations", "edits"]
    small = small_pipe(folder)
    assert operations(small) == ["generations"]
    with pytest.raises(ValueError, match="does not support edits"):
        generate(small, [task], lambda _: None, 16)

    (folder / "upsample_inpaint.pt").unlink()
    edit = ["edit", files[0], "--mask", files[1], "--prompt", "a fish", "--device", "cpu"]
    edit += ["--negative-prompt", "a dish", "--steps", "1", "-o", files[2], "--quiet", "--model"]
    assert main([*edit, str(folder / "base_inpaint.pt")]) == 0
    kept = np.asarray(mask) == 0
    assert (np.asarray(Image.open(files[2]))[kept] == np.asarray(image)[kept]).all()
    assert read_metadata(files[2])[0]["arguments"]["negative_prompt"] == "a dish"
    capsys.readouterr()
    (folder / "upsample.pt").unlink()
    assert main([*edit, str(folder / "base.pt")]) == 2
    assert "cannot inpaint" in capsys.readouterr().err


def test_networks_are_loaded_in_half_precision(folder: Path) -> None:
    pipe = unclip.load(folder, device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for net in pipe.networks().values() for p in net.parameters()} == {
        torch.bfloat16
    }


def test_convert_info_and_generate_commands(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "upsample.pt").unlink()
    ours, image_file = str(tmp_path / "ours"), str(tmp_path / "fish.png")
    assert main(["convert", str(folder), ours, "--to", "unclip"]) == 0
    assert main(["info", ours]) == 0
    output = capsys.readouterr().out
    assert "glide: glide in" in output and "decoder " in output and "tokenizer" not in output
    generate = ["generate", "a fish", "--model", ours, "--device=cpu", "-o", image_file]
    assert main([*generate, "--steps=1", "--negative-prompt=a dish"]) == 0
    assert read_metadata(image_file)[0]["negative_prompt"] == "a dish"
    assert Image.open(image_file).size == (64, 64)
    assert main([*generate, "--set=decoder.timesteps=[900]", "--set=decoder.guidance=1"]) == 0
    decoder = read_metadata(image_file)[0]["options"]["decoder"]
    assert (decoder["steps"], decoder["timesteps"], decoder["guidance"]) == (1, [900], 1.0)
    assert main([*generate, "--prior-steps=3"]) == 2
    assert (
        "glide is of kind glide, which has no --prior-steps; it has --steps"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (UnCLIPOptions(), "options is a UnCLIPOptions; expected GLIDEOptions"),
        (
            GLIDEOptions(upsamplers=(StageOptions(1),) * 2),
            "options for 2 upsamplers, but the model has 1",
        ),
        (GLIDEOptions(decoder=StageOptions(4, cache_interval=2)), "expected cache_interval 1"),
    ],
)
def test_options_of_another_kind_of_model_are_refused(
    options: object, message: str, folder: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        small_pipe(folder)("a fish", options=options, progress=False)


def test_variations_need_a_clip(folder: Path) -> None:
    with pytest.raises(ValueError, match="has no image embeddings"):
        small_pipe(folder).variations(image_emb=torch.zeros(1, 16))


def test_networks_that_do_not_fit_together_are_refused(folder: Path) -> None:
    base, upsample = (glide.read_network(folder / f"{name}.pt") for name in ("base", "upsample"))
    tokenizer = GPT2Tokenizer(*vocabulary(), context_length=L)
    with pytest.raises(ValueError, match="decoder must start from noise, but its low_size is 64"):
        GLIDEPipeline(tokenizer, upsample)
    with pytest.raises(
        ValueError, match="upsampler_0 must start from images of 64 px, but its low_size is None"
    ):
        GLIDEPipeline(tokenizer, base, [base])
    with pytest.raises(
        ValueError, match="decoder reads 6 of 50 tokens, but the tokenizer gives 7 of 50"
    ):
        GLIDEPipeline(GPT2Tokenizer(*vocabulary(), context_length=7), base)
    with pytest.raises(ValueError, match="schedules of prior; the model has decoder"):
        GLIDEPipeline(tokenizer, base, schedules={"prior": ScheduleConfig()})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "low_res is missing; low_size of this network is 64"),
        ({"low_res": LOW_RES, "known": torch.zeros(2, 4, 8, 8)}, "this network does not inpaint"),
    ],
)
def test_missing_network_inputs_are_refused(
    given: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    net = network("upsample", tmp_path)
    with pytest.raises(ValueError, match=message):
        net(torch.zeros(2, 3, 8, 8), T, IDS, MASK, **given)
    with pytest.raises(ValueError, match="the text has 5 tokens; this network takes 6"):
        net.condition(IDS[:, :5], MASK[:, :5])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("final_ln.bias"), r"base\.pt does not fit: missing: final_ln\.bias"),
        (lambda s: s.update(unemb=torch.zeros(2)), r"base\.pt does not fit: unexpected: unemb"),
        (
            lambda s: s.pop("token_embedding.weight"),
            r"not a network of GLIDE: the tensor token_embedding\.weight is missing",
        ),
        (
            lambda s: s.update({"input_blocks.0.0.weight": torch.zeros(32, 5, 3, 3)}),
            "a U-Net with 5 input channels; GLIDE's",
        ),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(
    edit: Callable[[dict[str, Tensor]], object], message: str, folder: Path
) -> None:
    changed = state("base")
    edit(changed)
    torch.save(changed, folder / "base.pt")
    with pytest.raises(ValueError, match=message):
        unclip.load(folder)


def test_a_missing_or_damaged_vocabulary_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / glide.VOCAB_FILE).write_bytes(b"{")
    with pytest.raises(ValueError, match=r"encoder\.json\.gz: not a vocabulary"):
        unclip.load(folder)
    (folder / glide.VOCAB_FILE).write_bytes(gzip.compress(bytes(5 * 2**20)))
    with pytest.raises(ValueError, match="it expands to more than 4,194,304 bytes"):
        unclip.load(folder)
    (folder / glide.VOCAB_FILE).unlink()
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *_: (_ for _ in ()).throw(OSError("no network"))
    )
    with pytest.raises(
        ValueError, match=r"has no encoder\.json\.gz .* downloading it failed: no network"
    ):
        unclip.load(folder)
    GPT2Tokenizer(*vocabulary(), context_length=L).save_pretrained(folder / "tokenizer")
    (folder / "tokenizer" / "tokenizer.json").rename(folder / "tokenizer.json")
    assert unclip.load(folder, device="cpu").tokenizer.vocab_size == 50
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a GPT-2 tokenizer"):
        unclip.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"low_size": 64},
            "unet has 3 channels in and 6 out; expected 6 in",
        ),
        ({"image_size": 63}, "image_size is 63; expected a multiple of .* 2"),
    ],
)
def test_sizes_are_checked(changes: dict[str, int], message: str, tmp_path: Path) -> None:
    config: GLIDEConfig = network("base", tmp_path).config
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)
