"""From what was seen of a tensor to the range its grid spans: four methods, pure functions.

A range is a trade: wider clips less, narrower rounds finer. `minmax` clips nothing. The others look at
the histogram: `percentile` gives up a fixed share of the values, `entropy` what costs least
information, `mse` what costs least squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from calibration.observers import Distribution
from calibration.qparams import asymmetric_uint8, representable_range
from pipeline.artifacts import QuantParams, TensorRange

__all__ = [
    "METHODS",
    "METHOD_OPTIONS",
    "entropy",
    "error_on_grid",
    "minmax",
    "mse",
    "percentile",
    "quantization_error",
]

PERCENTILE = 99.99
"""ONNX Runtime and NNCF take 99.99 to 99.999; a 299×299 photograph has some 10^6 values a layer."""
_N_LINEAR_BINS = 2048
_N_LEVELS = 256
_KL_STRIDE = 16
_MSE_COARSE = np.linspace(0.1, 1.0, 19)
_MSE_FINE = np.linspace(-0.04, 0.04, 9)


def minmax(seen: Distribution) -> TensorRange:
    """Everything that was seen."""
    return TensorRange(seen.low, seen.high)


def percentile(seen: Distribution, percent: float = PERCENTILE) -> TensorRange:
    """The range that holds `percent` of the values; half of the rest lies on either side.

    Values on one side of zero only (behind a Relu) lose their share on that side alone.

    Raises:
        ValueError: `percent` is not in (0, 100].
    """
    if not 0.0 < percent <= 100.0:
        raise ValueError(f"percent is {percent}; it must be in (0, 100]")
    cumulative = np.concatenate(([0.0], np.cumsum(seen.mass)))
    cumulative /= cumulative[-1]
    left_out = 1.0 - percent / 100.0
    sides = (seen.low < 0.0) + (seen.high > 0.0)
    share = left_out / max(sides, 1)
    low = float(_quantile(share, cumulative, seen.edges)) if seen.low < 0.0 else seen.low
    high = float(_quantile(1.0 - share, cumulative, seen.edges)) if seen.high > 0.0 else seen.high
    return TensorRange(low, high)


def entropy(seen: Distribution) -> TensorRange:
    """The clip with the least Kullback-Leibler divergence of the quantized distribution.

    The method of TensorRT (Migacz, "8-bit inference with TensorRT", GTC 2017) on 2,048 linear bins of
    the magnitude: for every clip, the reference is the histogram up to it with the outliers in its last
    bin; the candidate is the same without the outliers, averaged over as many groups as there are levels
    and spread again over the bins that were not empty. As NVIDIA's later implementations do, the bin
    at zero is given its neighbour's count: the spike a Relu leaves there is exact at every scale and
    would drown the rest. Values of both signs share the 256 levels.
    """
    largest = max(-seen.low, seen.high)
    if largest <= 0.0:
        return minmax(seen)
    counts = _linear_magnitudes(seen, largest)
    counts[0] = counts[1]
    n_levels = _N_LEVELS // 2 if seen.low < 0.0 < seen.high else _N_LEVELS
    clips = np.arange(n_levels, _N_LINEAR_BINS + 1, _KL_STRIDE)
    divergences = [_divergence(counts, int(clip), n_levels) for clip in clips]
    clip = largest * float(clips[int(np.argmin(divergences))]) / _N_LINEAR_BINS
    return TensorRange(max(seen.low, -clip), min(seen.high, clip))


def mse(seen: Distribution) -> TensorRange:
    """The range with the least expected squared error of its uint8 grid.

    Both ends are pulled in together on a coarse scale, then each by itself on a fine one. The search merges
    bins; where those of the histogram itself say that the whole range is better, it is taken.
    """
    exact, seen = seen, _coarsened(seen)
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)  # as every grid; ends of one sign could cross
    best = min((quantization_error(seen, TensorRange(f * low, f * high)), f) for f in _MSE_COARSE)
    error, low_part, high_part = best[0], best[1], best[1]
    for part in best[1] + _MSE_FINE:
        if 0.0 < part <= 1.0:
            trial = quantization_error(seen, TensorRange(low_part * low, part * high))
            if trial < error:
                error, high_part = trial, part
    if low < 0.0:
        for part in np.linspace(best[1] / 2, 1.0, 16):
            trial = quantization_error(seen, TensorRange(part * low, high_part * high))
            if trial < error:
                error, low_part = trial, part
    found, whole = TensorRange(float(low_part * low), float(high_part * high)), minmax(exact)
    return min(found, whole, key=lambda tensor_range: quantization_error(exact, tensor_range))


METHODS: Mapping[str, Callable[[Distribution], TensorRange]] = MappingProxyType(
    {"minmax": minmax, "percentile": percentile, "entropy": entropy, "mse": mse}
)

METHOD_OPTIONS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "minmax": {},
        "percentile": {"percent": PERCENTILE},
        "entropy": {"linear_bins": _N_LINEAR_BINS, "levels": _N_LEVELS, "stride": _KL_STRIDE},
        "mse": {"coarse_steps": len(_MSE_COARSE), "fine_steps": len(_MSE_FINE)},
    }
)
"""What a method's ranges depend on besides the images: a table made with other values is another table."""


