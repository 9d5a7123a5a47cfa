from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_stream import FakeApp

from apps.streaming.config import ServeConfig
from apps.streaming.serve import PageServer, make_token
from pipeline.errors import UsageError

TOKEN = "only-for-the-tests-7"
ADDRESSES = ("/", "/static/page.js", "/api/view", "/metrics", "/healthz", "/readyz", "/video", "/nothing")

Serve = Callable[..., PageServer]
Ask = Callable[..., Any]


@pytest.mark.parametrize("path", ADDRESSES)
def test_with_a_token_every_address_asks_for_it(serve: Serve, asking: Ask, path: str) -> None:
    server = serve(token=TOKEN)
    assert asking(server, path).status == 401
    assert asking(server, path, Authorization=f"Bearer {TOKEN}x").status == 401
    assert asking(server, path + f"?token={TOKEN[:-1]}").status == 401


def test_the_three_ways_to_show_it(serve: Serve, asking: Ask) -> None:
    server = serve(token=TOKEN)
    assert asking(server, "/api/view", Authorization=f"Bearer {TOKEN}").status == 200
    opened = asking(server, f"/?token={TOKEN}")
    assert opened.status == 200
    cookie = opened.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert TOKEN not in cookie
    assert asking(server, "/api/view", Cookie=cookie.partition(";")[0]).status == 200
    assert asking(server, "/api/view", Cookie=cookie.partition(";")[0] + "0").status == 401


def test_a_wrong_token_gets_no_cookie_and_bytes_are_no_crash(serve: Serve, asking: Ask) -> None:
    server = serve(token=TOKEN)
    assert "Set-Cookie" not in asking(server, "/?token=wrong").headers
    assert asking(server, "/?token=%ff%fe").status == 401
    assert asking(server, "/", Cookie="edgefold_0=\xff\xfe").status == 401
    assert asking(server, "/", Authorization="Bearer \xff").status == 401


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "10.0.0.5", "127.0.0.1.evil.example", ""]
)
def test_without_a_token_another_name_is_refused(serve: Serve, asking: Ask, host: str) -> None:
    """DNS rebinding: the browser connects to 127.0.0.1 and names the attacker's site."""
    answer = asking(serve(), "/api/view", Host=host)
    assert answer.status == 403
    assert "--token" in answer.text


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9000", "127.0.0.1:1", "[::1]:8080"])
def test_loopback_by_any_of_its_names(serve: Serve, asking: Ask, host: str) -> None:
    assert asking(serve(), "/api/view", Host=host).status == 200


def test_with_a_token_any_name_will_do(serve: Serve, asking: Ask) -> None:
    answer = asking(serve(token=TOKEN), "/", Host="cameras.example", Authorization=f"Bearer {TOKEN}")
    assert answer.status == 200


@pytest.mark.parametrize("path", ["/", "/static/page.css", "/api/view", "/nothing"])
def test_security_headers_on_every_answer(serve: Serve, asking: Ask, path: str) -> None:
    headers = asking(serve(), path).headers
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"


def test_the_page_fetches_nothing_from_elsewhere(serve: Serve, asking: Ask) -> None:
    server = serve()
    for path in ("/", "/static/page.js", "/static/video.js", "/static/page.css"):
        text = asking(server, path).text
        assert "http://" not in text
        assert "https://" not in text
        assert "style=" not in text


def test_a_command_needs_the_header_and_this_page(serve: Serve, asking: Ask, app: FakeApp) -> None:
    server = serve()
    assert asking(server, "/reload", "POST").status == 403
    assert asking(server, "/reload", "POST", X_Edgefold="1", Origin="http://evil.example").status == 403
    assert asking(server, "/reload", "POST", X_Edgefold="1", Origin="null").status == 403
    assert asking(server, "/reload", "GET", X_Edgefold="1").status == 405
    assert app.reloaded == []
    origin = server.url.rstrip("/")
    assert asking(server, "/reload", "POST", X_Edgefold="1", Origin=origin).status == 200
    assert app.reloaded == [None]
    assert asking(server, "/check", "POST", X_Edgefold="1").json() == {"preprocessing": "verified just now"}


def test_another_bundle_only_by_token(serve: Serve, asking: Ask, app: FakeApp) -> None:
    body = '{"bundle": "/srv/next"}'
    assert asking(serve(), "/reload", "POST", body, X_Edgefold="1").status == 403
    assert app.reloaded == []
    by_token = {"X_Edgefold": "1", "Authorization": f"Bearer {TOKEN}"}
    assert asking(serve(token=TOKEN), "/reload", "POST", body, **by_token).status == 200
    assert app.reloaded == [Path("/srv/next")]


@pytest.mark.parametrize(
    "body", ["{", "[]", '{"bundle": 3}', '{"bundel": "x"}', '{"bundle": "x", "force": 1}']
)
def test_a_body_that_is_no_command(serve: Serve, asking: Ask, app: FakeApp, body: str) -> None:
    by_token = {"X_Edgefold": "1", "Authorization": f"Bearer {TOKEN}"}
    assert asking(serve(token=TOKEN), "/reload", "POST", body, **by_token).status == 400
    assert app.reloaded == []


def test_a_body_without_end_is_cut(serve: Serve, asking: Ask) -> None:
    assert asking(serve(), "/reload", "POST", "x" * 100_000, X_Edgefold="1").status == 413


def test_a_refused_bundle_says_why(serve: Serve, asking: Ask, app: FakeApp) -> None:
    app.refuse = "model.onnx: SHA-256 differs"
    answer = asking(serve(), "/reload", "POST", X_Edgefold="1")
    assert answer.status == 422
    assert answer.json() == {"error": "IntegrityError", "message": "model.onnx: SHA-256 differs"}


@pytest.mark.parametrize("token", ["short", "long enough but with spaces", "ümlaut-ümlaut-ümlaut", "a;b" * 9])
def test_a_token_that_cannot_be_one(app: FakeApp, token: str) -> None:
    with pytest.raises(UsageError, match="at least 16"):
        PageServer(ServeConfig(port=0, token=token), app.view, app.reload, app.check)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", ""])
def test_beyond_loopback_a_token_is_needed(app: FakeApp, host: str) -> None:
    with pytest.raises(UsageError, match="no token"):
        PageServer(ServeConfig(host=host, port=0), app.view, app.reload, app.check)


def test_made_tokens_are_fit_and_differ(serve: Serve) -> None:
    assert serve(token=make_token()).url
    assert make_token() != make_token()
