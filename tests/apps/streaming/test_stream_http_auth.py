from __future__ import annotations

import pytest

from apps.streaming.sources.http_auth import Credentials, authorization
from apps.streaming.sources.rtsp import video_codec

MUFASA = Credentials("Mufasa", "Circle of Life")
NONCE = "7ypf/xlj9XXwfDPEoM4URrv/xwf94BcCAzFZH4GiTo0v"
OPAQUE = "FQhe/qaU925kfnzjCev0ciny7QMkPqMAFRtzCUYo5tdS"
CNONCE = "f2/wE4q74E6zIJEtWaHKaf5wv/H5QzzpXusqGemxURZJ"


def challenge(algorithm: str) -> str:
    return (
        f'Digest realm="http-auth@example.org", qop="auth, auth-int", algorithm={algorithm}, '
        f'nonce="{NONCE}", opaque="{OPAQUE}"'
    )


@pytest.mark.parametrize(
    ("algorithms", "response"),
    [
        (["MD5"], "8ca523f5e9506fed4657c9700eebdbec"),
        # The strongest is taken, whatever the order.
        (["MD5", "SHA-256"], "753927fa0e85d155564e2e272a28d1802ca10daf4496794697cf8db5856cb6c1"),
    ],
)
def test_the_example_of_rfc_7616(algorithms: list[str], response: str) -> None:
    header = authorization([challenge(a) for a in algorithms], MUFASA, "GET", "/dir/index.html", CNONCE)
    assert header is not None
    assert f'response="{response}"' in header
    assert f'opaque="{OPAQUE}"' in header
    assert "qop=auth, nc=00000001" in header


def test_digest_without_qop_is_rfc_2069s() -> None:
    # The example of RFC 2069, section 2.4, as its erratum corrects it.
    offered = 'Digest realm="testrealm@host.com", nonce="dcd98b7102dd2f0e8b11d0f600bfb0c093"'
    header = authorization([offered], Credentials("Mufasa", "CircleOfLife"), "GET", "/dir/index.html")
    assert header is not None
    assert 'response="1949323746fe6a43ef61f9606e7febea"' in header
    assert "qop" not in header


def test_basic_and_unknown_schemes() -> None:
    user = Credentials("Aladdin", "open sesame")
    assert authorization(['Basic realm="x"'], user, "GET", "/") == "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="
    assert authorization(['Basic realm="x"', challenge("MD5")], user, "GET", "/").startswith("Digest ")  # type: ignore[union-attr]
    assert authorization(["Negotiate"], user, "GET", "/") is None
    assert "open sesame" not in repr(user)


@pytest.mark.parametrize(
    ("sdp", "codec"),
    [
        ("v=0\r\nm=video 0 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\n", "H264"),
        ("v=0\nm=audio 0 RTP/AVP 8\nm=video 0 RTP/AVP 97\na=rtpmap:97 h265/90000\n", "H265"),
        ("v=0\r\nm=video 0 RTP/AVP 26\r\n", "JPEG"),
        ("v=0\r\nm=audio 0 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\n", None),
        ("", None),
    ],
)
def test_the_codec_of_a_description(sdp: str, codec: str | None) -> None:
    assert video_codec(sdp) == codec
