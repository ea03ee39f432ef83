"""Karlo's folder in diffusers' layout, as files: what its index names and where the weights lie; never imports torch.

karlo/
  model_index.json                                        the pipeline's class, and the class of each component
  prior/  decoder/  super_res_first/  super_res_last/     config.json and weights
  text_proj/                                              the decoder's projections of image and text
  text_encoder/  tokenizer/                               CLIP, as transformers has it
  image_encoder/  feature_extractor/                      for variations of a picture
  prior_scheduler/  decoder_scheduler/  super_res_scheduler/
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from unclip.files import read_json
from unclip.types import StageOptions, UnCLIPOptions

INDEX_FILE, CONFIG_FILE, SCHEDULER_FILE = "model_index.json", "config.json", "scheduler_config.json"
CARD_FILE = "README.md"
KARLO_OPTIONS = UnCLIPOptions(  # the defaults of diffusers' pipeline; its folders hold none
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


def is_prior_only(folder: Path) -> bool:
    """Whether a pipeline, such as Kandinsky's, has a prior but no decoder that is known here."""
    return (
        read_json(folder / INDEX_FILE).get("_class_name") not in PIPELINES
        and (folder / "prior").is_dir()
    )


def read_index(folder: Path) -> list[str]:
    """The components of a folder; ValueError or FileNotFoundError for one that is unknown, missing or of another class.

    A folder may have the parts of both pipelines; then it draws from text and knows pictures.
    """
    file = folder / INDEX_FILE
    index = read_json(file)
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise ValueError(f"{file}: _class_name is {pipeline!r}; expected {' or '.join(PIPELINES)}")
    entries = {
        name: entry
        for name, entry in index.items()
        if not name.startswith("_") and entry != [None, None]
    }
    known = {**FOR_TEXT, **SHARED, **FOR_IMAGES}
    if missing := [name for name in PIPELINES[pipeline] if name not in entries]:
        raise ValueError(f"{file} names no {' and no '.join(missing)}; {pipeline} needs it")
    for name, entry in entries.items():
        kind = entry[-1] if isinstance(entry, list) and entry else entry
        if name not in known:
            raise ValueError(f"{file} names an unknown component {name} ({kind})")
        if kind not in known[name]:
            raise ValueError(
                f"{file}: {name} is of class {kind!r}; expected {' or '.join(known[name])}"
            )
        if not (folder / name).is_dir():
            raise FileNotFoundError(f"{folder / name} is missing; {INDEX_FILE} names it")
    return [name for name in known if name in entries]


def weights_of(folder: Path) -> Path:
    """The file that holds a component's weights, or the index of its shards.

    Full precision before a variant such as `model.fp16.safetensors`, and safetensors before .bin.
    """
    found = [
        (
            file.name.count(".") - 2 * (file.suffix == ".json"),
            rank,
            file.name,
        )  # a variant's name has one part more
        for rank, ending in enumerate((".safetensors", ".bin"))
        for file in (*folder.glob(f"*{ending}"), *folder.glob(f"*{ending}.index*.json"))
        if not re.search(r"-\d+-of-\d+\.", file.name)
    ]
    if not found:
        raise FileNotFoundError(f"{folder} holds no weights; expected a .safetensors or .bin file")
    return folder / min(found)[-1]


def weight_files(folder: Path) -> list[Path]:
    """The files that together hold a component's weights."""
    file = weights_of(folder)
    if file.suffix != ".json":
        return [file]
    names: Any = read_json(file).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{file} has no weight_map; expected the file of each tensor")
    shards = [folder / name for name in sorted(set(names.values()))]
    for shard in shards:
        if not shard.is_file():
            raise FileNotFoundError(f"{shard} is missing; {file.name} names it")
    return shards


def name(folder: Path) -> str:
    """The folder's own name, or that of the Hub's repository whose snapshot it is."""
    folder = folder.resolve()
    return (
        folder.parent.parent.name.split("--")[-1]
        if folder.parent.name == "snapshots"
        else folder.name
    )


def licence(folder: Path) -> str:
    """What the model card's header says, or "" if there is none."""
    card = folder / CARD_FILE
    found = (
        re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8"), re.S)
        if card.is_file()
        else None
    )
    try:
        header = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        header = None
    return str(header.get("license") or "") if isinstance(header, dict) else ""
