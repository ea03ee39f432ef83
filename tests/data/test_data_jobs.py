"""Embedding jobs of several processes: killed at any moment, they write the same bytes."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_clip
from PIL import Image
from scripts import ROOT

from unclip.data.embeddings import main
from unclip.data.loader import open_dataset
from unclip.data.parts import ABANDONED, PartWriter, sha256
from unclip.data.shards import ShardWriter

pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip().save_pretrained(folder)
    return folder


def write_shards(folder: Path, count: int, images: int = 2, broken: int = 0) -> Path:
    """Write shards of images; the first `broken` shards have a broken one as well."""
    folder.mkdir()
    image = folder.parent / "image.png"
    with ShardWriter(folder, "train", images) as writer:
        for i in range(count * images):
            Image.new("RGB", (16, 16), (i % 256, i // 256, 0)).save(image)
            is_broken = i % images == 0 and i // images < broken
            png = b"broken" if is_broken else image.read_bytes()
            writer.write(f"k{i}", {"png": png, "txt": f"number {i}"})
    return folder


def command(data: Path, out: Path, clip: Path, *more: str) -> list[str]:
    return [str(data), str(out), "--clip", str(clip), "--device", "cpu", "--tasks", "1", *more]


def snapshot(folder: Path) -> dict[str, str]:
    # A killed process may leave a temporary file, which a later run deletes.
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp")
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def test_tasks_share_a_job(clip, tmp_path, capsys):
    data = write_shards(tmp_path / "data", 5, broken=2)
    main(command(data, tmp_path / "one", clip))
    assert "8 rows, 2 broken images skipped" in capsys.readouterr().out
    for task in "201":
        main(command(data, tmp_path / "three", clip, "--tasks", "3", "--task", task))
    assert "two" not in capsys.readouterr().out
    assert snapshot(tmp_path / "three") == snapshot(tmp_path / "one")
    manifest = json.loads((tmp_path / "one/manifest.json").read_text())
    assert (manifest["parts"], manifest["rows"], manifest["broken"]) == (5, 8, 2)
    assert manifest["files"] == {
        name: hash_
        for name, hash_ in snapshot(tmp_path / "one").items()
        if name.endswith((".npy", ".parquet"))
    }
    dataset = open_dataset(tmp_path / "three")
    assert dataset.captions[:3] == ["number 1", "number 3", "number 4"]


def test_an_unfinished_job_says_how_far_it_is(clip, tmp_path, capsys):
    data = write_shards(tmp_path / "data", 3)
    main(command(data, tmp_path / "out", clip, "--tasks", "2", "--task", "1"))
    assert "1 of 3 parts; the other tasks have not finished" in capsys.readouterr().out
    assert not (tmp_path / "out/manifest.json").exists()


def test_only_old_temporary_files_are_deleted(tmp_path):
    writer = PartWriter(tmp_path)
    writer.write_part(0, {}, {"caption": ["a"]})
    names = (".manifest.json.1.tmp", "parts/.part_0.json.2.tmp")
    written, abandoned = (tmp_path / name for name in names)
    for file in (written, abandoned):
        file.touch()
    old = time.time() - ABANDONED - 60
    os.utime(abandoned, (old, old))
    writer.write_manifest(1)
    assert written.exists() and not abandoned.exists()


def test_changed_files_are_computed_again(clip, tmp_path):
    data, out = write_shards(tmp_path / "data", 2), tmp_path / "out"
    main(command(data, out, clip))
    whole = snapshot(out)
    damaged = out / "img_emb/img_emb_1.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    (out / "text_emb/text_emb_0.npy").unlink()
    main(command(data, out, clip))
    assert snapshot(out) != whole
    main(command(data, out, clip, "--verify"))
    assert snapshot(out) == whole


def test_errors(clip, tmp_path):
    data = write_shards(tmp_path / "data", 1)
    with pytest.raises(SystemExit, match="task is 2; expected 0 to 1 for 2 tasks"):
        main(command(data, tmp_path / "out", clip, "--tasks", "2", "--task", "2"))
    for option in ("--tasks", "--ray"):
        with pytest.raises(SystemExit, match=f"{option} is 0; expected at least 1"):
            main(command(data, tmp_path / "out", clip, option, "0"))
    main(command(data, tmp_path / "out", clip))
    with pytest.raises(SystemExit, match="was started with shards 1, now None|started with"):
        main([str(data), str(tmp_path / "out"), "--clip", str(clip)])
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="cannot write .*file: .*file is not a directory"):
        main(command(data, tmp_path / "file", clip))
    with pytest.raises(SystemExit, match="no shards at"):
        main(command(tmp_path / "nothing-*.tar", tmp_path / "out", clip))


def kill_while_running(start, out: Path, kills: int, parts: int) -> int:
    """Start a job and kill it at regular intervals until it ends; return the number of kills."""
    for kill in range(kills):
        process = start()
        target = (kill + 1) * parts // (kills + 1)
        while process.is_alive() and len(list(out.glob("img_emb/*"))) < target:
            time.sleep(0.002)
        if not process.is_alive():
            return kill
        process.kill()
        process.join()
    process = start()
    process.join()
    return kills


def forked(arguments: list[str]):
    """Run a job in a forked process, which starts at once."""
    process = multiprocessing.get_context("fork").Process(target=main, args=(arguments,))
    process.start()
    return process


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process that uses torch")
@pytest.mark.parametrize(
    ("shards", "kills"), [(12, 4), pytest.param(200, 20, marks=pytest.mark.nightly)]
)
def test_a_killed_job_gives_the_same_bytes(clip, tmp_path, shards, kills):
    data, out = write_shards(tmp_path / "data", shards, broken=1), tmp_path / "out"
    main(command(data, tmp_path / "whole", clip))
    arguments = command(data, out, clip)
    killed = kill_while_running(lambda: forked(arguments), out, kills, shards)
    assert killed >= kills // 2
    assert snapshot(out) == snapshot(tmp_path / "whole")
    print(f"{shards} shards, killed {killed} times: identical")


class Session:
    """A job on Ray in a session of its own, with all its workers."""

    def __init__(self, arguments: list[str]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "unclip.data.embeddings", *arguments],
            env=environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        subprocess.run(["pkill", "-KILL", "-s", str(self.process.pid)], check=True)

    def join(self) -> None:
        self.process.wait()


@pytest.mark.nightly
@pytest.mark.parametrize(("shards", "kills"), [(200, 20)])
def test_a_job_on_ray_gives_the_same_bytes(clip, tmp_path, shards, kills):
    pytest.importorskip("ray.data")
    data, out = write_shards(tmp_path / "data", shards, broken=1), tmp_path / "out"
    main(command(data, tmp_path / "whole", clip))
    arguments = command(data, out, clip, "--ray", "2")
    killed = kill_while_running(lambda: Session(arguments), out, kills, shards)
    assert killed >= kills // 2
    assert snapshot(out) == snapshot(tmp_path / "whole")
    print(f"{shards} shards on Ray, killed {killed} times: identical")
