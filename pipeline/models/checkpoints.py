"""Weights files: read without running code, unwrapped, compared with the model key by key.

A file is safetensors, or what ``torch.save`` wrote and ``torch.load(weights_only=True)`` accepts; there
is no fallback to unpickling code. The bytes that are hashed are the bytes that are parsed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import WeightsError

__all__ = ["Checkpoint", "head_size", "load_state", "read_checkpoint", "refuse_non_finite", "unwrap"]

State = dict[str, Tensor]

_EMA_KEYS = ("state_dict_ema", "model_ema", "ema")
_WRAPPER_KEYS = (*_EMA_KEYS, "state_dict", "model_state_dict", "model")
"""In order of preference; the averaged weights first, because they are the ones that were evaluated."""

_PREFIXES = ("module.", "_orig_mod.", "model.")
"""Of DataParallel and DistributedDataParallel, ``torch.compile``, and Lightning modules."""

_N_LISTED = 20


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A file as it was read: `content` is what the file holds, still wrapped."""

    path: Path
    sha256: str
    content: Any


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a safetensors file or a torch checkpoint, told apart by content.

    Raises:
        WeightsError: there is no such file, it is damaged, or it would run code.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"weights file {path} cannot be read: {error.strerror}") from error
    # A safetensors file is the length of its header (8 bytes) and the header, a JSON object.
    is_safetensors = data[8:9] == b"{"
    content = _parse(path, data, _parse_safetensors if is_safetensors else _parse_torch)
    return Checkpoint(path, hashlib.sha256(data).hexdigest(), content)


def _parse_safetensors(data: bytes) -> Any:
    from safetensors.torch import load

    return load(data)


def _parse_torch(data: bytes) -> Any:
    # Training scripts (timm's among them) store their command line; a Namespace carries no code.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _parse(path: Path, data: bytes, parse: Callable[[bytes], Any]) -> Any:
    try:
        return parse(data)
    except Exception as error:  # each parser raises a dozen types on damaged bytes
        # torch's own message goes on to recommend weights_only=False, which this never does.
        code = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if code:
            raise WeightsError(
                f"weights file {path} holds more than tensors: its pickle calls {code[1]}, and loading that could "
                "run any code. Where you trust the file, load it yourself and save the tensors alone: "
                "torch.save(model.state_dict(), FILE), or safetensors"
            ) from error
        detail = str(error).rpartition("WeightsUnpickler error: ")[2].strip().splitlines()
        raise WeightsError(
            f"weights file {path} ({len(data)} bytes) is neither safetensors nor a torch checkpoint, or is "
            f"damaged: {detail[0] if detail else type(error).__name__}"
        ) from error


def unwrap(checkpoint: Checkpoint, expected: Collection[str]) -> tuple[State, tuple[str, ...]]:
    """The state dict inside a checkpoint, with keys as the model has them.

    Wrapper dicts are opened (`_WRAPPER_KEYS`, or the only entry that is a dict of tensors), and
    prefixes that the model's own keys do not have are cut off.

    Args:
        checkpoint: from `read_checkpoint`.
        expected: the model's keys.

    Returns:
        The tensors by key, and a note on everything that was opened, cut or left aside.

    Raises:
        WeightsError: the file holds no state dict, or cutting a prefix would merge two keys.
    """
    notes: list[str] = []
    content = _to_mapping(checkpoint.path, checkpoint.content)
    while not _is_state(content):
        key = _wrapper_key(checkpoint.path, content)
        others = [
            other for other in _WRAPPER_KEYS if other != key and isinstance(content.get(other), Mapping)
        ]
        also = f" ({_listed(others)} left aside)" if others else ""
        notes.append(f"weights taken from {key!r} of the checkpoint{also}")
        content = _to_mapping(checkpoint.path, content[key])

    state: State = dict(content)
    if "n_averaged" not in expected:
        state.pop("n_averaged", None)  # the step counter of torch's AveragedModel
    prefixes = []
    while prefix := _foreign_prefix(state, expected):
        prefixes.append(prefix)
        state = _without_prefix(checkpoint.path, state, prefix)
    if prefixes:
        notes.append(f"prefix {''.join(prefixes)!r} cut off the checkpoint's keys")
    return state, tuple(notes)


def _to_mapping(path: Path, content: Any) -> Mapping[str, Any]:
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(
            f"weights file {path} holds {_describe(content)}, not a state dict; save model.state_dict()"
        )
    return content


def _is_state(content: Mapping[str, Any]) -> bool:
    return all(isinstance(value, Tensor) for value in content.values())


def _wrapper_key(path: Path, content: Mapping[str, Any]) -> str:
    for key in _WRAPPER_KEYS:
        if isinstance(content.get(key), Mapping):
            return key
    states = [
        key for key, value in content.items() if isinstance(value, Mapping) and value and _is_state(value)
    ]
    if len(states) == 1:
        return states[0]
    found = _listed(f"{key}: {_describe(value)}" for key, value in content.items())
    raise WeightsError(
        f"weights file {path} holds no state dict that can be told from the rest ({found}); save the tensors "
        f"alone, or under one of {', '.join(_WRAPPER_KEYS)}"
    )


