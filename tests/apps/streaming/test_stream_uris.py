from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from apps.streaming.redaction import redact_urls
from apps.streaming.uri_options import SourceOptions
from apps.streaming.uris import parse_source
from pipeline.errors import DataError, UnsupportedError, UsageError


@pytest.mark.parametrize(
    ("uri", "kind", "live", "foreign"),
    [
        ("synthetic:7", "synthetic", True, False),
        ("synthetic:7:50#loop", "synthetic", False, False),
        ("csi:0", "csi", True, True),
        ("rtsp://cam.local/stream", "rtsp", True, True),
        ("rtsps://[fe80::1]:322/stream", "rtsp", True, True),
        ("http://cam.local/video.cgi?fps=5", "http", True, True),
        ("https://files.local/clip.MP4?x=1", "http", False, True),
        ("/dev/v4l/by-id/usb-Absent_Camera-index0", "v4l2", True, True),
        ("gst:videotestsrc is-live=true ! videoconvert", "gst", True, True),
        ("gst:videotestsrc num-buffers=5", "gst", False, True),
    ],
)
def test_kinds(uri: str, kind: str, live: bool, foreign: bool) -> None:
    parsed = parse_source(uri)
    assert (parsed.kind, parsed.live, parsed.foreign) == (kind, live, foreign)
    assert parsed.shown == uri
    assert pickle.loads(pickle.dumps(parsed)) == parsed


def test_paths_have_a_kind_and_options(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"x")
    parsed = parse_source(f"{tmp_path}/clip.mp4#t=1:30,1:31:00.5&loop")
    assert (parsed.kind, parsed.path) == ("video", tmp_path / "clip.mp4")
    assert parsed.options == SourceOptions(start_s=90, end_s=5460.5, loop=True)
    assert parse_source(f"{tmp_path}#loop").options.loop
    # A name that holds a # is found before its end is taken for options.
    (tmp_path / "clip.mp4#loop").write_bytes(b"x")
    parsed = parse_source(f"{tmp_path}/clip.mp4#loop")
    assert (parsed.path, parsed.options.loop) == (tmp_path / "clip.mp4#loop", False)


def test_options_of_cameras() -> None:
    options = parse_source("/dev/v4l/by-id/cam#size=1280x720&fps=29.97&format=MJPG").options
    assert (options.size_wh, options.fps, options.format) == ((1280, 720), 29.97, "MJPG")
    uri = parse_source("rtsp://h/s#transport=udp&latency=50&timeout=2.5&decoder=software&backend=gstreamer")
    assert uri.address == "rtsp://h/s"
    assert uri.options == SourceOptions(
        transport="udp", latency_ms=50, timeout_s=2.5, decoder="software", backend="gstreamer"
    )


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("rtsp://h/s#speed=2", "unknown option 'speed'; a rtsp source has: transport, latency, timeout"),
        ("synthetic:1#t=3", "unknown option 't'; a synthetic source has: loop"),
        ("synthetic:1#loop", "has no end"),
        ("rtsp://h/s#transport=quic", "transport=quic is not tcp or udp"),
        ("rtsp://h/s#latency=-1", "milliseconds from 0 to 10000"),
        ("rtsp://h/s#timeout=0", "seconds from 0.5 to 60"),
        ("rtsp://h/s#timeout=nan", "seconds from 0.5 to 60"),
        ("rtsp://h/s#timeout=2&timeout=3", "given twice"),
        ("rtsp://h/s#tls=unverified", "an option of rtsps"),
        ("rtsp://h/s#decoder=hardware&backend=ffmpeg", "leave backend=ffmpeg out"),
        ("csi:0#size=1920", "WIDTHxHEIGHT"),
        ("csi:0#size=1x99999", "WIDTHxHEIGHT"),
        ("csi:0#fps=0", "frames a second from 0.1"),
        ("csi:x", "csi:SENSOR_ID"),
        ("csi:99", "csi:SENSOR_ID"),
        ("/dev/v4l/by-id/cam#format=jpeg", "FourCC"),
        ("rtsp://", "is not SCHEME://"),
        ("rtsp:///stream", "is not SCHEME://"),
        ("rtsp://h:99999/s", "is not SCHEME://"),
        ("http://h/a b", "holds a space"),
        ("http://h/a\r\nX-Injected: 1", "control characters"),
        ("http://${HOST_NAME}/a", "in the userinfo and the query only"),
    ],
)
def test_malformed(uri: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_source(uri)


@pytest.mark.parametrize("t", ["", "5,5", "5,2", "x", "1:99", "-1", ",", "5,"])
def test_malformed_intervals(tmp_path: Path, t: str) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"is not START\[,END\]"):
        parse_source(f"{tmp_path}/clip.mp4#t={t}")


