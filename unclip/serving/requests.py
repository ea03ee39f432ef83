"""Requests of the Images API: parsed, validated and turned into tasks."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from unclip.serving import uploads
from unclip.serving.config import ServerConfig
from unclip.serving.errors import APIError, bad_request, not_found
from unclip.serving.tasks import Settings, Task, decode_vector

MAX_SEED = 2**53  # the integers that JavaScript represents
SIZES = ("256x256", "512x512", "1024x1024")
MIN_SIDE, MAX_SIDE = 16, 2048
MAX_PROMPT, STRICT_PROMPT = 32_000, 1_000  # characters
MAX_IMAGES = 16  # of one request
MAX_VECTOR = 65_536  # numbers of an embedding or layout
MAX_OPTIONS = 65_536  # characters of JSON
DEFAULT_NAMES = (None, "", "auto", "dall-e-2")  # of the default model


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a boolean is not a number")
    return value


def _options(value: Any) -> Any:
    """Parse the JSON text that a form has in place of an object."""
    return from_json(value, allow_inf_nan=False) if isinstance(value, str) else value


def _numbers(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else value


Integer = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
# numbers, or base64 of little-endian float32
Vector = Annotated[list[Number], Field(max_length=MAX_VECTOR)] | str
Steps = Annotated[Integer, Field(ge=1, le=1000)]
Guidance = Annotated[Number, Field(ge=-1000, le=1000)]
Candidates = Annotated[Integer, Field(ge=1, le=64)]
Sampler = Literal["ddim", "ancestral", "dpm++", "unipc"]  # "analytic" is for priors
Embedding = Literal["prior", "text", "none"]
Options = Annotated[dict[str, Any], BeforeValidator(_options)]
Weights = Annotated[list[Number], BeforeValidator(_numbers), Field(min_length=1, max_length=16)]


class Common(BaseModel):
    """The fields of all three calls; unknown ones are kept in `model_extra`."""

    model_config = ConfigDict(extra="allow")

    model: str | None = Field(None, max_length=256)
    n: Annotated[Integer, Field(ge=1, le=10)] = 1
    size: str | None = Field(None, description="SxS, or auto: the model's own size")
    response_format: Literal["url", "b64_json"] | None = None
    user: str | None = None
    stream: bool = False
    partial_images: Annotated[Integer, Field(ge=0, le=3)] = 0
    output_format: Literal["png", "jpeg", "webp", "gif", "svg"] = "png"
    output_compression: Annotated[Integer, Field(ge=0, le=100)] | None = None
    background: Literal["auto", "opaque", "transparent"] = "auto"
    seed: Annotated[Integer, Field(ge=0, le=MAX_SEED)] | None = None
    steps: Steps | None = None
    guidance: Guidance | None = None
    sampler: Sampler | None = None
    options: Options | None = None
    indexed_partials: bool = False
    prompt: str | None = Field(None, max_length=MAX_PROMPT)
    negative_prompt: str | None = Field(None, max_length=MAX_PROMPT)


class FromPrior(BaseModel):
    """The fields of calls that use the prior."""

    embedding: Embedding | None = None
    prior_steps: Steps | None = None
    prior_guidance: Guidance | None = None
    prior_candidates: Candidates | None = None


class FromImage(BaseModel):
    """The fields of calls with images, which are files in multipart."""

    image: str | list[str] | None = None
    images: list[dict[str, Any]] | None = Field(None, max_length=MAX_IMAGES)


class FromEmbedding(BaseModel):
    """The fields of calls that also take and return embeddings."""

    image_embedding: Vector | None = None
    layout: Vector | None = None
    return_embedding: bool = False


class Generation(Common, FromPrior, FromEmbedding):
    """Body of POST /v1/images/generations."""

    num_candidates: Candidates | None = None


class Edit(Common, FromPrior, FromImage):
    """Body of POST /v1/images/edits."""

    prompt: str = Field(max_length=MAX_PROMPT)
    mask: str | dict[str, Any] | None = None
    strength: Annotated[Number, Field(gt=0, le=1)] | None = None


class Variation(Common, FromImage, FromEmbedding):
    """Body of POST /v1/images/variations."""

    weights: Weights | None = None


BODIES: dict[str, type[Common]] = {
    "generations": Generation,
    "edits": Edit,
    "variations": Variation,
}
FILES = ("image", "image[]", "mask")
FOR_PRIOR = ("embedding", "prior_steps", "prior_guidance", "prior_candidates")
# fields that `image_embedding` replaces
REPLACED = (
    *("prompt", "negative_prompt", "num_candidates", "image", "images", "weights"),
    *FOR_PRIOR,
)
# fields that change how images are returned, not which
RETURNED = {"size", "response_format", "stream", "partial_images", "indexed_partials", "user"}
RETURNED |= {"output_format", "output_compression", "background", "return_embedding"}
UNWRITTEN = ("gif", "svg")  # formats of newer models; the result is a PNG
WORDS = {  # OpenAI's, by the type of pydantic's error
    "missing": "'{param}' is a required property",
    "less_than_equal": "{value} is greater than the maximum of {le} - '{param}'",
    "greater_than_equal": "{value} is less than the minimum of {ge} - '{param}'",
    "greater_than": "{value} is less than the minimum of {gt} - '{param}'",
    "literal_error": "{value} is not one of [{expected}] - '{param}'",
    "string_too_long": "The value is longer than {max_length} characters - '{param}'",
    "too_long": "{actual_length} values are more than the maximum of {max_length} - '{param}'",
}
OTHER_WORDS = "{value} is not of the expected type - '{param}' ({message})"
TEXTS = ("prompt", "negative_prompt")  # in which "null" is a valid text


@dataclass(frozen=True)
class Delivery:
    """The form in which the images of a task are returned."""

    kind: str  # "png", "jpeg", "webp"
    quality: int | None
    side: int | None  # pixels; None = as generated
    url: bool
    stream: bool
    partials: int
    indexed: bool  # partial images for n > 1
    embedding: bool
    ignored: tuple[str, ...]


Files = Mapping[str, list[bytes]]


async def read_body(request: Request, strict: bool) -> tuple[dict[str, Any], Files]:
    """Return the fields of a JSON or multipart body, and its files.

    APIError if it is malformed, or, when strict, declares files to be other than PNG.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _read_form(request, strict)
    if kind and kind != "application/json" and not kind.endswith("+json"):
        raise bad_request(
            f"Invalid Content-Type header ({kind!r}), expected application/json or "
            f"multipart/form-data."
        )
    try:
        fields = from_json(await request.body(), allow_inf_nan=False)
    except ValueError:
        raise bad_request("We could not parse the JSON body of your request.") from None
    if not isinstance(fields, dict):
        raise bad_request("The JSON body of your request is not an object.")
    return {name: value for name, value in fields.items() if value is not None}, {}


