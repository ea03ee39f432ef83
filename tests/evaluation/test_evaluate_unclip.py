"""`unclip evaluate` of an unCLIP model."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from styled import write_pairs

from unclip.cli.main import main
from unclip.evaluation import base, sheets
from unclip.evaluation.generator import Samples
from unclip.evaluation.pairs import Pairs, load_pairs
from unclip.evaluation.report import evaluation_rows
from unclip.evaluation.style import train_classifier
from unclip.evaluation.unclip import (
    NOISE_LEVELS,
    PredictedEmbeddings,
    UnCLIPEvaluation,
    UnCLIPGenerator,
)
from unclip.models.lora import LoRAConfig, add_lora, save_lora

pytestmark = pytest.mark.filterwarnings("ignore:the prompt")  # the tiny CLIP has a short context


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def held_out(data) -> Pairs:
    return load_pairs(data / "heldout-*.tar", 8, progress=False)


@pytest.fixture(scope="module")
def train(data) -> Pairs:
    return load_pairs(sorted(data.glob("train-*.tar")), 8, progress=False)


@pytest.fixture(autouse=True)
def short_training_of_the_classifier(monkeypatch):
    def train(pairs, seed, **_):
        return train_classifier(pairs, seed, 100, False)

    monkeypatch.setattr(base, "train_classifier", train)


@pytest.fixture
def evaluation(tiny_pipe, held_out, train) -> UnCLIPEvaluation:
    generator = UnCLIPGenerator(tiny_pipe, batch_size=3, progress=False)
    return UnCLIPEvaluation(generator, held_out, train, seed=5)


def test_samples_are_the_images_of_the_pipeline(evaluation, tiny_pipe):
    """Stages and batches do not change the images, nor does upsampling them twice."""
    images = evaluation.generator.upsample(evaluation.samples, [3, 1])
    again = evaluation.generator.upsample(evaluation.samples, [1, 3])
    for row, image, same in zip([3, 1], images, reversed(again), strict=True):
        caption = evaluation.held_out.captions[row]
        expected = tiny_pipe(caption, seed=5 + row, progress=False).images[0]
        assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).max() <= 2
        assert np.abs(np.asarray(image, int) - np.asarray(same, int)).max() <= 2


@pytest.mark.parametrize("embedding", ["text", "none"])
def test_embeddings_are_those_that_the_options_ask_for(tiny_pipe, held_out, train, embedding):
    options = replace(tiny_pipe.options, embedding=embedding)
    generator = UnCLIPGenerator(tiny_pipe, batch_size=3, options=options, progress=False)
    evaluation = UnCLIPEvaluation(generator, held_out, train, seed=5)
    (image,) = generator.upsample(evaluation.samples, [3])
    caption = held_out.captions[3]
    expected = tiny_pipe(caption, seed=8, options=options, progress=False).images[0]
    assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).max() <= 2
    assert "prior" not in evaluation.run()


def test_results_are_json_and_have_all_parts(evaluation):
    results = evaluation.run()
    assert json.loads(json.dumps(results)) == results
    assert results["held_out"].items() >= {"pairs": 4, "broken": 0}.items()
    assert results["train"].items() >= {"pairs": 8, "broken": 0}.items()
    assert results["sha256"].keys() == results["parameters"].keys()
    assert results["options"]["decoder"]["steps"] == 3
    assert results["parameters"].keys() >= {"clip", "prior", "decoder"}
    groups = results["recall"]["groups"]
    counts = {name: group["images"] for name, group in groups.items()}
    assert counts == {"all": 4, "dark": 2, "pale": 2, "without skin tones": 3}
    assert groups["dark"]["captions"] == 4 and groups["without skin tones"]["captions"] == 3
    repeatable = results["repeatable"]
    assert repeatable["same_seed_same_bytes"] and repeatable["from_metadata_same_bytes"]
    assert repeatable["batch_and_alone_differ_by"] <= 2
    upsampler = results["upsampler"]
    assert (upsampler["from"], upsampler["to"]) == (8, 16)
    assert upsampler["psnr"]["bicubic"] > upsampler["psnr"]["upsampled"]  # random weights
    figures = " ".join(row.figure for row in evaluation_rows(results))
    for word in ("gap", "recall@1", "style", "nearest", "x_0", "PSNR", "same seed"):
        assert word in figures


def test_a_perfect_model_scores_like_the_true_images(evaluation, held_out):
    text = evaluation.generator.encode_text(held_out.captions)
    true_emb = evaluation.true_emb
    evaluation.predicted = PredictedEmbeddings(held_out.captions, text, true_emb, [])
    evaluation.samples = Samples(held_out.captions, held_out.floats())
    prior = evaluation.prior()
    assert prior["cosine"]["matching"] == pytest.approx(1.0) and prior["normalised_mse"] == 0.0
    assert prior["cosine"]["matching"] > prior["text_cosine"]["matching"]
    for group in evaluation.recall()["groups"].values():
        assert group["generated"] == group["true"]
    nearest, style = evaluation.nearest(evaluation.train), evaluation.style(evaluation.train)
    assert all(group["generated"] == group["true"] == 1.0 for group in style.values())
    assert style["dark"]["images"] == 2
    for kind in ("clip", "pixels"):
        median, same = nearest[kind]["median_distance"], nearest[kind]["same_concept"]
        assert median["generated"] == pytest.approx(median["true"])
        assert same["generated"] == same["true"]
    assert nearest["nearer_to_truth"] == 1.0


def test_copied_training_images_are_detected(evaluation, held_out, train):
    evaluation.samples = Samples(held_out.captions, train.floats()[: len(held_out)])
    nearest = evaluation.nearest(train)
    assert nearest["nearer_to_truth"] == 0.0
    pairs = zip(held_out.entries, train.entries[:4], strict=True)
    same = [wanted.style == copied.style for wanted, copied in pairs]
    assert 0 < sum(same) < 4
    expected = {"images": 4, "generated": sum(same) / 4, "true": 1.0}
    assert evaluation.style(train)["all"] == expected
    assert nearest["pixels"]["median_distance"]["generated"] == pytest.approx(0.0, abs=1e-3)
    assert evaluation.nearest_to_generated["pixels"][0].tolist() == [0, 1, 2, 3]


def test_recall_is_1_if_images_embed_like_their_captions(evaluation):
    evaluation.generated_emb = evaluation.text_emb
    for group in evaluation.recall()["groups"].values():
        assert group["generated"] == {"recall@1": 1.0}  # of 4 captions


def test_decoder_error_of_a_known_denoiser(evaluation, tiny_pipe, held_out, monkeypatch):
    """A denoiser whose estimate of x_0 is half of the true image."""
    schedule, truth = tiny_pipe.schedules["decoder"], held_out.floats()

    def denoise(x_t, t, context):
        noise = (x_t - schedule.at("alpha", t, x_t) * truth / 2) / schedule.at("sigma", t, x_t)
        variance = torch.full_like(noise, 7.0)  # is not used
        return torch.cat([noise, variance], dim=1)

    monkeypatch.setattr(tiny_pipe.decoder, "denoise", denoise)
    evaluation.generator.batch_size = len(held_out)
    results, expected = evaluation.decoder(), (truth / 2).square().mean().item()
    by_level = {str(level): expected for level in NOISE_LEVELS}
    assert results["x0_mse"] == pytest.approx(by_level, rel=1e-3)
    assert results["mean_x0_mse"] == pytest.approx(expected, rel=1e-3)


def test_parts_can_be_selected(evaluation, tiny_pipe, held_out):
    others = {"prior", "recall", "style", "nearest", "upsampler"}
    assert not evaluation.run(["decoder"]).keys() & others
    alone = UnCLIPEvaluation(UnCLIPGenerator(tiny_pipe, progress=False), held_out).run(["images"])
    assert "recall" in alone and not alone.keys() & {"style", "nearest", "train"}
    with pytest.raises(ValueError, match="unknown part 'decodr'"):
        evaluation.run(["decodr"])


def test_results_are_saved_after_each_part(evaluation):
    saved = []
    parts = {"prior", "decoder"}
    evaluation.run(["prior", "decoder"], save=lambda results: saved.append(parts & results.keys()))
    assert saved == [{"prior"}, parts]


def test_sheets(evaluation, held_out, train):
    generators = evaluation.predicted.generators
    evaluation.samples = Samples(held_out.captions, train.floats()[:4], generators)
    sheet = sheets.held_out_sheet(evaluation, size=20)
    assert sheet.width == 4 * 24 - 4  # two styles, generated and true
    assert sheets.failures_sheet(evaluation, size=20).width == 4 * 44 + 3 * 12
    assert sheets.nearest_sheet(evaluation, train, size=20).height > 20


def test_the_command_writes_results_and_sheets(tiny_folder, data, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fish\n\na sun\n")
    held_out, train = data / "heldout-*.tar", data / "train-*.tar"
    arguments = (
        f"evaluate --model {tiny_folder} --data {held_out} --train-data {train} --steps 2 "
        f"--guidance 1 --prior-guidance 1 --prior-candidates 1 --quiet --parts prior images "
        f"--json {tmp_path}/e.json --sheets {tmp_path}/sheets --prompts-file {prompts}"
    )
    assert main(arguments.split()) == 0
    results = json.loads((tmp_path / "e.json").read_text())
    options = results["options"]
    assert options["decoder"]["steps"] == 2 and options["prior"]["guidance"] == 1
    assert options["prior_candidates"] == 1 and "decoder" not in results
    names = {path.stem for path in (tmp_path / "sheets").iterdir()}
    assert names == {"heldout", "failures", "samples", "nearest"}
    assert "recall@1 of the caption, all (4 images, 4 captions)" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:4 images; the Fréchet")
@pytest.mark.parametrize("flags", ["--offload", "--compile", "--quantize int8"])
def test_the_flags_of_the_runtime_change_little(tiny_folder, data, tmp_path, capsys, flags):
    pytest.importorskip("torchmetrics")
    arguments = (
        f"evaluate --model {tiny_folder} --data {data}/heldout-*.tar --steps 1 --quiet "
        f"--features clip --json {tmp_path}"
    )
    assert main(f"{arguments}/exact.json".split()) == 0
    assert main(f"{arguments}/e.json {flags}".split()) == 0
    exact, results = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("exact", "e"))
    assert (results["sha256"] == exact["sha256"]) == (flags == "--offload")  # as loaded
    assert results.get("quantized") == ("int8" if "int8" in flags else None)
    for part, figure in (("prior", "normalised_mse"), ("decoder", "mean_x0_mse")):
        assert results[part][figure] == pytest.approx(exact[part][figure], rel=0.05)
    assert results["features"]["generated"]["fd"] == pytest.approx(
        exact["features"]["generated"]["fd"], rel=0.2
    )


def test_lora_adapters_are_loaded(tiny_pipe, tiny_folder, data, tmp_path):
    pytest.importorskip("peft")
    adapted = copy.deepcopy(tiny_pipe.decoder)
    add_lora(adapted, LoRAConfig())
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    save_lora(adapted, tmp_path / "adapter")
    arguments = (
        f"evaluate --model {tiny_folder} --data {data}/heldout-*.tar --parts decoder --quiet"
    )
    results = []
    for flags in ("", f"--lora {tmp_path}/adapter"):
        file = tmp_path / f"{len(results)}.json"
        assert main(f"{arguments} --json {file} {flags}".split()) == 0
        results.append(json.loads(file.read_text()))
    plain, tuned = results
    assert plain["decoder"] != tuned["decoder"]
    assert plain["sha256"]["decoder"] != tuned["sha256"]["decoder"]  # other settings: no resuming


def test_renamed_flags_still_work(tiny_folder, data, tmp_path, capsys):
    arguments = (
        f"evaluate --model {tiny_folder} --data {data}/heldout-*.tar --steps 1 --quiet "
        f"--beside {tiny_folder} --pictures {tmp_path} --parts pictures --json {tmp_path}/e.json"
    )
    assert main(arguments.split()) == 0
    assert "--beside is deprecated; use --baseline" in capsys.readouterr().err
    assert json.loads((tmp_path / "e.json").read_text())["baseline"] == "tiny"
    assert (tmp_path / "samples.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data nowhere", "nowhere"),
        ("--data {data}/heldout-*.tar --limit 0", "'0' is not a whole number"),
        ("--data {data}/heldout-*.tar --limit 1", "expected at least two different captions"),
        ("--data {data}/heldout-*.tar --batch-size 0", "'0' is not a whole number"),
        ("--data {data}/heldout-*.tar --json no/folder/e.json", "no/folder"),
        ("--data {data}/heldout-*.tar --model emojy", "emojy"),
        ("--data {data}/heldout-*.tar --steps 0", "'0' is not a whole number"),
        ("", "--data"),
    ],
)
def test_invalid_arguments_are_reported_in_one_line(arguments, message, tiny_folder, data, capsys):
    words = f"evaluate --model {tiny_folder} --quiet {arguments.format(data=data)}".split()
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
