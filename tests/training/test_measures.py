"""The measures of a validation agree with the pipeline and with the metrics of the evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from accelerate import PartialState
from conftest import CONTEXT, EMB_DIM, TEXT_WIDTH, scrambled, tiny_prior
from fitting import OPTIM, fit_config
from forks import FSDP, fork, wait
from networks import Captioned, build
from torch import nn

from unclip.diffusion.schedules import Schedule
from unclip.embeddings import cosine_gap
from unclip.evaluation.metrics import recall
from unclip.models.unclip.ar_prior import ARPrior, ARPriorConfig
from unclip.models.unclip.mlp_prior import MLPPrior, MLPPriorConfig
from unclip.models.unclip.one_shot_prior import OneShotPrior, OneShotPriorConfig
from unclip.pipelines.request import generators_from
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.training.fit import fit
from unclip.training.launch import Run
from unclip.training.measures import STEPS, Retrieval, SampledCosines
from unclip.types import StageOptions

CAPTIONS = ["a red apple", "a blue fish", "a red fish", "a red apple", "a blue apple", "a fish"]
SIZES = (EMB_DIM, TEXT_WIDTH, CONTEXT, 32, 2, 2)


def prior_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    prior = {
        "diffusion": lambda: tiny_prior(),
        "mlp": lambda: MLPPrior(MLPPriorConfig(*SIZES, kind="mlp", mlp_width=32)),
        "ar": lambda: ARPrior(ARPriorConfig(*SIZES, components=4, buckets=8)),
        "one_shot": lambda: OneShotPrior(OneShotPriorConfig(*SIZES, query="noise")),
    }[kind]()
    return scrambled(prior).requires_grad_(False).eval()


def batches(size: int, start: int = 0, stride: int = 1) -> list[dict[str, Any]]:
    emb = torch.randn(len(CAPTIONS), EMB_DIM, generator=torch.Generator().manual_seed(0))
    emb, captions = emb[start::stride], CAPTIONS[start::stride]
    return [
        {"image_emb": emb[i : i + size], "caption": captions[i : i + size]}
        for i in range(0, len(captions), size)
    ]


@pytest.mark.parametrize("kind", ["diffusion", "mlp", "ar", "one_shot"])
def test_the_cosines_are_those_of_the_embeddings_that_the_pipeline_samples(kind, tiny_pipe):
    prior, clip = prior_of(kind), tiny_pipe.clip
    pipe = UnCLIPPipeline(clip, prior, tiny_pipe.decoder)
    schedule = Schedule() if kind in ("diffusion", "mlp") else None
    measured = SampledCosines(prior, clip, schedule)(batches(4))
    with torch.no_grad():
        generators = generators_from(range(len(CAPTIONS)))
        text, options = clip.encode_text(CAPTIONS), StageOptions(STEPS)
        emb = pipe.sample_prior(text, generators=generators, options=options, candidates=1)
    expected = cosine_gap(emb, batches(6)[0]["image_emb"], CAPTIONS)
    names = {"cosine": "matching", "cosine_unrelated": "mismatched", "cosine_gap": "gap"}
    assert measured == pytest.approx({n: expected[x] for n, x in names.items()}, abs=1e-5)


def test_two_processes_measure_the_same_as_one(tmp_path: Path, tiny_pipe):
    clip = tiny_pipe.clip

    def measure(rank: int, processes: int) -> dict[str, float]:
        part = batches(2, rank, processes)
        samples = SampledCosines(prior_of("diffusion"), clip, Schedule())
        return {**samples(part), **Retrieval(clip)(part)}

    def run(rank: int) -> None:
        PartialState(cpu=True)
        (tmp_path / f"{rank}.json").write_text(json.dumps(measure(rank, 2)))

    assert wait(fork(run, 2), 120) == [0, 0]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1] == pytest.approx(measure(0, 1), abs=1e-5)


def test_cosines_of_one_caption_have_nothing_unrelated(tiny_pipe):
    batch = {"image_emb": torch.randn(3, EMB_DIM), "caption": ["a fish"] * 3}
    measured = SampledCosines(prior_of("one_shot"), tiny_pipe.clip)([batch])
    assert measured.keys() == {"cosine"} and -1 <= measured["cosine"] <= 1


def test_recall_counts_images_and_captions_that_find_each_other(tiny_pipe):
    clip = tiny_pipe.clip
    with torch.no_grad():
        text_emb = clip.encode_text(CAPTIONS).emb
    batch = {"image_emb": text_emb, "caption": CAPTIONS}
    assert Retrieval(clip)([batch]) == {"recall_of_captions": 1.0, "recall_of_images": 1.0}
    # Two images exchanged: the first caption, which occurs twice, then finds a wrong one as well.
    swapped = text_emb[[1, 0, 2, 3, 4, 5]]
    measured = Retrieval(clip)([{**batch, "image_emb": swapped}])
    assert measured == pytest.approx({"recall_of_captions": 4 / 6, "recall_of_images": 3 / 6})
    equal = torch.ones_like(text_emb)
    measured = Retrieval(clip)([{**batch, "image_emb": equal}])
    assert measured["recall_of_images"] == 0.0  # a tie
    other = [0, 1, 2, 4, 5]  # captions that differ
    noisy, captions = text_emb[other] + torch.randn(5, EMB_DIM), [CAPTIONS[i] for i in other]
    measured = Retrieval(clip)([{"image_emb": noisy, "caption": captions}])
    expected = recall(noisy, text_emb[other], torch.arange(5), ks=(1,))["recall@1"]
    assert measured["recall_of_captions"] == pytest.approx(expected)
    near = 0.005 * torch.eye(5, EMB_DIM) + F.normalize(torch.randn(EMB_DIM), dim=0)  # similar texts
    with (
        torch.autocast("cpu", torch.bfloat16),
        mock.patch.object(clip, "encode_captions") as encode,
    ):
        encode.return_value.emb = near
        found = Retrieval(clip)([{"image_emb": near, "caption": captions}])
    assert found == {"recall_of_captions": 1.0, "recall_of_images": 1.0}


def test_a_sharded_prior_has_the_cosines_of_a_whole_one(tmp_path: Path):
    """The updates after a validation are those of a whole one as well."""

    def train(name: str, env: dict[str, str] | None) -> list[dict[str, float]]:
        config = fit_config(tmp_path / name, 3, precision="fp32", log_every=1, val_every=1)

        def run(rank: int) -> None:
            prior, loss_fn = build("prior")
            measure = SampledCosines(prior, loss_fn.clip, loss_fn.schedule)
            loaders = [Captioned(rank=rank, processes=2) for _ in range(2)]
            options = {"val_loader": loaders[1], "measure": measure}
            fit(
                prior, loss_fn, loaders[0], config, OPTIM, run=Run({"fit": vars(config)}), **options
            )

        assert wait(fork(run, 2, env), 300) == [0, 0]
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        keep = ("loss", "val_loss", "val_cosine", "val_cosine_unrelated", "val_cosine_gap")
        return [{k: v for k, v in json.loads(row).items() if k in keep} for row in rows]

    sharded, whole = train("sharded", FSDP), train("whole", None)
    assert len(whole) == 6 and whole[1].keys() >= {"val_loss", "val_cosine_gap"}
    for one, other in zip(sharded, whole, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-4)
