"""Which devices there are, and whether what is asked of one can work, before any work is done.

A plan for the wrong TensorRT, or for a DLA that the release lacks, fails on the device after an hour of building,
with a message about kernels. The same is known from a table beforehand: compute capability against TensorRT against
JetPack.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from pipeline.errors import UnsupportedError, UsageError
from pipeline.target_entry import JetPack, Peaks, Precision, Source, Target, TensorRtWindow, version_key
from pipeline.target_table import JETPACKS, TARGETS

__all__ = [
    "JETPACKS",
    "OLDEST_TENSORRT",
    "TARGETS",
    "JetPack",
    "Peaks",
    "Precision",
    "Preflight",
    "Source",
    "Target",
    "TensorRtWindow",
    "find_target",
    "jetpacks_of",
    "preflight",
]

OLDEST_TENSORRT = "10.3"
_DLA_LOST = "10.8"
"""TensorRT 10.7 was the last 10.x with DLA ("Working with DLA", TensorRT 11.4.1 documentation)."""
_DLA_FOUND = "11.4.1"
"""The first after that, on Jetson AGX Orin with JetPack 7.2.2 (the same page)."""
_DLA_PRECISIONS = ("int8", "fp16")


@dataclass(frozen=True, slots=True)
class Preflight:
    """A combination that can work, and what is worth knowing of it."""

    target: Target
    jetpack: JetPack | None
    tensorrt: str | None
    """The version asked for, or the JetPack's."""
    notes: tuple[str, ...]


def find_target(name: str) -> Target:
    """The target called `name`, or the one meant by a name without its memory size.

    Raises:
        UnsupportedError: there is none; near names are in the message.
    """
    wanted = name.strip().lower().replace("_", "-")
    by_name = {known: target for target in TARGETS for known in (target.name, *target.aliases)}
    if wanted in by_name:
        return by_name[wanted]
    near = [known for known in by_name if wanted and wanted in known]
    near += [known for known in difflib.get_close_matches(wanted, by_name, n=4) if known not in near]
    hint = f"did you mean {_listed(near[:6], 'or')}?" if near else "none is like it;"
    raise UnsupportedError(
        f"no target is called {name!r}; {hint} see edgefold targets. A board that is not listed can take the name "
        "of one with its compute capability"
    )


def jetpacks_of(target: Target) -> tuple[JetPack, ...]:
    """The JetPack releases whose TensorRT this product can use on `target`, oldest first."""
    if target.kind != "jetson":
        return ()
    return tuple(release for release in JETPACKS if _usable(release) and target.sm in release.sms)


def preflight(
    target: Target,
    *,
    precision: str,
    jetpack: str | None = None,
    tensorrt: str | None = None,
    dla: bool = False,
) -> Preflight:
    """Whether an engine of `precision` can be built for `target` with these releases.

    Args:
        target: from `find_target`.
        precision: ``int8``, ``fp16``, ``bf16`` or ``fp32``.
        jetpack: the release on the device, such as ``6.2`` or ``7.2.2``; only for a Jetson.
        tensorrt: the version on the device, such as ``10.16.2``.
        dla: whether layers are to run on the DLA.

    Raises:
        UsageError: a version is not written as numbers with dots.
        UnsupportedError: the combination cannot work; the message has both sides and what to use instead.
    """
    if target.refusal is not None:
        raise UnsupportedError(f"{target.name} cannot be built for: {target.refusal}")
    if precision not in target.precisions:
        raise UnsupportedError(
            f"{precision} is no precision of {_titled(target)}; it has {_listed(target.precisions, 'and')}"
        )
    if target.family == "cpu":
        _refuse_on_cpu(jetpack, tensorrt, dla)
        return Preflight(target, None, None, ())
    release = _release(target, jetpack) if jetpack is not None else None
    version = _tensorrt(target, release, tensorrt)
    notes: list[str] = []
    if dla:
        _check_dla(target, precision, release, version)
        notes.append("DLA takes no dynamic shapes: the engine is built for one batch size")
    if target.kind == "jetson" and release is None:
        notes.append(f"no JetPack was given; {target.name} takes {_jetpacks(target)}")
    if target.tensorrt is not None and target.tensorrt.first is None:
        notes.append(f"the first TensorRT with sm_{target.sm} is not known; check on the device")
    if target.note is not None:
        notes.append(target.note)
    return Preflight(target, release, version, tuple(notes))


def _refuse_on_cpu(jetpack: str | None, tensorrt: str | None, dla: bool) -> None:
    for given, what in ((jetpack, "--jetpack"), (tensorrt, "--tensorrt"), (dla or None, "--dla")):
        if given is not None:
            raise UnsupportedError(f"{what} says nothing about the 'cpu' target; leave it out")


