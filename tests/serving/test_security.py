"""Keys, hosts, uploads, paths and logs."""

from __future__ import annotations

import io
import json
import logging
import re
import struct
import zlib

import pytest
from PIL import Image
from serving_helpers import CONFIG, client, client_of, load, png

from unclip.serving.app import create_app
from unclip.serving.config import ServerConfig, is_loopback
from unclip.serving.logs import JSONFormatter, log_warning

KEY = "sk-0123456789abcdef"
PUBLIC = {"/", "/page/{name}", "/healthz", "/readyz", "/v1/files/{name:path}"}
BEARER = {"authorization": f"Bearer {KEY}"}
GENERATIONS, EDITS, VARIATIONS = (
    f"/v1/images/{name}" for name in ("generations", "edits", "variations")
)


@pytest.fixture(scope="module")
def keyed(load):
    with client_of(load, api_keys=("another", KEY), host="0.0.0.0") as client:
        yield client


def routes(app):
    """Return every (method, path) that the application answers."""
    found = set()
    for route in app.routes:
        inner = getattr(route, "routes", None) or getattr(
            getattr(route, "original_router", None), "routes", [route]
        )
        for one in inner:
            found |= {(method, one.path) for method in one.methods}
    return found


def test_every_route_but_the_public_ones_needs_a_key(load, keyed):
    found = routes(create_app(CONFIG, load))
    assert {path for _, path in found} >= PUBLIC | {GENERATIONS, "/v1/models", "/metrics"}
    for method, path in found:
        address = re.sub(r"\{.*?\}", "x", path)
        status = keyed.request(method, address).status_code
        if path in PUBLIC:
            assert status != 401, (method, path)
        else:
            assert status == 401, (method, path)
            assert keyed.request(method, address, headers=BEARER).status_code != 401
    for method, path in (("POST", "/"), ("GET", "/v1/nothing"), ("DELETE", "/v1/files/x")):
        assert keyed.request(method, path).status_code == 401


def test_wrong_and_missing_keys(keyed):
    missing = keyed.get("/v1/models")
    assert missing.json()["error"]["message"].startswith("You didn't provide an API key")
    for value in (f"Bearer {KEY}x", "Bearer another-key-of-mine", f"Basic {KEY}", "Bearer é"):
        response = keyed.get("/v1/models", headers={"authorization": value.encode("latin-1")})
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
    wrong = keyed.get("/v1/models", headers={"authorization": "Bearer sk-wrongwrongwrong"})
    error = wrong.json()["error"]
    assert error["code"] == "invalid_api_key"
    assert error["message"] == "Incorrect API key provided: sk-***rong."
    assert keyed.get("/v1/models", headers=BEARER).status_code == 200


def test_other_machines_need_a_key():
    with pytest.raises(ValueError, match="0.0.0.0"):
        ServerConfig(host="0.0.0.0")
    ServerConfig(host="0.0.0.0", api_keys=(KEY,))
    for key in ("", "a\nb"):
        with pytest.raises(ValueError):
            ServerConfig(api_keys=(key,))
    assert all(map(is_loopback, ("127.0.0.1", "localhost", "::1", "[::1]", "127.8.0.1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "example.com", "10.0.0.1", "")))


def test_urls_of_other_hosts_are_not_made_up(load, keyed):
    response = keyed.post(GENERATIONS, json={"prompt": "a"}, headers=BEARER)
    assert response.json()["error"]["param"] == "response_format"
    with client_of(load, public_base_url="https://images.example/") as client:
        response = client.post(GENERATIONS, json={"prompt": "a"})
        assert response.json()["data"][0]["url"].startswith("https://images.example/v1/files/")


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "evil.example:8000"},
        {"host": ""},
        {"origin": "https://evil.example"},
        {"origin": "null"},
    ],
)
def test_other_web_sites_cannot_use_a_server_without_keys(client, headers):
    assert client.get("/v1/models", headers=headers).status_code == 403


def test_the_public_address_is_compared_as_browsers_write_it(load):
    with client_of(load, public_base_url="https://Images.Example:443/api") as client:
        for headers in ({}, {"origin": "https://images.example"}):
            headers = {"host": "images.example", **headers}
            assert client.get("/v1/models", headers=headers).status_code == 200
        headers = {"host": "images.example", "origin": "https://images.example:8443"}
        assert client.get("/v1/models", headers=headers).status_code == 403


def test_the_page_may_use_its_own_server(client):
    for headers in ({"origin": "http://127.0.0.1"}, {"host": "localhost:8000"}, {"host": "[::1]"}):
        assert client.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", "x", "", "a/b", "%00"]
)
def test_paths_cannot_leave_the_storage(load, tmp_path, name):
    (tmp_path / "secret").write_text("secret")
    with client_of(load, storage=str(tmp_path / "results")) as client:
        for prefix in ("/v1/files/", "/page/", "/"):
            response = client.get(prefix + name)
            if prefix + name != "/":
                assert response.status_code == 404, prefix + name
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}


# -- uploads


def upload(client, data, **headers):
    files = {"image": ("image.png", data, "image/png")}
    return client.post(EDITS, files=files, data={"prompt": "a"}, headers=headers)


