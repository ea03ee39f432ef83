"""Calls of the Images API, and what they return."""

from __future__ import annotations

import base64
import io
import json

from serving_helpers import client, load, png

GENERATIONS, EDITS, VARIATIONS = (
    f"/v1/images/{name}" for name in ("generations", "edits", "variations")
)


def images_of(response):
    assert response.status_code == 200, response.text
    return [base64.b64decode(entry["b64_json"]) for entry in response.json()["data"]]


def generate(client, **fields):
    body = {"prompt": "a red apple", "response_format": "b64_json", "seed": 3, **fields}
    return client.post(GENERATIONS, json=body)


def error_of(response, status, param=None, code=None):
    """Return the message, after checking everything else of an error."""
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"].startswith("req_")
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code)
    return error["message"]


def events_of(response):
    """Return the events of a stream as (kind, fields)."""
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert not any(line.startswith(("id:", "retry:")) for line in response.text.splitlines())
    events = []
    for block in response.text.strip().split("\n\n"):
        lines = [line for line in block.splitlines() if not line.startswith(":")]
        if lines:
            kind = lines[0].removeprefix("event: ")
            events.append((kind, json.loads(lines[-1].removeprefix("data: "))))
    return events


def edit(client, image=None, mask=None, **fields):
    files = {"image": png(mode="RGBA") if image is None else image}
    files |= {} if mask is None else {"mask": mask}
    data = {"prompt": "a red apple", "response_format": "b64_json", "seed": "3", **fields}
    return client.post(EDITS, files=files, data=data)


def encode(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def vary(client, *images, **fields):
    files = [("image" if len(images) == 1 else "image[]", image) for image in images]
    return client.post(VARIATIONS, files=files, data={"response_format": "b64_json", **fields})
