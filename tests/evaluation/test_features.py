"""`unclip evaluate --features`: distances and CLIP score of the final images."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_unet
from safetensors.torch import save_file
from styled import write_pairs
from torch import Tensor, nn

from unclip.cli.main import main
from unclip.evaluation.base import Evaluation
from unclip.evaluation.dalle import DalleEvaluation, DalleGenerator
from unclip.evaluation.features import Extractor, as_uint8, load_extractor
from unclip.evaluation.generator import Samples
from unclip.evaluation.glide import GLIDEGenerator
from unclip.evaluation.metrics import precision_and_recall
from unclip.evaluation.pairs import Pairs, load_pairs
from unclip.evaluation.reference import load_statistics
from unclip.evaluation.report import evaluation_rows
from unclip.evaluation.unclip import UnCLIPEvaluation, UnCLIPGenerator
from unclip.models.published.glide import GLIDE, GLIDEConfig, TextTransformer
from unclip.pipelines.glide import GLIDEPipeline
from unclip.tokenizer import GPT2Tokenizer
from unclip.types import GLIDEOptions, StageOptions

FEATURES = {"return_features": True}
fid = pytest.importorskip("torchmetrics.image.fid")
pytestmark = [
    pytest.mark.filterwarnings("ignore:the prompt"),  # the tiny CLIP has a short context
    pytest.mark.filterwarnings("ignore:4 images; the Fréchet"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]


class Inception(nn.Module):
    """The interface of the TorchScript file that FID is usually computed with."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 5)

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        assert img.dtype == torch.uint8
        x = nn.functional.adaptive_avg_pool2d(img.float(), [2, 2]).flatten(1)
        x = self.linear(x / 255)
        return x if return_features else x.softmax(dim=1)


@pytest.fixture(scope="module")
def inception() -> Inception:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Inception().eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def held_out(data) -> Pairs:
    return load_pairs(data / "heldout-*.tar", 8, progress=False)


def unclip_evaluation(pipe, held_out, extractor, **arguments) -> UnCLIPEvaluation:
    generator = UnCLIPGenerator(pipe, batch_size=3, progress=False)
    return UnCLIPEvaluation(generator, held_out, extractor=extractor, seed=5, **arguments)


def test_the_frechet_distance_is_that_of_torchmetrics_on_final_images(
    tiny_pipe, held_out, inception
):
    """The reference metric gets the images that the pipeline writes, and the true ones."""
    evaluation = unclip_evaluation(tiny_pipe, held_out, Extractor("x", inception, FEATURES))
    results = evaluation.run(["features"])["features"]
    generated = tiny_pipe(held_out.captions, seed=5, progress=False).images
    assert generated[0].size == (16, 16) and results["size"] == 16  # after the upsampler

    class Features(nn.Module):
        num_features = 5

        def forward(self, images: Tensor) -> Tensor:
            return inception(images, return_features=True)

    metric = fid.FrechetInceptionDistance(Features())
    metric.update(as_uint8(generated), real=False)
    metric.update(as_uint8([held_out.image(row, 16) for row in range(4)]), real=True)
    with torch.inference_mode():
        expected = metric.compute().item()
    assert expected > 0.01
    assert results["generated"]["fd"] == pytest.approx(expected, rel=0.02)  # batches round
    assert results["images"] == {"generated": 4, "true": 4}
    assert results["resize"] == {
        "true": "16 px, Lanczos, centre crop",
        "features": "by the extractor",
    }
    assert len(results["sha256"]) == 64


def test_images_that_are_the_true_ones_have_no_distance(tiny_dalle, data, inception):
    held_out = load_pairs(data / "heldout-*.tar", 16, progress=False)
    generator = DalleGenerator(tiny_dalle, batch_size=3, progress=False)
    extractor = Extractor("x", inception, FEATURES)
    evaluation = DalleEvaluation(generator, held_out, extractor=extractor)
    evaluation.samples = Samples(held_out.captions, held_out.floats())
    results = evaluation.features()
    perfect = results["generated"]
    assert perfect["fd"] == pytest.approx(0, abs=1e-3)
    assert perfect["precision"] == perfect["recall"] == 1.0
    assert perfect["clip_score"] == pytest.approx(results["true"]["clip_score"])
    evaluation.samples = Samples(held_out.captions, -held_out.floats())
    assert evaluation.features()["generated"]["fd"] > 0.1


