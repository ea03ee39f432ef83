"""Only the files that make a model are downloaded from a repository on the Hub."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import yaml

import unclip
from unclip.checkpoints.card import model_card
from unclip.checkpoints.hub import PRIOR_FILES, select
from unclip.cli.main import main
from unclip.image_io import read_metadata

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


def listing(names):
    from huggingface_hub import ModelInfo

    return ModelInfo(id="someone/tiny", siblings=[{"rfilename": name} for name in names])


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

    monkeypatch.setattr(huggingface_hub, "model_info", lambda hub_id: listing([*OURS, "a.bin"]))
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
        match="not a local folder.*the Hub cannot be reached, and the model is not cached; ",
    ):
        unclip.load("someone/other")


def test_a_hub_that_cannot_be_reached_is_reported_soon(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens
    start = time.monotonic()
    with pytest.raises(ValueError, match="the Hub cannot be reached, and the model is not cached"):
        unclip.load("someone/gone")
    assert time.monotonic() - start < 10


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

    def model_info(hub_id):
        raise Answer

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    with pytest.raises(
        ValueError,
        match=f"'someone/gone' is not a local folder and could not be downloaded: {reason}",
    ):
        unclip.load("someone/gone")


def test_a_download_that_breaks_off_is_reported(monkeypatch):
    import huggingface_hub

    def snapshot_download(hub_id, allow_patterns):
        raise RuntimeError("peer closed connection\nmore")

    monkeypatch.setattr(huggingface_hub, "model_info", lambda hub_id: listing(OURS))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match="'me/tiny' .* not be downloaded: peer closed connection;"):
        unclip.load("me/tiny")


def test_revisions_and_arguments_reach_the_hub(tiny_folder, monkeypatch):
    import huggingface_hub

    calls = []

    def snapshot_download(hub_id, **arguments):
        calls.append((hub_id, {k: v for k, v in arguments.items() if k != "allow_patterns"}))
        return str(tiny_folder)

    def model_info(hub_id, **arguments):
        calls.append((hub_id, arguments))
        return listing(OURS)

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    pipe = unclip.load("someone/tiny@v1.0", "cpu", token="t", cache_dir="c")
    assert pipe.source == "someone/tiny@v1.0"
    remote = {"revision": "v1.0", "token": "t"}
    assert calls == [("someone/tiny", remote), ("someone/tiny", {**remote, "cache_dir": "c"})]
    calls.clear()
    prior = unclip.load_prior("someone/tiny", revision="refs/pr/1", local_files_only=True)
    assert prior.source == "someone/tiny@refs/pr/1"  # no list is fetched
    assert calls == [("someone/tiny", {"revision": "refs/pr/1", "local_files_only": True})]
    with pytest.raises(ValueError, match="is a .*expected an image codec|not an image codec"):
        unclip.load_codec("someone/tiny@v2")
    assert calls[-1] == ("someone/tiny", {"revision": "v2"})
    with pytest.raises(ValueError, match="someone/tiny@v1 and revision='v2' differ"):
        unclip.load("someone/tiny@v1", revision="v2")


class FakeHub:
    """The methods of HfApi that are used, on a folder in place of the Hub."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls = root, []

    def __call__(self, token: str | None = None) -> FakeHub:
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> str:
        self.calls.append(("create_repo", private))
        return f"https://hub/{repo_id}"

    def create_branch(self, repo_id: str, branch: str, exist_ok: bool) -> None:
        self.calls.append(("create_branch", branch))

    def upload_folder(
        self, repo_id: str, folder_path: Path, revision: str | None, commit_message: str
    ) -> None:
        shutil.copytree(folder_path, self.root / repo_id)


def test_a_model_is_pushed_with_a_card(tiny_pipe, tmp_path, monkeypatch):
    import huggingface_hub

    hub = FakeHub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    url = tiny_pipe.push_to_hub("me/tiny", prompts=["a red apple"], token="t", revision="dev")
    assert url == "https://hub/me/tiny"
    assert hub.calls == [("token", "t"), ("create_repo", False), ("create_branch", "dev")]
    _, header, text = (tmp_path / "me/tiny/README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "unclip",
        "pipeline_tag": "text-to-image",
        "license": "mit",
        "tags": ["unclip", "dall-e-2", "diffusion", "text-to-image"],
        "widget": [{"text": "a red apple", "output": {"url": "images/0.png"}}],
    }
    assert "unclip.load('me/tiny')" in text
    assert read_metadata(tmp_path / "me/tiny/images/0.png")[0]["prompt"] == "a red apple"
    names = [
        str(path.relative_to(tmp_path / "me/tiny")) for path in (tmp_path / "me/tiny").rglob("*")
    ]
    assert "decoder/model.safetensors" in select([name.replace("\\", "/") for name in names])
    again = unclip.load(tmp_path / "me/tiny", "cpu")("a", seed=0, progress=False)
    assert again.images[0].tobytes() == tiny_pipe("a", seed=0, progress=False).images[0].tobytes()


def test_the_push_command(tiny_folder, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", hub := FakeHub(tmp_path))
    command = ["push", str(tiny_folder), "me/tiny", "--private", "--dtype", "bf16"]
    assert main(command) == 0 and capsys.readouterr().out == "https://hub/me/tiny\n"
    assert ("create_repo", True) in hub.calls and (tmp_path / "me/tiny/model.json").is_file()
    assert main(["push", str(tiny_folder), "tiny"]) == 2
    assert "'tiny' is not a name on the Hub; expected ORG/NAME" in capsys.readouterr().err

    def refuse(*_, **__):
        raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required")

    monkeypatch.setattr(FakeHub, "create_repo", refuse)
    assert main(command) == 2
    assert "Token is required; check the name, and log in" in capsys.readouterr().err


def test_a_push_without_a_network_is_one_line(tiny_folder, monkeypatch, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["push", str(tiny_folder), "me/tiny"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: me/tiny could not be uploaded: the Hub cannot be reached (")
    assert err.count("\n") == 1 and "log in" not in err


def test_licences_without_an_identifier_are_named():
    header = model_card("me/x", "dalle", "weights: MIT; see notes").split("---\n")[1]
    assert yaml.safe_load(header)["license"] == "other"
    assert yaml.safe_load(header)["license_name"] == "weights: MIT; see notes"
