"""Python processes with the time and the memory that each took, and the machine they ran on.

This module imports no torch: a process counts its parent's memory at the time it was started as its own.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run(arguments: Sequence[str]) -> tuple[float, int | None]:
    """Wall seconds and peak memory in bytes (None where the system does not tell) of `python arguments...`.

    ValueError with its last line if it fails.
    """
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=said
        )
        peak = None
        try:
            if hasattr(os, "wait4"):
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
                peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            else:
                process.wait()
        except BaseException:  # Ctrl-C: a process of its own would go on for minutes
            process.kill()
            raise
        seconds = time.perf_counter() - start
        if process.returncode:
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines()
            raise ValueError(lines[-1].removeprefix("error: ") if lines else f"{arguments} failed")
    return seconds, peak


def import_time() -> float:
    """Seconds of `import unclip` alone, in a process without torch."""
    code = "import time; start = time.perf_counter(); import unclip; print(time.perf_counter() - start)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(ran.stdout)


def host() -> dict[str, Any]:
    """Processor, cores and system."""
    return {"cpu": _cpu(), "cores": os.cpu_count(), "os": platform.system()}


def _cpu() -> str:
    """The processor's name as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
