"""The stream: source → bounded queue → preprocess → engine → predictions, overlay, recording.

One source runs in one `runtime.StreamRuntime`; everything that is counted is keyed by reason or
stage in `metrics.StreamMetrics`, and every frame carries its ``source_id``.
"""

__all__: list[str] = []