async def _read_form(request: Request, strict: bool) -> tuple[dict[str, Any], Files]:
    fields: dict[str, Any] = {}
    files: dict[str, list[bytes]] = {}
    try:
        async with request.form(max_files=MAX_IMAGES + 1, max_fields=100) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if strict and value.content_type != "image/png" and not name.endswith("[]"):
                        raise _unsupported_type(name, value.content_type)
                    files.setdefault(name, []).append(await value.read())
                elif name in fields and name.endswith("[]"):
                    fields[name] += "," + value
                else:
                    fields[name] = value
    except (APIError, ClientDisconnect):
        raise
    except HTTPException as error:
        about = _printable(str(error.detail))
        raise bad_request(f"Could not parse the multipart form: {about}") from None
    except Exception:  # the parser raises many types for malformed bodies
        raise bad_request("Could not parse the multipart form.") from None
    if "weights[]" in fields:
        fields["weights"] = fields.pop("weights[]")
    # In a form, null is the text "null"; null fields of JSON are left out as well.
    kept = {name: value for name, value in fields.items() if value != "null" or name in TEXTS}
    return kept, files


def content_hash(operation: str, fields: dict[str, Any], files: Files) -> int:
    """Return a hash of what a request generates, not of how it is returned."""
    content = {name: value for name, value in fields.items() if name not in RETURNED}
    parts = [(name, *files[name]) for name in sorted(files)]
    return hash((operation, json.dumps(content, sort_keys=True), *parts))


def _unsupported_type(name: str, given: str | None) -> APIError:
    name = _printable(name)
    return bad_request(
        f"Invalid file '{name}': unsupported mimetype ('{_printable(given or '')}'). "
        f"Supported file formats are 'image/png'.",
        name,
        "unsupported_file_mimetype",
    )


