import io
import multiprocessing
import os
import signal
import time
from collections import Counter
from dataclasses import replace
from itertools import chain, repeat

import numpy as np
import pytest
import torch
from PIL import Image

from unclip.data.augment import Augment, crop, shift_and_scale
from unclip.data.loader import DataConfig, ImageReader, Loader, open_dataset
from unclip.data.order import EpochOrder
from unclip.data.shards import ShardWriter


def encoded(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_shard(folder, count=22, broken=(), weights=None):
    """Write images of noise with three captions each."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder, "train", samples_per_shard=10) as writer:
        for i in range(count):
            image = encoded(Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)))
            meta = {
                "captions": [f"c{i} {n}" for n in range(3)],
                "weight": weights[i] if weights else 1,
            }
            writer.write(f"k{i}", {"png": b"damaged" if i in broken else image, "json": meta})
    return str(folder)


@pytest.fixture
def config(tmp_path):
    return DataConfig(write_shard(tmp_path / "data"), image_size=8, batch_size=4, seed=3)


def same(a, b):
    return (
        a["caption"] == b["caption"]
        and a["key"] == b["key"]
        and torch.equal(a["image"], b["image"])
    )


def forever(loader):
    """Iterate over epochs without end."""
    return chain.from_iterable(repeat(loader))


def take(loader, n):
    return [batch for _, batch in zip(range(n), forever(loader), strict=False)]


def test_an_epoch_has_each_sample_once(config):
    loader = Loader(replace(config, batch_size=2))
    batches = list(loader)
    assert len(batches) == len(loader) == 11
    keys = [key for batch in batches for key in batch["key"]]
    assert sorted(keys) == sorted(f"k{i}" for i in range(22))
    image = batches[0]["image"]
    assert image.shape == (2, 3, 8, 8) and image.dtype == torch.float32 and image.is_contiguous()
    assert -1 <= image.min() < -0.5 and 0.5 < image.max() <= 1
    next_epoch = [key for batch in loader for key in batch["key"]]
    assert next_epoch != keys


def test_pixels_equal_the_file(config):
    loader = Loader(replace(config, image_size=12))
    batch = next(iter(loader))
    index = int(batch["key"][0][1:])
    expected = np.asarray(loader.dataset[index].image).transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(batch["image"][0].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("returned", [0, 3, 5, 7])
@pytest.mark.parametrize("cache", [False, True])
def test_a_resumed_loader_continues_exactly(config, returned, cache):
    config = replace(config, cache=cache, augment=Augment(0.2, 0.2), crop=6)
    whole = take(Loader(config), 12)  # 5 batches per epoch: into the third epoch
    loader = Loader(config)
    take(loader, returned)
    resumed = Loader(config)
    resumed.load_state_dict(loader.state_dict())
    assert all(map(same, take(resumed, 12 - returned), whole[returned:]))


def test_the_state_counts_returned_batches(config):
    loader = Loader(config)
    positions = [loader.state_dict()]
    for _ in loader:
        positions.append(loader.state_dict())
    assert positions == [{"epoch": 0, "batch": n} for n in range(5)] + [{"epoch": 1, "batch": 0}]
    with pytest.raises(ValueError, match="batch 5, but an epoch has 5 batches"):
        loader.load_state_dict({"epoch": 0, "batch": 5})


def test_workers_return_the_same_batches(config, tmp_path):
    config = replace(
        config,
        augment=Augment(0.1, 0.1),
        path=write_shard(tmp_path / "b", broken=(4,)),
        max_broken=0.1,
    )
    with pytest.warns(UserWarning, match="k4"):
        expected = take(Loader(config), 7)
    before = torch.get_rng_state()
    loader = Loader(replace(config, workers=2))
    stream = forever(loader)
    with pytest.warns(UserWarning, match="k4"):
        batches = [next(stream) for _ in range(7)]
    assert all(map(same, batches, expected)) and list(loader.broken) == [4]
    assert loader.state_dict() == {
        "epoch": 1,
        "batch": 2,
    }  # without the batches that workers have prefetched
    assert torch.equal(torch.get_rng_state(), before)
    resumed = Loader(replace(config, workers=1))
    resumed.load_state_dict({"epoch": 0, "batch": 3})
    with pytest.warns(UserWarning, match="k4"):
        assert all(map(same, take(resumed, 4), expected[3:]))


def test_cached_images_are_equal(config, monkeypatch):
    cached = Loader(replace(config, cache=True))
    assert all(map(same, take(cached, 30), take(Loader(config), 30)))
    monkeypatch.setattr(type(cached.dataset), "__getitem__", lambda *_: pytest.fail("read again"))
    assert len(take(cached, 5)) == 5


def test_processes_split_the_batches(config):
    whole = take(Loader(replace(config, batch_size=6)), 4)
    parts = [
        take(Loader(replace(config, batch_size=2), num_processes=3, process_index=i), 4)
        for i in range(3)
    ]
    for n, batch in enumerate(whole):
        for i in range(3):
            assert (
                parts[i][n]["key"] == batch["key"][i::3]
                and parts[i][n]["caption"] == batch["caption"][i::3]
            )
            assert torch.equal(parts[i][n]["image"], batch["image"][i::3])


def test_the_process_index_is_read_from_the_environment(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    explicit = Loader(config, num_processes=2, process_index=1)
    assert same(next(iter(Loader(config))), next(iter(explicit)))


def test_captions_are_canonical_or_any(config):
    canonical = [
        c
        for batch in take(Loader(replace(config, captions="canonical")), 20)
        for c in batch["caption"]
    ]
    assert {caption[-1] for caption in canonical} == {"0"}
    counts = Counter(c[-1] for batch in take(Loader(config), 100) for c in batch["caption"])
    assert set(counts) == set("012") and min(counts.values()) > 90  # of 400, 133 expected
    assert len(list(Loader(config).captions())) == 66
    assert len(list(Loader(replace(config, captions="canonical")).captions())) == 22


def test_weights_are_expected_counts(tmp_path):
    weights = [0.2] * 10 + [1.0] * 5 + [2.5] * 4 + [0.0]
    config = DataConfig(
        write_shard(tmp_path / "data", 20, weights=weights), image_size=8, batch_size=17
    )
    loader = Loader(config)
    assert len(loader) == 1  # 2 + 5 + 10 samples
    counts = Counter(key for batch in take(loader, 200) for key in batch["key"])
    for i, weight in enumerate(weights):
        expected = 200 * weight
        assert (
            abs(counts[f"k{i}"] - expected)
            <= 4 * np.sqrt(200 * (weight % 1) * (1 - weight % 1)) + 1e-9
        )
    unweighted = Loader(replace(config, weighted=False, batch_size=20))
    assert len(set(next(iter(unweighted))["key"])) == 20


def test_epochs_have_equal_length_and_integer_weights_are_exact():
    order = EpochOrder(np.array([0.3, 1.0, 0.3, 2.0, 0.7]), seed=0)
    for epoch in range(50):
        counts = Counter(order(epoch).tolist())
        assert len(order(epoch)) == len(order) == 4
        assert counts[3] in (1, 2) and max(counts[i] for i in (0, 1, 2, 4)) <= 1
    assert not np.array_equal(EpochOrder(np.ones(50), 0)(0), EpochOrder(np.ones(50), 1)(0))
    assert sorted(EpochOrder(np.ones(1000), 5)(7)) == list(range(1000))


def test_few_samples_make_one_smaller_batch(config):
    loader = Loader(replace(config, batch_size=100))
    assert len(loader) == 1 and next(iter(loader))["image"].shape[0] == 22
    with pytest.raises(ValueError, match="22 samples per epoch for 30 processes"):
        Loader(config, num_processes=30, process_index=0)


def test_a_broken_image_is_replaced_counted_and_reported(tmp_path):
    path = write_shard(tmp_path / "data", 120, broken=(7,))
    loader = Loader(DataConfig(path, image_size=8, batch_size=120))
    with pytest.warns(UserWarning, match="k7: the image: not a readable image") as warned:
        batches = take(loader, 3)
    assert len(warned) == 1 and list(loader.broken) == [7]
    for batch in batches:
        assert (
            len(batch["image"]) == 120
            and "k7" not in batch["key"]
            and len(set(batch["key"])) == 119
        )


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_images_are_an_error(tmp_path, workers):
    path = write_shard(tmp_path / "data", 120, broken=(3, 9))
    loader = Loader(DataConfig(path, image_size=8, batch_size=120, workers=workers))
    with pytest.raises(
        ValueError,
        match=r"2 broken images, more than max_broken = 1\.0% of 120: .*tar: k\d: .*tar: k\d",
    ):
        with pytest.warns(UserWarning, match="broken"):
            next(iter(loader))
    nothing = write_shard(tmp_path / "nothing", 4, broken=range(4))
    with pytest.raises(ValueError, match="broken images, more than max_broken"):
        with pytest.warns(UserWarning, match="broken"):
            config = DataConfig(nothing, 8, batch_size=2, workers=workers, max_broken=0.9)
            next(iter(Loader(config)))


def test_shift_and_scale_preserve_the_content_on_white():
    image = np.random.default_rng(0).integers(0, 255, (10, 10, 3), dtype=np.uint8)
    still = shift_and_scale(image, Augment(0.2, 0.0), np.array([0.9, 0.5, 0.5]))
    assert np.array_equal(still, image)
    # 2 pixels to the right, 2 up
    moved = shift_and_scale(image, Augment(0.2, 0.0), np.array([0.5, 0.999, 0.0]))
    assert np.array_equal(moved[:8, 2:], image[2:, :8])
    assert (moved[8:] == 255).all() and (moved[:, :2] == 255).all()
    smaller = shift_and_scale(
        np.zeros((10, 10, 3), np.uint8), Augment(0.0, 0.2), np.array([0.0, 0.5, 0.5])
    )
    assert (smaller[1:9, 1:9] == 0).all() and smaller.sum() == 255 * 3 * (100 - 64)
    larger = shift_and_scale(
        np.zeros((10, 10, 3), np.uint8), Augment(0.0, 0.2), np.array([0.999, 0.5, 0.5])
    )
    assert (larger == 0).all()


def test_crops_cover_the_image(config):
    image = np.arange(64).reshape(8, 8, 1).repeat(3, axis=2)
    corners = {
        tuple(crop(image, 6, np.array([x, y]))[0, 0])
        for x in (0, 0.4, 0.999)
        for y in (0, 0.4, 0.999)
    }
    assert len(corners) == 9 and (18, 18, 18) in corners
    assert next(iter(Loader(replace(config, crop=5))))["image"].shape == (4, 3, 5, 5)


def test_open_dataset_recognises_the_layout(tmp_path, config):
    shards = config.path
    assert {
        type(open_dataset(path)).__name__
        for path in (shards, f"{shards}/*.tar", f"{shards}/train-00000.tar")
    } == {"ShardDataset"}
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "table.csv").write_text("file_name,text\na.png,a fox\n")
    for path in (tmp_path, tmp_path / "table.csv"):
        assert open_dataset(path)[0].captions == ["a fox"]
    with pytest.raises(FileNotFoundError, match="no data at .*nowhere"):
        open_dataset(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"crop": 9}, "crop is 9; expected at most image_size, 8"),
        ({"max_broken": 1.0}, "max_broken"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_invalid_settings_are_rejected(config, change, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **change)
    with pytest.raises(ValueError, match="shift is 1"):
        Augment(shift=1.0)


def test_a_cache_larger_than_memory_is_rejected(config):
    with pytest.raises(ValueError, match="caching needs .* GiB, the machine has"):
        Loader(replace(config, image_size=2**20, cache=True))


@pytest.mark.skipif(not hasattr(os, "getpgid"), reason="Windows has no process groups")
def test_ctrl_c_does_not_reach_the_workers(config):
    """Ctrl-C signals the terminal's process group, but a training needs its workers to finish."""
    batches = iter(Loader(replace(config, workers=1)))
    next(batches)
    workers = multiprocessing.active_children()
    assert workers and all(os.getpgid(worker.pid) != os.getpgrp() for worker in workers)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("during", ["the step", "loading"])
def test_a_killed_worker_is_one_error_at_the_next_batch(config, during, monkeypatch):
    read = ImageReader.__getitem__

    def kill_first(reader, index):
        if multiprocessing.parent_process():
            os.kill(os.getpid(), signal.SIGKILL)
        return read(reader, index)

    if during == "loading":
        monkeypatch.setattr(ImageReader, "__getitem__", kill_first)
    before, batches = signal.getsignal(signal.SIGCHLD), iter(Loader(replace(config, workers=2)))
    if during == "the step":
        next(batches)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(0.5)  # the training step, which the death of the worker does not interrupt
    with pytest.raises(ChildProcessError, match=r"worker was killed \(signal 9\).*data.workers"):
        list(batches)
    assert signal.getsignal(signal.SIGCHLD) is before
