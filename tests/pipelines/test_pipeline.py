"""From prompts to images: seeds, batches, stages, guidance and metadata."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY_OPTIONS, scrambled, tiny_decoder, tiny_prior, tiny_upsampler
from PIL import Image

from unclip.image_io import grid, open_image, read_metadata, save_png
from unclip.pipelines.provenance import regenerate
from unclip.pipelines.request import generators_from
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.types import StageOptions

PROMPTS = ["a red apple", "a blue fish", "an apple and a fish"]


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


def with_stage(stage: str, **changes):
    return replace(TINY_OPTIONS, **{stage: replace(getattr(TINY_OPTIONS, stage), **changes)})


@pytest.fixture
def generate(tiny_pipe):
    return lambda *args, **kwargs: tiny_pipe(*args, progress=False, **kwargs)


def test_images_are_in_order_with_consecutive_seeds(generate):
    result = generate(PROMPTS, num_images=2, seed=10)
    assert result.seeds == [10, 11, 12, 13, 14, 15]
    assert result.prompts == [prompt for prompt in PROMPTS for _ in range(2)]
    assert [image.size for image in result.images] == [(16, 16)] * 6
    assert len({image.tobytes() for image in result.images}) == 6


@pytest.mark.parametrize("batch_size", [16, 2])
def test_each_image_may_have_a_seed_of_its_own(generate, batch_size):
    seeds = [7, 3, 3, 9]
    result = generate(
        ["a red apple", "a blue fish"], num_images=2, seed=seeds, batch_size=batch_size
    )
    assert result.seeds == seeds
    for image, prompt, seed in zip(result.images, result.prompts, seeds, strict=True):
        assert difference(image, generate(prompt, seed=seed).images[0]) <= 2
    for wrong in ([1, 2], [1, 2, 3, -4], [1, 2, 3, "4"]):
        with pytest.raises(ValueError, match="seed"):
            generate(["a red apple", "a blue fish"], num_images=2, seed=wrong)


def test_the_same_seed_gives_the_same_bytes(generate):
    assert (
        generate("a red apple", seed=1).images[0].tobytes()
        == generate("a red apple", seed=1).images[0].tobytes()
    )


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_images_do_not_depend_on_the_batch(generate, sampler):
    options = with_stage("decoder", sampler=sampler, eta=1.0)
    together = generate(PROMPTS, num_images=3, seed=4, options=options)
    for batch_size in (1, 2, 4):
        apart = generate(PROMPTS, num_images=3, seed=4, options=options, batch_size=batch_size)
        assert apart.seeds == together.seeds
        assert max(map(difference, apart.images, together.images)) <= 2
    for k in (0, 5, 8):
        alone = generate(together.prompts[k], seed=together.seeds[k], options=options)
        assert difference(alone.images[0], together.images[k]) <= 2


def test_a_random_seed_is_reported(generate):
    first, second = generate("a red apple"), generate("a red apple")
    assert first.seeds != second.seeds
    assert (
        generate("a red apple", seed=first.seeds[0]).images[0].tobytes()
        == first.images[0].tobytes()
    )


def test_the_global_generator_is_unchanged(generate):
    before = torch.get_rng_state()
    generate("a red apple")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_text_prefix_is_computed_once_for_each_prompt(tiny_pipe, monkeypatch):
    pipe = UnCLIPPipeline(
        tiny_pipe.clip, tiny_pipe.prior, tiny_pipe.decoder
    )  # a new pipeline, with an empty cache
    rows = []
    condition = pipe.prior.condition
    monkeypatch.setattr(
        pipe.prior, "condition", lambda text: rows.append(len(text)) or condition(text)
    )
    options = replace(TINY_OPTIONS, prior_candidates=3, upsamplers=())
    pipe(PROMPTS, num_images=4, options=options, progress=False)
    assert rows == [3, 1]  # the prompts and one null
    pipe(PROMPTS[:2], options=options, progress=False)
    assert rows == [3, 1, 2]  # the null is cached


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 2), (3.0, 4)])
def test_no_null_is_computed_without_guidance(tiny_pipe, generate, monkeypatch, guidance, rows):
    seen = set()
    denoise = tiny_pipe.decoder.denoise
    monkeypatch.setattr(
        tiny_pipe.decoder,
        "denoise",
        lambda x, *args, **kwargs: seen.add(len(x)) or denoise(x, *args, **kwargs),
    )
    generate("a red apple", num_images=2, options=with_stage("decoder", guidance=guidance))
    assert seen == {rows}


def test_each_stage_has_its_own_guidance(generate):
    photos = [
        generate("a red apple", seed=0, options=options).images[0].tobytes()
        for options in (
            TINY_OPTIONS,
            with_stage("prior", guidance=1.0),
            with_stage("decoder", guidance=1.0),
        )
    ]
    assert len(set(photos)) == 3


def test_the_best_candidate_has_the_highest_dot_product_with_the_text(tiny_pipe):
    options = StageOptions(steps=3, guidance=2.0)  # DDIM: a candidate uses its initial noise only
    text = tiny_pipe.encode_text(["a red apple", "a blue fish"])
    best = tiny_pipe.sample_prior(
        text, generators=generators_from([7, 8]), options=options, candidates=3
    )
    generators = generators_from([7, 8])
    each = torch.stack(
        [
            tiny_pipe.sample_prior(text, generators=generators, options=options, candidates=1)
            for _ in range(3)
        ]
    )  # candidate, prompt, D
    scores = (each * text.emb).sum(dim=-1)
    for prompt in range(2):
        torch.testing.assert_close(best[prompt], each[scores[:, prompt].argmax(), prompt])


def test_separate_stages_equal_a_call(tiny_pipe, generate):
    generators = generators_from([5])
    text = tiny_pipe.encode_text("a red apple")
    emb = tiny_pipe.sample_prior(text, generators=generators)
    small = tiny_pipe.decode(emb, text, generators=generators)
    large = tiny_pipe.upsample(small, generators=generators)
    assert small.shape == (1, 3, 8, 8) and large.shape == (1, 3, 16, 16)
    assert large.abs().max() <= 1
    result = generate("a red apple", seed=5)
    torch.testing.assert_close(result.image_emb, emb)
    pixels = ((large[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    assert difference(Image.fromarray(pixels), result.images[0]) == 0


def test_outputs_of_stages_are_not_inference_tensors(tiny_pipe, tiny_dalle):
    text = tiny_pipe.encode_text("a red apple")
    image_emb = tiny_pipe.sample_prior(text)
    small = tiny_pipe.decode(image_emb, text)
    photos = [
        tiny_pipe.upsample(small),
        tiny_dalle.decode(torch.zeros(1, 4, 4, dtype=torch.long)),
    ]
    embs = [image_emb, tiny_pipe.as_image(text.emb), tiny_pipe.encode_image(photos[0])]
    for answer in (text.emb, text.states, *embs, small, *photos):
        answer /= answer.norm()
        assert answer.requires_grad_().sum().backward() is None
    with torch.inference_mode():  # no copy is needed
        assert tiny_pipe.encode_text("a red apple").emb.is_inference()


def test_every_step_is_reported(generate):
    steps = []
    generate("a red apple", num_images=3, batch_size=2, on_step=steps.append)
    once = [("prior", i, 3) for i in (1, 2, 3)] + [("decoder", i, 3) for i in (1, 2, 3)]
    once += [("upsampler_0", i, 2) for i in (1, 2)]
    assert [(p.stage, p.step, p.num_steps) for p in steps] == once * 2
    assert [p.preview if p.preview is None else tuple(p.preview.shape) for p in steps[:8]] == (
        [None] * 3 + [(2, 3, 8, 8)] * 3 + [(2, 3, 16, 16)] * 2
    )


def test_the_progress_bar_can_be_turned_off(tiny_pipe, capsys):
    tiny_pipe("a red apple", progress=False)
    assert capsys.readouterr().err == ""
    tiny_pipe("a red apple", progress=True)
    assert "/8" in capsys.readouterr().err


def test_variations_accept_images_in_any_form(tiny_pipe, generate, tmp_path):
    photo = generate("a red apple", seed=0).images[0]
    save_png(photo, tmp_path / "apple.png")
    first = tiny_pipe.variations(photo, num_images=2, seed=3, progress=False)
    assert first.seeds == [3, 4] and first.prompts == [None, None]
    assert first.images[0].tobytes() != first.images[1].tobytes()

    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1) / 127.5 - 1
    for image in (
        tmp_path / "apple.png",
        str(tmp_path / "apple.png"),
        [photo],
        pixels,
        pixels[None],
    ):
        again = tiny_pipe.variations(image, num_images=2, seed=3, progress=False)
        assert max(map(difference, again.images, first.images)) <= 2
    again = tiny_pipe.variations(
        image_emb=first.image_emb[:1], num_images=2, seed=3, progress=False
    )
    assert max(map(difference, again.images, first.images)) == 0


@pytest.mark.parametrize("null_text", ["learned", "empty_prompt"])
def test_variations_use_the_null_text(tiny_pipe, null_text):
    prior, decoder = (
        scrambled(tiny_prior(null_text=null_text)),
        scrambled(tiny_decoder(null_text=null_text)),
    )
    pipe = UnCLIPPipeline(
        tiny_pipe.clip, prior, decoder, options=replace(TINY_OPTIONS, upsamplers=())
    )
    emb = torch.ones(1, 16)
    null = pipe.variations(image_emb=emb, seed=0, progress=False).images[0]
    if null_text == "empty_prompt":
        said = pipe.decode(emb, pipe.encode_text(""), generators=generators_from([0]))
        pixels = ((said[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
        assert difference(Image.fromarray(pixels), null) == 0
    else:
        decoder.text.null_text_state.mul_(-1)
        assert (
            difference(pipe.variations(image_emb=emb, seed=0, progress=False).images[0], null) > 0
        )


def test_the_decoder_reads_the_prompts_of_variations(tiny_pipe):
    texts, negative = ["a red apple", "a blue fish"], "an apple and a fish"
    emb, call = torch.randn(2, 16), {"seed": 3, "progress": False}
    result = tiny_pipe.variations(
        image_emb=emb, prompt=texts, negative_prompt=negative, num_images=2, **call
    )
    assert result.prompts == [text for text in texts for _ in range(2)]
    sampling = {"generators": generators_from([5])}
    said, avoided = tiny_pipe.encode_text(texts[1]), tiny_pipe.encode_text(negative)
    small = tiny_pipe.decode(emb[1:], said, negative=avoided, **sampling)
    decoded = tiny_pipe.upsample(small, **sampling)
    pixels = ((decoded[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    assert difference(Image.fromarray(pixels), result.images[2]) <= 2
    one = {"image_emb": emb[1:], **call, "seed": 5}
    for other in ({}, {"prompt": texts[1]}, {"negative_prompt": negative}):
        assert difference(tiny_pipe.variations(**one, **other).images[0], result.images[2]) > 0
    for k, metadata in enumerate(result.metadata):
        again = regenerate(tiny_pipe, metadata, progress=False)
        assert difference(again.images[0], result.images[k]) <= 2
        assert again.metadata == [metadata]


@pytest.mark.parametrize("embedding", ["text", "none"])
def test_variations_accept_embeddings(tiny_pipe, embedding):
    options = replace(TINY_OPTIONS, embedding=embedding)
    with pytest.raises(ValueError, match=f"embedding is '{embedding}'"):
        tiny_pipe.variations(Image.new("RGB", (16, 16)), options=options, progress=False)


def test_embeddings_of_a_result_are_not_inference_tensors(generate):
    emb = generate("a red apple", seed=0).image_emb
    emb *= 2
    assert emb.requires_grad_().sum().backward() is None


def test_metadata_regenerates_an_image(tiny_pipe, generate, tmp_path):
    generated = generate(
        ["a red apple", "ein Apfel 🍎"], seed=2, options=with_stage("decoder", steps=4)
    )
    varied = tiny_pipe.variations(generated.images[0], num_images=2, seed=5, progress=False)
    for result, k in ((generated, 0), (generated, 1), (varied, 0), (varied, 1)):
        save_png(result.images[k], tmp_path / "a.png", result.metadata[k])
        (metadata,) = read_metadata(tmp_path / "a.png")
        assert metadata == result.metadata[k]
        assert (metadata["version"], metadata["model"], metadata["dtype"]) == (
            "0.1.0",
            "tiny",
            "float32",
        )
        assert (
            difference(regenerate(tiny_pipe, metadata, progress=False).images[0], result.images[k])
            <= 2
        )


def test_metadata_names_a_scheduler_object(tiny_pipe, generate):
    from diffusers import DDIMScheduler

    betas = tiny_pipe.schedules["decoder"].betas.tolist()
    options = with_stage("decoder", sampler=DDIMScheduler(trained_betas=betas))
    metadata = generate("a red apple", seed=0, options=options).metadata[0]
    assert metadata["options"]["decoder"]["sampler"] == "DDIMScheduler"
    with pytest.raises(ValueError, match="'DDIMScheduler'"):
        regenerate(tiny_pipe, metadata, progress=False)


@pytest.mark.parametrize("stage", ["prior", "upsamplers"])
def test_a_scheduler_object_cannot_be_saved(tiny_pipe, tmp_path, monkeypatch, stage):
    from diffusers import DDIMScheduler

    changed = StageOptions(2, sampler=DDIMScheduler())
    changed = (changed,) if stage == "upsamplers" else changed
    monkeypatch.setattr(tiny_pipe, "options", replace(tiny_pipe.options, **{stage: changed}))
    with pytest.raises(ValueError, match="have a DDIMScheduler; expected sampler names"):
        tiny_pipe.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_fewer_upsamplers_give_smaller_images(generate):
    assert generate("a red apple", options=replace(TINY_OPTIONS, upsamplers=())).images[0].size == (
        8,
        8,
    )


def test_two_upsamplers(tiny_pipe):
    upsamplers = [tiny_pipe.upsamplers[0], scrambled(tiny_upsampler(low=16))]
    pipe = UnCLIPPipeline(tiny_pipe.clip, tiny_pipe.prior, tiny_pipe.decoder, upsamplers)
    steps = []
    options = replace(TINY_OPTIONS, upsamplers=(StageOptions(2), StageOptions(1)))
    result = pipe("a red apple", options=options, on_step=steps.append, progress=False)
    assert result.images[0].size == (32, 32)
    assert [p.stage for p in steps[-3:]] == ["upsampler_0", "upsampler_0", "upsampler_1"]


def test_the_last_network_of_an_upsampler_takes_the_last_step(tiny_pipe, monkeypatch):
    unet = tiny_pipe.upsamplers[0].config.unet
    upsampler = scrambled(tiny_upsampler(last_unet=unet))
    pipe = UnCLIPPipeline(tiny_pipe.clip, tiny_pipe.prior, tiny_pipe.decoder, [upsampler])
    calls = []
    for name in ("unet", "last_unet"):
        unet = getattr(upsampler, name)
        unet.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    pipe.upsample(torch.zeros(1, 3, 8, 8), options=[StageOptions(3)])
    assert calls == ["unet", "unet", "last_unet"]


def test_half_precision(tiny_pipe, generate):
    pipe = copy.deepcopy(tiny_pipe).to(dtype=torch.bfloat16)
    assert pipe.dtype == torch.bfloat16
    assert {p.dtype for p in pipe.clip.parameters()} == {
        torch.float32
    }  # a small CLIP stays float32
    assert pipe.prior.emb_std.dtype == torch.float32
    near = pipe("a red apple", seed=0, progress=False)
    assert near.metadata[0]["dtype"] == "bfloat16"
    exact = generate("a red apple", seed=0)
    assert torch.cosine_similarity(near.image_emb, exact.image_emb).item() > 0.98


def test_without_a_prior_only_variations_work(tiny_pipe):
    pipe = UnCLIPPipeline(tiny_pipe.clip, None, tiny_pipe.decoder)
    assert pipe.variations(image_emb=torch.ones(1, 16), progress=False).images[0].size == (8, 8)
    with pytest.raises(ValueError, match="no prior"):
        pipe("a red apple")


def test_a_long_prompt_is_cut_with_a_warning(generate):
    with pytest.warns(UserWarning, match="'.*marine'"):
        generate("a red " * 6 + "yellow submarine")


def test_images_are_opened_upright_and_on_white(tmp_path):
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert open_image(clear).getpixel((0, 0)) == (255, 255, 255)
    turned = Image.new("RGB", (3, 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (2, 3)


def test_grid_places_images_in_rows():
    colours = ["red", "green", "blue"]
    sheet = grid([Image.new("RGB", (4, 4), colour) for colour in colours], columns=2, gap=1)
    assert sheet.size == (9, 9)
    assert [sheet.getpixel(at) for at in ((0, 0), (5, 0), (0, 5), (5, 5))] == [
        (255, 0, 0),
        (0, 128, 0),
        (0, 0, 255),
        (255, 255, 255),
    ]


def test_images_are_written_atomically(tmp_path, monkeypatch):
    save_png(Image.new("RGB", (2, 2), "red"), tmp_path / "a.png")

    def full(self, file, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_png(Image.new("RGB", (2, 2), "blue"), tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert Image.open(tmp_path / "a.png").getpixel((0, 0)) == (255, 0, 0)