def bomb(side):
    """A PNG of a few bytes whose header declares side x side pixels."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_large_images_are_refused_by_their_header(client):
    for side in (4097, 50_000, 2**31 - 1):
        message = upload(client, bomb(side)).json()["error"]["message"]
        assert "Uploaded image" in message
    assert "damaged" in upload(client, bomb(4096)).json()["error"]["message"]


def test_the_type_of_an_upload_is_that_of_its_content(client):
    gif = io.BytesIO()
    Image.new("L", (8, 8)).save(gif, "GIF")
    for data in (gif.getvalue(), b"<svg/>", b"%PDF-1.4", png(kind="BMP")):
        assert "PNG, JPEG or WebP" in upload(client, data).json()["error"]["message"]
    files = {"image": ("x.exe", png(mode="RGBA"), "application/octet-stream")}
    data = {"prompt": "a", "response_format": "b64_json"}
    assert client.post(EDITS, files=files, data=data).status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_large_bodies_are_refused_while_they_arrive(load, chunked):
    with client_of(load, max_body=100_000) as client:
        data = b"x" * 300_000
        if chunked:
            response = client.post(
                GENERATIONS,
                content=(data[i : i + 1000] for i in range(0, len(data), 1000)),
                headers={"content-type": "application/json"},
            )
        else:
            response = upload(client, data)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"


def test_no_url_is_fetched(client, monkeypatch):
    import socket

    def connect(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", connect)
    for image in ("http://127.0.0.1/x.png", "https://e.example/x", "file:///etc/passwd"):
        for body in ({"image": image}, {"images": [{"image_url": image}]}):
            response = client.post(EDITS, json={"prompt": "a", **body})
            assert response.status_code == 400
            assert "URL" in response.json()["error"]["message"]


# -- logs and headers


def logged(load, caplog, **changes):
    with caplog.at_level(logging.DEBUG, "unclip.serving"):
        with client_of(load, api_keys=(KEY,), **changes) as client:
            body = {"prompt": "a secret prompt", "response_format": "b64_json"}
            assert client.post(GENERATIONS, json=body, headers=BEARER).status_code == 200
            client.get("/v1/models", headers={"authorization": "Bearer sk-secretsecretsecret"})
    return [json.loads(JSONFormatter().format(record)) for record in caplog.records]


def test_logs_have_no_prompts_and_keys(load, caplog):
    entries = logged(load, caplog)
    request = next(entry for entry in entries if entry.get("route") == GENERATIONS)
    assert (request["status"], request["images"], request["model"]) == (200, 1, "tiny")
    assert request["request_id"].startswith("req_") and request["ms"] > 0
    text = json.dumps(entries)
    assert "secret" not in text and KEY not in text


def test_warnings_do_not_quote_prompts(load, tiny_pipe, recwarn):
    prompts = ["secret " * 100, "sécrèt"]  # too long; without a known word
    tiny_pipe(prompts, progress=False)
    assert len({warning.category for warning in recwarn if "cret" in str(warning.message)}) > 0
    recwarn.clear()
    with client_of(load) as client:
        for prompt in prompts:
            body = {"prompt": prompt, "response_format": "b64_json"}
            assert client.post(GENERATIONS, json=body).status_code == 200
    assert not recwarn.list


def test_python_warnings_are_log_lines(caplog):
    log_warning(UserWarning("guidance is 500"), UserWarning, "file.py", 1)
    (record,) = caplog.records
    entry = json.loads(JSONFormatter().format(record))
    assert (entry["event"], entry["text"]) == ("warning", "guidance is 500")


def test_prompts_are_logged_on_request(load, caplog):
    assert "a secret prompt" in json.dumps(logged(load, caplog, log_prompts=True))


def test_responses_have_security_headers(client):
    for path in ("/", "/v1/models", "/healthz", "/nothing"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy and "http:" not in policy and "*" not in policy


def test_pages_of_allowed_origins_may_call_the_api(load):
    shop, other = "https://shop.example", "https://other.example"
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "x-a"}
    with client_of(load, allow_origins=(shop,)) as client:
        preflight = client.options(GENERATIONS, headers={"origin": shop, **asked})
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == shop
        assert client.options(GENERATIONS, headers={"origin": other, **asked}).status_code == 400
        answer = client.post(GENERATIONS, json={}, headers={"origin": shop})
        assert answer.status_code == 400  # of the body; the page may read it
        assert answer.headers["access-control-allow-origin"] == shop
        assert answer.headers["cross-origin-resource-policy"] == "cross-origin"
        refused = client.get("/v1/models", headers={"origin": other})
        assert refused.status_code == 403 and "access-control-allow-origin" not in refused.headers


@pytest.mark.parametrize("origin", ["*", "shop.example", "https://shop.example/page"])
def test_a_wrong_origin_is_rejected_at_the_start(origin):
    with pytest.raises(ValueError, match=re.escape(origin)):
        ServerConfig(allow_origins=(origin,))


def test_all_origins_need_a_key(load):
    with client_of(load, allow_origins=("*",), api_keys=(KEY,)) as client:
        headers = {"origin": "https://any.example", **BEARER}
        answer = client.get("/v1/models", headers=headers)
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "*"


def test_a_prompt_filter_refuses_prompts(load, tmp_path, monkeypatch):
    (tmp_path / "house_rules.py").write_text("def allowed(prompt):\n    return 'red' in prompt\n")
    monkeypatch.syspath_prepend(tmp_path)
    with client_of(load, prompt_filter="house_rules:allowed") as client:
        assert client.post(GENERATIONS, json={"prompt": "a red apple"}).status_code == 200
        refused = client.post(GENERATIONS, json={"prompt": "a blue apple", "stream": True})
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "content_policy_violation"
        variation = client.post(VARIATIONS, files={"image": png(16)})
        assert variation.status_code == 200  # it has no prompt


@pytest.mark.parametrize("name", ["no_such_module:f", "os:no_such_function", "os:name", "a b"])
def test_a_wrong_prompt_filter_is_rejected_at_the_start(name, load):
    with pytest.raises(ValueError, match=name):
        create_app(ServerConfig(prompt_filter=name), load)
