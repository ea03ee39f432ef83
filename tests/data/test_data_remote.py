"""Shards at URLs: cached, retried, in the order of local shards; and a benchmark of loaders."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from PIL import Image

from unclip.cli.main import main as cli
from unclip.data import remote
from unclip.data.loader import DataConfig, Loader, open_dataset
from unclip.data.shards import ShardWriter


@pytest.fixture
def shards(tmp_path: Path, monkeypatch) -> Path:
    """Three shards of four images; nothing waits between attempts."""
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    (tmp_path / "data").mkdir()
    with ShardWriter(tmp_path / "data", "train", 4) as writer:
        for i in range(12):
            Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / "image.png")
            writer.write(f"k{i}", {"png": (tmp_path / "image.png").read_bytes(), "txt": f"n {i}"})
    return tmp_path / "data"


@pytest.fixture
def memory(shards: Path) -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    for shard in shards.iterdir():
        fs.pipe(f"/bucket/{shard.name}", shard.read_bytes())
    yield "memory://bucket"
    fs.rm("/bucket", recursive=True)


def config(path: str | Path, **changes: object) -> DataConfig:
    return DataConfig(**{"path": str(path), "image_size": 8, "batch_size": 3, **changes})


@pytest.mark.parametrize("pattern", ["", "/train-*.tar", "/train-{00000..00002}.tar"])
def test_batches_and_positions_are_those_of_local_shards(shards, memory, pattern):
    local, far = Loader(config(shards)), Loader(config(memory + pattern, workers=1))
    for one, other in zip(local, far, strict=True):
        assert one["key"] == other["key"] and torch.equal(one["image"], other["image"])
    resumed = Loader(config(memory + pattern))
    resumed.load_state_dict({"epoch": 1, "batch": 2})
    local.load_state_dict({"epoch": 1, "batch": 2})
    assert [batch["key"] for batch in resumed] == [batch["key"] for batch in local]


def test_cached_shards_need_no_network(memory, tmp_path, monkeypatch):
    first = open_dataset(f"{memory}/train-00000.tar")[0].key

    def unreachable(self, path, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", unreachable)
    with monkeypatch.context() as patch:
        patch.setattr(remote.time, "sleep", lambda seconds: pytest.fail(f"waited {seconds} s"))
        assert open_dataset(f"{memory}/train-00000.tar")[0].key == first
    with pytest.raises(OSError, match=r"memory://bucket/train-00001.tar: no route \(5 attempts\)"):
        open_dataset(f"{memory}/train-00001.tar")


def test_a_changed_shard_is_downloaded_again(memory, shards):
    url = f"{memory}/train-00000.tar"
    assert len(open_dataset(url)) == 4
    with ShardWriter(shards, "longer", 100) as writer:
        for i in range(40):
            png = (shards.parent / "image.png").read_bytes()
            writer.write(f"l{i}", {"png": png, "txt": "longer"})
    fsspec.filesystem("memory").pipe(
        "/bucket/train-00000.tar", (shards / "longer-00000.tar").read_bytes()
    )
    assert len(open_dataset(url)) == 40


class Unreliable(http.server.SimpleHTTPRequestHandler):
    """Serves files of the data folder, without ranges.

    The first requests for each shard fail in several ways; `status` fails all.
    """

    folder: Path
    requests: dict[str, int] = {}
    status: int | None = None

    def do_HEAD(self) -> None:
        self.answer(head=True)

    def do_GET(self) -> None:
        self.answer(head=False)

    def answer(self, head: bool) -> None:
        file = self.folder / self.path.lstrip("/")
        if self.status is not None:
            return self.send_error(self.status)
        if not file.is_file():
            return self.send_error(404)
        count = self.requests[self.path] = self.requests.get(self.path, 0) + (not head)
        if not head and count == 1:
            return self.send_error(503)
        data = file.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not head:
            self.wfile.write(data[: len(data) // 2] if count == 2 else data)
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def handler(shards: Path) -> type[Unreliable]:
    return type("Handler", (Unreliable,), {"folder": shards, "requests": {}})


@pytest.fixture
def server(handler: type[Unreliable]) -> Iterator[str]:
    pytest.importorskip("aiohttp")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


def test_failed_and_truncated_downloads_are_tried_again(server, shards, tmp_path):
    far = Loader(config(f"{server}/train-{{00000..00002}}.tar"))
    assert [batch["key"] for batch in far] == [batch["key"] for batch in Loader(config(shards))]
    cached = sorted((tmp_path / "cache/shards").glob("*.tar"))
    assert sorted(path.read_bytes() for path in cached) == sorted(
        path.read_bytes() for path in shards.glob("*.tar")
    )
    with pytest.raises(FileNotFoundError, match="train-00009.tar does not exist"):
        open_dataset(f"{server}/train-00009.tar")


@pytest.mark.parametrize("status", [403, 500, 503])
def test_a_failing_server_is_not_a_missing_shard(server, handler, status):
    handler.status = status
    with pytest.raises(OSError, match=rf"train-00000.tar: {status}, .*\(5 attempts\)"):
        open_dataset(f"{server}/train-00000.tar")
    with pytest.raises(OSError, match=r"127.0.0.1:9/a.tar: Cannot connect.*\(5 attempts\)"):
        open_dataset("http://127.0.0.1:9/a.tar")


def test_a_shard_is_larger_than_a_block_of_a_server_without_ranges(server, shards):
    png = (shards.parent / "image.png").read_bytes()
    with ShardWriter(shards, "large", 1) as writer:
        writer.write("a", {"png": png, "txt": "a", "bin": bytes(12 * 2**20)})
    with pytest.warns(UserWarning, match="left out"):
        assert len(Loader(config(f"{server}/large-00000.tar", batch_size=1))) == 1


def test_a_damaged_copy_is_downloaded_again_by_the_next_run(memory, shards):
    fs, url = fsspec.filesystem("memory"), f"{memory}/train-00000.tar"
    shard = (shards / "train-00000.tar").read_bytes()
    fs.pipe("/bucket/train-00000.tar", b"<html>log in</html>".ljust(len(shard)))
    with pytest.raises(ValueError, match=r"is not a tar.*removed from the cache: the next run"):
        open_dataset(url)
    fs.pipe("/bucket/train-00000.tar", shard)  # of the same size
    assert len(open_dataset(url)) == 4


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere://bucket/a.tar", "nowhere://bucket/a.tar cannot be opened: .*nowhere"),
        ("memory://empty/train-*.tar", "no shards at memory://empty"),
    ],
)
def test_errors(shards, path, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_dataset(path)


def test_the_speed_of_a_loader_is_measured(shards, tmp_path, capsys):
    command = ["bench", "--data", str(shards), "--image-size", "8", "--batch-size", "4"]
    command += [
        "--workers",
        "0,1",
        "--batches",
        "4",
        "--step",
        "0.05",
        "--json",
        str(tmp_path / "speed.json"),
    ]
    assert cli(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["workers", "0", "1"]
    plain, _ = json.loads((tmp_path / "speed.json").read_text())["loader"]
    # Each batch of 4 takes the step and, without workers, all of the loading.
    assert plain["images_per_second"] <= 4 / (0.05 + plain["wait"])
    assert plain["wait"] > 0
