"""Results, seeds, dtypes and arguments as users of Python and notebooks expect them."""

from __future__ import annotations

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from PIL import Image

import unclip
from unclip.checkpoints.formats import LoadedPrior
from unclip.config import flatten, to_dict
from unclip.diffusion.schedules import ScheduleConfig
from unclip.image_io import read_metadata
from unclip.pipelines.request import seeds_from, warn_of_unknown
from unclip.tokenizer import BPETokenizer
from unclip.types import GenerationResult
from unclip.weights import to_dtype


@pytest.fixture(scope="module")
def result(tiny_pipe):
    return tiny_pipe(["a red apple", "a fish"], num_images=2, seed=5, progress=False)


def test_a_result_is_a_sequence_of_results(result):
    assert [one.seeds for one in result] == [[5], [6], [7], [8]]
    assert result[-1].prompts == ["a fish"] and result[1:3].seeds == [6, 7]
    assert torch.equal(result[2].image_emb, result.image_emb[2:3])
    with pytest.raises(IndexError):
        result[4]
    assert repr(result) == (
        "<GenerationResult: 4 images 16x16, seeds [5, 6, 7, 8], prompts ['a red apple', 'a fish']>"
    )
    assert len(repr(replace(result, prompts=["x" * 5000] * 4))) < 200
    assert copy.deepcopy(result).seeds == copy.copy(result).seeds == result.seeds


def test_results_are_concatenated(result, tiny_dalle):
    cat, prompt = GenerationResult.cat, "a red apple"
    assert cat([result[:1], result[1:]]).metadata == result.metadata
    assert cat([result, replace(result, metadata=[])]).metadata == []
    best = tiny_dalle(prompt, num_candidates=2, seed=0, progress=False)
    plain = tiny_dalle(prompt, seed=1, progress=False)
    for parts in ([best, plain], [plain, best]):
        joined = cat(parts)
        assert joined.scores is None and joined.seeds == [one.seeds[0] for one in parts]
        assert len(joined.codes) == 2


@pytest.mark.parametrize("name", ["a.png", "new/a.JPG", "a.webp"])
def test_saved_images_carry_their_metadata(result, name, tmp_path):
    assert result[1].save(tmp_path / name) == [tmp_path / name]
    assert [entry["seed"] for entry in read_metadata(tmp_path / name)] == [6]
    with pytest.raises(ValueError, match="one file for 4 images; give a folder"):
        result.save(tmp_path / name)


def test_threads_may_save_to_the_same_file(result, tmp_path):
    files = [tmp_path / "a.png"] * 200
    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(result[0].save, files)] == [[file] for file in files]
    assert [*tmp_path.iterdir()] == files[:1]


def test_several_images_are_saved_into_a_folder(result, tmp_path):
    files = result.save(tmp_path / "images")
    names = ["a-red-apple-5", "a-red-apple-6", "a-fish-7", "a-fish-8"]
    assert files == [tmp_path / "images" / f"{name}.png" for name in names]
    assert read_metadata(files[3])[0]["prompt"] == "a fish"
    same = replace(result, seeds=[1] * 4)
    assert len(set(same.save(tmp_path / "same"))) == 4


def test_a_new_folder_is_not_named_like_an_image(result, tmp_path):
    for name in ("run.v2", "out.2024", ".hidden"):
        assert result.save(tmp_path / name)[0].parent == tmp_path / name
    for name in ("a.bmp", "new/a.JPGG", "a.mp4"):
        with pytest.raises(ValueError, match=f"{name}: images are written as .png, .jpg or .webp"):
            result.save(tmp_path / name)
        assert not (tmp_path / name).parent.joinpath("new").exists()
    (tmp_path / "a.bmp").mkdir()
    assert len(result.save(tmp_path / "a.bmp")) == 4


def test_notebooks_show_images(result):
    html = replace(result, prompts=["<b>", "a", "b", "c"])._repr_html_()
    assert html.count("<img") == 4 and "&lt;b&gt; · 5" in html and "<b>" not in html
    assert result._repr_png_() is None and result[0]._repr_png_().startswith(b"\x89PNG")


def test_a_pipeline_has_a_short_repr(tiny_pipe, tiny_dalle):
    assert repr(tiny_pipe).startswith("<UnCLIPPipeline 'tiny' on cpu in float32: clip 0.")
    assert "DallePipeline" in repr(tiny_dalle) and len(repr(tiny_dalle)) < 200


