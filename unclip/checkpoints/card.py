"""Model cards for the Hub: a README.md whose header the Hub reads. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

# Licences with an identifier of the Hub.
LICENCES = ("mit", "apache-2.0", "cc-by-4.0", "cc-by-sa-4.0", "cc0-1.0", "creativeml-openrail-m")
TAGS = {
    "unclip": ["unclip", "dall-e-2", "diffusion"],
    "glide": ["glide", "diffusion"],
    "dalle": ["dall-e"],
}


def model_card(
    repo_id: str, kind: str, licence: str, samples: Sequence[tuple[str, Path]] = ()
) -> str:
    """Return the card of a model; samples: prompts, and paths of their images in the repository."""
    identifier = licence.lower().replace(" ", "-")
    header = {"library_name": "unclip", "pipeline_tag": "text-to-image"}
    if identifier in LICENCES:
        header["license"] = identifier
    elif licence:
        header |= {"license": "other", "license_name": licence}
    card: dict[str, object] = {**header, "tags": [*TAGS[kind], "text-to-image"]}
    if samples:
        card["widget"] = [
            {"text": prompt, "output": {"url": file.as_posix()}} for prompt, file in samples
        ]
    images = "".join(f"![{prompt}]({file.as_posix()})\n" for prompt, file in samples)
    prompt = samples[0][0] if samples else "a red apple"
    return f"""---
{yaml.safe_dump(card, sort_keys=False, allow_unicode=True).strip()}
---

# {repo_id.split("/")[-1]}

{images}
```python
import unclip

pipe = unclip.load({repo_id!r})
pipe({prompt!r}).save("image.png")
```

Licence: {licence or "not stated"}.
"""