def test_the_clip_score_is_that_of_the_extractor_or_of_the_model(tiny_pipe, held_out, tmp_path):
    own = unclip_evaluation(tiny_pipe, held_out, load_extractor("clip")).features()
    images = tiny_pipe(held_out.captions, seed=5, progress=False).images
    with torch.inference_mode():
        emb = tiny_pipe.clip.encode_image(2 * as_uint8(images).float() / 255 - 1)
        text = tiny_pipe.clip.encode_text(held_out.captions).emb
    cosine = nn.functional.cosine_similarity(emb, text)
    assert own["generated"]["clip_score"] == pytest.approx(
        100 * cosine.clamp(min=0).mean().item(), abs=0.2
    )
    assert own["resize"]["features"] == "16 px, bicubic, shortest"

    other = load_extractor("clip").bind(tiny_pipe.clip, torch.device("cpu")).network
    other.save_pretrained(tmp_path / "clip")
    from_folder = unclip_evaluation(tiny_pipe, held_out, load_extractor(str(tmp_path / "clip")))
    assert from_folder.features()["generated"] == pytest.approx(own["generated"])


def test_the_number_of_images_is_stated_and_few_are_warned_of(tiny_pipe, held_out, inception):
    evaluation = unclip_evaluation(tiny_pipe, held_out, Extractor("incep", inception, FEATURES))
    with pytest.warns(UserWarning, match="4 images; .* below 10,000"):
        results = evaluation.run(["features"])
    rows = {row.figure: row for row in evaluation_rows(results)}
    start = "4 final images, 16 px, incep: "
    assert {f"{start}Fréchet distance (too large below 10,000 images)"} <= rows.keys()
    assert "true images" in rows["CLIP score of the final images"].reference
    results["features"]["images"]["generated"] = 10_000
    rows = {row.figure for row in evaluation_rows(results)}
    assert "10000 final images, 16 px, incep: Fréchet distance" in rows


def test_results_of_the_judge_state_that_there_are_few_images():
    generated = {"fd": 0.28, "kd": -1.2e-5, "precision": 0.9, "recall": 0.8}
    rows = evaluation_rows({"realism": {"images": 510, "generated": generated}})
    assert "too large below 10,000 images" in rows[0].figure and "noisy" in rows[1].figure
    assert rows[1].value == "-1.2e-05"
    many = evaluation_rows({"realism": {"images": 30_000, "generated": generated}})
    assert "10,000" not in many[0].figure


def test_parts_bound_the_memory_without_changing_precision_and_recall(monkeypatch):
    torch.manual_seed(0)
    features, true = torch.randn(50, 4), 0.5 + torch.randn(40, 4)
    whole = precision_and_recall(features, true)
    monkeypatch.setattr("unclip.evaluation.metrics.PART", 7)
    assert precision_and_recall(features, true) == whole


def test_a_torchscript_file_gives_features(inception, tmp_path):
    file = tmp_path / "inception.pt"
    torch.jit.script(inception).save(str(file))
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    extractor = load_extractor(str(file)).bind(None, torch.device("cpu"))
    with torch.inference_mode():
        expected = inception(images, return_features=True)
    assert torch.allclose(extractor(images), expected)


class Payload:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_pickle_is_not_executed(tmp_path):
    executed = tmp_path / "executed"
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Payload(executed)))
    torch.save(Payload(executed), tmp_path / "b.pt")
    for file in ("a.pkl", "b.pt"):
        with pytest.raises(ValueError, match="is not a TorchScript file"):
            load_extractor(str(tmp_path / file))
    assert not executed.exists()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.pt", "nowhere.pt does not exist; expected 'clip'"),
        ("my_features:missing", "cannot be imported"),
        ("no_such_module:f", "cannot be imported"),
        ("my_features:Network", "is a class; expected a function"),
        ("my_features:NUMBER", "is of type int; expected a function"),
        ("my_features:images", r"gave shape \(2, 3, 4, 4\); expected features \(2, F\)"),
        ("my_features:fails", "raised bad input"),
        ("my_features:nothing", "gave NoneType"),
    ],
)
def test_errors_name_the_extractor(spec, message, tmp_path, monkeypatch):
    (tmp_path / "my_features.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        extractor = load_extractor(spec).bind(None, torch.device("cpu"))
        extractor(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))


CODE = """
class Network: pass
NUMBER = 3
def means(images): return images.float().mean((2, 3))
def images(images): return images.float()
def nothing(images): return None
def fails(images): raise RuntimeError("bad input")
"""


def test_a_model_without_an_image_encoder_needs_another_extractor():
    with pytest.raises(ValueError, match="the model has no CLIP for images; expected a CLIP"):
        load_extractor("clip").bind(None, torch.device("cpu"))


