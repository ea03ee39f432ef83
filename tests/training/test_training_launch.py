"""A training script: one-line errors, resuming, two processes."""

from __future__ import annotations

import json
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import (
    OPTIM,
    TinyLoader,
    checkpoint_tensors,
    fit_config,
    plain_loss,
    plain_model,
    run_fit,
)
from forks import fork, wait

from unclip.training.fit import FitConfig, fit
from unclip.training.launch import Run, launch, this_process
from unclip.training.optim import OptimConfig
from unclip.training.stopping import resume_command


@dataclass(frozen=True)
class Script:
    fit: FitConfig
    optim: OptimConfig = OPTIM


def main(run: Run[Script]) -> None:
    config = run.config
    loader = TinyLoader(
        1, rank=int(os.environ.get("RANK", 0)), processes=int(os.environ.get("WORLD_SIZE", 1))
    )
    fit(plain_model().to(run.device), plain_loss, loader, config.fit, config.optim, run=run)


def script_config(folder: Path, **settings: Any) -> str:
    values = {
        "output": str(folder / "run"),
        "steps": 2,
        "trackers": [],
        "val_every": 0,
        "preview_every": 0,
        **settings,
    }
    (folder / "run.yaml").write_text(json.dumps({"fit": values}))
    return str(folder / "run.yaml")


def raise_interrupt(_: object) -> None:
    raise KeyboardInterrupt


def test_a_warning_of_a_script_is_one_line_without_code(tmp_path: Path) -> None:
    def shown() -> str:
        return warnings.formatwarning(UserWarning("1 of 9 is broken"), UserWarning, __file__, 1)

    inside: list[str] = []
    launch(lambda run: inside.append(shown()), Script, None, ["--config", script_config(tmp_path)])
    assert inside == ["warning: 1 of 9 is broken\n"]
    assert __file__ in shown()


def test_a_user_error_ends_a_script_with_one_line(tmp_path: Path) -> None:
    config = script_config(tmp_path)
    for argv, message in [
        (
            ["--config", config, "--set=fit.stepps=3"],
            "error: --set fit.stepps=3: fit.stepps is unknown; did you mean",
        ),
        (["--config", config, "--resume", "latest"], "error: no checkpoint in"),
        (["--config", config, "--init", "nowhere"], "error: nowhere does not exist"),
    ]:
        with pytest.raises(SystemExit) as stop:
            launch(main, Script, None, argv)
        assert str(stop.value.code).startswith(message)
        assert "\n" not in str(stop.value.code)
    with pytest.raises(FileNotFoundError):
        launch(main, Script, None, ["--config", config, "--resume", "latest", "--traceback"])
    with pytest.raises(SystemExit, match="error: interrupted; nothing was saved"):
        launch(raise_interrupt, Script, None, ["--config", config])


def test_a_script_trains_and_resumes(tmp_path: Path) -> None:
    config = script_config(tmp_path)
    launch(main, Script, None, ["--config", config])
    launch(
        main,
        Script,
        None,
        ["--config", config, "--resume", "latest", "--set=fit.steps=3", "--set=optim.lr=1e-5"],
    )
    saved = json.loads(
        (tmp_path / "run" / "checkpoints" / "step-0000003" / "state.json").read_text()
    )
    assert (saved["settings"]["optim"]["lr"], saved["data"]) == (1e-5, {"epoch": 3, "batch": 0})


def test_a_checkpoint_of_an_older_version_resumes(tmp_path: Path) -> None:
    config = script_config(tmp_path)
    launch(main, Script, None, ["--config", config])
    file = tmp_path / "run" / "checkpoints" / "step-0000002" / "state.json"
    state = json.loads(file.read_text())
    again = ["--config", config, "--resume", "latest", "--set=fit.steps=3"]
    (file.parent / "manifest.json").unlink()  # which older versions did not write
    file.write_text(
        json.dumps({**state, "settings": {**state["settings"], "optim": {"betas": [0.5, 0.9]}}})
    )
    with pytest.raises(SystemExit, match=r"optim\.betas\.0 was 0\.5, is 0\.9"):
        launch(main, Script, None, again)
    del state["settings"]["optim"]["betas"]  # as before the setting existed: it has its default
    file.write_text(json.dumps(state))
    launch(main, Script, None, again)
    assert (tmp_path / "run" / "checkpoints" / "step-0000003").is_dir()


def test_the_resume_command_uses_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(sys, "argv", ["train/clip.py", "--config", "c.yaml", "--set=optim.lr=1"])
    assert (
        resume_command()
        == "accelerate launch train/clip.py --config c.yaml --set=optim.lr=1 --resume latest"
    )


def test_two_processes_equal_one_with_the_joined_batch(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    config = script_config(tmp_path / "two", precision="fp32", accumulate=2)
    processes = fork(lambda rank: launch(main, Script, None, ["--config", config]), 2)
    assert wait(processes, 300) == [0, 0]
    fit(
        plain_model(),
        plain_loss,
        TinyLoader(1, size=8),
        fit_config(tmp_path / "one", 2, precision="fp32", accumulate=2),
        OPTIM,
    )
    one, two = (
        checkpoint_tensors(tmp_path / "one", 2),
        checkpoint_tensors(tmp_path / "two" / "run", 2),
    )
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-6, rtol=1e-5)


def test_unconnected_processes_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    this_process()  # accelerate is initialised with one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        SystemExit, match=r"error: WORLD_SIZE is 2, but accelerate trains with 1 process\(es\)"
    ):
        launch(main, Script, None, ["--config", script_config(tmp_path)])


def test_accumulation_by_accelerate_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(SystemExit, match="accumulation_steps is 4; expected 1.*fit.accumulate"):
        launch(main, Script, None, ["--config", script_config(tmp_path)])


def test_bf16_is_the_default_only_where_the_cpu_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    emulates = "unclip.training.launch.emulates_bf16"
    for emulated, expected in ((True, "fp32"), (False, "bf16")):
        monkeypatch.setattr(emulates, lambda emulated=emulated: emulated)
        assert FitConfig("run", 1).precision == expected
    monkeypatch.setattr(emulates, lambda: True)
    with pytest.warns(UserWarning, match="no bfloat16 instructions: fit.precision fp32"):
        run_fit(fit_config(tmp_path / "run", 1, precision="bf16"))
