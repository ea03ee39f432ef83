"""Time and memory of Python processes, and the machine they run on.

This module does not import torch: a child process inherits its parent's peak memory.
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
    """Run `python arguments...`; return seconds and peak memory in bytes (None if unavailable).

    Raises ValueError with the last line of its stderr if the process fails.
    """
    with tempfile.TemporaryFile() as stderr:
        start, peak = time.perf_counter(), None
        command = [sys.executable, *arguments]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            if sys.platform == "win32":
                process.wait()
            else:
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
                peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        except BaseException:  # on Ctrl-C, the child would otherwise continue for minutes
            process.kill()
            raise
        seconds = time.perf_counter() - start
        if process.returncode:
            stderr.seek(0)
            lines = stderr.read().decode(errors="replace").strip().splitlines()
            raise ValueError(lines[-1].removeprefix("error: ") if lines else f"{arguments} failed")
    return seconds, peak


def import_time() -> float:
    """Return the seconds of `import unclip` in a new process."""
    code = (
        "import time; start = time.perf_counter(); import unclip; "
        "print(time.perf_counter() - start)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def host() -> dict[str, Any]:
    """Return the processor, number of cores and operating system."""
    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux
    return {"cpu": cpu, "cores": os.cpu_count(), "os": platform.system()}
