"""Feature extractors of the user's choice, for the distances between final and true images."""

# N images, B batch, S image size, F features, D CLIP embedding width

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from unclip.clip import CLIP
from unclip.files import open_regular, printable
from unclip.image_io import from_uint8

OWN_CLIP = "clip"


@dataclass(frozen=True)
class Extractor:
    """Features (B, F) of uint8 images (B, 3, S, S) with values from 0 to 255."""

    name: str  # as the user gave it
    network: CLIP | Callable[..., Any] | None  # None: the CLIP of the evaluated model
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of each call of the network

    def bind(self, clip: CLIP | None, device: torch.device) -> Extractor:
        """Return an extractor that computes on `device`, with the model's CLIP if it is asked for.

        Raises ValueError if the model has none, or it has no image tower.
        """
        network = clip if self.network is None else self.network
        if network is None or (isinstance(network, CLIP) and network.model.visual is None):
            whose = "the model has no CLIP" if network is None else f"{self.name} encodes only text"
            expected = "expected a CLIP folder, a TorchScript file or MODULE:NAME"
            raise ValueError(f"--features {self.name}: {whose} for images; {expected}")
        if isinstance(network, nn.Module) and network is not clip:
            network.to(device).eval()
        return replace(self, network=network)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, F) in float32, on the CPU. Raises ValueError on any failure."""
        assert self.network is not None
        if isinstance(self.network, CLIP):
            return encode(self.network, images)
        given = f"--features {self.name}: uint8 images {tuple(images.shape)}"
        try:
            features = self.network(images, **self.arguments)
        except Exception as error:  # of any code
            reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise ValueError(f"{given} raised {printable(reason[0])}") from error
        if not (isinstance(features, Tensor) and features.shape[:-1] == (len(images),)):
            found = getattr(features, "shape", None)
            found = type(features).__name__ if found is None else f"shape {tuple(found)}"
            raise ValueError(f"{given} gave {found}; expected features ({len(images)}, F)")
        return features.float().cpu()

    @property
    def resize(self) -> str:
        """How the extractor resizes images, for the results."""
        if not isinstance(self.network, CLIP):
            return "by the extractor"
        how = self.network.preprocess
        return f"{self.network.image_size} px, {how.interpolation}, {how.resize_mode}"


def load_extractor(spec: str) -> Extractor:
    """Load "clip", a CLIP folder in open_clip's layout, a TorchScript file, or "module:name".

    A TorchScript file is a program, and an import runs a module: use only what you trust. Python
    pickles are not executed. A `forward` with an argument `return_features` gets True, as the usual
    TorchScript file of FID's Inception expects. `name` is a function or a network. Errors are
    ValueError or FileNotFoundError.
    """
    path = Path(spec)
    if spec == OWN_CLIP:
        return Extractor(spec, None)
    if path.is_dir():
        return Extractor(spec, CLIP.from_pretrained(path))
    if path.is_file():
        return _load_torchscript(spec)
    module, colon, name = spec.partition(":")
    if not (colon and name and all(part.isidentifier() for part in module.split("."))):
        kinds = "'clip', a CLIP folder, a TorchScript file or MODULE:NAME"
        raise FileNotFoundError(f"--features: {spec} does not exist; expected {kinds}")
    try:
        found: Any = getattr(importlib.import_module(module), name)
    except Exception as error:  # of any code
        raise ValueError(f"--features {spec} cannot be imported: {printable(error)}") from error
    if isinstance(found, type) or not callable(found):
        kind = "a class" if isinstance(found, type) else f"of type {type(found).__name__}"
        raise ValueError(f"--features {spec} is {kind}; expected a function or a network")
    return Extractor(spec, found)


def _load_torchscript(file: str) -> Extractor:
    open_regular(file).close()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.export would unpickle
            network = torch.jit.load(file, map_location="cpu")
    except RuntimeError as error:
        reason = printable(str(error).splitlines()[0])
        raise ValueError(f"{file} is not a TorchScript file ({reason})") from None
    known = [argument.name for argument in network.forward.schema.arguments]
    return Extractor(file, network, {"return_features": True} if "return_features" in known else {})


def encode(clip: CLIP, images: Tensor) -> Tensor:
    """Return CLIP embeddings of images, uint8 or in [-1, 1]: (B, 3, S, S) -> (B, D).

    They are in float32 on the CPU.
    """
    x = from_uint8(images) if images.dtype == torch.uint8 else images
    return clip.encode_image(x).float().cpu()


def as_uint8(images: Sequence[Image.Image]) -> Tensor:
    """Stack B images of one size: -> (B, 3, S, S) uint8."""
    return (
        torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        .permute(0, 3, 1, 2)
        .contiguous()
    )


@torch.inference_mode()
def extract(
    extractor: Extractor,
    clip: CLIP | None,
    batches: Iterable[Tensor],
    device: torch.device,
    use: Callable[[nn.Module], None],
) -> tuple[Tensor, Tensor | None]:
    """Return features (N, F), and CLIP embeddings (N, D) if there is a CLIP, of uint8 images.

    use: called with each network before it runs, since the model's CLIP may be offloaded.
    """
    features, embeddings = [], []
    for images in batches:
        images = images.to(device)
        if isinstance(extractor.network, nn.Module):
            use(extractor.network)
        features.append(extractor(images))
        if clip is not None:
            use(clip)
            same = clip is extractor.network
            embeddings.append(features[-1] if same else encode(clip, images))
    return torch.cat(features), torch.cat(embeddings) if embeddings else None
