"""The DALL-E pipeline: seeds, batches, image prompts, variations, files, invalid input."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import box_mask
from PIL import Image

import unclip
from unclip.image_io import read_metadata, save_png
from unclip.models.codecs.dvae import DVAE
from unclip.models.codecs.vae import GaussianVAE, GaussianVAEConfig
from unclip.models.codecs.vqvae import VQVAE, ConvNetConfig, VQVAEConfig
from unclip.models.dalle.transformer import DALLE
from unclip.pipelines.dalle.pipeline import DallePipeline
from unclip.pipelines.provenance import regenerate
from unclip.tokenizer import BPETokenizer
from unclip.types import CodeOptions, UnCLIPOptions

PROMPTS = ["a red apple", "a blue fish", "an apple and a fish"]
GUIDED = CodeOptions(temperature=0.9, top_k=12, top_p=0.95, guidance=2.0)


@pytest.fixture
def generate(tiny_dalle):
    return lambda *args, **kwargs: tiny_dalle(*args, progress=False, **kwargs)


@pytest.fixture(scope="module")
def photo(tiny_dalle) -> Image.Image:
    return tiny_dalle("a red apple", seed=0, progress=False).images[0]


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.tobytes() == b.tobytes()


def test_images_are_in_order_with_consecutive_seeds(generate):
    result = generate(PROMPTS, num_images=2, seed=10)
    assert result.seeds == [10, 11, 12, 13, 14, 15]
    assert result.prompts == [prompt for prompt in PROMPTS for _ in range(2)]
    assert [image.size for image in result.images] == [(16, 16)] * 6
    assert result.codes.shape == (6, 4, 4) and len(result.codes.unique(dim=0)) == 6
    assert result.image_emb is None and result.scores is None
    assert not result.codes.is_inference()  # so that the caller can compute gradients


@pytest.mark.parametrize("options", [CodeOptions(), GUIDED])
def test_images_do_not_depend_on_the_batch(generate, options):
    together = generate(PROMPTS, num_images=3, seed=4, options=options)
    for batch_size in (1, 2, 4):
        apart = generate(PROMPTS, num_images=3, seed=4, options=options, batch_size=batch_size)
        assert apart.seeds == together.seeds and torch.equal(apart.codes, together.codes)
    for k in (0, 5, 8):
        alone = generate(together.prompts[k], seed=together.seeds[k], options=options)
        assert torch.equal(alone.codes[0], together.codes[k])


def test_images_depend_on_prompt_seed_and_options(generate):
    codes = [
        generate(prompt, seed=seed, options=options).codes
        for prompt, seed, options in [
            ("a red apple", 0, CodeOptions()),
            ("a blue fish", 0, CodeOptions()),
            ("a red apple", 1, CodeOptions()),
            ("a red apple", 0, CodeOptions(guidance=3.0)),
        ]
    ]
    assert len(torch.cat(codes).unique(dim=0)) == 4
    cold = CodeOptions(temperature=0)
    assert torch.equal(
        generate("a fish", seed=0, options=cold).codes,
        generate("a fish", seed=1, options=cold).codes,
    )


def test_separate_stages_equal_a_call(tiny_dalle, generate):
    result = generate("a red apple", seed=5)
    pixels = (
        (tiny_dalle.decode(result.codes)[0].permute(1, 2, 0) + 1).mul(127.5).round().byte().numpy()
    )
    assert same(Image.fromarray(pixels), result.images[0])
    x = torch.from_numpy(np.array(result.images[0])).permute(2, 0, 1)[None] / 127.5 - 1
    assert torch.equal(tiny_dalle.encode(result.images), tiny_dalle.codec.encode(x))


def test_each_prompt_and_the_null_are_encoded_once(tiny_dalle, generate, monkeypatch):
    rows = []
    condition = tiny_dalle.dalle.condition
    monkeypatch.setattr(
        tiny_dalle.dalle, "condition", lambda tokens: rows.append(len(tokens)) or condition(tokens)
    )
    generate(PROMPTS[:2], num_images=5, batch_size=2, options=GUIDED)
    assert rows == [1, 1, 1]  # each prompt once for its three batches, and a null


def test_progress_of_every_code_with_a_preview_after_each_row(generate):
    steps = []
    result = generate("a red apple", num_images=3, batch_size=2, seed=0, on_step=steps.append)
    assert [(p.stage, p.step, p.num_steps) for p in steps] == [
        ("dalle", n, 16) for n in range(1, 17)
    ] * 2
    assert [p.step for p in steps if p.preview is not None] == [4, 8, 12, 16] * 2
    half, whole = steps[7].preview, steps[15].preview
    assert half.shape == whole.shape == (2, 3, 16, 16)
    assert (half[:, :, 8:] == 1).all() and not (half[:, :, :8] == 1).all()
    generated = np.stack([np.asarray(image) for image in result.images[:2]]) / 127.5 - 1
    assert np.abs(whole.permute(0, 2, 3, 1).numpy() - generated).max() < 0.005


def test_no_preview_is_decoded_without_a_callback(tiny_dalle, monkeypatch, capsys):
    decoded = []
    decode = tiny_dalle.codec.decode
    monkeypatch.setattr(
        tiny_dalle.codec, "decode", lambda codes: decoded.append(len(codes)) or decode(codes)
    )
    tiny_dalle("a red apple", progress=True)
    assert "/16" in capsys.readouterr().err and decoded == [1]
    tiny_dalle("a red apple", progress=False)
    assert capsys.readouterr().err == ""


def test_a_compiled_step_gives_the_same_images(tiny_dalle, generate):
    calls = []

    def backend(graph, inputs):
        return lambda *args: calls.append(1) or graph(*args)

    pipe = unclip.compile(copy.deepcopy(tiny_dalle), backend=backend)
    result = pipe("a red apple", seed=3, options=GUIDED, progress=False)
    assert len(calls) == 15  # one graph, for every code but the first
    assert torch.equal(result.codes, generate("a red apple", seed=3, options=GUIDED).codes)
    with pytest.raises(ValueError, match="the networks are compiled and cannot be moved"):
        pipe.offload()
    packed = unclip.compile(copy.deepcopy(tiny_dalle))
    assert torch.equal(
        packed("a red apple", seed=3, options=GUIDED, progress=False).codes, result.codes
    )


@pytest.mark.parametrize(("keep", "kept"), [(0, 0), (0.4375, 7), (0.5, 8), (0.999, 15)])
def test_kept_codes_stay_unchanged(tiny_dalle, photo, keep, kept):
    codes = tiny_dalle.encode(photo).flatten(1)
    steps = []
    result = tiny_dalle.complete(
        photo, "a fish", keep=keep, num_images=8, seed=1, on_step=steps.append, progress=False
    )
    generated = result.codes.flatten(1)
    assert torch.equal(generated[:, :kept], codes[:, :kept].expand(8, -1))
    assert len(generated[:, kept:].unique(dim=0)) > 1
    assert steps[-1].step == steps[-1].num_steps == 16 - kept
    alone = tiny_dalle.complete(photo, "a fish", keep=keep, seed=6, progress=False)
    assert torch.equal(alone.codes[0], result.codes[5])
    if not kept:
        assert torch.equal(
            generated, tiny_dalle("a fish", num_images=8, seed=1, progress=False).codes.flatten(1)
        )


def test_images_and_prompts_are_paired(tiny_dalle, photo):
    other = tiny_dalle("a blue fish", seed=9, progress=False).images[0]
    drawing = {"seed": 0, "progress": False, "keep": 0.5}
    both = tiny_dalle.complete([photo, other], PROMPTS[:2], num_images=2, **drawing)
    assert both.prompts == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    firsts = tiny_dalle.encode([photo, other])[:, :2].repeat_interleave(2, dim=0)
    assert torch.equal(both.codes[:, :2], firsts)
    assert tiny_dalle.complete(photo, PROMPTS, **drawing).prompts == PROMPTS
    assert tiny_dalle.complete([photo, other], **drawing).prompts == [None, None]
    x = torch.from_numpy(np.array(photo)).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(
        tiny_dalle.complete([x, other], PROMPTS[:2], **drawing).codes[0],
        tiny_dalle.complete(photo, PROMPTS[0], **drawing).codes[0],
    )


def test_variations_resample_the_lower_part(tiny_dalle, photo):
    result = tiny_dalle.variations(photo, num_images=4, seed=2, progress=False)
    assert result.prompts == [None] * 4
    assert torch.equal(
        result.codes.flatten(1)[:, :7], tiny_dalle.encode(photo).flatten(1)[:, :7].expand(4, -1)
    )
    null = tiny_dalle.complete(photo, "", num_images=4, seed=2, progress=False)
    assert torch.equal(null.codes, result.codes)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_variations_with_keep_0_are_conditioned_on_the_image_codes(tiny_dalle, photo, guidance):
    codes, dalle = tiny_dalle.encode(photo).flatten(1), tiny_dalle.dalle
    steps = []
    drawing = {"prompt": "a fish", "keep": 0, "progress": False}
    cold = tiny_dalle.variations(
        photo, options=CodeOptions(0, guidance=guidance), seed=0, on_step=steps.append, **drawing
    )
    with torch.no_grad():
        conditioned, null = (
            dalle(tiny_dalle._tokens([text]), codes).codes[0] for text in ("a fish", None)
        )
    assert torch.equal(cold.codes[0].flatten(), (null + guidance * (conditioned - null)).argmax(-1))
    assert [(p.step, p.num_steps, tuple(p.preview.shape)) for p in steps] == [
        (1, 1, (1, 3, 16, 16))
    ]

    together = tiny_dalle.variations(photo, num_images=5, seed=3, batch_size=2, **drawing)
    assert together.seeds == [3, 4, 5, 6, 7] and len(together.codes.unique(dim=0)) == 5
    assert torch.equal(tiny_dalle.variations(photo, seed=6, **drawing).codes[0], together.codes[3])
    frequencies = tiny_dalle.variations(
        photo, num_images=2000, batch_size=500, seed=0, **drawing
    ).codes.flatten(1)
    expected = conditioned.softmax(-1)[-1]
    assert (frequencies[:, -1].bincount(minlength=24) / 2000 - expected).abs().max() < 0.05


def test_inpainting_forces_the_codes_of_known_patches(tiny_dalle, photo, monkeypatch):
    """The codec has patches of 4 x 4 px."""
    decoded, decode = [], tiny_dalle.codec.decode
    monkeypatch.setattr(
        tiny_dalle.codec, "decode", lambda codes: decoded.append(codes) or decode(codes)
    )
    mask = box_mask(16, 16, (4, 7, 9, 12))
    painted_over = photo.copy()
    painted_over.paste("blue", (4, 7, 9, 12))
    call = {"prompt": "a blue fish", "num_images": 3, "seed": 1, "progress": False}
    result = tiny_dalle.inpaint(photo, mask, **call)
    again = tiny_dalle.inpaint(painted_over, mask, **call)
    touched = torch.zeros(4, 4, dtype=torch.bool)
    touched[1:3, 1:3] = True
    (codes, other) = decoded
    assert len(codes.unique(dim=0)) == 3
    assert (codes[:, ~touched] == codes[0, ~touched]).all()
    assert torch.equal(codes, other), "the content of the hole was used"
    kept = np.asarray(mask) == 0
    for one, same_seed in zip(result.images, again.images, strict=True):
        assert (np.asarray(one)[kept] == np.asarray(photo)[kept]).all()
        assert (np.asarray(one)[~kept] != np.asarray(photo)[~kept]).any()
        assert (np.asarray(one)[~kept] == np.asarray(same_seed)[~kept]).all()
    far = tiny_dalle.inpaint(photo, box_mask(16, 16, (12, 12, 16, 16)), progress=False)
    assert torch.equal(
        decoded[-1][:, ~touched][:, :-1], tiny_dalle.encode(photo)[:, ~touched][:, :-1]
    )
    assert far.prompts == [None]


def test_several_images_of_any_size_are_inpainted_as_each_alone(tiny_dalle, photo):
    images = [photo, photo.resize((40, 24)), photo.resize((30, 30))]
    masks = [
        box_mask(16, 16, (3, 0, 9, 16)),
        box_mask(40, 24, (2, 3, 38, 20)),
        Image.new("L", (30, 30)),
    ]
    call = {"num_images": 2, "batch_size": 4, "progress": False}
    with pytest.warns(UserWarning, match="nothing is marked") as warned:
        together = tiny_dalle.inpaint(images, masks, PROMPTS, seed=5, **call)
        assert [one.filename for one in warned] == [__file__]
        for k, image in enumerate(images):
            alone = tiny_dalle.inpaint(image, masks[k], PROMPTS[k], seed=5 + 2 * k, **call)
            assert alone.metadata == together.metadata[2 * k : 2 * k + 2]
            for ours, theirs in zip(together.images[2 * k :], alone.images, strict=False):
                assert same(ours, theirs)
                unmarked = np.asarray(masks[k]) == 0
                assert (np.asarray(ours) == np.asarray(image))[unmarked].all()
    with pytest.raises(ValueError, match="mask is 16 x 16 px, but the image is 40 x 24"):
        tiny_dalle.inpaint(images[1], masks[0])
    with pytest.raises(ValueError, match="3 prompts for 2 images"):
        tiny_dalle.inpaint(images[:2], masks[:2], PROMPTS)


def test_candidates_of_inpainting_are_compared_by_clip(tiny_dalle, photo):
    mask, call = box_mask(16, 16, (0, 8, 16, 16)), {"seed": 3, "progress": False}
    many = tiny_dalle.inpaint(photo, mask, "a blue fish", num_images=6, **call)
    best = tiny_dalle.inpaint(photo, mask, "a blue fish", num_candidates=6, **call)
    text = tiny_dalle.clip.encode_text(["a blue fish"]).emb.float()

    def scores(result):
        return torch.cosine_similarity(tiny_dalle.clip.encode_image(result.images).float(), text)

    chosen = int(scores(many).argmax())
    assert same(best.images[0], many.images[chosen]) and best.seeds == [3 + chosen]
    own = tiny_dalle.inpaint(photo, mask, "a blue fish", options=CodeOptions(candidates=6), **call)
    assert scores(own).item() > scores(many)[0].item()  # many[0] is the image without candidates


def test_clip_sees_the_painted_end_of_a_long_image(tiny_dalle, photo):
    mask = box_mask(40, 16, (32, 0, 40, 16))  # outside of the central square
    call = {"num_candidates": 4, "num_images": 4, "seed": 3, "progress": False}
    result = tiny_dalle.inpaint(photo.resize((40, 16)), mask, "a blue fish", **call)
    assert len({np.asarray(image).tobytes() for image in result.images}) > 1
    assert len(set(result.scores)) > 1
    assert [tuple(image.size) for image in result.images] == [(40, 16)] * 4


def test_progress_of_inpainting_shows_the_rest_of_the_image(tiny_dalle, photo):
    steps = []
    tiny_dalle.inpaint(
        photo, box_mask(16, 16, (5, 5, 7, 11)), "a", on_step=steps.append, progress=False
    )
    assert [(p.step, p.num_steps) for p in steps] == [(n, 5) for n in range(1, 6)]  # codes 5 to 9
    (preview,) = (p.preview for p in steps if p.preview is not None)
    pixels = np.asarray(photo) / 127.5 - 1
    assert np.abs(preview[0].permute(1, 2, 0).numpy() - pixels)[12:].max() < 1e-6


def test_a_negative_prompt_replaces_the_null_of_guidance(tiny_dalle, photo):
    mask, both = box_mask(16, 16, (0, 8, 16, 16)), {"negative_prompt": PROMPTS[:2]}
    call = {"options": CodeOptions(guidance=3.0), "seed": 2, "progress": False}
    for make in (
        lambda **more: tiny_dalle(PROMPTS[2], **more),
        lambda **more: tiny_dalle.complete(photo, PROMPTS[2], **more),
        lambda **more: tiny_dalle.variations(photo, prompt=PROMPTS[2], keep=0, **more),
        lambda **more: tiny_dalle.inpaint(photo, mask, PROMPTS[2], **more),
    ):
        plain, avoided = make(**call), make(negative_prompt=PROMPTS[0], **call)
        assert not same(plain.images[0], avoided.images[0])
        again = regenerate(tiny_dalle, avoided.metadata[0], progress=False)
        assert same(again.images[0], avoided.images[0]) and again.metadata == avoided.metadata
    together = tiny_dalle(PROMPTS[1:], num_images=2, **both, **call)
    alone = tiny_dalle(PROMPTS[2], negative_prompt=PROMPTS[1], **{**call, "seed": 5})
    assert torch.equal(together.codes[3], alone.codes[0])
    with pytest.raises(ValueError, match="guidance is 1 in options; set it higher"):
        tiny_dalle("a", negative_prompt="b", options=CodeOptions())


def test_metadata_regenerates_an_image(tiny_dalle, generate, photo, tmp_path):
    drawing = {"seed": 5, "num_images": 2, "progress": False}
    for result in (
        generate(["a red apple", "ein Apfel 🍎"], seed=2, options=GUIDED),
        tiny_dalle.complete(photo, "a fish", keep=0.25, **drawing),
        tiny_dalle.complete(photo, **drawing),
        tiny_dalle.variations(photo, prompt="a fish", keep=0, **drawing),
        tiny_dalle.inpaint(photo, box_mask(16, 16, (3, 3, 9, 9)), "a fish", **drawing),
        tiny_dalle.inpaint(photo.resize((30, 18)), box_mask(30, 18, (1, 3, 29, 9)), **drawing),
        generate("a fish", seed=1, num_candidates=4, num_images=2),
    ):
        for k in range(2):
            save_png(result.images[k], tmp_path / "a.png", result.metadata[k])
            (metadata,) = read_metadata(tmp_path / "a.png")
            assert metadata == result.metadata[k] and metadata["seed"] == result.seeds[k]
            again = regenerate(tiny_dalle, metadata, progress=False)
            assert same(again.images[0], result.images[k]) and again.prompts[0] == result.prompts[k]


def test_a_saved_pipeline_gives_the_same_images(tiny_dalle, tiny_dalle_folder, generate):
    pipe = unclip.load(tiny_dalle_folder, device="cpu")
    assert isinstance(pipe, DallePipeline) and (pipe.name, pipe.licence) == ("tiny-dalle", "MIT")
    assert (
        isinstance(pipe.codec, DVAE)
        and isinstance(pipe.dalle, DALLE)
        and pipe.options == tiny_dalle.options
    )
    assert not pipe.tokenizer.marked and pipe.tokenizer.context_length == 24
    result = pipe(PROMPTS, seed=0, num_candidates=2, progress=False)
    expected = generate(PROMPTS, seed=0, num_candidates=2)
    assert torch.equal(result.codes, expected.codes) and result.scores == pytest.approx(
        expected.scores, abs=1e-5
    )
    assert result.metadata[0]["model"] == str(tiny_dalle_folder)
    same_kind = DallePipeline.from_pretrained(tiny_dalle_folder)
    assert torch.equal(
        same_kind(PROMPTS, seed=0, progress=False).codes, generate(PROMPTS, seed=0).codes
    )


def test_clip_is_optional(tiny_dalle, tmp_path):
    parts = tiny_dalle.tokenizer, tiny_dalle.codec, tiny_dalle.dalle
    DallePipeline(*parts, options=GUIDED, name="blind").save_pretrained(
        tmp_path / "blind", torch.float16
    )
    pipe = unclip.load(tmp_path / "blind", device="cpu")
    assert pipe.clip is None and pipe.options == GUIDED and pipe.dtype == torch.float32
    assert pipe("a fish", progress=False).images[0].size == (16, 16)
    with pytest.raises(ValueError, match="no CLIP"):
        pipe("a fish", num_candidates=2, progress=False)


def test_half_precision(tiny_dalle):
    pipe = copy.deepcopy(tiny_dalle).to(dtype=torch.bfloat16)
    assert pipe.dtype == torch.bfloat16 and {p.dtype for p in pipe.clip.parameters()} == {
        torch.float32
    }
    result = pipe("a red apple", seed=0, num_candidates=2, options=GUIDED, progress=False)
    assert result.metadata[0]["dtype"] == "bfloat16"
    assert pipe.complete(result.images[0], seed=0, progress=False).images[0].size == (16, 16)


def test_the_bound_equals_its_terms(tiny_dalle, photo):
    other = tiny_dalle("a blue fish", seed=1, progress=False).images[0]
    photos, captions = [photo, other] * 10, ["a red apple", "a blue fish"] * 10
    bound = tiny_dalle.elbo(photos, captions, seed=0)
    assert (
        bound.bits_per_dim.shape == (20,)
        and bound.bits_per_dim.isfinite().all()
        and bound.dimensions == 3 * 16**2
    )
    assert torch.equal(bound.nats, tiny_dalle.elbo(photos, captions, seed=0).nats)
    tokens, codes = tiny_dalle._tokens(captions), tiny_dalle.encode(photos)
    text, _ = tiny_dalle.dalle.log_likelihood(tokens, codes)
    torch.testing.assert_close(bound.text, text.sum(1))  # does not depend on the codes
    with pytest.raises(ValueError, match="1 captions for 2 images; expected one for each"):
        tiny_dalle.elbo([photo, other], "a fish")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"size": (20, 16)},
            r"20 x 16 px; expected 16 x 16",
        ),
        ({"mode": "F"}, "mode is F; expected RGB"),
        ({"mode": "LAB"}, "mode is LAB; expected RGB"),
    ],
)
def test_images_of_another_size_are_rejected(tiny_dalle, change, message):
    image = Image.new(**{"mode": "RGB", "size": (16, 16), **change})
    for ask in (tiny_dalle.complete, tiny_dalle.variations, tiny_dalle.encode):
        with pytest.raises(ValueError, match=message) as error:
            ask(image)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_images_of_other_modes_are_converted(tiny_dalle, photo, mode):
    image = photo.convert(mode)
    assert torch.equal(tiny_dalle.encode(image), tiny_dalle.encode(image.convert("RGB")))


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(1, 16, 16),
        torch.full((3, 16, 16), 255.0),
        torch.zeros(3, 16, 16, dtype=torch.uint8),
        torch.full((3, 16, 16), torch.nan),
        torch.zeros(3, 8, 8),
        [torch.zeros(2, 3, 16, 16), torch.full((3, 16, 16), -2.0)],
        [],
    ],
)
def test_invalid_image_tensors_are_rejected(tiny_dalle, image):
    with pytest.raises(
        ValueError, match=r"^(the )?(image|list of images) (is|has) .*(expected|tiny-dalle takes) "
    ):
        tiny_dalle.complete(image)


def test_invalid_input_is_rejected_in_one_line(tiny_dalle, photo):
    for keep in (1, 1.5, -0.1, float("nan")):
        with pytest.raises(
            ValueError, match=rf"keep is {keep}; expected a fraction of the image in \[0, 1\)"
        ):
            tiny_dalle.complete(photo, keep=keep)
    for codes in (torch.full((1, 4, 4), 24), torch.full((1, 4, 4), -1)):
        with pytest.raises(ValueError, match="codes are .*; this codec expects 0 to 23"):
            tiny_dalle.decode(codes)
    for call, message in {
        lambda: tiny_dalle(
            "a", options=UnCLIPOptions()
        ): "options is a UnCLIPOptions; expected CodeOptions",
        lambda: tiny_dalle([]): "the list of prompts is empty",
        lambda: tiny_dalle("a", num_images=0): "num_images is 0",
        lambda: tiny_dalle("a", batch_size=0): "batch_size is 0",
        lambda: tiny_dalle.complete(
            [photo] * 3, PROMPTS[:2]
        ): "2 prompts for 3 images; expected one for each",
        lambda: tiny_dalle.complete(photo, num_candidates=2): "there is none; give one",
        lambda: tiny_dalle.variations(
            image_emb=torch.ones(1, 16)
        ): "varies images, not CLIP embeddings",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_incompatible_components_are_rejected(tiny_dalle):
    tokenizer, codec, dalle = tiny_dalle.tokenizer, tiny_dalle.codec, tiny_dalle.dalle
    finer = DVAE(replace(codec.config, groups=2))
    richer = DVAE(replace(codec.config, vocab_size=30))
    longer = BPETokenizer(tokenizer.tokenizer, context_length=9, marked=False)
    for parts, message in (
        (
            (tokenizer, finer, dalle),
            "the codec has 24 codes on a grid of 8 x 8; the transformer expects 24 on 4 x 4",
        ),
        (
            (tokenizer, richer, dalle),
            "the codec has 30 codes on a grid of 4 x 4; the transformer expects 24 on 4 x 4",
        ),
        (
            (longer, codec, dalle),
            "the tokenizer gives 9 of 270 tokens; expected 24 of 270",
        ),
        (
            (tokenizer, GaussianVAE(GaussianVAEConfig(image_size=16)), dalle),
            "codec is a GaussianVAE; expected an image codec",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            DallePipeline(*parts)


def test_every_codec_works(tiny_dalle, photo):
    net = ConvNetConfig(width=16, factor=4, blocks=1, block_width=8)
    pipe = DallePipeline(
        tiny_dalle.tokenizer, VQVAE(VQVAEConfig("vqvae", 16, 24, 6, net)), tiny_dalle.dalle
    )
    result = pipe.complete(photo, "a fish", seed=0, progress=False)
    assert torch.equal(result.codes[0, 0], pipe.encode(photo)[0, 0])
    bound = pipe.elbo(photo, "a fish", seed=0)
    assert bound.entropy.tolist() == [0] and bound.bits_per_dim.isfinite().all()
    packed = unclip.compile(pipe).complete(photo, "a fish", seed=0, progress=False)
    assert torch.equal(packed.codes, result.codes)