def test_the_baseline_must_have_the_same_full_size(tiny_pipe, held_out, inception):
    options = replace(tiny_pipe.options, upsamplers=())
    small = UnCLIPGenerator(tiny_pipe, options, progress=False)
    assert small.full_size == 8
    unclip_evaluation(tiny_pipe, held_out, None, baseline=small)
    with pytest.raises(ValueError, match="8 px to 8 px and tiny 8 px to 16 px; expected the same"):
        unclip_evaluation(tiny_pipe, held_out, Extractor("x", inception), baseline=small)


def test_the_command(tiny_folder, tiny_dalle_folder, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("some_features.py").write_text(CODE)
    shared = f"--data {data}/heldout-*.tar --parts features --quiet --json e.json"
    arguments = f"evaluate --model {tiny_folder} --steps 1 {shared}"
    assert main([*arguments.split(), "--features", "some_features:means"]) == 0
    shown = capsys.readouterr()
    assert "4 final images, 16 px, some_features:means: Fréchet distance" in shown.out
    assert [line for line in shown.err.splitlines() if "below 10,000" in line] == [
        line for line in shown.err.splitlines() if line
    ]  # the only warning
    results = json.loads(Path("e.json").read_text())["features"]
    assert np.isfinite(list(results["generated"].values())).all()

    Path("e.json").unlink()
    arguments = f"evaluate --model {tiny_dalle_folder} {shared} --features clip"
    assert main(arguments.split()) == 0
    results = json.loads(Path("e.json").read_text())["features"]
    assert results["extractor"] == "clip" and results["generated"].keys() >= {"fd", "clip_score"}
    capsys.readouterr()

    for given, message in [("", "expected --features SPEC"), ("--features no.pt", "no.pt does")]:
        assert main([*f"evaluate --model {tiny_folder} {shared} {given}".split()]) == 2
        assert message in capsys.readouterr().err
    few = f"evaluate --model {tiny_folder} {shared} --features clip --limit 3"
    assert main(few.split()) == 2 and "3 pairs; --features needs more" in capsys.readouterr().err


def test_statistics_give_the_distance_to_their_images(tiny_pipe, held_out, inception, tmp_path):
    """The images as a reference, and the mean and covariance of their features."""
    extractor = Extractor("x", inception, FEATURES)
    images = unclip_evaluation(tiny_pipe, held_out, extractor, reference=held_out).features()
    plain = unclip_evaluation(tiny_pipe, held_out, extractor).features()
    assert images["generated"] == plain["generated"] and images["images"]["reference"] == 4
    assert images["true"]["fd"] == pytest.approx(0, abs=1e-4)
    assert images["resize"]["reference"] == "16 px, Lanczos, centre crop"

    true = as_uint8([held_out.image(row, 16) for row in range(4)])
    features = extractor(true).double()
    mean, covariance = features.mean(dim=0), features.T.cov()
    np.savez(tmp_path / "s.npz", mu=mean, sigma=covariance)
    tensors = {"mean": mean, "covariance": covariance, "num_images": torch.tensor(4)}
    save_file(tensors, tmp_path / "s.safetensors")
    for name, count in (("s.npz", None), ("s.safetensors", 4)):
        statistics = load_statistics(tmp_path / name)
        assert statistics.images == count
        evaluation = unclip_evaluation(tiny_pipe, held_out, extractor, reference=statistics)
        assert evaluation.settings()["reference"]["sha256"] == statistics.sha256
        found = evaluation.features()["generated"]
        assert found["fd"] == pytest.approx(images["generated"]["fd"], rel=1e-4)
        assert "kd" not in found
    with pytest.raises(ValueError, match="statistics of 3 features; x gives 5"):
        other = replace(statistics, mean=mean[:3])
        unclip_evaluation(tiny_pipe, held_out, extractor, reference=other)


def test_broken_statistics_are_refused(tmp_path):
    whole = {"mu": np.zeros(1), "sigma": np.zeros((1, 1))}
    for name, arrays, message in (
        ("a", {"mu": np.zeros(2)}, "has mu; expected mean and covariance or mu and sigma"),
        ("b", {"mu": np.zeros(2), "sigma": np.zeros((3, 3))}, "expected .F,. and .F, F."),
        ("c", {"mu": np.full(1, np.nan), "sigma": np.zeros((1, 1))}, "not finite"),
        ("d", {"mu": np.array([None]), "sigma": np.zeros((1, 1))}, "is not a .npz file"),
        ("e", {"mu": np.array(["a"]), "sigma": np.zeros((1, 1))}, "mu has values of type <U1"),
        ("f", {"mu": np.zeros(1, complex), "sigma": np.zeros((1, 1))}, "mu is complex"),
        ("g", {**whole, "num_images": np.zeros(2)}, r"num_images is \[0.0, 0.0\]; expected a num"),
        ("h", {**whole, "num_images": np.nan}, "num_images is nan; expected a number"),
    ):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            load_statistics(tmp_path / f"{name}.npz")
    np.savez_compressed(tmp_path / "whole.npz", mu=np.arange(1000.0), sigma=np.eye(1000))
    data = bytearray((tmp_path / "whole.npz").read_bytes())
    data[200:1200:3] = bytes(334)
    for content in (data, pickle.dumps(Payload(tmp_path / "executed"))):
        (tmp_path / "broken.npz").write_bytes(content)
        with pytest.raises(ValueError, match="is not a .npz file"):
            load_statistics(tmp_path / "broken.npz")
    assert not (tmp_path / "executed").exists()


def test_the_same_command_resumes(tiny_folder, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = (
        f"evaluate --model {tiny_folder} --data {data}/heldout-*.tar --steps 1 --quiet "
        f"--features clip --reference {data}/train-*.tar --json e.json --parts features upsampler"
    )

    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("unclip.evaluation.unclip.UnCLIPEvaluation.upsampler", interrupted)
        assert main(arguments.split()) == 130
    kept = json.loads(Path("e.json").read_text())
    assert "features" in kept and "upsampler" not in kept
    assert kept["reference"]["pairs"] == kept["features"]["images"]["reference"] == 8
    with monkeypatch.context() as patch:
        patch.setattr("unclip.evaluation.unclip.UnCLIPEvaluation.features", interrupted)
        assert main(arguments.split()) == 0
    assert json.loads(Path("e.json").read_text()).items() >= kept.items()
    assert "to 8 reference images" in capsys.readouterr().out
    for flags in ("--seed 1", "--reference nowhere.npz"):
        assert main([*arguments.split(), *flags.split()]) == 2
    errors = capsys.readouterr().err
    assert "e.json has results for other settings" in errors and "nowhere.npz" in errors


@pytest.fixture
def glide_pipe() -> GLIDEPipeline:
    letters = {chr(97 + i): i for i in range(26)} | {"<|endoftext|>": 26}
    text = TextTransformer(width=24, depth=1, heads=2, context_length=6, vocab_size=27)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = GLIDE(GLIDEConfig(tiny_unet(3, 6, context_dim=24), 8, text))
        upsampler = GLIDE(GLIDEConfig(tiny_unet(6, 6, context_dim=24), 16, text, low_size=8))
    stage = StageOptions(steps=2)
    options = GLIDEOptions(stage, (stage,))
    return GLIDEPipeline(GPT2Tokenizer(letters, [], 6), decoder, [upsampler], options, name="g")


def test_a_glide_is_evaluated_by_an_extractor(glide_pipe, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("more_features.py").write_text(CODE)
    glide_pipe.save_pretrained("glide")
    arguments = f"evaluate --model glide --data {data}/heldout-*.tar --quiet --json e.json"
    assert main([*arguments.split(), "--features", "more_features:means"]) == 0
    results = json.loads(Path("e.json").read_text())
    assert (
        results["features"]["size"] == 16 and "clip_score" not in results["features"]["generated"]
    )
    assert results["repeatable"]["same_seed_same_bytes"]
    to_train = f"{arguments.replace('e.json', 'r.json')} --reference {data}/train-*.tar"
    assert main([*to_train.split(), "--features", "more_features:means"]) == 0
    table = capsys.readouterr().out
    assert "to 8 reference images: Fréchet distance" in table and "CLIP score" not in table
    assert main([*arguments.split(), "--features", "clip"]) == 2
    assert "the model has no CLIP for images" in capsys.readouterr().err
    sheets = [*arguments.split(), "--features", "more_features:means", "--sheets", "s"]
    assert main(sheets) == 2 and "--sheets needs a CLIP" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:4 prompts")
def test_glide_images_are_those_of_the_pipeline(glide_pipe, held_out, inception):
    generator = GLIDEGenerator(glide_pipe, batch_size=3, progress=False)
    evaluation = Evaluation(generator, held_out, extractor=Extractor("x", inception), seed=5)
    (batch, rest) = generator.final_images(evaluation.samples)
    expected = as_uint8(glide_pipe(held_out.captions, seed=5, progress=False).images)
    assert (torch.cat([batch, rest]).int() - expected.int()).abs().max() <= 2