def _release(target: Target, version: str) -> JetPack:
    """The table's entry for JetPack `version`: the newest of its minor version that is not newer than it."""
    if target.kind != "jetson":
        raise UnsupportedError(
            f"JetPack {version} was given, but {_titled(target)} is no Jetson; leave --jetpack out"
        )
    key = _key(version, "JetPack")
    same_minor = [release for release in JETPACKS if version_key(release.version)[:2] == key[:2]]
    known = [release for release in same_minor if version_key(release.version) <= key]
    if not known:
        raise UnsupportedError(
            f"JetPack {version} is not in the table, which has {_listed([r.version for r in JETPACKS], 'and')}; "
            f"{target.name} takes {_jetpacks(target)}"
        )
    release = known[-1]
    remedy = f"use {_jetpacks(target)}"
    if not _usable(release):
        raise UnsupportedError(
            f"JetPack {version} has TensorRT {release.tensorrt}; Edgefold needs {OLDEST_TENSORRT} or later: {remedy}"
        )
    if target.sm not in release.sms:
        kernels = _listed([f"sm_{sm}" for sm in release.sms], "and")
        raise UnsupportedError(
            f"{_titled(target)} has no engine with JetPack {version}: its TensorRT {release.tensorrt} has no "
            f"sm_{target.sm}, only {kernels}; {remedy}"
        )
    return release


def _tensorrt(target: Target, release: JetPack | None, asked: str | None) -> str | None:
    """The TensorRT to expect, checked against the device."""
    if asked is None:
        return release.tensorrt if release else None
    key = _key(asked, "TensorRT")
    if key < version_key(OLDEST_TENSORRT):
        raise UnsupportedError(
            f"TensorRT {asked} is too old: Edgefold needs {OLDEST_TENSORRT} or later, for strongly typed networks"
        )
    if release is not None and not _same_release(asked, release.tensorrt):
        raise UnsupportedError(
            f"TensorRT {asked} does not go with JetPack {release.version}, which has {release.tensorrt}; "
            "give the one that is on the device, or only one of the two"
        )
    if target.kind == "jetson":
        brought = [known.tensorrt for known in jetpacks_of(target)]
        if not any(_same_release(asked, version) for version in brought):
            raise UnsupportedError(
                f"TensorRT {asked} is in no JetPack for {_titled(target)}; those for it have "
                f"{_listed(list(dict.fromkeys(brought)), 'or')}: use {_jetpacks(target)}"
            )
    elif target.tensorrt is not None and not target.tensorrt.holds(asked):
        first, last = target.tensorrt.first, target.tensorrt.last
        span = f"{first} or later" if last is None else f"{first or 'an earlier one'} to {last}"
        raise UnsupportedError(
            f"TensorRT {asked} has no sm_{target.sm}, the compute capability of {target.name}; use {span}"
        )
    return asked


def _check_dla(target: Target, precision: str, release: JetPack | None, version: str | None) -> None:
    if target.dla_cores == 0:
        raise UnsupportedError(f"{_titled(target)} has no DLA; build for its GPU")
    if precision not in _DLA_PRECISIONS:
        raise UnsupportedError(f"a DLA runs {_listed(_DLA_PRECISIONS, 'and')}, not {precision}")
    if version is None:
        return
    key = version_key(version)
    if version_key(_DLA_LOST) <= key < version_key(_DLA_FOUND):
        with_release = f" (JetPack {release.version})" if release else ""
        raise UnsupportedError(
            f"TensorRT {version}{with_release} has no DLA: 10.7 was the last before {_DLA_FOUND}; use JetPack 6.2 for "
            f"{target.name}, or build for its GPU"
        )
    if key >= version_key(_DLA_FOUND) and not target.name.startswith("jetson-agx-orin"):
        raise UnsupportedError(
            f"TensorRT {version} has DLA on Jetson AGX Orin only, not on {target.title}; use JetPack 6.2, or build "
            "for its GPU"
        )


def _usable(release: JetPack) -> bool:
    return version_key(release.tensorrt) >= version_key(OLDEST_TENSORRT)


def _same_release(asked: str, brought: str) -> bool:
    """Whether both are of one minor version, which is what a JetPack keeps."""
    return version_key(asked)[:2] == version_key(brought)[:2]


def _key(version: str, what: str) -> tuple[int, ...]:
    try:
        return version_key(version)
    except ValueError:
        raise UsageError(f"{what} version {version!r} is not numbers with dots, such as 7.2") from None


def _jetpacks(target: Target) -> str:
    return f"JetPack {_listed([release.version for release in jetpacks_of(target)], 'or')}"


def _titled(target: Target) -> str:
    return target.name if target.sm is None else f"{target.name} (sm_{target.sm})"


def _listed(words: list[str] | tuple[str, ...], last: str) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"
