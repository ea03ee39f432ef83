"""Karlo's folder in diffusers' layout: components and classes in its index. Does not import torch.

karlo/
  model_index.json                                        the classes of the pipeline and components
  prior/  decoder/  super_res_first/  super_res_last/     config.json and weights
  text_proj/                                              the decoder's projections of CLIP outputs
  text_encoder/  tokenizer/                               CLIP in transformers' layout
  image_encoder/  feature_extractor/                      for image variations
  prior_scheduler/  decoder_scheduler/  super_res_scheduler/
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unclip.checkpoints.hub import INDEX_FILE
from unclip.files import read_json
from unclip.types import StageOptions, UnCLIPOptions

SCHEDULER_FILE = "scheduler_config.json"
KARLO_OPTIONS = UnCLIPOptions(  # the defaults of diffusers' pipeline; the folder holds none
    prior=StageOptions(steps=25, guidance=4.0, sampler="ancestral"),
    decoder=StageOptions(steps=25, guidance=8.0, sampler="ancestral"),
    upsamplers=(StageOptions(steps=7, sampler="ancestral"),),
    prior_candidates=1,
)

SHARED = {
    "text_encoder": ("CLIPTextModelWithProjection",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast"),
    "text_proj": ("UnCLIPTextProjModel",),
    "decoder": ("UNet2DConditionModel",),
    "decoder_scheduler": ("UnCLIPScheduler",),
    "super_res_first": ("UNet2DModel",),
    "super_res_last": ("UNet2DModel",),
    "super_res_scheduler": ("UnCLIPScheduler",),
}
FOR_TEXT = {"prior": ("PriorTransformer",), "prior_scheduler": ("UnCLIPScheduler",)}
FOR_IMAGES = {
    "image_encoder": ("CLIPVisionModelWithProjection",),
    "feature_extractor": ("CLIPImageProcessor", "CLIPFeatureExtractor"),
}
PIPELINES = {
    "UnCLIPPipeline": {**FOR_TEXT, **SHARED},
    "UnCLIPImageVariationPipeline": {**SHARED, **FOR_IMAGES},
}


def recognise(folder: Path) -> bool:
    return (folder / INDEX_FILE).is_file()


def _read_pipeline(folder: Path) -> tuple[dict[str, Any], str | None]:
    """Return the index and the class of the pipeline. ValueError if it has code of its own."""
    index = read_json(folder / INDEX_FILE)
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str | None):  # [module, class]
        reason = "the pipeline has code of its own, such as an export by unclip"
        raise ValueError(f"{folder}: {reason}; load it with diffusers, or load what was exported")
    return index, pipeline


def is_prior_only(folder: Path) -> bool:
    """Return whether the pipeline, such as Kandinsky's, has a prior but no supported decoder."""
    _, pipeline = _read_pipeline(folder)
    return pipeline not in PIPELINES and (folder / "prior").is_dir()


def read_index(folder: Path) -> list[str]:
    """Return the components of a folder, which may have the parts of both pipelines.

    Raises ValueError or FileNotFoundError if a component is unknown, missing or of another class.
    """
    index, pipeline = _read_pipeline(folder)
    file = folder / INDEX_FILE
    if pipeline not in PIPELINES:
        raise ValueError(f"{file}: _class_name is {pipeline!r}; expected {' or '.join(PIPELINES)}")
    entries = {
        name: entry
        for name, entry in index.items()
        if not name.startswith("_") and entry != [None, None]
    }
    known = {**FOR_TEXT, **SHARED, **FOR_IMAGES}
    if missing := [name for name in PIPELINES[pipeline] if name not in entries]:
        raise ValueError(f"{file} has no {' and no '.join(missing)}; {pipeline} needs it")
    for name, entry in entries.items():
        kind = entry[-1] if isinstance(entry, list) and entry else entry
        if name not in known:
            raise ValueError(f"{file} has an unknown component {name} ({kind})")
        if kind not in known[name]:
            expected = " or ".join(known[name])
            raise ValueError(f"{file}: {name} is of class {kind!r}; expected {expected}")
        if not (folder / name).is_dir():
            raise FileNotFoundError(f"{folder / name} is missing; {INDEX_FILE} names it")
    return [name for name in known if name in entries]
