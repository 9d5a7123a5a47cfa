"""The camera app: feeds → one runtime → one engine → predictions, events, overlay, recording, page.

All sources run in one `runtime.StreamRuntime`. What is counted is keyed by reason or stage in a
`metrics.StreamMetrics` a source, and every frame carries its ``source_id``.
"""

__all__: list[str] = []
