"""Read thousands of damaged and hostile files of every kind.

PYTHONPATH=.:tests python tests/faults/hostile_files.py --files 2000

Each file is a mutation of a valid one, or a bomb, and is read in a fork of this process. A reader
may accept it or refuse it with a ValueError or OSError of printable lines. Any other exception, a
crash, a started program, a connection, 80 MB more memory than the imports take (300 MB with torch),
or 1 s of CPU time is a failure.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import io
import json
import os
import pickle
import random
import resource
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from bombs import BOMBS
from conftest import tiny_decoder, tiny_prior
from PIL import Image

from unclip.checkpoints.states import read_state
from unclip.checkpoints.store import load_component, save_component
from unclip.checkpoints.summary import summary
from unclip.cli.main import main as cli
from unclip.config import load_config, to_dict
from unclip.data.precomputed import EmbeddingDataset
from unclip.data.shards import ShardDataset, ShardWriter
from unclip.diffusion.schedules import ScheduleConfig
from unclip.files import error_text
from unclip.image_io import encode_image, read_metadata
from unclip.models.unclip.decoder import DecoderConfig
from unclip.pipelines.provenance import encode_image as encode_source
from unclip.weights import read_tensors

MEMORY, SECONDS = 80 * 2**20, 1.0  # torch takes 220 MB
ACCEPTED, REFUSED, TRACEBACK, EXECUTED = range(4)
PICKLES = ("zip", "old", "module", "state")
BY_LINE = ("YAML", "JSON")  # a config has a line for each error
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "socket.")
TOKENS = [  # spliced into files of every kind
    *(bytes(8), b"\xff" * 8, b"\xff\xff\xff\x7f", b"\x80", b"\n", b"\x1b[31m", b"\0" * 512),
    *(b"[" * 2000, b'{"a":' * 2000, b"9" * 5000, b"1e999", b"NaN", b"-1", b"null", b"true"),
    *(b'"', b"\\ud800", b"\xed\xa0\x80", b"\xe2\x80\xae", b": *a", b"&a [*a]", b"!!int x"),
    *(b"!!python/object/apply:os.system [true]", b"cos\nsystem\n(X\x04\0\0\0truetR", b"r\xff" * 4),
    *(b"%!PS-Adobe-3.0 EPSF-3.0\n", b"PK\x03\x04", b"version https://git-lfs", b"../" * 20),
]


class Canary:
    """An object whose pickle calls a program."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("true",)


@dataclass(frozen=True)
class Kind:
    """One kind of file: valid files, their place in a folder, and the function that reads them."""

    name: str
    files: tuple[bytes, ...]
    place: str  # in the folder
    read: Callable[[Path], object]  # called with the folder
    command: tuple[str, ...] = ()  # of the command line, relative to the folder
    others: dict[str, bytes] = field(default_factory=dict)  # other files in the folder