def quantization_error(seen: Distribution, tensor_range: TensorRange) -> float:
    """Mean squared error of `seen` on the uint8 grid over `tensor_range`."""
    return error_on_grid(seen, asymmetric_uint8(tensor_range))


def error_on_grid(seen: Distribution, params: QuantParams) -> float:
    """Mean squared error of `seen` on a per-tensor grid, in closed form.

    Within a bin the density is constant, so with ``u`` in steps from the zero point the rounding error
    integrates to ``F(u) = n / 12 + (u - n)^3 / 3``, ``n = round(u)``: a twelfth for every whole step, the
    classical ``step^2 / 12``, and what is left of the last. Outside the grid the error is the distance
    to its end.
    """
    step = float(params.scale)
    ends = representable_range(params)
    left, right = seen.edges[:-1], seen.edges[1:]
    inside_left, inside_right = np.clip(left, ends.low, ends.high), np.clip(right, ends.low, ends.high)
    error = step**3 * (_rounding_integral(inside_right / step) - _rounding_integral(inside_left / step))
    error += (np.maximum(right - ends.high, 0.0) ** 3 - np.maximum(left - ends.high, 0.0) ** 3) / 3.0
    error += (np.maximum(ends.low - left, 0.0) ** 3 - np.maximum(ends.low - right, 0.0) ** 3) / 3.0
    width = right - left
    point = np.clip(np.rint(left / step) * step, ends.low, ends.high)  # of a bin without width
    mean = np.divide(error, width, out=(left - point) ** 2, where=width > 0.0)
    return float(np.average(mean, weights=seen.mass))


def _rounding_integral(steps: NDArray[np.float64]) -> NDArray[np.float64]:
    nearest = np.rint(steps)
    integral: NDArray[np.float64] = nearest / 12.0 + (steps - nearest) ** 3 / 3.0
    return integral


def _coarsened(seen: Distribution) -> Distribution:
    """Bins merged to at least a 4,096th of the range: below that nothing is decided, but time is spent.

    The bin at zero stays by itself, because zero is exact on every grid.
    """
    grid = (seen.high - seen.low) / 4096.0
    if grid <= 0.0:
        return seen
    cell = np.floor(seen.edges / grid)
    keep = np.concatenate(([True], cell[1:] != cell[:-1]))
    zero = int(np.clip(np.searchsorted(seen.edges, 0.0, side="right") - 1, 0, len(seen.mass) - 1))
    keep[[zero, zero + 1, -1]] = True
    first = np.flatnonzero(keep[:-1])
    return Distribution(seen.edges[keep], np.add.reduceat(seen.mass, first))


def _quantile(share: float, cumulative: NDArray[np.float64], edges: NDArray[np.float64]) -> float:
    """The value below which `share` of the mass lies."""
    index = int(np.clip(np.searchsorted(cumulative, share), 1, len(edges) - 1))
    below, above = cumulative[index - 1], cumulative[index]
    part = (share - below) / (above - below) if above > below else 0.0
    return float(edges[index - 1] + part * (edges[index] - edges[index - 1]))


def _linear_magnitudes(seen: Distribution, largest: float) -> NDArray[np.float64]:
    """Mass of ``|x|`` in equal bins over [0, largest]."""
    grid = np.linspace(0.0, largest, _N_LINEAR_BINS + 1)
    below = np.concatenate(([0.0], np.cumsum(seen.mass)))
    # Mirrored, not interpolated at -grid: a bin without width at the lower end would not be counted.
    above = np.concatenate(([0.0], np.cumsum(seen.mass[::-1])))
    up_to = np.interp(grid, seen.edges, below) + np.interp(grid, -seen.edges[::-1], above)
    return np.diff(up_to)


def _divergence(counts: NDArray[np.float64], clip: int, n_levels: int) -> float:
    reference = counts[:clip].copy()
    kept = reference.copy()
    reference[-1] += counts[clip:].sum()
    starts = np.arange(n_levels) * clip // n_levels
    filled = kept > 0.0
    n_filled = np.add.reduceat(filled, starts)
    level = np.add.reduceat(kept, starts) / np.maximum(n_filled, 1)
    candidate = np.where(filled, np.repeat(level, np.diff(np.append(starts, clip))), 0.0)
    total, candidate_total = reference.sum(), candidate.sum()
    if total <= 0.0 or candidate_total <= 0.0:
        return float("inf")
    shared = (reference > 0.0) & (candidate > 0.0)
    p, q = reference[shared] / total, candidate[shared] / candidate_total
    lost = float(reference[(reference > 0.0) & ~shared].sum()) / total
    # What the candidate cannot express at all must cost something, or the shortest clip would win.
    return float(np.sum(p * np.log(p / q)) + lost * np.log(_N_LINEAR_BINS))
