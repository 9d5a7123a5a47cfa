"""Reading a model file once: what is hashed is what is parsed."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pipeline.errors import EngineError, IntegrityError

__all__ = ["read_model_bytes"]


def read_model_bytes(path: Path, sha256: str | None) -> bytes:
    """The bytes of a self-contained ONNX file, verified before anyone parses them.

    Args:
        path: the ONNX file.
        sha256: the digest it must have; ``None`` where the caller has just written the file itself.

    Raises:
        EngineError: the file cannot be read, or keeps tensors in other files.
        IntegrityError: the digest differs.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EngineError(f"model {path} cannot be read: {error.strerror or error}") from error
    if sha256 is not None:
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise IntegrityError(
                f"model {path} has SHA-256 {found}, but {sha256} is expected; it was not parsed. "
                "Rebuild it, or copy it again from where it was built"
            )
    _refuse_external_data(data, path)
    return data


def _refuse_external_data(data: bytes, path: Path) -> None:
    """Engines given a buffer look for external tensors in the current directory, which no digest covers."""
    if b"location" not in data:  # the mandatory key of every external tensor: its absence is proof
        return
    import onnx

    try:
        model = onnx.ModelProto.FromString(data)
    except Exception as error:
        raise EngineError(f"model {path} is not an ONNX file: {error}") from error
    graphs = [model.graph]
    while graphs:
        graph = graphs.pop()
        tensors = list(graph.initializer)
        for sparse in graph.sparse_initializer:
            tensors += [sparse.values, sparse.indices]
        for node in [*graph.node, *(node for function in model.functions for node in function.node)]:
            for attribute in node.attribute:
                tensors += [attribute.t, *attribute.tensors]
                graphs += [g for g in (attribute.g, *attribute.graphs) if g.node]
        for tensor in tensors:
            if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
                raise EngineError(
                    f"model {path} keeps tensor {tensor.name!r} in another file, which its digest does not "
                    "cover; save it as one self-contained ONNX file"
                )
