"""Only the files that make a model are downloaded from a repository on the Hub."""

from __future__ import annotations

from pathlib import Path

import pytest

import unclip
from unclip.checkpoints.hub import PRIOR_FILES, select

OURS = [
    "model.json",
    "options.json",
    "clip/open_clip_config.json",
    "decoder/config.json",
    "decoder/model.safetensors",
]
KARLO = [
    "model_index.json",
    "prior/config.json",
    "decoder/config.json",
    "prior/w.safetensors",
    "decoder/w.safetensors",
]
MEGA = ["config.json", "vocab.json", "merges.txt", "encoder.pt", "decoder.pt", "detoker.pt"]
MINI = ["vocab_mini.json", "merges_mini.txt", "encoder_mini.pt", "decoder_mini.pt"]


def test_json_and_safetensors_are_preferred():
    useless = [
        "decoder/pytorch_model.bin",
        "sheet.png",
        "last.pt",
        "decoder/model.fp16.safetensors",
        "run.ckpt",
    ]
    assert select(OURS + useless) == OURS
    assert select(KARLO + useless) == KARLO


def test_other_weights_are_selected_if_there_are_no_full_safetensors():
    bare = [*KARLO, "text_encoder/config.json", "image_encoder/config.json"]
    more = ["text_encoder/pytorch_model.bin", "image_encoder/model.fp16.safetensors"]
    assert sorted(select([*bare, *more, "decoder/w.bin"])) == sorted(bare + more)


def test_mega_is_preferred_to_mini():
    assert set(select(MEGA + MINI)) == {*MEGA, "vocab_mini.json", "merges_mini.txt"}
    assert set(select([*MINI, "detoker.pt"])) == {*MINI, "detoker.pt"}


def test_one_checkpoint_per_folder_of_dalle2_pytorch_is_selected():
    prior = ["prior/prior_config.json", "prior/best.pth"]
    decoder = ["decoder/decoder_config.json", "decoder/a/latest.pth"]
    useless = [
        "prior/latest.pth",
        "prior/old/best.pth",
        "decoder/a/epoch_1.pth",
        "decoder/a/samples.npy",
        "other.pth",
    ]
    assert set(select([*prior, *decoder, *useless])) == {*prior, *decoder}
    assert set(select([*prior, *decoder, *useless], PRIOR_FILES)) == set(prior)
    with pytest.raises(
        ValueError,
        match=r"several models \(decoder/a/latest.pth, decoder/b/latest.pth\); download one",
    ):
        select([*prior, *decoder, "decoder/b/latest.pth"])


def test_files_of_other_formats_are_selected():
    karlo = [
        "prior-ckpt-step=01000000.ckpt",
        "decoder-ckpt-step=01000000.ckpt",
        "ViT-L-14.pt",
        "ViT-L-14_stats.th",
    ]
    assert set(select([*karlo, "a.png"])) == set(karlo)
    assert set(select([*karlo, "2_1.pt"], PRIOR_FILES)) == {karlo[0], karlo[3]}
    assert select(["dalle.pt", "tokenizer.json", "train.log"]) == ["tokenizer.json", "dalle.pt"]


def test_a_hub_id_is_downloaded(tiny_folder, monkeypatch):
    import huggingface_hub

    requested = {}

    def snapshot_download(hub_id, allow_patterns):
        requested[hub_id] = allow_patterns
        return str(tiny_folder)

    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda hub_id: [*OURS, "a.bin"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert unclip.load("someone/tiny", "cpu").source == "someone/tiny"
    assert requested == {"someone/tiny": OURS}


def test_the_cache_is_used_without_a_network(tiny_folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--someone--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0a1b")
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / "0a1b").symlink_to(Path(tiny_folder).resolve())
    assert unclip.load("someone/tiny", "cpu").name == "tiny"
    with pytest.raises(
        ValueError,
        match="not a local folder.*the Hub cannot be reached, and nothing of the model is cached; ",
    ):
        unclip.load("someone/other")


@pytest.mark.parametrize(
    ("status", "reason"), [(404, "the Hub has no such model, or it is private"), (503, "no more")]
)
def test_the_error_has_the_hub_s_reason(status, reason, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants, errors

    class Answer(errors.RepositoryNotFoundError if status == 404 else errors.HfHubHTTPError):
        def __init__(self) -> None:
            OSError.__init__(self, "no more")

        def __str__(self) -> str:
            return "no more"

    def list_repo_files(hub_id):
        raise Answer

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "list_repo_files", list_repo_files)
    with pytest.raises(
        ValueError,
        match=f"'someone/gone' is not a local folder and could not be downloaded: {reason}",
    ):
        unclip.load("someone/gone")