def kinds() -> list[Kind]:
    """Make one or more valid files of each kind."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_component(tiny_prior(), folder / "prior", schedule=ScheduleConfig())
        prior = {path.name: path.read_bytes() for path in (folder / "prior").iterdir()}
        for file, is_zip in {"zip.pt": True, "old.pt": False}.items():
            content = {"a": torch.ones(5), "b": [Canary()]}
            torch.save(content, folder / file, _use_new_zipfile_serialization=is_zip)
        torch.save(torch.nn.Linear(3, 2), folder / "module.pt")
        torch.save(torch.nn.Linear(3, 2).state_dict(), folder / "state.pt")
        rows = [f"caption {i}" for i in range(50)]
        np.save(folder / "a.npy", np.ones((50, 4), np.float32), allow_pickle=False)
        table = {"caption": rows, "key": rows, "weight": [1.0] * 50}
        pyarrow.parquet.write_table(pyarrow.table(table), folder / "a.parquet")
        nested = {"caption": [["a"]] * 50, "key": [datetime.date(2020, 1, 1)] * 50}
        pyarrow.parquet.write_table(pyarrow.table(nested), folder / "b.parquet")
        with ShardWriter(folder, "a") as writer:
            for i in range(4):
                writer.write(f"s{i}", {"png": _png(), "json": {"caption": rows[i], "weight": 1}})
        read = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    config = to_dict(tiny_decoder().config)
    source = {"picture": encode_source(Image.new("RGB", (8, 8))), "inversion": {}}
    arrays, rows_file = "img_emb/img_emb_0.npy", "metadata/metadata_0.parquet"
    weights = prior.pop("model.safetensors")
    settings = prior.pop("config.json")
    return [
        Kind("safetensors", (weights,), "model.safetensors", _load, ("info", "."),
             {**prior, "config.json": settings}),
        Kind("pickle", (*(read[f"{x}.pt"] for x in PICKLES), pickle.dumps(Canary())),
             "model.pt", _read_pickle, ("info", "model.pt")),
        Kind("JSON", (settings,), "config.json", _load, ("info", "."),
             {**prior, "model.safetensors": weights}),
        Kind("YAML", (json.dumps(config, indent=1).encode(), b"a: &a {x: 1}\nunet: {<<: *a}\n"),
             "run.yaml", lambda folder: load_config(folder / "run.yaml", DecoderConfig)),
        Kind("npy", (read["a.npy"],), arrays, _read_embeddings, (), {rows_file: read["a.parquet"]}),
        Kind("parquet", (read["a.parquet"], read["b.parquet"]), rows_file, _read_embeddings, (),
             {arrays: read["a.npy"]}),
        Kind("image metadata",
             tuple(encode_image(Image.new("RGB", (8, 8)), kind, metadata=entry)
                   for kind in ("png", "jpeg", "webp")
                   for entry in ({"prompt": "a", "seed": 1}, [{"sources": [source]}])),
             "a.png", _read_metadata, ("info", "a.png")),
        Kind("tar", (read["a-00000.tar"],), "a.tar", _read_tar),
    ]  # fmt: skip


def _png() -> bytes:
    return encode_image(Image.effect_noise((16, 16), 50))


def _all(*calls: Callable[[], object]) -> None:
    """Make all calls; raise the first refusal at the end, and other exceptions at once."""
    refusals = []
    for call in calls:
        try:
            call()
        except (ValueError, OSError) as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


def _load(folder: Path) -> None:
    file = folder / "model.safetensors"
    _all(lambda: read_tensors(file), lambda: summary(folder), lambda: load_component(folder))


def _read_pickle(folder: Path) -> None:
    _all(lambda: read_state(folder / "model.pt"), lambda: summary(folder / "model.pt"))


def _read_embeddings(folder: Path) -> None:
    EmbeddingDataset(folder).batch([0, 1])


def _read_metadata(folder: Path) -> None:
    cli(["info", str(folder / "a.png")])
    read_metadata(folder / "a.png")


def _read_tar(folder: Path) -> None:
    dataset = ShardDataset(folder / "a.tar")
    for i in range(len(dataset)):
        _ = dataset[i].image


def mutate(data: bytes, random: random.Random) -> bytes:
    """Return a copy with one to four changes."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(changed) + 1)
        if random.random() < 0.5:  # headers are at the start
            at = min(at, random.randrange(300))
        length = random.choice((1, 1, 2, 4, 8, 64, 512))
        match random.randrange(7):
            case 0:
                del changed[at:]
            case 1:
                del changed[at : at + length]
            case 2:
                changed[at:at] = random.choice(TOKENS)
            case 3:
                changed[at : at + length] = random.randbytes(length)
            case 4:
                token = random.choice(TOKENS)
                changed[at : at + len(token)] = token
            case 5:
                changed[at:at] = changed[at : at + length] * random.choice((1, 10, 1000))
            case 6:
                if at < len(changed):
                    changed[at] ^= 1 << random.randrange(8)
    return bytes(changed)


@dataclass
class Outcome:
    """Results of reading the files of one kind."""

    files: int = 0
    counts: Counter[int] = field(default_factory=Counter)  # by exit code of the process
    memory: int = 0  # bytes, the maximum of one process, without the imports
    seconds: float = 0.0  # of CPU time, the maximum
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        accepted, refused = self.counts[ACCEPTED], self.counts[REFUSED]
        return (
            f"{self.files} files, {refused} refused, {accepted} accepted, {len(self.faults)} "
            f"faults; at most {self.seconds:.2f} s and {self.memory / 2**20:.0f} MB"
        )