def test_seeking_needs_ffmpeg(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"x")
    for option in ("backend=gstreamer", "decoder=hardware"):
        with pytest.raises(UsageError, match="t= needs the FFmpeg back-end"):
            parse_source(f"{tmp_path}/clip.mp4#t=1&{option}")


def test_a_camera_named_by_id_may_be_away_but_must_stay_in_its_folder() -> None:
    assert parse_source("/dev/v4l/by-path/pci-0000:00:14.0-usb").path.name == "pci-0000:00:14.0-usb"
    with pytest.raises((DataError, UnsupportedError), match=r"not a video capture device|no such device"):
        parse_source("/dev/v4l/by-id/../../null")


SECRET = "S3cr3t/pass word"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("rtsp://admin:hunter22@h:554/s#transport=udp", "rtsp://***@h:554/s#transport=udp"),
        ("http://h/v?user=me&password=hunter22&fps=5", "http://h/v?user=me&password=***&fps=5"),
        ("http://h/v?access_token=hunter22", "http://h/v?access_token=***"),
        (
            "gst:rtspsrc location=rtsp://admin:hunter22@h/s user-pw=hunter22 ! decodebin",
            "gst:rtspsrc location=rtsp://***@h/s user-pw=*** ! decodebin",
        ),
    ],
)
def test_credentials_are_not_shown(uri: str, shown: str) -> None:
    parsed = parse_source(uri)
    assert parsed.shown == shown
    assert "hunter22" not in repr(parsed)
    assert "hunter22" in parsed.address
    log = f"[rtsp @ 0x1] cannot open {parsed.address}: hunter22 was refused"
    assert "hunter22" not in parsed.redact(log)
    assert "was refused" in parsed.redact(log)


def test_variables_are_expanded_encoded_and_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAM_PASSWORD", SECRET)
    parsed = parse_source("rtsp://admin:${CAM_PASSWORD}@h/s?key=${CAM_PASSWORD}")
    assert parsed.address == "rtsp://admin:S3cr3t%2Fpass%20word@h/s?key=S3cr3t%2Fpass%20word"
    assert parsed.shown == "rtsp://***@h/s?key=***"
    basic = "YWRtaW46UzNjcjN0L3Bhc3Mgd29yZA=="  # admin:S3cr3t/pass word
    for form in (SECRET, "S3cr3t%2Fpass%20word", basic):
        assert form not in parsed.redact(f"it said {form}, twice: {form}")
    monkeypatch.delenv("CAM_PASSWORD")
    with pytest.raises(UsageError, match="'CAM_PASSWORD' is not set"):
        parse_source("rtsp://admin:${CAM_PASSWORD}@h/s")


