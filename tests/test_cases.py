"""`unclip` and the training scripts on inputs that once failed, one folder each.

`expect.txt` in a folder describes the expected result; a test of the same name checks it. The tests
are skipped if there are no such folders.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_clip
from scripts import ROOT, run_script, write_shape_images

from unclip.cli.main import main as unclip_cli
from unclip.config import load_config
from unclip.data import check
from unclip.data.loader import DataConfig, open_dataset
from unclip.training.initialization import load_weights

CASES = ROOT.parent / "shared" / "cases"
FOLDERS = sorted(path.name for path in CASES.glob("*/")) if CASES.is_dir() else []
MEMORY = 300 * 2**20  # bytes
pytestmark = pytest.mark.skipif(not FOLDERS, reason="there is no folder of cases")


@contextlib.contextmanager
def within(seconds: float | None = None) -> Iterator[None]:
    """Fail if the block needs more than 300 MB of address space, or more CPU time."""
    try:
        import resource
    except ImportError:  # not available on every system
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    status = Path("/proc/self/statm")  # pages
    used = int(status.read_text().split()[0]) * resource.getpagesize() if status.exists() else None
    started = time.process_time()
    if used is not None:
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert seconds is None or time.process_time() - started < seconds


def assert_one_line(message: str, *words: str) -> None:
    """Assert that an error is one line that contains the words."""
    message = message.strip()
    assert "Traceback" not in message and "\n" not in message, message
    for word in words:
        assert word in message, message


def check_data(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """Run the report on data and return its lines."""
    check.main([*arguments, "--decode"])
    return capsys.readouterr().out.splitlines()


def refused(call: Callable[[], object]) -> str:
    """Return the message of a ValueError or of an exit with an error."""
    with within(), pytest.raises((ValueError, OSError, SystemExit)) as raised:
        call()
    return str(raised.value)


def train(name: str, *arguments: str) -> str | None:
    """Run a training script on a tiny config; return its error."""
    config = ROOT / f"configs/tiny/{name}.yaml"
    settings = ("fit.val_every=0", "fit.preview_every=0", "val_data=null", "fit.steps=3")
    options = [f"--set={setting}" for setting in (*settings, *arguments)]
    try:
        run_script(ROOT / f"train/{name}.py", "--config", str(config), *options)
    except SystemExit as error:
        return str(error)
    return None


@pytest.fixture
def trained_clip(tmp_path, monkeypatch):
    """Save a random CLIP for the tiny configs, in the working directory."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tiny_clip().eval().save_pretrained("clip")
    return "clip"


def cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command line, which must fail, and return its error."""
    with within():
        assert unclip_cli(list(arguments)) == 2
    return capsys.readouterr().err


# -- data


@pytest.mark.parametrize(
    ("case", "source", "first"),
    [
        ("hidden_files", "data", "3 samples with 3 captions, 0 broken"),
        ("caption_lines", "data", "1 samples with 3 captions, 0 broken"),
        ("dropped_members", "data", "4 samples with 4 captions, 0 broken"),
        ("dropped_members", "data.tar", "4 samples with 4 captions, 0 broken"),
        ("odd_folder_name", "my {old} pictures", "2 samples with 2 captions, 0 broken"),
        ("odd_folder_name", "what?", "2 samples with 2 captions, 0 broken"),
        ("odd_folder_name", "set [1]", "2 samples with 2 captions, 0 broken"),
        ("windows_csv", "data", "2 samples with 2 captions, 0 broken"),
        ("concatenated_tar", "data.tar", "4 samples with 4 captions, 0 broken"),
    ],
)
def test_data_is_read(case, source, first, capsys):
    lines = check_data(capsys, str(CASES / case / source))
    assert lines == [f"{CASES / case / source}: {first}"]


@pytest.mark.parametrize(
    ("case", "source", "first", "broken"),
    [
        ("surrogate_caption", "data", "8 samples with 8 captions, 1 broken", ["jsonl: line 5:"]),
        ("null_caption", "embeddings", "998 samples, 2 broken", ["row 500:", "row 700:"]),
        ("zeroed_header", "data.tar", "9 samples with 9 captions, 1 broken", ["tar: s2: no image"]),
    ],
)
def test_broken_samples_are_counted_and_named(case, source, first, broken, capsys):
    path = CASES / case / source
    head, *lines = check_data(capsys, str(path))
    assert head == f"{path}: {first}" and len(lines) == len(broken)
    assert all(word in line for word, line in zip(broken, lines, strict=True))


def test_other_columns(capsys):
    path = str(CASES / "other_columns/train.tsv")
    lines = check_data(capsys, path, "--image", "filepath", "--caption", "title")
    assert lines == [f"{path}: 2 samples with 2 captions, 0 broken"]
    assert_one_line(refused(lambda: check.main([path])), "filepath", "title", "data.columns")


def test_weights():
    message = refused(lambda: open_dataset(CASES / "weights/data"))
    assert_one_line(message, "weight is 1000000000.0", "weight is 1e+300", "weight is 9999")


def test_sparse_tar():
    assert_one_line(refused(lambda: open_dataset(CASES / "sparse_tar/sparse.tar")), "sparse")


def test_long_captions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="48 of 48 captions are longer than 14 tokens") as caught:
        assert train("clip", f"data.path={CASES}/long_captions/data") is None
    assert sum("captions" in str(warning.message) for warning in caught) == 1


def test_huge_word(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = time.process_time()
    with pytest.warns(UserWarning, match="2 of 2 captions"):
        assert train("clip", f"data.path={CASES}/huge_word/data", "fit.steps=1") is None
    assert time.process_time() - started < 10  # a training step included


def test_one_picture(trained_clip):
    data = f"data.path={CASES}/one_picture/data"
    assert_one_line(train("clip", data) or "", "a batch has 1 image", "at least 2")
    model = ("model.emb_dim=16", "model.text_width=24", "model.context_length=24")
    error = train("prior", data, f"clip={trained_clip}", *model)
    assert_one_line(error or "", "at least two different images")


def test_unit_embeddings(trained_clip, tmp_path):
    model = ("model.emb_dim=16", "model.text_width=24", "model.context_length=24")
    shutil.copytree(CASES / "unit_embeddings/embeddings", tmp_path / "emb")
    for name in ("img_emb", "text_emb"):  # of the width of the tiny CLIP
        array = np.load(tmp_path / f"emb/{name}/{name}_0.npy", allow_pickle=False)[:, :16]
        array = (array / np.linalg.norm(array, axis=1, keepdims=True)).astype(np.float16)
        np.save(tmp_path / f"emb/{name}/{name}_0.npy", array, allow_pickle=False)
    error = train("prior", "data.path=emb", f"clip={trained_clip}", *model)
    assert_one_line(error or "", "text embeddings of another CLIP")


# -- images


@pytest.mark.parametrize(
    ("case", "file"), [("postscript_png", "evil.png"), ("grey16_bomb", "bomb.png")]
)
def test_images_are_refused(case, file, capsys, tmp_path):
    path = str(CASES / case / file)
    assert_one_line(cli(capsys, "info", path), file)
    shutil.copy(path, tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a caption")
    with within():
        lines = check_data(capsys, str(tmp_path))
    assert lines[0].endswith("0 samples, 1 broken") and len(lines) == 2


# -- weights, configs and run folders


@pytest.mark.parametrize(
    ("case", "files", "words"),
    [
        ("lfs_pointer", "*.safetensors", ["Git LFS"]),
        ("safetensors_headers", "*.safetensors", []),
        ("memo_bomb", "*.pt", []),
    ],
)
def test_weights_are_refused(case, files, words, capsys):
    for path in sorted((CASES / case).glob(files)):
        assert_one_line(cli(capsys, "info", str(path)), path.name, *words)
        message = refused(lambda path=path: load_weights(torch.nn.Linear(1, 1), path))
        assert_one_line(message, path.name, *words)


def test_configs(capsys):
    for path in sorted((CASES / "configs").glob("*.yaml")):
        with within(seconds=1):
            message = refused(lambda path=path: load_config(path, DataConfig))
        assert_one_line(message, path.name)


@pytest.mark.parametrize(
    ("case", "file"),
    [
        ("state_list.json", "checkpoints/step-0000003/state.json"),
        ("state_empty.json", "checkpoints/step-0000003/state.json"),
        ("rng_number.json", "checkpoints/step-0000003/rng-0.json"),
        ("metrics_number.jsonl", "metrics.jsonl"),
    ],
)
def test_run_folders(case, file, run_folder):
    target = run_folder / file
    assert target.is_file()
    shutil.copy(CASES / "run_folders" / case, target)
    config = str(ROOT / "configs/tiny/codec.yaml")
    settings = ("val_data=null", "perceptual=null", "adversarial=null", "fit.steps=4")
    options = [f"--set={setting}" for setting in settings]
    try:
        run_script(ROOT / "train/codec.py", "--config", config, "--resume", "latest", *options)
    except SystemExit as error:
        assert_one_line(str(error), target.name)
    else:
        assert (run_folder / "checkpoints/step-0000004").is_dir()


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """Train a codec for three steps, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("run")
    write_shape_images(folder / "data/tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train("codec", "perceptual=null", "adversarial=null", "fit.save_every=1") is None
    return folder


@pytest.fixture
def run_folder(finished_run, tmp_path, monkeypatch):
    """Return a copy of the run, in the working directory."""
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("runs/tiny/codec")


def test_every_case_has_a_test():
    """A new folder of cases must be checked here."""
    text = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in FOLDERS if f"{name}" not in text] == []