def parse(
    operation: str, fields: dict[str, Any], files: Files, config: ServerConfig
) -> tuple[Task, Delivery]:
    """Validate a request. APIError with OpenAI's message if it is invalid."""
    files = {name: [*files[name]] for name in files}
    if config.strict and "image[]" in files:
        raise bad_request("Invalid type for 'image'.", "image", "invalid_type")
    images = [*files.pop("image", []), *files.pop("image[]", [])]
    masks = files.pop("mask", [])
    try:
        body = BODIES[operation].model_validate(fields)
    except ValidationError as error:
        raise _as_api_error(error) from None
    ignored = [*(body.model_extra or {}), *files]
    if body.background == "transparent":
        ignored.append("background")
    kind: str = body.output_format
    if kind in UNWRITTEN:
        ignored.append("output_format")
        kind = "png"
    if body.output_compression is not None and kind == "png":
        ignored.append("output_compression")
    if not body.stream:
        ignored += [name for name in ("partial_images", "indexed_partials") if name in fields]
    values = body.model_dump(exclude=set(body.model_extra or ()))
    if masks and operation != "edits":
        ignored.append("mask")
    if images and operation == "generations":
        ignored.append("image")
    if values.get("image_embedding") is not None:
        given = {**fields, **({"image": images} if images else {})}
        kept = TEXTS if operation == "variations" else ()
        ignored += [name for name in REPLACED if name in given and name not in kept]
    elif values.get("layout") is not None:
        ignored.append("layout")
    if config.strict and ignored:
        raise bad_request(
            f"Unknown parameter: '{_printable(ignored[0])}'.",
            _printable(ignored[0]),
            "unknown_parameter",
        )
    task = _task(operation, values, images, masks, config)
    partial_images = body.stream and (body.n == 1 or body.indexed_partials)
    delivery = Delivery(
        kind=kind,
        quality=body.output_compression,
        side=parse_size(body.size, config.strict),
        url=body.response_format == "url" or (not body.stream and body.response_format is None),
        stream=body.stream,
        partials=body.partial_images if partial_images else 0,
        indexed=body.indexed_partials,
        embedding=bool(values.get("return_embedding")),
        ignored=tuple(_printable(name).strip() or "?" for name in dict.fromkeys(ignored)),
    )
    return task, delivery


def _task(
    operation: str,
    values: dict[str, Any],
    files: list[bytes],
    masks: list[bytes],
    config: ServerConfig,
) -> Task:
    embedding = _vector(values, "image_embedding")
    layout = None if embedding is None else _vector(values, "layout")
    optional = embedding is not None or operation == "variations"
    prompt, negative = _check_prompt(values, optional, config), values.get("negative_prompt")
    if embedding is not None and operation == "generations":
        prompt = negative = None
    candidates = values.get("num_candidates")
    if candidates is not None and candidates < values["n"]:
        raise bad_request(
            f"{candidates} is less than 'n', which is {values['n']} - 'num_candidates'",
            "num_candidates",
        )
    n = candidates or values["n"]
    settings = {option.name: values.get(option.name) for option in fields(Settings)}
    if settings["options"] is not None:
        settings["options"] = _canonical(settings["options"])
    if embedding is not None:
        settings |= dict.fromkeys(FOR_PRIOR)
    seed = random.SystemRandom().randrange(2**31) if values["seed"] is None else values["seed"]
    if seed + n > MAX_SEED:
        raise bad_request(f"{seed} is greater than the maximum of {MAX_SEED - n} - 'seed'", "seed")
    images, mask, weights = (), None, None
    if operation != "generations" and embedding is None:
        images, mask = _images(operation, values, files, masks, config)
        if (weights := values.get("weights")) is not None:
            weights = tuple(weights)
            if len(weights) != len(images) or sum(weights) <= 0:
                raise bad_request(
                    f"got {len(weights)} weights of sum {sum(weights):g} for {len(images)} images; "
                    f"expected one each, of a sum above 0 - 'weights'",
                    "weights",
                )
    return Task(
        operation=operation,
        model=_model(values["model"], config),
        n=values["n"],
        seed=seed,
        settings=Settings(**settings),
        prompt=prompt,
        negative=negative,
        candidates=None if embedding is not None else candidates,
        images=images,
        mask=mask,
        weights=weights,
        embedding=embedding,
        layout=layout,
        strength=values.get("strength"),
    )


def _canonical(options: dict[str, Any]) -> str:
    """Encode options; equal ones have equal texts. APIError if they are too long."""
    text = json.dumps(options, sort_keys=True)
    if len(text) > MAX_OPTIONS:
        raise bad_request(
            f"{len(text)} characters are more than the maximum of {MAX_OPTIONS} - 'options'",
            "options",
        )
    return text


