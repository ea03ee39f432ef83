"""Results by URL: names, expiry, limits, and all three kinds of storage."""

from __future__ import annotations

import resource
import signal
from unittest import mock

import pytest
from serving_helpers import client_of, load

from unclip.serving import storage as module
from unclip.serving.storage import MemoryFiles, Storage, open_storage


@pytest.fixture(params=["memory", "folder", "fsspec"])
def target(request, tmp_path):
    folder = str(tmp_path / "results")
    return {"memory": None, "folder": folder, "fsspec": f"file://{folder}"}[request.param]


def test_files_are_returned_until_they_expire(target, monkeypatch):
    storage = open_storage(target, 3600, 2**20)
    name = storage.put(b"data", "png")
    assert storage.get(name) == (b"data", "image/png")
    now = module.time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + 3590)
    assert storage.get(name) is not None and storage.sweep() == 0
    monkeypatch.setattr(module.time, "time", lambda: now + 3601)
    assert storage.get(name) is None
    assert storage.sweep() == 1
    assert storage.files.read(name) is None


def test_a_file_system_that_is_not_installed_is_one_line(monkeypatch):
    error = ImportError("Install s3fs to access S3")
    monkeypatch.setattr("fsspec.core.url_to_fs", mock.Mock(side_effect=error))
    with pytest.raises(ValueError, match="s3://bucket/x: Install s3fs.*remote"):
        open_storage("s3://bucket/x", 3600, 2**20)


def test_a_file_in_place_of_the_folder_is_one_line(tmp_path):
    file = tmp_path / "pid"
    file.write_text("1")
    for folder in (file, file / "results"):
        with pytest.raises(OSError, match="cannot store results in .*pid.*; give a folder"):
            open_storage(str(folder), 3600, 2**20)
    with pytest.raises(ValueError, match="cannot store results in foo://x: .*foo; give a folder"):
        open_storage("foo://x", 3600, 2**20)


def test_a_folder_without_permission_is_refused_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(OSError, match="no permission to write"):
        open_storage(str(tmp_path), 3600, 2**20)


def test_a_result_that_does_not_fit_on_the_disk_leaves_no_file(tmp_path):
    storage = open_storage(str(tmp_path), 3600, 2**20)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            storage.put(bytes(200_000), "png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not [*tmp_path.iterdir()]


def test_names_are_random_and_checked(target):
    storage = open_storage(target, 3600, 2**20)
    names = {storage.put(b"data", "webp") for _ in range(100)}
    assert len(names) == 100
    name = min(names)
    for wrong in ("", "x", "../x", f"../results/{name}", name + "x", name.upper(), "0" * 45):
        assert storage.get(wrong) is None


def test_files_on_disk_survive_a_restart(tmp_path):
    for target in (str(tmp_path), f"file://{tmp_path}"):
        name = open_storage(target, 3600, 2**20).put(b"data", "jpeg")
        assert open_storage(target, 3600, 2**20).get(name) == (b"data", "image/jpeg")


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    storage = open_storage(str(tmp_path), -1, 2**20)
    storage.put(b"data", "png")
    assert storage.sweep() == 1
    assert (tmp_path / "notes.txt").exists()


def test_old_results_in_memory_give_way():
    storage = Storage(MemoryFiles(max_bytes=100), 3600)
    names = [storage.put(bytes(40), "png") for _ in range(3)]
    assert [storage.get(name) is None for name in names] == [True, False, False]


def test_a_server_finds_its_results_after_a_restart(load, tmp_path):
    with client_of(load, storage=str(tmp_path)) as client:
        body = {"prompt": "a red apple"}
        url = client.post("/v1/images/generations", json=body).json()["data"][0]["url"]
    with client_of(load, storage=str(tmp_path)) as client:
        assert client.get(url).status_code == 200
