"""The launch configs ask accelerate for what their first comment says; memory of sharded runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from scripts import ROOT, load_script

from unclip.training import sharding
from unclip.training.launch import launch

CONFIGS = ROOT / "configs/accelerate"


def launched_with(name: str) -> tuple[int, dict[str, str]]:
    """Return the number of processes and the environment that accelerate gives them."""
    file = str(CONFIGS / f"{name}.yaml")
    words = launch_command_parser().parse_args(["--config_file", file, "train/prior.py"])
    args, _, _ = _validate_launch_command(words)
    if args.multi_gpu or args.use_fsdp:
        return args.num_processes, prepare_multi_gpu_env(args)
    return args.num_processes, prepare_simple_launcher_cmd_env(args)[1]


@pytest.mark.parametrize(
    ("name", "processes", "sharded", "replicas"),
    [
        ("cpu", 1, False, "1"),
        ("gpu", 1, False, "1"),
        ("ddp", 8, False, "1"),
        ("fsdp2", 8, True, "1"),
        ("hsdp", 32, True, "4"),
    ],
)
def test_launch_configs(
    monkeypatch: pytest.MonkeyPatch, name: str, processes: int, sharded: bool, replicas: str
) -> None:
    count, environment = launched_with(name)
    assert count == processes
    assert environment.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "1") == replicas
    monkeypatch.setenv("ACCELERATE_USE_FSDP", environment.get("ACCELERATE_USE_FSDP", "false"))
    monkeypatch.setenv("FSDP_VERSION", environment.get("FSDP_VERSION", "1"))
    assert sharding.requested() == sharded


def test_every_launch_config_is_tested_and_documented() -> None:
    names = {file.stem for file in CONFIGS.glob("*.yaml")}
    assert names == {"cpu", "gpu", "ddp", "fsdp2", "hsdp"}
    page = (ROOT / "train/README.md").read_text(encoding="utf-8")
    assert all(f"configs/accelerate/{name}.yaml" in page for name in names)


def test_fsdp_1_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="fsdp_version is 1; expected 2"):
        sharding.requested()


@pytest.mark.parametrize(
    ("name", "processes", "parameters"),
    [
        ("tiny/prior", 4, ""),
        pytest.param("paper/prior", 64, "1,225,927,680", marks=pytest.mark.slow),
        pytest.param("paper/decoder", 64, "3,567,370,758", marks=pytest.mark.slow),
    ],
)
def test_a_dry_run_describes_each_of_several_processes(
    capsys: pytest.CaptureFixture, name: str, processes: int, parameters: str
) -> None:
    """It needs neither CLIP nor data, whose paths in the config do not exist."""
    script = load_script(Path(name).name)
    config = next(getattr(script, n) for n in dir(script) if n.endswith("Training"))
    argv = ["--config", str(ROOT / f"configs/{name}.yaml"), "--dry-run", str(processes)]
    launch(script.main, config, None, argv)
    text = capsys.readouterr().out
    assert parameters in text and f"processes    {processes}, FSDP2" in text
    for part in ("weights", "gradients", "AdamW", "EMA", "gathered layers", "activations"):
        assert f"{part} " in text
