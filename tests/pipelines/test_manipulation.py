"""Inversion, reconstruction, variations, interpolation and text diffs."""

from __future__ import annotations

import copy
import json
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import save_file

import unclip
from unclip.diffusion.inversion import InversionOptions
from unclip.embeddings import normalise
from unclip.image_io import open_image, read_metadata, save_png
from unclip.pipelines.diffusion_stage import BoundStage
from unclip.pipelines.provenance import regenerate
from unclip.pipelines.unclip import manipulations as manipulation
from unclip.pipelines.unclip.latent import Latent, along, deterministic
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.types import GenerationResult

ROOT = Path(__file__).parents[2]
FEW = {"progress": False, "batch_size": 2}


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


def mean_difference(generated: list[Image.Image], photos: list[Image.Image]) -> float:
    pairs = zip(generated, photos, strict=True)
    return float(np.mean([np.abs(np.subtract(a, b, dtype=int)).mean() for a, b in pairs]))


def blob(colour: str, size: tuple[int, int] = (16, 16)) -> Image.Image:
    """An image with an edge and a gradient."""
    image = Image.new("RGB", size, "white")
    image.paste(colour, (3, 4, size[0] - 5, size[1] - 3))
    return Image.blend(image, Image.linear_gradient("L").resize(size).convert("RGB"), 0.3)


PHOTOS = [blob("red"), blob("blue"), blob("green", (24, 20))]


@pytest.fixture(scope="module")
def pipe(invertible_pipe) -> UnCLIPPipeline:
    return invertible_pipe


@pytest.fixture(scope="module")
def options(pipe):
    return deterministic(pipe.options, steps=8)


@pytest.fixture(scope="module")
def latent(pipe, options) -> Latent:
    return pipe.invert(PHOTOS, options=options, **FEW)


@pytest.fixture(scope="module")
def again(pipe, latent):
    return pipe.reconstruct(latent, **FEW)


def test_a_latent_has_an_embedding_and_noise(pipe, latent):
    assert len(latent) == 3
    assert [tuple(x.shape) for x in latent.noise] == [(3, 3, 8, 8), (3, 3, 16, 16)]
    assert latent.image_emb.shape == (3, 16)
    assert repr(latent) == "<Latent: 3 images, embedding of 16, noise 8x8, 16x16>"
    torch.testing.assert_close(latent.image_emb[:2], pipe.encode_image(PHOTOS[:2]))


def test_reconstructions_match_the_images(again):
    for generated, photo in zip(again.images, PHOTOS, strict=True):
        fitted = photo.crop((2, 0, 22, 20)).resize((16, 16), Image.Resampling.LANCZOS)
        assert difference(generated, photo if photo.size == (16, 16) else fitted) <= 12
    assert again.seeds == [None] * 3


def test_corrections_beat_plain_inversion(pipe, options):
    guided = replace(options, upsamplers=(), decoder=replace(options.decoder, guidance=6.0))
    small = [photo.resize((8, 8)) for photo in PHOTOS[:2]]

    def error(iterations: int) -> float:
        result = pipe.reconstruct(
            small, options=guided, inversion=InversionOptions(iterations), **FEW
        )
        return mean_difference(result.images, small)

    assert error(10) < error(0)


def test_inversion_does_not_depend_on_the_batch(pipe, options, latent):
    alone = pipe.invert(PHOTOS[1], options=options, progress=False)
    for of_one, of_all in zip(alone.noise, latent[[1]].noise, strict=True):
        torch.testing.assert_close(of_one, of_all, rtol=0, atol=2e-3)


def test_every_step_is_reported(pipe, options):
    steps = []
    pipe.invert(PHOTOS, options=options, on_step=steps.append, **FEW)
    once = [("decoder", i, 8) for i in range(1, 9)] * 2 + [
        ("upsampler_0", i, 3) for i in range(1, 4)
    ]
    assert [(p.stage, p.step, p.num_steps) for p in steps] == once * 2


