"""`unclip evaluate` of a DALL-E."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from styled import write_pairs

from unclip.cli.main import main
from unclip.evaluation import base
from unclip.evaluation import dalle as module
from unclip.evaluation.codec import evaluate_codec
from unclip.evaluation.dalle import BestCandidates, DalleEvaluation, DalleGenerator
from unclip.evaluation.generator import Samples
from unclip.evaluation.pairs import Pairs, load_pairs
from unclip.evaluation.report import evaluation_rows, plain_table
from unclip.evaluation.sheets import samples_sheet
from unclip.evaluation.style import train_classifier
from unclip.evaluation.unclip import UnCLIPGenerator
from unclip.image_io import to_pil, to_tensor

# The tiny tokenizer has a short context.
pytestmark = pytest.mark.filterwarnings("ignore:the prompt")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def held_out(data) -> Pairs:
    return load_pairs(data / "heldout-*.tar", 16, progress=False)


@pytest.fixture(scope="module")
def train(data) -> Pairs:
    return load_pairs(data / "train-*.tar", 16, progress=False)


@pytest.fixture(autouse=True)
def few_candidates_and_a_short_training(monkeypatch):
    def train(pairs, seed, **_):
        return train_classifier(pairs, seed, 8, False)

    monkeypatch.setattr(base, "train_classifier", train)
    monkeypatch.setattr(module, "CANDIDATES", (1, 2, 8))
    monkeypatch.setattr(module, "RERANKED", 3)


@pytest.fixture
def generator(tiny_dalle) -> DalleGenerator:
    return DalleGenerator(tiny_dalle, batch_size=3, progress=False)


@pytest.fixture
def evaluation(generator, held_out, train) -> DalleEvaluation:
    return DalleEvaluation(generator, held_out, train, baseline=generator, seed=5)


def test_samples_are_the_images_of_the_pipeline(evaluation, tiny_dalle):
    for row in (0, 3):
        caption = evaluation.held_out.captions[row]
        image = tiny_dalle(caption, seed=5 + row, progress=False).images[0]
        assert torch.equal(evaluation.samples.images[row], to_tensor([image])[0])
        (full_size,) = evaluation.generator.upsample(evaluation.samples, [row])
        assert full_size.tobytes() == image.tobytes()


def test_results_are_json_and_have_all_parts(evaluation, tiny_dalle, held_out):
    results = evaluation.run()
    assert json.loads(json.dumps(results)) == results and evaluation.results == results
    assert results["baseline"] == "tiny-dalle"
    options = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "guidance": 1.0, "candidates": 1}
    assert results["options"] == options
    assert results["parameters"].keys() == {"clip", "codec", "dalle"}
    for group in (*results["recall"]["groups"].values(), *results["style"].values()):
        assert group["generated"] == group["baseline"]  # the same model
    codec = evaluate_codec(tiny_dalle.codec, held_out.images)
    assert results["codec"] == pytest.approx(codec, rel=1e-4)
    assert results["repeatable"] == {
        "same_seed_same_bytes": True,
        "batch_and_alone_differ_by": 0,
        "from_metadata_same_bytes": True,
    }
    table = plain_table(evaluation_rows(results))
    for words in ("recall@1", "tiny-dalle", "best of 8 (3 captions)", "PSNR", "perplexity"):
        assert words in table
    assert "bits per value" in table


def test_the_best_of_more_candidates_is_the_best_of_their_groups(evaluation, tiny_dalle):
    best, results = evaluation.best, evaluation.candidates()
    shapes = {n: tuple(emb.shape[:2]) for n, emb in best.emb.items()}
    assert shapes == {1: (3, 8), 2: (3, 4), 8: (3, 1)}
    row = best.rows[1]
    caption = evaluation.held_out.captions[row]
    images = tiny_dalle(caption, num_images=8, seed=5, progress=False).images
    emb = evaluation.generator.embed(to_tensor(images))
    scores = F.cosine_similarity(emb, evaluation.text_emb[row][None])
    torch.testing.assert_close(best.emb[1][1], emb)
    torch.testing.assert_close(best.emb[8][1, 0], emb[scores.argmax()])
    best_of_2 = [scores[i : i + 2].argmax().item() + i for i in range(0, 8, 2)]
    torch.testing.assert_close(best.emb[2][1], emb[best_of_2])
    assert torch.equal(best.images[8][1], to_tensor([images[scores.argmax()]])[0])
    clip_scores = [results["by_count"][n]["clip_score"] for n in ("1", "2", "8")]
    assert clip_scores == sorted(clip_scores) and clip_scores[0] < clip_scores[-1]
    assert results["captions"] == 3
    reranked = tiny_dalle(caption, num_candidates=8, seed=5, progress=False)
    assert max(reranked.scores) == pytest.approx(scores.max().item(), abs=1e-5)


def test_true_images_as_candidates_have_a_cosine_of_1(evaluation, held_out, monkeypatch):
    truth = dict(zip(held_out.captions, held_out.floats(), strict=True))

    def candidates(caption, n, seed):
        return Samples([caption] * n, truth[caption].expand(n, -1, -1, -1))

    monkeypatch.setattr(evaluation.generator, "candidates", candidates)
    for values in evaluation.candidates()["by_count"].values():
        assert values["cosine_to_truth"] == pytest.approx(1.0)
    evaluation.true_emb = evaluation.text_emb
    evaluation.best = BestCandidates([0, 2], {1: evaluation.text_emb[[0, 2]][:, None]}, {})
    expected = {"clip_score": 1.0, "cosine_to_truth": 1.0, "recall@1": 1.0}
    assert evaluation.candidates()["by_count"]["1"] == pytest.approx(expected)


def test_the_terms_of_the_bound_add_up(evaluation, tiny_dalle, held_out):
    results = evaluation.bound()
    bound = tiny_dalle.elbo(to_pil(held_out.floats()), held_out.captions, seed=5)
    assert results["bits_per_dim"] == pytest.approx(bound.bits_per_dim.mean().item())
    total = sum(results["bits_of_dim"].values())
    assert total == pytest.approx(results["bits_per_dim"], rel=1e-5)
    code_bits = results["bits_of_dim"]["codes"] * 3 * 16**2
    assert results["bits_per_code"] * 16 == pytest.approx(code_bits)


def test_uniform_codes_cost_the_log_of_the_vocabulary(tiny_dalle, held_out):
    uniform = copy.deepcopy(tiny_dalle)
    with torch.no_grad():
        uniform.dalle.code_head.weight.zero_()
        uniform.dalle.code_head.bias.zero_()
    results = DalleEvaluation(DalleGenerator(uniform, progress=False), held_out).bound()
    assert results["bits_per_code"] == pytest.approx(math.log2(24), rel=1e-5)


def test_the_command_writes_sheets(tiny_dalle_folder, data, tmp_path, capsys):
    arguments = (
        f"evaluate --model {tiny_dalle_folder} --data {data}/heldout-*.tar --quiet "
        f"--train-data {data}/train-*.tar --temperature 0.9 --baseline {tiny_dalle_folder} "
        f"--sheets {tmp_path}"
    )
    assert main(arguments.split()) == 0
    names = {path.stem for path in tmp_path.iterdir()}
    assert names == {"heldout", "failures", "samples", "nearest", "codec", "candidates"}
    assert Image.open(tmp_path / "codec.png").size == (4 * 16 + 3 * 4, 36)
    assert "tiny-dalle" in capsys.readouterr().out


def test_samples_of_a_baseline_are_on_the_same_sheet(evaluation):
    sheet = samples_sheet(evaluation, ["a fish"] * 3, size=20)
    assert sheet.width == 2 * (2 * 20 + 4) + 8


def test_a_baseline_must_have_the_same_image_size(evaluation, tiny_pipe, held_out):
    other = UnCLIPGenerator(tiny_pipe, progress=False)
    with pytest.raises(ValueError, match="tiny generates 8 px and tiny-dalle 16 px"):
        DalleEvaluation(evaluation.generator, held_out, baseline=other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps 3", "tiny-dalle is of kind dalle, which has no --steps"),
        (
            "--parts prior",
            "unknown part 'prior'; expected some of images, candidates, codec, bound, repeatable",
        ),
        ("--baseline nothing", "nothing"),
        ("--top-k 0", "'0' is not a whole number"),
    ],
)
def test_invalid_arguments_are_reported_in_one_line(
    arguments, message, tiny_dalle_folder, data, capsys
):
    words = f"evaluate --model {tiny_dalle_folder} --data {data}/heldout-*.tar --quiet {arguments}"
    assert main(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_model_without_clip_is_evaluated_without_the_parts_that_need_one(tiny_dalle, held_out):
    without_clip = copy.copy(tiny_dalle)
    without_clip.clip = None
    evaluation = DalleEvaluation(DalleGenerator(without_clip, progress=False), held_out)
    with pytest.warns(UserWarning, match="left out images, candidates of tiny-dalle"):
        results = evaluation.run()
    assert results.keys() >= {"codec", "bound", "repeatable"}
    assert "clip" not in results["parameters"] and "recall" not in results
    with pytest.raises(ValueError, match="unknown part 'images' of tiny-dalle, which has no CLIP"):
        evaluation.run(["images"])