def test_pipelines_can_be_sent_to_other_processes(tiny_pipe, tiny_dalle):
    assert all(ForkingPickler.dumps(pipe) for pipe in (tiny_pipe, tiny_dalle))


def test_a_copied_pipeline_remembers_the_schedules_of_its_priors(tiny_pipe):
    first, pipe = copy.deepcopy(tiny_pipe.prior), copy.deepcopy(tiny_pipe)
    pipe.prior = LoadedPrior(first, ScheduleConfig("linear"))
    pipe.prior = copy.deepcopy(tiny_pipe.prior)
    copied = copy.deepcopy(pipe)
    copied.prior = first
    assert copied.schedules["prior"].config == ScheduleConfig("linear")


def test_metadata_names_a_foreign_prior_again(tiny_pipe):
    foreign, pipe = copy.deepcopy(tiny_pipe.prior), copy.deepcopy(tiny_pipe)
    own, sources = pipe.prior, []
    for prior in (LoadedPrior(foreign, source="foreign"), own, foreign):
        pipe.prior = prior
        (entry,) = pipe("a", seed=0, progress=False).metadata
        sources.append(entry.get("prior_model"))
    assert sources == ["foreign", None, "foreign"]


@pytest.mark.parametrize("seeds", [[7, 9], (7, 9), np.array([7, 9]), [np.int64(7), np.uint8(9)]])
def test_seeds_may_be_a_list_or_numpy_s(seeds, tiny_pipe):
    several = tiny_pipe("a", num_images=2, seed=seeds, progress=False)
    one = tiny_pipe("a", seed=np.int32(9), progress=False)
    assert several.seeds == [7, 9] and {type(seed) for seed in several.seeds} == {int}
    assert several.images[1].tobytes() == one.images[0].tobytes()


def test_lists_of_seeds_work_everywhere(invertible_pipe):
    pipe, image = invertible_pipe, Image.new("RGB", (16, 16), "red")
    mask = Image.new("L", (16, 16), 255)
    given = {"seed": [3, 8], "num_images": 2, "progress": False}
    assert pipe.vary(image, **given).seeds == [3, 8]
    with pytest.warns(UserWarning, match="everything is marked in the mask"):
        assert pipe.inpaint(image, mask, "a", **given).seeds == [3, 8]
    latent = pipe.imagine(["a", "b"], seed=[3, 8], progress=False)
    assert [source["seed"] for source in latent.sources] == [3, 8]


@pytest.mark.parametrize("seed", [True, 1.5, "7", -1, 2**64, np.float32(1), [1.5], np.bool_(True)])
def test_other_seeds_are_refused(seed):
    with pytest.raises(ValueError, match="seed is .*; expected a whole number from 0 to"):
        seeds_from(seed, 1)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("generator", "did you mean seed?"),
        ("num_images_per_prompt", "did you mean num_images?"),
        ("num_image", "did you mean num_images?"),
        ("width", "expected one of prompt, "),
    ],
)
def test_arguments_of_other_libraries_get_a_suggestion(name, hint, tiny_pipe, tiny_dalle):
    for pipe in (tiny_pipe, tiny_dalle):
        with pytest.raises(TypeError, match=f"unknown argument {name}; ") as error:
            pipe("a", **{name: 1})
        assert hint in str(error.value)
    with pytest.raises(TypeError, match="unknown argument generator; did you mean seed?"):
        tiny_pipe.vary(None, generator=1)


@pytest.mark.parametrize(
    ("name", "value", "changed"),
    [
        ("steps", 2, "decoder.steps"),
        ("num_inference_steps", 2, "decoder.steps"),
        ("guidance_scale", 3.0, "decoder.guidance"),
        ("sampler", "ancestral", "decoder.sampler"),
        ("prior_steps", 2, "prior.steps"),
        ("prior_num_inference_steps", 2, "prior.steps"),
        ("embedding", "text", "embedding"),
    ],
)
def test_a_suggested_option_can_be_used(name, value, changed, tiny_pipe):
    options = suggested_options(tiny_pipe, name, value)
    assert flatten(to_dict(options)) == {**flatten(to_dict(tiny_pipe.options)), changed: value}
    tiny_pipe("a", options=options, progress=False)


@pytest.mark.parametrize("name", ["guidance", "guidance_scale"])
def test_a_suggested_option_of_dalle_can_be_used(name, tiny_dalle):
    options = suggested_options(tiny_dalle, name, 3.0)
    assert options == replace(tiny_dalle.options, guidance=3.0)
    tiny_dalle("a", options=options, progress=False)


