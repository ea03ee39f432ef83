"""`unclip info`, `models`, `convert` and `push`: what models and images hold, formats, uploads."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from unclip.cli.arguments import add_command, add_dtype, lora_options, prompt
from unclip.files import printable

FORMATS = ("unclip", "diffusers")
CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".safetensors")
# Keys of the metadata that hold what an image was generated from.
SOURCES = {
    "image_emb": "a CLIP image embedding",
    "sources": "latents",
    "picture": "another image",
}


def add_commands(commands: Any) -> None:
    about = "show what a model holds, or how an image was generated"
    parser = add_command(commands, info, about)
    about = "bundled name, folder, checkpoint file or Hub id of a model; or an image made by unclip"
    parser.add_argument("target", metavar="MODEL|IMAGE", help=about)

    add_command(commands, models, "list the bundled models")

    parser = add_command(commands, convert, "convert a model to another format")
    about = "bundled name, folder, checkpoint file or Hub id"
    parser.add_argument("source", metavar="MODEL", help=about)
    parser.add_argument("output", type=Path, metavar="FOLDER")
    about = "our own format (default), or that of diffusers' unCLIP pipelines"
    parser.add_argument("--to", choices=FORMATS, default=FORMATS[0], help=about)
    about = "data type of the weights (default: as stored)"
    add_dtype(parser, about)

    about = "upload a model with a model card to the Hugging Face Hub"
    parser = add_command(
        commands, push, about, 'unclip push my_model me/my-model --prompts "a red apple"'
    )
    about = "bundled name, folder, checkpoint file or Hub id"
    parser.add_argument("source", metavar="MODEL", help=about)
    parser.add_argument("repository", metavar="ORG/NAME")
    about = "prompts of sample images for the model card"
    parser.add_argument(
        "--prompts", nargs="+", type=prompt, default=[], metavar="PROMPT", help=about
    )
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--revision", metavar="BRANCH", help="branch (default: main)")
    add_dtype(parser, "data type of the weights (default: as stored)")


def info(args: Namespace) -> None:
    path = Path(args.target)
    if path.is_file() and path.suffix.lower() not in CHECKPOINTS:
        _image_info(path)
    elif path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") and not path.exists():
        raise ValueError(f"image file {path} does not exist")
    else:
        _model_info(args.target)


def _image_info(path: Path) -> None:
    import shlex

    from unclip.checkpoints.folders import bundled_models
    from unclip.image_io import lacks_image, read_metadata, read_source_type

    entries = read_metadata(path)
    for entry in entries:
        shown = {k: value for k, value in entry.items() if k not in ("options", "mask", *SOURCES)}
        for key in SOURCES.keys() & entry.keys():
            stored = "is not stored" if lacks_image(entry) else "is stored"
            shown["generated from"] = f"{SOURCES[key]}, which {stored} in this file"
        for key, value in (shown | entry.get("options", {})).items():
            print(f"{printable(key)}: {_one_line(value)}")
        print()
    if (source_type := read_source_type(path)) is not None:
        print(f"digital source type: {source_type}\n")
    if any(map(lacks_image, entries)):
        print("It cannot be generated again: its source image is not stored in this file.")
    else:
        named = {entries[0].get(key) for key in ("model", "prior_model")} - {None}
        trust = "" if named <= bundled_models().keys() else " --trust-model"
        source, adapters = shlex.quote(str(path)), lora_options(entries[0].get("lora", ()))
        print(f"generate it again: unclip generate --from {source} -o again.png{trust}{adapters}")


def _model_info(name: str) -> None:
    from unclip.checkpoints.folders import FORMAT_NAME, locate
    from unclip.checkpoints.summary import summary

    folder = locate(name)
    model = summary(folder)
    layout = "" if model.format == FORMAT_NAME else f" (format: {model.format})"
    print(printable(f"{model.name}: {model.kind} in {folder}{layout}"))
    print(f"licence: {printable(model.licence) or 'unknown'}\n")
    for part in model.components:
        shared = f", from {part.shared_from}" if part.shared_from else ""
        print(_size_line(part.name, part.parameters, part.size), " + ".join(part.dtypes) + shared)
    parameters = sum(part.parameters for part in model.components)
    print(_size_line("all", parameters, sum(part.size for part in model.components)))
    if model.options:
        print("\ndefault options:")
    for key, value in model.options.items():
        print(f"  {printable(key)}: {_one_line(value)}")


def _one_line(value: Any) -> str:
    if isinstance(value, dict):
        items = ((key, item) for key, item in value.items() if item is not None)
        return ", ".join(f"{printable(key)} {_one_line(item)}" for key, item in items)
    return "; ".join(map(_one_line, value)) if isinstance(value, list) else printable(value)


def _size_line(name: str, parameters: int, size: int) -> str:
    return f"{name:<16}{parameters / 1e6:10.2f} M parameters{size / 1e6:10.2f} MB "


def models(args: Namespace) -> None:
    from unclip.checkpoints.folders import bundled_models, read_model_json
    from unclip.checkpoints.summary import describe

    for name, folder in bundled_models().items():
        size = sum(part.size for part in describe(folder) if part.shared_from is None)
        print(f"{name}  {size / 1e6:.0f} MB  {read_model_json(folder)['licence']}")


def convert(args: Namespace) -> None:
    from unclip.checkpoints.folders import locate

    source = locate(args.source)  # an unknown name is reported before torch is imported

    from unclip.checkpoints.convert import convert

    convert(source, args.output, args.to, args.dtype)
    print(args.output)


def push(args: Namespace) -> None:
    from unclip.checkpoints.folders import is_hub_id, locate

    if not is_hub_id(args.repository):
        raise ValueError(f"{args.repository!r} is not a name on the Hub; expected ORG/NAME")
    path = locate(args.source)  # an unknown name is reported before torch is imported

    from unclip.checkpoints.convert import stored_dtype
    from unclip.pipelines import load

    pipe = load(args.source, "cpu", args.dtype or stored_dtype(path))
    given = {"private": args.private, "revision": args.revision}
    print(pipe.push_to_hub(args.repository, prompts=args.prompts, **given))