def _describe(value: Any) -> str:
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, Mapping) else type(value).__name__


def _foreign_prefix(state: State, expected: Collection[str]) -> str | None:
    for prefix in _PREFIXES:
        in_model = any(key.startswith(prefix) for key in expected)
        if not in_model and any(key.startswith(prefix) for key in state):
            return prefix
    return None


def _without_prefix(path: Path, state: State, prefix: str) -> State:
    cut = {key.removeprefix(prefix): value for key, value in state.items()}
    if len(cut) != len(state):
        twice = [key for key in state if key.startswith(prefix) and key.removeprefix(prefix) in state]
        raise WeightsError(
            f"weights file {path} holds {_listed(twice)} both with and without the prefix {prefix!r}; "
            "save one state dict"
        )
    return cut


def head_size(expected: Mapping[str, Tensor], state: State) -> tuple[int, int] | None:
    """The class counts of the model and of the file where *only* the head differs, else ``None``.

    The head needs no name: it is what differs in its first dimension alone, by the same two numbers.
    """
    pairs = set()
    for key, tensor in expected.items():
        if key in state and state[key].shape != tensor.shape:
            model, file = tuple(tensor.shape), tuple(state[key].shape)
            if not model or not file or model[1:] != file[1:]:
                return None
            pairs.add((model[0], file[0]))
    return pairs.pop() if len(pairs) == 1 else None


def load_state(
    module: nn.Module, state: State, source: str, dropped: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Copies `state` into `module`, every key accounted for; half precision is cast to the model's.

    Args:
        module: the model.
        state: tensors by the model's keys.
        source: what the weights are called in errors.
        dropped: key prefixes of heads that the model does without.

    Returns:
        Notes on what was dropped.

    Raises:
        WeightsError: keys are missing, extra or misshapen (all listed), or a weight is NaN or infinite.
    """
    expected = module.state_dict()
    notes = []
    surplus = sorted(key for key in state if key not in expected and key.startswith(dropped))
    if surplus:
        heads = sorted({key.split(".")[0] for key in surplus})
        notes.append(
            f"dropped {', '.join(heads)} ({len(surplus)} tensors): heads that inference does not use"
        )
    used = {key: value for key, value in state.items() if key not in surplus}

    # Old files lack num_batches_tracked, a counter that only training reads.
    missing = [key for key in expected if key not in used and not key.endswith("num_batches_tracked")]
    extra = [key for key in used if key not in expected]
    misshapen = [
        f"{key} (file {_shape(used[key])}, model {_shape(tensor)})"
        for key, tensor in expected.items()
        if key in used and not _compatible(used[key], tensor)
    ]
    if missing or extra or misshapen:
        raise WeightsError(_mismatch(source, type(module).__name__, len(expected), missing, extra, misshapen))
    refuse_non_finite(used, source)
    module.load_state_dict({**expected, **used})
    return tuple(notes)


def _compatible(given: Tensor, wanted: Tensor) -> bool:
    return given.shape == wanted.shape and given.is_floating_point() == wanted.is_floating_point()


def _shape(tensor: Tensor) -> str:
    dims = "×".join(map(str, tensor.shape)) or "scalar"
    return dims if tensor.is_floating_point() else f"{dims} {str(tensor.dtype).removeprefix('torch.')}"


def _mismatch(
    source: str, model: str, n_expected: int, missing: list[str], extra: list[str], misshapen: list[str]
) -> str:
    kinds = (("missing", missing), ("extra", extra), ("misshapen", misshapen))
    lines = [f"  {len(keys)} {kind}: {_listed(keys)}" for kind, keys in kinds if keys]
    fitting = n_expected - len(missing) - len(misshapen)
    return "\n".join([
        f"weights {source} do not belong to this {model}: {fitting} of its {n_expected} tensors fit",
        *lines,
        "give the weights of this architecture, or name the architecture of these weights",
    ])  # fmt: skip


def refuse_non_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Refuses NaN and infinite weights.

    Raises:
        WeightsError: naming the tensors and how many of their values are not finite.
    """
    broken = []
    for key, tensor in state.items():
        if tensor.is_floating_point():
            n_broken = tensor.numel() - int(torch.isfinite(tensor).sum())
            if n_broken:
                broken.append(f"{key} ({n_broken} of {tensor.numel()})")
    if broken:
        raise WeightsError(
            f"weights {source} hold NaN or infinite values in {_listed(broken)}: training diverged or the "
            "file is damaged; use an earlier checkpoint"
        )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f", and {len(names) - _N_LISTED} more" if len(names) > _N_LISTED else ""
    return ", ".join(names[:_N_LISTED]) + more