@pytest.mark.parametrize("name", ["steps", "num_inference_steps", "prior_steps"])
def test_options_that_a_model_does_not_have_are_not_suggested(name, tiny_dalle):
    with pytest.raises(TypeError, match=f"unknown argument {name}; expected one of prompt, "):
        tiny_dalle("a", **{name: 2})


def suggested_options(pipe, name, value):
    """Return the options that the error for an unknown argument suggests, with `value`."""
    with pytest.raises(TypeError, match=f"unknown argument {name}; did you mean ") as error:
        pipe("a", **{name: value})
    expression = str(error.value).partition("did you mean options=")[2].removesuffix("?")
    return eval(expression.replace("...", "value"), {"replace": replace}, locals())


def test_loaders_suggest_arguments(tiny_folder):
    with pytest.raises(TypeError, match="unknown argument torch_dtype; did you mean dtype?"):
        unclip.load(tiny_folder, torch_dtype="bf16")
    with pytest.raises(TypeError, match="unknown argument revison; did you mean revision?"):
        unclip.load_codec(tiny_folder, revison="main")


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", "torch.bfloat16", torch.bfloat16])
def test_a_dtype_may_be_a_name(dtype, tiny_folder, tmp_path):
    pipe = unclip.load(tiny_folder, "cpu", dtype)
    assert pipe.dtype == unclip.load_prior(tiny_folder, dtype).network.head.weight.dtype
    assert pipe.dtype == torch.bfloat16 == to_dtype(dtype)
    assert pipe.to(torch.float32).dtype == torch.float32
    assert pipe.to("cpu", dtype).dtype == torch.bfloat16
    assert pipe.to("fp32").dtype == torch.float32
    pipe.save_pretrained(tmp_path / "half", dtype)
    half, whole = (
        path / "decoder" / "model.safetensors" for path in (tmp_path / "half", tiny_folder)
    )
    assert half.stat().st_size < 0.6 * whole.stat().st_size


@pytest.mark.parametrize("dtype", ["float33", "int8", torch.int64, 3])
def test_other_dtypes_are_refused_before_loading(dtype, tiny_folder):
    with pytest.raises(ValueError, match="dtype is .*; expected fp32, fp16, bf16 or"):
        unclip.load(tiny_folder, "cpu", dtype)


@pytest.mark.parametrize("guidance", [-1.0, 100.0])
def test_unusual_guidance_is_warned_of(guidance, tiny_pipe):
    decoder = replace(tiny_pipe.options.decoder, guidance=guidance)
    with pytest.warns(UserWarning, match=f"guidance is {guidance:g}; images are useful from"):
        tiny_pipe("a", options=replace(tiny_pipe.options, decoder=decoder), progress=False)


def test_concepts_of_the_training_data_are_known():
    tokenizer = unclip.load("emoji").clip.tokenizer
    rare = ["wolf", "zebra", "an avocado", "crocodile", "volcano", "jar", "goose", "T-Rex"]
    unknown = ["zzyzx", "a zzyzx", "собака", "hjkl"]
    assert [text for text in rare + unknown if not tokenizer.knows_a_word_of(text)] == unknown
    small = unclip.load("emoji-dalle1").tokenizer  # 2,048 tokens: most words are several
    assert all(map(small.knows_a_word_of, ["owl", "a wolf", "avocado"]))


def test_prompts_without_a_known_word_are_warned_of(tiny_pipe, monkeypatch):
    words = [f"{a}{b}{c}" for a in "abcdefghij" for b in "klmnopqrst" for c in "uvwxyzabcd"]
    tokenizer = BPETokenizer.train([f"{word} apple" for word in words], 1200, 24)
    monkeypatch.setattr("unclip.tokenizer.MIN_WORDS", 1000)
    with pytest.warns(UserWarning, match="knows no word of the prompt 'zzyzx qwrt'"):
        warn_of_unknown(["zzyzx qwrt"], tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unknown(["zzyzx apple", "a", ""], tokenizer)
        tiny_pipe.encode_text("zzyzx")  # its vocabulary is too small for words
    monkeypatch.setattr("unclip.tokenizer.MIN_WORDS", 0)
    with pytest.warns(UserWarning, match="knows no word of the prompt 'zzyzx'"):
        tiny_pipe.encode_text("zzyzx")