def _vector(values: dict[str, Any], name: str) -> tuple[float, ...] | None:
    if values.get(name) is None:
        return None
    try:
        return decode_vector(values[name])
    except ValueError as error:
        raise bad_request(f"Invalid '{name}': {error}.", name) from None


def _check_prompt(values: dict[str, Any], optional: bool, config: ServerConfig) -> str | None:
    prompt = values.get("prompt")
    if prompt is None:
        if optional:
            return None
        raise bad_request("'prompt' is a required property", "prompt")
    if not prompt.strip():
        raise bad_request(f"'{prompt[:20]}' is too short - 'prompt'", "prompt")
    limit = STRICT_PROMPT if config.strict else MAX_PROMPT
    if len(prompt) > limit:
        raise bad_request(f"The prompt is longer than {limit} characters - 'prompt'", "prompt")
    return prompt


def _images(
    operation: str,
    values: dict[str, Any],
    files: list[bytes],
    masks: list[bytes],
    config: ServerConfig,
) -> tuple[tuple[Any, ...], Any]:
    """Decode the images of a request: RGB ones, and the mask of an edit."""
    texts = values.get("image") or []
    texts = [texts] if isinstance(texts, str) else texts
    texts += [_reference(one, "images") for one in values.get("images") or []]
    if isinstance(values.get("mask"), dict):
        values["mask"] = _reference(values["mask"], "mask")
    files = [*files, *(uploads.decode_text(text, "image") for text in texts)]
    masks = [*masks, *([uploads.decode_text(values["mask"], "mask")] if values.get("mask") else [])]
    if not files:
        raise bad_request("'image' is a required property", "image")
    if len(files) > (1 if operation == "edits" or config.strict else MAX_IMAGES):
        raise bad_request(f"got {len(files)} images, more than expected - 'image'", "image")
    decoded = [uploads.decode_image(data, "image", config) for data in files]
    images = tuple(uploads.to_rgb(image, "image") for image in decoded)
    if operation != "edits":
        return images, None
    if len(masks) > 1:
        raise bad_request(f"got {len(masks)} masks; expected one - 'mask'", "mask")
    mask = uploads.decode_image(masks[0], "mask", config) if masks else None
    required = values.get("strength") is None
    return images, uploads.edit_mask(decoded[0], mask, config.strict, required)


def _reference(value: dict[str, Any], param: str) -> str:
    """Return the data URL of an object such as {"image_url": "data:..."}."""
    url = value.get("image_url")
    url = url.get("url") if isinstance(url, dict) else url
    if not isinstance(url, str):
        raise bad_request(
            f"'{param}' must give image_url, a data URL; files by id are not supported.", param
        )
    return url


def _model(name: str | None, config: ServerConfig) -> str:
    if name in config.models:
        return name
    if name in DEFAULT_NAMES:
        return config.models[0]
    raise model_not_found(name or "")


def model_not_found(name: str) -> APIError:
    message = f"The model '{_printable(name)}' does not exist or you do not have access to it."
    return not_found(message, "model_not_found", "model")


def parse_size(size: str | None, strict: bool) -> int | None:
    """Return the side of square images. APIError if it is not allowed."""
    if size in (None, "auto"):
        return None
    found = re.fullmatch(r"(\d{1,5})x\1", size, re.ASCII)
    side = int(found[1]) if found else 0
    if size in SIZES if strict else MIN_SIDE <= side <= MAX_SIDE:
        return side
    expected = f"one of {list(SIZES)}"
    if not strict:
        expected = f"SxS with S from {MIN_SIDE} to {MAX_SIDE}, such as '256x256', or 'auto'"
    raise bad_request(f"'{_printable(size)}' is not {expected} - 'size'", "size")


def _as_api_error(error: ValidationError) -> APIError:
    """Return the first problem in OpenAI's words."""
    first = error.errors(include_url=False)[0]
    param = _printable(str(first["loc"][0])) if first["loc"] else None
    value, context = first.get("input"), first.get("ctx", {})
    context |= {"param": param, "message": first["msg"]}
    context["expected"] = context.get("expected", "").replace(" or ", ", ")
    context["value"] = _printable(
        repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    )
    return bad_request(WORDS.get(first["type"], OTHER_WORDS).format(**context), param)


def _printable(text: str) -> str:
    """Return a short version of a client's text for messages and headers, in printable ASCII."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text[:80])