@pytest.mark.parametrize(
    "uri",
    [
        "rtsp://admin:hunter/22@h/s",  # unescaped: what stands before the slash is no port
        "rtsp://admin:hunter#22@h/s",
        "rtsp://admin:hunter22@h:port/s",
        "rtsp://admin:hunter22@/s",
        "rtsp://admin:hunter22@h/s#nonsense",
        "http://h/v?token=hunter22#nonsense",
        "gst:rtspsrc location=rtsp://a:hunter22@h/s user-pw=hunter22 ! filesink location=x",
        "gst:rtspsrc user-pw='hunter 22' ! decodebin",
    ],
)
def test_errors_hold_no_credentials(uri: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_source(uri)
    assert "hunter" not in str(caught.value)
    assert "hunter" not in str(caught.value.__cause__ or "")


def test_short_passwords_are_hidden_as_words_only() -> None:
    parsed = parse_source("rtsp://u:ab@h/s")
    assert parsed.redact("ab failed about ab.") == "*** failed about ***."


def test_text_without_credentials_is_left_alone() -> None:
    text = "rtsp://h:554/user@home?fps=5 opened; see https://example.org/a:b@c"
    assert redact_urls(text) == text


GOOD = [
    "videotestsrc",
    "v4l2src device=/dev/video0 ! image/jpeg,width=1280,height=720,framerate=30/1 ! jpegdec",
    "nvarguscamerasrc sensor-id=0 ! video/x-raw(memory:NVMM), width=(int)1920, format=(string)NV12 ! nvvidconv "
    "flip-method=2 ! video/x-raw, format=(string)BGRx",
    "rtspsrc location=rtsp://h/s latency=100 ! rtph264depay ! h264parse ! avdec_h264 ! videoconvert",
    'filesrc location="my clip!.mp4" ! decodebin',
    'udpsrc port=5000 caps="application/x-rtp,media=video,encoding-name=H264" ! rtph264depay ! avdec_h264',
]

BAD = [
    ("", "element 1 of the pipeline is empty"),
    ("videotestsrc !", "element 2 of the pipeline is empty"),
    ("videotestsrc ! filesink location=/etc/passwd", "'filesink' is not on the list"),
    ("videotestsrc ! tee name=t t. ! fakesink", "'tee' is not on the list"),
    ("videotestsrc ! shmsink socket-path=/tmp/x", "'shmsink' is not on the list"),
    ("fdsrc fd=3 ! decodebin", "'fdsrc' is not on the list"),
    ("uridecodebin uri=file:///etc/passwd", "'uridecodebin' is not on the list"),
    ("videotestsrc ! appsink", "'appsink' is not on the list"),
    ("videotestsrc ! filesrc location=x", "'filesrc' stands first, and nowhere else"),
    ("videoconvert ! videoscale", "'videoconvert' stands behind a source"),
    ("videotestsrc name=x ! videoconvert", "may not be given the property 'name'"),
    ("videotestsrc ! videoconvert dump-file=x", "may not be given the property 'dump-file'"),
    ("videotestsrc filesink location=x ! videoconvert", "what follows 'videotestsrc'"),
    ("videotestsrc pattern=0 x. ! videoconvert", "what follows 'videotestsrc'"),
    ("( videotestsrc ! videoconvert )", "neither an element"),
    ("bin.( videotestsrc )", "neither an element"),
    ('filesrc location="a" ! "filesink location=x"', "neither an element"),
    ('filesrc location="a\\" ! filesink location=x', "what follows|neither|not on the list"),
    ("filesrc location='a ! filesink location=b'", "what follows"),
    ("videotestsrc ! video/x-raw;audio/x-raw ! videoconvert", "neither an element"),
    ("video/x-raw,format=BGR ! videotestsrc", "neither an element"),
    ("videotestsrc ! capsfilter caps=video/x-raw(memory:CUDA) ! videoconvert", "the caps of|what follows"),
    ("videotestsrc pattern=0 ; filesink location=x", "what follows"),
]


@pytest.mark.parametrize("pipeline", GOOD)
def test_pipelines_that_are_allowed(pipeline: str) -> None:
    assert parse_source(f"gst:{pipeline}").address == pipeline


@pytest.mark.parametrize(("pipeline", "message"), BAD)
def test_pipelines_that_would_inject(pipeline: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_source(f"gst:{pipeline}")
