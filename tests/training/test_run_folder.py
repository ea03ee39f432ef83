"""The run folder: damaged checkpoints, locks, metrics after a resume, requests to stop."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import (
    OPTIM,
    TinyLoader,
    checkpoint_tensors,
    denoising_loss,
    fit_config,
    run_fit,
    tiny_model,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from scripts import ROOT
from torch import nn

from unclip.training.fit import fit
from unclip.training.launch import Run
from unclip.training.lock import check_unlocked, locked

CASES = ROOT.parent / "shared/cases/run_folders"


def same(one: Path, other: Path, step: int) -> bool:
    first, second = checkpoint_tensors(one, step), checkpoint_tensors(other, step)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)


def state_is_a_list(file: Path) -> None:
    file.with_name("manifest.json").unlink()  # as in a checkpoint of an older version
    file.write_text("[]")


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("optimizer.safetensors", truncate, "optimizer.safetensors has "),
        ("model.safetensors", flip, "model.safetensors differs from its hash"),
        ("rng-0.json", Path.unlink, "rng-0.json is missing"),
        ("manifest.json", truncate, "manifest.json is not valid JSON"),
        ("state.json", state_is_a_list, "state.json holds a list"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_a_damaged_checkpoint_is_skipped(
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    name: str,
    damage: Callable[[Path], None],
    reason: str,
) -> None:
    config = fit_config(tmp_path / "run", 4, save_every=1)
    run_fit(config)
    newest = tmp_path / "run/checkpoints/step-0000004"
    damage(newest / name)
    run_fit(config, start={"resume": "latest"})
    output = capsys.readouterr().out
    assert f"step-0000004 is damaged: {reason}" in output
    assert "resuming from " in output and "step-0000003, the newest whole" in output
    run_fit(fit_config(tmp_path / "whole", 4))
    assert same(tmp_path / "run", tmp_path / "whole", 4)
    assert (newest.parent / "damaged-step-0000004").is_dir()


def test_without_a_whole_checkpoint_the_error_says_how_to_go_on(tmp_path: Path) -> None:
    config = fit_config(tmp_path, 2)
    run_fit(config)
    newest = tmp_path / "checkpoints/step-0000002"
    truncate(newest / "model.safetensors")
    with pytest.raises(ValueError, match=r"step-0000002 is damaged: model.*--resume latest skips"):
        run_fit(config, start={"resume": str(newest)})
    with pytest.raises(
        ValueError, match=r"every checkpoint .* is damaged \(step-0000002: .*--init"
    ):
        run_fit(config, start={"resume": "latest"})


@pytest.mark.skipif(not CASES.is_dir(), reason="needs the shared cases")
@pytest.mark.parametrize("case", ["rng_number.json", "state_empty.json", "state_list.json"])
def test_files_of_another_shape_are_reported_in_one_line(tmp_path: Path, case: str) -> None:
    config = fit_config(tmp_path, 2)
    run_fit(config)
    newest = tmp_path / "checkpoints/step-0000002"
    (newest / "manifest.json").unlink()
    name = "rng-0.json" if case.startswith("rng") else "state.json"
    (newest / name).write_bytes((CASES / case).read_bytes())
    with pytest.raises((ValueError, OSError)) as error:
        run_fit(replace(config, steps=3), start={"resume": "latest"})
    assert "\n" not in str(error.value) and name in str(error.value)


def test_damaged_metrics_are_dropped(tmp_path: Path) -> None:
    config = fit_config(tmp_path, 4, log_every=1, save_every=2)
    run_fit(replace(config, steps=2))
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'5\n{"loss": 1}\n\xff\n' + file.read_bytes() + b'{"step": 2, "lo')
    run_fit(config, start={"resume": "latest"})
    assert [json.loads(row)["step"] for row in file.read_text().splitlines()] == [1, 2, 3, 4]


def test_an_average_of_another_shape_is_refused(tmp_path: Path) -> None:
    run_fit(fit_config(tmp_path, 2))
    file = tmp_path / "checkpoints/step-0000002/ema.safetensors"
    (file.parent / "manifest.json").unlink()
    tensors = load_file(file)
    save_file({**tensors, "0.bias": torch.ones(1)}, file)  # would be broadcast
    with pytest.raises(ValueError, match=r"ema\.safetensors: 0\.bias is \(1,\), expected \(8,\)"):
        run_fit(fit_config(tmp_path, 3), start={"resume": "latest"})


def metrics(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("hours", "samples_per_s")} for r in rows]


def interrupting(at: int, action: Callable[[], None]) -> Callable:
    """Return a loss that calls `action` at a batch."""
    calls = []

    def loss_fn(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        calls.append(batch)
        if len(calls) == at:
            action()
        return denoising_loss(model, batch)

    return loss_fn


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("at", [4, 7], ids=["between_reports", "in_validation"])
def test_metrics_of_an_interrupted_run_equal_those_of_an_uninterrupted_one(
    tmp_path: Path, at: int
) -> None:
    """Reports cover three updates; validation takes two batches after the sixth update."""
    settings = {"log_every": 3, "val_every": 6}
    config = fit_config(tmp_path / "run", 9, **settings)
    with pytest.raises(SystemExit):
        run_fit(config, interrupting(at, terminate), val_loader=TinyLoader(2))
    step = 4 if at == 4 else 6
    assert (tmp_path / f"run/checkpoints/step-000000{step}").is_dir()
    assert not any("val_loss" in row for row in metrics(tmp_path / "run"))
    run_fit(config, start={"resume": "latest"}, val_loader=TinyLoader(2))
    run_fit(fit_config(tmp_path / "whole", 9, **settings), val_loader=TinyLoader(2))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert same(tmp_path / "run", tmp_path / "whole", 9)


def test_a_validation_skipped_at_the_last_step_is_done_by_the_resumed_run(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    settings = {"log_every": 1, "val_every": 2}
    config = fit_config(tmp_path / "run", 2, **settings)
    with pytest.raises(SystemExit) as stop:
        run_fit(config, interrupting(3, terminate), val_loader=TinyLoader(2))
    assert stop.value.code == 0
    assert "stopped after step 2; to resume: " in capsys.readouterr().out
    state = tmp_path / "run/checkpoints/step-0000002/state.json"
    assert json.loads(state.read_text())["pending"] == ["validation"]
    run_fit(config, start={"resume": "latest"}, val_loader=TinyLoader(2))
    assert "nothing to train" not in capsys.readouterr().out
    assert json.loads(state.read_text())["pending"] == []
    run_fit(fit_config(tmp_path / "whole", 2, **settings), val_loader=TinyLoader(2))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert same(tmp_path / "run", tmp_path / "whole", 2)


def test_a_validation_that_is_repeated_twice_has_one_row(tmp_path: Path) -> None:
    def preview(model: nn.Module) -> Image.Image:
        raise RuntimeError("power cut")

    settings = {"log_every": 1, "val_every": 1}
    config = fit_config(tmp_path / "run", 3, preview_every=2, **settings)
    options: dict[str, Any] = {"val_loader": TinyLoader(2), "preview": preview}
    with pytest.raises(SystemExit):  # in the validation of step 2
        run_fit(config, interrupting(5, terminate), **options)
    with pytest.raises(RuntimeError, match="power cut"):  # after that validation
        run_fit(config, start={"resume": "latest"}, **options)
    assert "val_loss" in metrics(tmp_path / "run")[-1]
    run_fit(config, start={"resume": "latest"}, val_loader=TinyLoader(2))
    run_fit(fit_config(tmp_path / "whole", 3, **settings), val_loader=TinyLoader(2))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_a_signal_interrupts_a_preview_which_the_resumed_run_makes(tmp_path: Path) -> None:
    previews = []

    def preview(model: nn.Module) -> Image.Image:
        previews.append(model.training)
        if len(previews) == 1:
            terminate()
            raise AssertionError("not reached")
        return Image.new("RGB", (8, 8))

    config = fit_config(tmp_path, 4, preview_every=2)
    with pytest.raises(SystemExit):
        run_fit(config, preview=preview)
    assert not (tmp_path / "previews").exists()
    run_fit(config, preview=preview, start={"resume": "latest"})
    names = sorted(file.name for file in (tmp_path / "previews").iterdir())
    assert names == ["step-0000002.png", "step-0000004.png"]


def test_a_time_limit_saves_and_exits_0(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        run_fit(fit_config(tmp_path, 4, max_hours=1e-9))
    assert stop.value.code == 0
    assert "stopped after step 1; to resume: " in capsys.readouterr().out
    run_fit(fit_config(tmp_path, 4), start={"resume": "latest"})
    run_fit(fit_config(tmp_path / "whole", 4))
    assert same(tmp_path, tmp_path / "whole", 4)


HOLDER = """
import sys
from pathlib import Path
from unclip.training.fit import fit
from unclip.training.launch import Run
from unclip.training.lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_in_a_folder_stops_at_once(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        owner = f"run is in use by process {holder.pid} on {socket.gethostname()}; stop that run"
        for _ in range(2):  # a refused attempt does not release the lock
            with pytest.raises(ValueError, match=owner):
                run_fit(fit_config(tmp_path / "run", 1))
        with pytest.raises(ValueError, match=owner):
            check_unlocked(tmp_path / "run")
    finally:
        holder.kill()
        holder.wait()
    run_fit(fit_config(tmp_path / "run", 1))  # the lock ended with its process
    check_unlocked(tmp_path / "run")
    assert not (tmp_path / "run/.lock").exists()


def test_a_lock_that_cannot_be_removed_hides_no_error(tmp_path: Path) -> None:
    """Removal fails in a folder that has become read-only; root may write there, but not here."""
    with pytest.raises(ValueError, match="the cause"), locked(tmp_path):
        (tmp_path / ".lock").unlink()
        (tmp_path / ".lock").mkdir()
        raise ValueError("the cause")


@pytest.mark.parametrize("replaced", [False, True])
def test_nothing_is_saved_in_a_run_folder_that_was_removed(tmp_path: Path, replaced: bool) -> None:
    """After a removal, another run may have started in a folder of the same name."""
    folder = tmp_path / "run"
    others = [folder / ".lock", folder / "checkpoints/.writing/model.safetensors"]

    def remove(step: int) -> None:
        if step == 1:
            shutil.rmtree(folder)
        if step == 1 and replaced:
            for file in others:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text("another run's")

    config = replace(fit_config(folder, 2), log_every=0, save_every=2)
    with pytest.raises(OSError, match=f"{folder}: the folder was removed or replaced"):
        fit(tiny_model(), denoising_loss, TinyLoader(), config, OPTIM, before_step=remove)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == (others if replaced else [])


def test_an_unused_lock_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError), locked(tmp_path / "run"):
        raise ValueError
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write to .*file/run: .*; choose another fit.output"):
        run_fit(fit_config(tmp_path / "file/run", 1))


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_full_disk_at_a_resume_is_named_and_loses_nothing(tmp_path: Path, name: str) -> None:
    import resource

    run_fit(fit_config(tmp_path, 2, log_every=1))
    rows = tmp_path / "metrics.jsonl"
    if name == "metrics.jsonl":  # longer than the other file
        rows.write_text(rows.read_text().replace("{", "{" + " " * 8000))
    before = (tmp_path / name).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        size = 100 if name == "config.json" else 8000
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        with pytest.raises(OSError, match=f"cannot write .*{name}: .*File too large"):
            run_fit(fit_config(tmp_path, 3), start={"resume": "latest"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / name).read_bytes() == before
    assert not [*tmp_path.glob(f".{name}.*")]


def test_saving_in_the_background_changes_nothing(tmp_path: Path) -> None:
    settings = {"save_every": 2, "keep": 9}
    run_fit(fit_config(tmp_path / "waiting", **settings))
    run_fit(fit_config(tmp_path / "background", async_save=True, **settings))
    for step in (2, 4, 6):
        assert same(tmp_path / "waiting", tmp_path / "background", step)
    one, other = (
        load_file(tmp_path / name / "model/model.safetensors") for name in ("waiting", "background")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    hidden = [p.name for p in (tmp_path / "background").rglob(".*")]
    assert hidden == []


def test_a_nan_in_the_data_names_its_sample(tmp_path: Path) -> None:
    class Damaged(TinyLoader):
        def __iter__(self):
            for batch in super().__iter__():
                if batch["key"][0] == "e0b1i0":
                    batch["image"][2] = float("inf")
                yield batch

    with pytest.raises(FloatingPointError, match=r"step 2: .*; not finite: image of e0b1i2\. The"):
        run_fit(fit_config(tmp_path), loader=Damaged())


class MovedLoader(TinyLoader):
    def __init__(self, content: str) -> None:
        super().__init__()
        self.content = content

    def samples_hash(self) -> str:
        return self.content


def test_data_may_move_but_not_change(tmp_path: Path) -> None:
    config = fit_config(tmp_path, 3)

    def resume(path: str, content: str, **start: Any) -> None:
        settings = {"fit": vars(config), "data": {"path": path}}
        loader, run = MovedLoader(content), Run(settings, **start)
        fit(tiny_model(), denoising_loss, loader, config, OPTIM, run=run)

    resume("old", "apples")
    with pytest.raises(ValueError, match=r"data\.path was old, is new"):
        resume("new", "pears", resume="latest")
    resume("new", "apples", resume="latest")
    resume("newer", "apples and more", resume="latest")  # older versions saved a part of the hash
    with pytest.warns(UserWarning, match="the data has other samples than .*step-0000003"):
        resume("old", "pears", resume="latest")


def test_a_kill_between_checkpoint_and_model_leaves_no_older_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = fit_config(tmp_path / "run", 4, save_every=2)
    rename, names = Path.rename, []

    def fail_at_the_last_name(self: Path, target: Path) -> Path:
        names.extend({Path(target).name} & {"step-0000002", "step-0000004", "model"})
        if len(names) == 4:  # of two folders, published twice
            monkeypatch.undo()
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_at_the_last_name)
    with pytest.raises(KeyboardInterrupt):
        run_fit(config)
    run_fit(config, start={"resume": "latest"})
    exported = load_file(tmp_path / "run/model/model.safetensors")
    averages = load_file(tmp_path / "run/checkpoints/step-0000004/ema.safetensors")
    assert all(torch.equal(exported[name], averages[name]) for name in averages)
