"""What becomes of the answers about one source: events, predictions, recording, window, page.

A picture with the overlay is drawn only when somebody looks: a recording, a window, or a client of the
page that is due one. It is a new array, so the frame's buffer goes back to its source whoever keeps it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from apps.streaming.config import EventConfig, RecordConfig, StreamConfig
from apps.streaming.contracts import Event, EventOutput, PictureHub
from apps.streaming.metrics import MetricsSnapshot
from apps.streaming.overlay import OverlayPainter
from apps.streaming.predictions import Prediction
from apps.streaming.runtime import Answer
from apps.streaming.scheduling import RuntimeFeed
from apps.streaming.sinks import PredictionLog, Recorder, Sink, Window, check_mp4_path
from apps.streaming.sources import DEFAULT_FPS
from pipeline.metrics import probabilities

if TYPE_CHECKING:
    from apps.streaming.events import EventTracker
    from apps.streaming.recording import SegmentRecorder

__all__ = ["SourceOutput", "open_event_outputs"]


class SourceOutput:
    """Takes the answers about one source, in the calling thread of the runtime.

    Args:
        source: the feed, and its metrics for the overlay.
        record: where its pictures are recorded.
        window: where its pictures are shown.
        predictions: the log of all sources; closed by the caller.
        events: when a label is in view; ``None``: no events are made.
        event_outputs: where events go; closed by the caller.
        hub: the page's pictures.
        silence_s: without a frame for so long nothing is in view.

    Raises:
        UsageError: the recording cannot go where it is to go.
    """

    def __init__(
        self,
        source: RuntimeFeed,
        *,
        record: RecordConfig | None = None,
        window: Window | None = None,
        predictions: PredictionLog | None = None,
        events: EventConfig | None = None,
        event_outputs: Sequence[EventOutput] = (),
        hub: PictureHub | None = None,
        silence_s: float = 2.0,
    ) -> None:
        self._source = source
        self._record = record
        self._window = window
        self._hub = hub
        self._events = events
        self._event_outputs = tuple(event_outputs)
        self._silence_s = silence_s
        self._sinks: list[Sink] = [sink for sink in (predictions, window) if sink is not None]
        self._owned: list[Sink] = [] if window is None else [window]
        self._segments: SegmentRecorder | None = None
        self._painter: OverlayPainter | None = None
        self._tracker: EventTracker | None = None
        self._labels: tuple[str, ...] = ()
        self.latest: Prediction | None = None
        self.present: tuple[str, ...] = ()
        """Labels that entered and have not left."""
        if record is not None and record.path.suffix:
            check_mp4_path(record.path)

    @property
    def needs_images(self) -> bool:
        """Whether pictures may be drawn."""
        return self._record is not None or self._window is not None or self._hub is not None

    @property
    def user_closed(self) -> bool:
        """Whether the user closed the window."""
        return self._window is not None and self._window.closed

    def take(self, answer: Answer) -> None:
        """One answer; raises `EdgefoldError` where a sink cannot keep it."""
        frame, prediction = answer.frame, answer.prediction
        self.latest = prediction
        if self._events is not None:
            self._track(answer, self._events)
        if self._record is not None:
            self._open_recording(self._record)
        picture = None
        if any(sink.needs_picture for sink in self._sinks):
            picture = self._draw(answer, self._source.metrics.snapshot())
        for sink in self._sinks:
            sink.write(frame, prediction, picture)
        if self._hub is not None and self._hub.wanted(frame.source_id):
            # The page has the figures beside the picture.
            self._hub.publish(frame.source_id, self._draw(answer, None))

    def tick(self) -> None:
        """Looks at the clock: what is in view of a source that fell silent leaves."""
        if self._tracker is not None:
            self._publish(self._tracker.tick(time.monotonic_ns()))
            self.present = tuple(self._tracker.present)

    def stop(self) -> None:
        """Begins to complete the recording, so that those of all sources are completed at the same time."""
        if self._segments is not None:
            self._segments.stop()

    def close(self) -> None:
        """Completes the recording, closes the window, and lets every label leave; twice is harmless."""
        with ExitStack() as stack:
            for sink in self._owned:
                stack.callback(sink.close)
            if self._tracker is not None:
                self._publish(self._tracker.close(time.monotonic_ns()))
                self._tracker, self.present = None, ()

    def _track(self, answer: Answer, config: EventConfig) -> None:
        from apps.streaming.events import EventTracker

        if self._tracker is None or answer.labels != self._labels:
            if self._tracker is not None:  # another engine, with other classes: what was in view is over
                self._publish(self._tracker.close(answer.frame.timestamp_ns))
            source_id = self._source.feed.source_id
            self._tracker = EventTracker(config, answer.labels, source_id, silence_s=self._silence_s)
            self._labels = answer.labels
        confidences = probabilities(answer.scores[np.newaxis])[0]
        self._publish(self._tracker.update(answer.frame, confidences))
        self.present = tuple(self._tracker.present)

    def _publish(self, events: Sequence[Event]) -> None:
        for event in events:
            for output in self._event_outputs:
                output.publish(event)

    def _open_recording(self, record: RecordConfig) -> None:
        """At the first frame, when the rate of the source is known."""
        feed = self._source.feed
        fps = feed.status().fps or DEFAULT_FPS
        # Frame by frame where nothing is dropped; else by time, or the video would run too fast.
        by_time = feed.policy == "newest" or feed.live
        sink: Sink
        if record.path.suffix:
            sink = Recorder(record.path, fps, by_time)
        else:
            from apps.streaming.recording import SegmentRecorder, open_recording

            sink = open_recording(record, fps, by_time, feed.source_id)
            self._segments = sink if isinstance(sink, SegmentRecorder) else None
        self._sinks.append(sink)
        self._owned.append(sink)
        self._record = None

    def _draw(self, answer: Answer, metrics: MetricsSnapshot | None) -> NDArray[np.uint8]:
        if self._painter is None:
            self._painter = OverlayPainter()
        frame = answer.frame
        return self._painter.draw(frame.image, frame.pixel_format, answer.prediction, metrics, frame.yuv)


def open_event_outputs(config: StreamConfig, source_ids: Sequence[str]) -> Iterator[tuple[str, EventOutput]]:
    """What events are written or sent to, each with its name in the metrics; opened as it is asked for, so that the
    caller can close those before one that fails.

    Raises:
        UsageError: a file that cannot be written, or a wrong URL or topic.
        UnsupportedError: a package is missing.
    """
    if config.events is not None and config.events.log is not None:
        from apps.streaming.events import EventLog

        yield "log", EventLog(config.events.log)
    if config.mqtt is not None:
        from apps.streaming.mqtt import MqttPublisher

        yield "mqtt", MqttPublisher(config.mqtt, source_ids)