def test_a_latent_is_saved_and_loaded(latent, again, pipe, tmp_path):
    latent.save(tmp_path / "new" / "a.safetensors")
    loaded = Latent.load(tmp_path / "new" / "a.safetensors")
    assert (loaded.options, loaded.sources) == (latent.options, latent.sources)
    assert difference(pipe.reconstruct(loaded, **FEW).images[1], again.images[1]) == 0
    save_file({"image_emb": torch.ones(1, 16)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="is not a saved latent"):
        Latent.load(tmp_path / "b.safetensors")


def test_latents_are_indexed_and_concatenated(latent):
    parts = Latent.cat([latent[[2]], latent[:2]])
    assert [one.sources for one in latent] == [(source,) for source in latent.sources]
    assert torch.equal(latent[-1].noise[0], latent.noise[0][2:])
    assert torch.equal(latent[np.int64(2)].image_emb, latent[2].image_emb)
    with pytest.raises(IndexError):
        latent[3]
    torch.testing.assert_close(parts.noise[1], latent.noise[1][[2, 0, 1]])
    assert parts.sources == (latent.sources[2], *latent.sources[:2])
    assert latent.repeat_interleave(2).image_emb[3].equal(latent.image_emb[1])
    other = replace(latent, options=deterministic(latent.options, steps=9))
    with pytest.raises(ValueError, match="different options"):
        Latent.cat([latent, other])
    with pytest.raises(ValueError, match=r"have \[2, 3\] images"):
        replace(latent, image_emb=latent.image_emb[:2])


# -- variations


def test_variations_move_away_as_eta_grows(pipe, latent, again):
    def distance(eta: float) -> float:
        varied = pipe.vary(latent, eta=eta, num_images=2, seed=3, **FEW)
        return mean_difference(varied.images, [image for image in again.images for _ in range(2)])

    distances = [distance(eta) for eta in (0.0, 0.3, 0.6, 1.0)]
    assert distances[0] == 0 and distances == sorted(distances) and len(set(distances)) == 4


def test_variations_are_seeded(pipe, latent):
    varied = pipe.vary(latent, eta=0.5, num_images=2, seed=3, **FEW)
    assert (
        varied.seeds == [3, 4, 5, 6, 7, 8]
        and len({image.tobytes() for image in varied.images}) == 6
    )
    alone = pipe.vary(latent[[1]], eta=0.5, seed=6, **FEW)
    assert difference(alone.images[0], varied.images[3]) <= 1
    with pytest.raises(ValueError, match="eta is 1.5; expected 0"):
        pipe.vary(latent, eta=1.5)


def test_a_random_latent_gives_the_images_of_variations(pipe, options):
    emb = pipe.encode_image(PHOTOS[:2])
    latent = pipe.random_latent(emb, seed=4, options=options)
    generated = pipe.variations(image_emb=emb, seed=4, options=options, progress=False)
    for a, b in zip(pipe.reconstruct(latent, **FEW).images, generated.images, strict=True):
        assert difference(a, b) <= 1
    with pytest.raises(ValueError, match=r"image_emb is of shape \(2,\)"):
        pipe.random_latent(torch.ones(2))


# -- interpolation


@pytest.mark.parametrize("noise", ["slerp", "first", "random"])
def test_interpolation_starts_and_ends_with_the_reconstructions(pipe, latent, again, noise):
    path = pipe.interpolate(latent[:2], frames=5, noise=noise, seed=1, **FEW)
    assert len(path) == 5 and not path.image_emb.is_inference()
    if noise != "random":
        assert difference(path.images[0], again.images[0]) == 0
    if noise == "slerp":
        assert difference(path.images[-1], again.images[1]) == 0
    torch.testing.assert_close(path.image_emb[[0, -1]], latent.image_emb[:2])


def test_frames_are_interpolated_batch_by_batch(pipe, latent, monkeypatch):
    """The latents of a long path are not in memory together."""
    known = []

    def seen(path: Latent, places: list[float]) -> Latent:
        points = along(path, places)
        known.append((len(points), len(points.noise)))
        return points

    monkeypatch.setattr(manipulation, "along", seen)
    pipe.interpolate(latent, frames=5, **FEW)
    assert known == [(2, 2), (2, 2), (1, 2)]
    pipe.interpolate(latent, frames=5, even=True, **FEW)
    assert known[3:6] == [
        (2, 1),
        (2, 1),
        (1, 1),
    ]  # the small frames for CLIP need no noise for the upsampler


def test_a_path_through_several_images_divides_evenly(latent):
    points = along(latent, [k / 8 for k in range(9)])
    for i, place in enumerate((0, 4, 8)):
        torch.testing.assert_close(points.image_emb[place], latent.image_emb[i], rtol=0, atol=0)
        torch.testing.assert_close(points.noise[0][place], latent.noise[0][i], rtol=0, atol=0)
    unit = normalise(points.image_emb)
    steps = (unit[1:] - unit[:-1]).norm(dim=1)
    torch.testing.assert_close(steps[:4], steps[:1].expand(4))
    torch.testing.assert_close(steps[4:], steps[4:5].expand(4))
    norms = points.noise[0].flatten(1).norm(dim=1)  # interpolated noise keeps its norm
    torch.testing.assert_close(norms[:5], torch.lerp(norms[0], norms[4], torch.linspace(0, 1, 5)))


@pytest.mark.parametrize("noise", ["slerp", "random"])
def test_even_frames_have_equal_clip_distances(pipe, latent, again, noise):
    def steps(path: GenerationResult) -> torch.Tensor:
        seen = normalise(pipe.encode_image(path.images))
        return (seen[1:] - seen[:-1]).norm(dim=1)

    chosen = {"noise": noise, "seed": 1, "options": replace(latent.options, upsamplers=()), **FEW}
    plain, even = (
        pipe.interpolate(latent[:2], frames=7, even=one, **chosen) for one in (False, True)
    )
    assert steps(even).max() / steps(even).mean() < min(
        1.5, steps(plain).max() / steps(plain).mean()
    )
    places = [entry["arguments"]["frames"][0] for entry in even.metadata]
    assert places == sorted(set(places)) and (places[0], places[-1]) == (0, 1)
    again = pipe.interpolate(latent[:2], frames=places, **chosen)
    assert [difference(*pair) for pair in zip(again.images, even.images, strict=True)] == [0] * 7


def test_even_frames_between_equal_images_are_uniform(pipe, latent):
    path = pipe.interpolate(latent[[0, 0]], frames=3, even=True, **FEW)
    assert [entry["arguments"]["frames"] for entry in path.metadata] == [[0.0], [0.5], [1.0]]


def test_interpolation_between_latents(pipe, latent):
    expected = pipe.interpolate(latent[:2], frames=3, **FEW)
    path = pipe.interpolate([latent[0], latent[1]], frames=np.linspace(0, 1, 3), **FEW)
    assert [difference(*pair) for pair in zip(path.images, expected.images, strict=True)] == [0] * 3
    assert path.metadata == expected.metadata
    assert len(pipe.vary([latent[0], latent[1:]], seed=0, **FEW)) == 3
    with pytest.raises(ValueError, match="got images and latents; expected one of the two"):
        pipe.interpolate([latent[0], PHOTOS[0]], **FEW)


def test_interpolation_between_prompts(pipe, options):
    path = pipe.interpolate(
        prompts=["a red apple", "a blue fish"], frames=3, seed=5, options=options, **FEW
    )
    ends = pipe.imagine(["a red apple", "a blue fish"], seed=5, options=options, progress=False)
    generated = pipe.reconstruct(ends, **FEW)
    assert [difference(path.images[k], generated.images[k // 2]) for k in (0, 2)] == [0, 0]
    torch.testing.assert_close(
        ends.image_emb[1:],
        pipe("a blue fish", seed=6, options=options, progress=False).image_emb,
        rtol=0,
        atol=1e-4,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either images .* or prompts"),
        ({"path": blob("red")}, "at least 2 images or prompts; got 1"),
        ({"path": torch.zeros(1, 3, 8, 8)}, "at least 2 images or prompts; got 1"),
        ({"path": [blob("red")]}, "at least 2 images or prompts; got 1"),
        ({"prompts": ["a"]}, "at least 2 images or prompts; got 1"),
        ({"prompts": ["a", "b"], "frames": 1}, "frames is 1"),
        ({"prompts": ["a", "b"], "frames": [0.5, 1.5]}, "expected positions on the path"),
        (
            {"prompts": ["a", "b"], "frames": [0.5, 1], "even": True},
            "even=True",
        ),
        (
            {"prompts": ["a", "b"], "frames": np.array([0.5, 1]), "even": True},
            "even=True",
        ),
        ({"prompts": ["a", "b"], "frames": np.array([])}, "expected positions on the path"),
        ({"prompts": ["a", "b"], "frames": np.zeros((2, 2))}, "expected positions on the path"),
        ({"prompts": ["a", "b"], "frames": ["0", "x"]}, r"frames is \['0', 'x'\]; expected pos"),
        ({"prompts": ["a", "b"], "noise": "none"}, "noise is 'none'"),
    ],
)
def test_invalid_paths_are_rejected(pipe, options, arguments, message, monkeypatch):
    monkeypatch.setattr(BoundStage, "invert", None)  # must fail before the slow inversion
    with pytest.raises(ValueError, match=message):
        pipe.interpolate(**arguments, options=options, progress=False)


# -- text diffs


def test_text_diff_starts_at_the_reconstruction(pipe, latent, again):
    thetas = [0.0, 0.2, 0.5]
    result = pipe.text_diff(latent[:2], "", "a blue fish", thetas, eta=0.0, **FEW)
    assert len(result) == 6
    assert [difference(result.images[3 * i], again.images[i]) for i in range(2)] == [0, 0]
    base, text = pipe.encode_text(["", "a blue fish"]).emb
    direction = normalise(normalise(text) - normalise(base))
    closeness = (normalise(result.image_emb) @ direction).view(2, 3)
    assert (closeness.diff(dim=1) > 0).all()
    torch.testing.assert_close(
        result.image_emb.norm(dim=1), latent.image_emb[[0, 0, 0, 1, 1, 1]].norm(dim=1)
    )
    one = pipe.text_diff(latent[[1]], "", "a blue fish", theta=0.5, eta=0.0, **FEW)
    assert difference(one.images[0], result.images[5]) <= 1
    for theta in (1.5, [], "x", None):
        with pytest.raises(ValueError, match="theta is"):
            pipe.text_diff(latent, "a", "b", theta)
    with pytest.raises(ValueError, match="eta is 1.5"):
        pipe.text_diff(latent, "a", "b", eta=1.5)
    with pytest.raises(ValueError, match="same embedding"):
        pipe.text_diff(latent, "a fish", "a fish")


@pytest.mark.parametrize("theta", [np.array([0.1, 0.2]), torch.tensor([0.1, 0.2]), (0.1, 0.2)])
def test_theta_accepts_any_sequence(pipe, latent, theta):
    result = pipe.text_diff(latent[0], "", "a blue fish", theta, **FEW)
    assert [entry["arguments"]["theta"] for entry in result.metadata] == pytest.approx([0.1, 0.2])


def test_invalid_seeds_are_rejected_before_inversion(pipe, monkeypatch):
    monkeypatch.setattr(BoundStage, "invert", None)
    with pytest.raises(ValueError, match="seed is -1"):
        pipe.vary(PHOTOS, seed=-1)
    with pytest.raises(ValueError, match="seed is -1"):
        pipe.text_diff(PHOTOS, "", "a blue fish", seed=-1)
    with pytest.raises(ValueError, match="same embedding"):
        pipe.text_diff(PHOTOS, "a fish", "a fish")


def test_text_diff_with_eta_adds_noise(pipe, latent, again):
    chosen = {"theta": [0.0, 0.3], **FEW}
    result = pipe.text_diff(latent[:2], "", "a blue fish", seed=4, **chosen)
    assert result.seeds == [4, 4, 5, 5]
    assert difference(result.images[0], again.images[0]) > 0
    varied = pipe.vary(latent[:2], eta=0.5, seed=4, **FEW)  # equal to theta 0
    assert [difference(result.images[2 * i], varied.images[i]) for i in range(2)] == [0, 0]
    alone = pipe.text_diff(latent[[1]], "", "a blue fish", seed=5, **chosen)
    assert difference(alone.images[1], result.images[3]) <= 1


# -- metadata


def test_metadata_regenerates_manipulated_images(pipe, latent, tmp_path):
    results = [
        pipe.reconstruct(latent, **FEW),
        pipe.vary(latent, eta=0.5, num_images=2, seed=3, **FEW),
        pipe.interpolate(latent, frames=5, **FEW),
        pipe.interpolate(latent, frames=3, noise="random", seed=8, **FEW),
        pipe.interpolate(
            prompts=["a red apple", "a blue fish"], frames=3, seed=2, options=latent.options, **FEW
        ),
        pipe.text_diff(latent, "", "a blue fish", [0.1, 0.4], eta=0.0, **FEW),
        pipe.text_diff(latent, "", "a blue fish", [0.1, 0.4], seed=6, **FEW),
    ]
    latents: dict = {}
    for result in results:
        save_png(result.images[1], tmp_path / "a.png", result.metadata[1])
        (metadata,) = read_metadata(tmp_path / "a.png")
        redrawn = regenerate(pipe, metadata, progress=False, latents=latents)
        assert len(redrawn) == 1 and difference(redrawn.images[0], result.images[1]) <= 2
    assert len(latents) == 5  # three images and two embeddings: nothing is inverted twice


def test_metadata_keeps_options_of_latents_and_decoding(pipe, latent):
    guided = replace(latent.options, decoder=replace(latent.options.decoder, guidance=6.0))
    latents: dict = {}
    for result in (
        pipe.vary(latent, eta=0.3, seed=1, options=guided, **FEW),
        pipe.vary(
            pipe.random_latent(latent.image_emb, seed=4, options=latent.options),
            options=guided,
            **FEW,
        ),
        pipe.reconstruct(PHOTOS, options=guided, **FEW),
    ):
        again = regenerate(
            pipe, json.loads(json.dumps(result.metadata[0])), progress=False, latents=latents
        )
        assert (
            difference(again.images[0], result.images[0]) <= 2
            and again.metadata[0] == result.metadata[0]
        )
    assert len(latents) == 3  # the first image with each of the options
    assert "options" not in result.metadata[0]["sources"][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operation": "__init__"}, "unknown operation '__init__'"),
        ({"sources": []}, "has no sources"),
        ({"sources": [{"film": ""}]}, "has film; expected an image or an embedding"),
        ({"sources": [{"picture": "AAAA"}]}, "an image in the metadata is damaged"),
        (
            {"sources": [{"picture": "", "inversion": {"turns": 1}}]},
            "inversion in the metadata: turns is unknown",
        ),
    ],
)
def test_metadata_of_manipulations_is_checked(pipe, again, changes, message):
    with pytest.raises(ValueError, match=message):
        regenerate(pipe, {**again.metadata[0], **changes}, progress=False)


# -- options


def test_stochastic_options_are_rejected(pipe, options):
    for changes in ({"sampler": "unipc"}, {"eta": 0.5}, {"cache_interval": 2}):
        bad = replace(options, decoder=replace(options.decoder, **changes))
        with pytest.raises(ValueError, match="expected 'ddim'"):
            pipe.invert(PHOTOS[0], options=bad)
        assert deterministic(bad, 8) == options
    for source in (PHOTOS[0], pipe.random_latent(torch.ones(1, 16), options=options)):
        with pytest.raises(ValueError, match="options is a StageOptions"):
            pipe.reconstruct(source, options=options.decoder)
    scheduler = replace(options, decoder=replace(options.decoder, sampler=DDIMScheduler()))
    with pytest.raises(ValueError, match="sampler 'DDIMScheduler'.*; set these, or call without"):
        pipe.invert(PHOTOS[0], options=scheduler)


def test_latents_of_another_model_are_rejected(pipe, latent):
    other = replace(latent, noise=(latent.noise[1], latent.noise[1]))
    with pytest.raises(ValueError, match="noise of 16, 16 px; expected 8, 16 px"):
        pipe.reconstruct(other)
    wide = replace(latent, image_emb=torch.ones(3, 17))
    for generated in (
        pipe.reconstruct,
        pipe.vary,
        pipe.interpolate,
        lambda path: pipe.text_diff(path, "a", "b"),
    ):
        with pytest.raises(ValueError, match="has embeddings of width 17; expected 16"):
            generated(wide)


def test_large_images_are_resized_one_at_a_time(pipe, options, tmp_path, monkeypatch):
    for i in range(3):
        Image.effect_noise((90, 70), 50).convert("RGB").save(tmp_path / f"{i}.png")
    files = sorted(tmp_path.iterdir())
    expected, alive = pipe.invert(list(map(Image.open, files)), options=options, **FEW), []

    def opened(source: Path) -> Image.Image:
        assert all(one() is None for one in alive)
        alive.append(weakref.ref(photo := open_image(source)))
        return photo

    monkeypatch.setattr(manipulation, "open_image", opened)
    latent = pipe.invert(files, options=options, **FEW)
    assert len(alive) == 3 and all(map(torch.equal, latent.noise, expected.noise))


def test_fewer_stages_give_smaller_images(pipe, latent):
    small = pipe.reconstruct(latent, options=replace(latent.options, upsamplers=()), **FEW)
    assert small.images[0].size == (8, 8)


def test_images_of_any_size_are_inverted(pipe, options):
    photos = [Image.new("RGB", size, "red") for size in ((1, 1), (40, 3), (300, 200))]
    result = pipe.reconstruct(photos, options=options, **FEW)
    assert [image.size for image in result.images] == [(16, 16)] * 3
    assert all(difference(image, Image.new("RGB", (16, 16), "red")) <= 6 for image in result.images)
    tensor = torch.full((1, 3, 16, 16), -1.0)
    assert (
        difference(
            pipe.reconstruct(tensor, options=options, **FEW).images[0], Image.new("RGB", (16, 16))
        )
        <= 6
    )


def test_a_separate_last_network_runs_at_t_0(pipe, options):
    """The last network was trained for t = 0 only (Karlo)."""
    from conftest import scrambled, tiny_upsampler

    unet = pipe.upsamplers[0].config.unet
    upsampler = scrambled(tiny_upsampler(prediction="v", last_unet=unet), std=0.02)
    two = UnCLIPPipeline(pipe.clip, None, pipe.decoder, [upsampler], options)
    low_res = torch.zeros(1, 3, 8, 8)
    with torch.inference_mode():
        run = two.upsampler_stages[0].bind(low_res, options.upsamplers[0], end_at_0=True)
    assert run.timesteps[0] == 999 and run.timesteps[-1] == 0
    photo = PHOTOS[0]
    assert difference(two.reconstruct(photo, options=options, **FEW).images[0], photo) <= 12


def test_half_precision(pipe, options):
    half = copy.deepcopy(pipe).to(dtype=torch.bfloat16)
    latent = half.invert(PHOTOS[0], options=options, **FEW)
    assert {x.dtype for x in latent.noise} == {torch.float32}
    assert difference(half.reconstruct(latent, **FEW).images[0], PHOTOS[0]) <= 40


# -- the bundled model


@pytest.fixture(scope="module")
def emoji() -> UnCLIPPipeline:
    return unclip.load("emoji", "cpu")


def test_the_bundled_model_reconstructs_its_image(emoji):
    """With guidance, where plain inversion fails; few steps, to save time."""
    from unclip.evaluation.metrics import psnr
    from unclip.image_io import to_tensor

    options = replace(deterministic(emoji.options), upsamplers=())
    options = replace(options, decoder=replace(options.decoder, steps=20))
    generated = emoji("a smiling face", seed=0, options=options, progress=False)

    def decibels(iterations: int) -> float:
        again = emoji.reconstruct(
            generated.images[0], options=options, inversion=InversionOptions(iterations), **FEW
        )
        return psnr(to_tensor(again.images), to_tensor(generated.images)).item()

    better, plain = decibels(10), decibels(0)
    assert better > 25 and better > plain + 10
