"""Deprecated name of train/progressive_grow.py."""

import runpy
import warnings
from pathlib import Path

warnings.warn("train/grow.py is now train/progressive_grow.py", FutureWarning, stacklevel=1)
runpy.run_path(str(Path(__file__).with_name("progressive_grow.py")), run_name="__main__")