def read_in_fork(kind: Kind, folder: Path) -> tuple[int, str, float, int]:
    """Return the exit code, message, CPU seconds and memory of reading the file in a folder."""
    reader, writer = os.pipe()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    gc.freeze()  # else a garbage collection in the fork copies the memory of this process
    if not (process := os.fork()):
        code, message = TRACEBACK, "?"
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
            sys.addaudithook(_forbid)
            sys.stdout = sys.stderr = io.StringIO()
            code, message = _outcome(kind, folder)
        finally:
            os.write(writer, message.encode(errors="backslashreplace")[-4000:])
            os._exit(code)
    os.close(writer)
    _, status, usage = os.wait4(process, 0)
    with open(reader, "rb") as pipe:
        message = pipe.read().decode()
    code = os.waitstatus_to_exitcode(status)
    return code, message, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 - before


def _forbid(event: str, arguments: tuple[object, ...]) -> None:
    if event.startswith(FORBIDDEN):
        os._exit(EXECUTED)


def _outcome(kind: Kind, folder: Path) -> tuple[int, str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind.read(folder)
    except (ValueError, OSError) as error:
        lines = str(error).replace(str(folder), "")
        if lines != error_text(lines) or ("\n" in lines and kind.name not in BY_LINE):
            return TRACEBACK, f"not printable: {lines!r}"
        return REFUSED, lines
    except BaseException:
        return TRACEBACK, traceback.format_exc()
    return ACCEPTED, ""


def hostile_files(kind: Kind, files: int, seed: int) -> Iterator[bytes]:
    """Yield bombs, for pickles, and mutations."""
    bombs = list(BOMBS.values()) if kind.name == "pickle" else []
    yield from bombs[:files]
    generator = random.Random(f"{seed} {kind.name}")
    for _ in range(files - len(bombs)):
        yield mutate(generator.choice(kind.files), generator)


def examine(kind: Kind, files: int, folder: Path, seed: int = 0, limit: float = SECONDS) -> Outcome:
    """Read mutations of one kind; `folder` is a new one, `limit` in CPU seconds."""
    outcome = Outcome()
    for place, content in kind.others.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(content)
    file = folder / kind.place
    file.parent.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(hostile_files(kind, files, seed)):
        file.write_bytes(content)
        code, message, seconds, memory = read_in_fork(kind, folder)
        outcome.files += 1
        outcome.counts[code] += 1
        outcome.seconds = max(outcome.seconds, seconds)
        outcome.memory = max(outcome.memory, memory)
        if code not in (ACCEPTED, REFUSED):
            outcome.faults.append(f"file {number}: exit code {code}: {message}")
        elif seconds > limit or memory > MEMORY:
            outcome.faults.append(f"file {number}: {seconds:.2f} s, {memory / 2**20:.0f} MB")
    return outcome


def run_command(kind: Kind, content: bytes, folder: Path) -> str:
    """Run `unclip` on a file; return what is wrong with its result, or ""."""
    (folder / kind.place).write_bytes(content)
    command = [sys.executable, "-m", "unclip", *kind.command]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    is_line = done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    if done.returncode == 0 or (done.returncode == 2 and is_line):
        return ""
    return f"{kind.name}: exit code {done.returncode}: {done.stderr[-2000:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--commands", type=int, default=5, help="of the command line, per kind")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    faults, every = [], kinds()
    for i, kind in enumerate(every):
        share = args.files * (i + 1) // len(every) - args.files * i // len(every)
        with tempfile.TemporaryDirectory() as name:
            outcome = examine(kind, share, Path(name), args.seed)
            print(f"{kind.name}: {outcome}", flush=True)
            faults += [f"{kind.name}: {fault}" for fault in outcome.faults]
            if kind.command:
                contents = list(hostile_files(kind, 40, args.seed))[-args.commands :]
                faults += filter(None, (run_command(kind, x, Path(name)) for x in contents))
                print(f"{kind.name}: {len(contents)} runs of unclip {' '.join(kind.command)}")
    print("\n".join(faults) or "no faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
