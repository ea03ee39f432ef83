"""Damage tar shards at random and compare the losses that are reported with the true ones.

python tests/faults/damaged_shards.py --shards 1000
"""

from __future__ import annotations

import argparse
import io
import random
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from unclip.data.shards import ShardDataset

BLOCK = tarfile.BLOCKSIZE
LAYOUTS = (("png", "txt"), ("jpg", "txt"), ("png", "json"), ("webp", "json", "txt"))
FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}


class Shard(NamedTuple):
    data: bytes
    headers: dict[tuple[str, str], int]  # (key, extension) -> offset

    @property
    def keys(self) -> set[str]:
        return {key for key, _ in self.headers}


def make_shard(rng: random.Random, prefix: str) -> Shard:
    """Return a shard of 4 to 20 samples of noise, with members in one of LAYOUTS."""
    layout, file = rng.choice(LAYOUTS), io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for i in range(rng.randint(4, 20)):
            for extension in layout:
                info = tarfile.TarInfo(f"{prefix}{i:03d}.{extension}")
                content = make_member(rng, extension)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    with tarfile.open(fileobj=io.BytesIO(file.getvalue())) as tar:
        headers = {(stem, kind): m.offset for m in tar for stem, kind in [m.name.split(".")]}
    return Shard(file.getvalue(), headers)


def make_member(rng: random.Random, extension: str) -> bytes:
    if extension in FORMATS:
        size, file = rng.randint(1, 40), io.BytesIO()
        pixels = rng.randbytes(3 * size * size)
        Image.frombytes("RGB", (size, size), pixels).save(file, FORMATS[extension])
        return file.getvalue()
    text = " ".join(["a square"] * rng.randint(1, 200))
    return f'{{"caption": "{text}"}}'.encode() if extension == "json" else text.encode()


def damage_headers(rng: random.Random, shard: Shard) -> tuple[bytearray, set[tuple[str, str]]]:
    """Damage some headers, often several in a row, and return the members that are lost.

    Some samples at the start or the end stay whole, to show which members a sample has.
    """
    data, lost = bytearray(shard.data), set()
    members = list(shard.headers)
    whole = 2 * sum(key == members[0][0] for key, _ in members)
    members = members[whole:] if rng.random() < 0.5 else members[:-whole]
    for _ in range(rng.randint(0, 3)):
        first = rng.randrange(len(members))
        for member in members[first : first + rng.choice((1, 1, 2, 3, 5))]:
            at = shard.headers[member]
            kind = rng.choice(("zeros", "noise", "one byte"))
            if kind == "zeros":
                data[at : at + BLOCK] = bytes(BLOCK)
            elif kind == "noise":
                data[at : at + BLOCK] = rng.randbytes(BLOCK)
            else:
                data[at + rng.randrange(100)] ^= 1 << rng.randrange(8)  # in the name
            try:
                tarfile.TarInfo.frombuf(data[at : at + BLOCK], "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                lost.add(member)
    return data, lost


def lost_samples(shard: Shard, lost: set[tuple[str, str]]) -> Counter[str]:
    """Return the keys of the samples without an image or without any caption."""
    keys = shard.keys
    left = {key: {e for k, e in shard.headers if k == key and (k, e) not in lost} for key in keys}
    usable = {k for k, e in left.items() if e & set(FORMATS) and e & {"txt", "json"}}
    return Counter(keys - usable)


def check_shard(rng: random.Random, path: Path) -> str:
    """Write a damaged shard, read it, compare the losses, and return the kind of damage."""
    kind = rng.choice(("headers", "images", "concatenated", "misaligned", "junk", "cut off"))
    shard = make_shard(rng, "a")
    data, members = damage_headers(rng, shard)
    lost = lost_samples(shard, members)
    keys = Counter(shard.keys)
    if kind == "images":
        for (key, extension), at in shard.headers.items():
            if extension in FORMATS and (key, extension) not in members and rng.random() < 0.1:
                data[at + BLOCK : at + BLOCK + 16] = bytes(16)
                lost[key] = 1
    elif kind in ("concatenated", "misaligned"):
        other = make_shard(rng, rng.choice("ab"))
        second, members = damage_headers(rng, other)
        lost += lost_samples(other, members)
        keys += Counter(other.keys)
        data += rng.randbytes(rng.randint(1, 2000)) if kind == "misaligned" else b""
        data += second
    elif kind == "junk":
        data += rng.randbytes(rng.randint(1, 20_000))
    elif kind == "cut off":
        last = max(shard.headers.values())
        del data[rng.randint(BLOCK, last + 2 * BLOCK) :]
        lost = keys
    path.write_bytes(data)
    try:
        dataset = ShardDataset(path)
    except ValueError as error:  # refused, and named
        assert str(path) in str(error) and (kind == "cut off" or lost == keys), (kind, error)
        return kind
    assert kind != "cut off", "a shard that is cut off was read"
    found, reasons = Counter(), list(dataset.broken)
    for index in range(len(dataset)):
        try:
            sample = dataset[index]
            sample.image  # noqa: B018
            found[sample.key] += 1
        except ValueError as error:
            reasons.append(str(error))
    assert found == keys - lost, (kind, found, keys - lost)
    assert len(reasons) == lost.total(), (kind, reasons, lost)
    assert all(str(path) in reason for reason in reasons), reasons
    return kind


def run(shards: int, seed: int = 0) -> Counter[str]:
    """Check damaged shards and return how many there were of each kind."""
    kinds: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(shards):
            rng = random.Random(f"{seed} {number}")
            try:
                kinds[check_shard(rng, Path(folder) / "a.tar")] += 1
            except AssertionError as error:
                raise AssertionError(f"shard {number} of seed {seed}: {error}") from None
    return kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.perf_counter()
    kinds = run(options.shards, options.seed)
    seconds = time.perf_counter() - started
    print(
        f"{options.shards} shards, losses counted = losses true in each, {seconds:.0f} s: {kinds}"
    )


if __name__ == "__main__":
    main()
