"""Shared memory and messages: what is handed over arrives, and what is not true is refused."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest

from apps.streaming.capture.fingerprint import fingerprint
from apps.streaming.capture.messages import (
    Dropped,
    Ended,
    Failed,
    FrameReady,
    Labels,
    Message,
    Opened,
    RingReady,
    decode,
    encode,
)
from apps.streaming.capture.ring import RingReader, RingWriter
from pipeline.artifacts import YuvCoding

FRAME = FrameReady(3, 5, 1080, 1920, "BGR", None, 123456789012345, 0.004, 0xFFFFFFFF)
PLANES = [
    YuvCoding("bt601", False, "left"),
    YuvCoding("bt709", False, "center"),
    YuvCoding("bt709", True, "left"),
]


def test_what_is_written_is_read_and_outlives_both_sides() -> None:
    writer = RingWriter(2, 24)
    reader = RingReader(writer.fd, 2, 24)
    os.close(writer.fd)
    slot = writer.acquire()
    assert slot == 0
    writer.view(slot, (2, 4, 3))[...] = np.arange(24).reshape(2, 4, 3)
    seen = reader.view(slot, (2, 4, 3))
    del writer, reader
    assert (seen == np.arange(24).reshape(2, 4, 3)).all()


def test_slots_are_given_out_once_lowest_first() -> None:
    writer = RingWriter(3, 10)
    os.close(writer.fd)
    assert [writer.acquire() for _ in range(4)] == [0, 1, 2, None]
    writer.release(1)
    writer.release(0)
    assert writer.acquire() == 0


def test_a_ring_cannot_be_shrunk_under_its_reader() -> None:
    writer = RingWriter(1, 10_000)
    with pytest.raises(PermissionError):
        os.ftruncate(writer.fd, 1)
    os.close(writer.fd)


def test_a_ring_that_is_not_what_it_claims_is_refused() -> None:
    writer = RingWriter(1, 4096)
    with pytest.raises(ValueError, match="announced"):
        RingReader(writer.fd, 2, 4096)
    with pytest.raises(ValueError, match="slots"):
        RingReader(writer.fd, 1 << 20, 1 << 20)
    reader = RingReader(writer.fd, 1, 4096)
    os.close(writer.fd)
    for slot, shape in ((1, (2, 2)), (-1, (2, 2)), (0, (65, 64)), (0, (0, 4)), (0, (1 << 31, 1 << 31, 4))):
        with pytest.raises(ValueError, match="slots"):
            reader.view(slot, shape)
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 4096)
    with pytest.raises(ValueError, match="sealed"):
        RingReader(unsealed, 1, 4096)
    os.close(unsealed)


@pytest.mark.parametrize(
    "message",
    [
        FRAME,
        *(replace(FRAME, pixel_format="I420", yuv=coding) for coding in PLANES),
        RingReady(1, 8, 6_220_800),
        Labels(("a", "b")),
        Opened(29.97, ("note",)),
        Dropped("no image", 3),
        Ended(()),
        Failed("SourceLostError", "404", "seldom"),
    ],
)
def test_a_message_survives_its_datagram(message: Message) -> None:
    assert decode(encode(message)) == message


@pytest.mark.parametrize(
    "datagram",
    [
        b"F123",
        encode(FRAME).replace(b"F", b"F", 1)[:15] + b"\xff" + encode(FRAME)[16:],
        encode(replace(FRAME, pixel_format="I420")),
        encode(replace(FRAME, yuv=PLANES[0])),
        encode(replace(FRAME, pixel_format="I420", yuv=PLANES[0], height=1079)),
        encode(replace(FRAME, pixel_format="I420", yuv=PLANES[0])).replace(b"\x05\x01", b"\x05\x09"),
        b"{}",
        b'["Opened", {"fps": "fast", "notes": []}]',
        b'["Opened", {"fps": NaN, "notes": []}]',
        b'["Dropped", {"reason": "x", "count": -1}]',
        b'["Dropped", {"reason": "x", "count": 1, "more": 1}]',
        b'["CaptureTask", {}]',
        b"\x80\x04N.",
        b"[" * 60_000,
    ],
)
def test_nonsense_is_refused(datagram: bytes) -> None:
    with pytest.raises(ValueError, match=r"frame|message"):
        decode(datagram)


def test_the_shape_of_planes() -> None:
    assert replace(FRAME, pixel_format="I420", yuv=PLANES[0]).shape == (1620, 1920)
    assert (FRAME.shape, replace(FRAME, pixel_format="GRAY").shape) == ((1080, 1920, 3), (1080, 1920))


def test_a_fingerprint_sees_one_digit_change() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (1080, 1920, 3), np.uint8)
    changed = image.copy()
    changed[40:72, 100:116] ^= 0xFF  # a digit of a clock, 32 × 16
    assert fingerprint(image) == fingerprint(image.copy())
    assert fingerprint(image) != fingerprint(changed)
