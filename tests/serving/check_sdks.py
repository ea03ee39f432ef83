"""Check several versions of OpenAI's Python package, and the Node package, against a server.

    python tests/serving/check_sdks.py [--model emoji] [--node]

Each version is installed into a virtual environment of its own, in a temporary folder.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from serving_helpers import png, serving

from unclip.serving.app import create_app
from unclip.serving.config import ServerConfig

VERSIONS = ("0.28.1", "1.3.0", "1.109.1", "2.54.0", "newest")
# The version of httpx that openai 1.3 was written for.
EXTRA = {"0.28.1": ["urllib3<2", "setuptools"], "1.3.0": ["httpx<0.28"]}
KEY = "sk-0123456789abcdef"
HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--versions", nargs="*", default=VERSIONS)
    parser.add_argument("--node", action="store_true")
    args = parser.parse_args()
    failed = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "image.png").write_bytes(png(64))
        (folder / "mask.png").write_bytes(png(64, "RGBA"))
        app = create_app(ServerConfig(models=(args.model,), api_keys=(KEY,)))
        with serving(app) as url:
            given = [f"{url}/v1", KEY, str(folder / "image.png"), str(folder / "mask.png")]
            for version in args.versions:
                command = [python_with(version, folder), str(HERE / "sdk_client.py"), *given]
                failed += [version] if subprocess.run(command).returncode else []
            if args.node:
                subprocess.run(["npm", "install", "--silent", "openai"], cwd=folder, check=True)
                script = folder / "sdk_client.mjs"
                script.write_text((HERE / "sdk_client.mjs").read_text())
                failed += (
                    ["node"] if subprocess.run(["node", str(script), *given]).returncode else []
                )
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return bool(failed)


def python_with(version: str, folder: Path) -> str:
    """Install a version of openai; return the interpreter."""
    home = folder / version
    venv.create(home, with_pip=True)
    python = str(home / "bin" / "python")
    package = "openai" if version == "newest" else f"openai=={version}"
    command = [python, "-m", "pip", "install", "--quiet", package, *EXTRA.get(version, [])]
    subprocess.run(command, check=True)
    return python


if __name__ == "__main__":
    sys.exit(main())
