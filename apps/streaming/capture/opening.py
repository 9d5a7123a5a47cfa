"""From a configured source to its feed."""

from __future__ import annotations

import functools
from collections.abc import Callable

from apps.streaming.capture.child import CaptureTask
from apps.streaming.capture.supervisor import ProcessFeed
from apps.streaming.capture.threaded import ThreadFeed
from apps.streaming.config import CaptureLimits, SourceConfig
from apps.streaming.contracts import Feed
from apps.streaming.metrics import StreamMetrics
from apps.streaming.queues import DropPolicy
from apps.streaming.sources import ModelClasses, Source, SourceUri, open_source

__all__ = ["DEFAULT_BUFFERS", "open_feed"]

DEFAULT_BUFFERS = 8
"""Frames of one source that may be in use: one waits, one is written, the others are the runtime's.
Memory is touched only as far as they are really needed."""


def open_feed(
    source: SourceConfig,
    uri: SourceUri,
    classes: ModelClasses,
    limits: CaptureLimits,
    metrics: StreamMetrics,
    *,
    buffers: int = DEFAULT_BUFFERS,
    opener: Callable[[SourceUri, ModelClasses, float | None], Source] = open_source,
) -> Feed:
    """The feed of a source; nothing is opened before `Feed.start`.

    Args:
        source: as configured; `source.uri` is not read.
        uri: parsed from it.
        classes: the engine's.
        limits: when the source is in trouble, and how often it is tried again.
        metrics: the source's own; ``frames_read = frames_inferred + dropped + in flight`` holds with it,
            over restarts too, where the runtime counts what it took.
        buffers: frames in use at the same time, at least the runtime's and 2.
        opener: opens the source; a function of a module, since a capture process may call it.
    """
    policy: DropPolicy = source.policy or ("newest" if uri.live else "every")
    name = source.name or uri.shown
    if not uri.foreign:
        return ThreadFeed(
            functools.partial(opener, uri, classes, source.fps),
            name,
            uri.live,
            policy,
            source.fps,
            limits,
            metrics,
            buffers,
        )
    task = CaptureTask(opener, uri, classes, source.fps, policy, buffers, skip=0)
    # One that loops has no place to come back to: it begins again.
    resumes = not uri.live and not uri.options.loop
    return ProcessFeed(task, name, uri.live, limits, metrics, resumes=resumes)
