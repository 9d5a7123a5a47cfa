"""Where frames come from. `apps.streaming.uris` has the syntax; `docs/sources.md` the examples."""

from apps.streaming.sources.opening import open_source
from apps.streaming.sources.source import DEFAULT_FPS, Delivered, ModelClasses, Source
from apps.streaming.uris import SourceUri, parse_source

__all__ = ["DEFAULT_FPS", "Delivered", "ModelClasses", "Source", "SourceUri", "open_source", "parse_source"]
