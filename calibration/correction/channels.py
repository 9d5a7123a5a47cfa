"""Which channels of which tensors can only be scaled together.

Multiplying a channel by ``s > 0`` where it is made and dividing by it where it is read changes nothing, if
everything in between is positively homogeneous, ``f(s x) = s f(x)``: Relu, pools, averages, moves of
values. An Add ties the channels of its inputs to one another, a Concat only puts them side by side
(Nagel et al., arXiv 1906.04721, section 4.1, for one producer and one consumer; here for any number).

Every channel of every tensor gets the number of its *atom*; channels with the same atom have the same scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.placement import WeightPoint
from calibration.placement.layers import STANDARD_DOMAINS, WEIGHTED, is_constant, name_of, weight_point

__all__ = ["ChannelAtoms", "Layer", "trace_channels"]

Atoms = NDArray[np.intp]

_KEEPS_CHANNELS = frozenset(
    {"Relu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity", "Clip", "ReduceMean"}
)


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer whose weight takes scales in: on the side of its output, and of its input where that has atoms."""

    node: ir.Node
    point: WeightPoint
    n_groups: int


@dataclass(slots=True)
class ChannelAtoms:
    """What `trace_channels` found."""

    of: dict[str, Atoms] = field(default_factory=dict)
    """By tensor name: one atom for each element of axis 1."""
    layers: list[Layer] = field(default_factory=list)
    clips: list[tuple[str, float]] = field(default_factory=list)
    """Tensors that are clipped at a value from above, and at 0 from below."""
    fixed: set[int] = field(default_factory=set)
    """Atoms that cannot be scaled."""
    _parent: list[int] = field(default_factory=list)

    @property
    def n_atoms(self) -> int:
        """How many numbers were given out; tied ones share that of their root."""
        return len(self._parent)

    def new(self, n: int) -> Atoms:
        """`n` atoms tied to nothing yet."""
        first = len(self._parent)
        self._parent += range(first, first + n)
        return np.arange(first, first + n)

    def tie(self, one: Atoms, other: Atoms) -> None:
        """From now on these have the same scales."""
        for i, j in zip(self.roots(one), self.roots(other), strict=True):
            self._parent[self._root(int(i))] = self._root(int(j))

    def roots(self, atoms: Atoms) -> Atoms:
        """The atom that stands for each one's tied set."""
        return np.array([self._root(int(atom)) for atom in atoms], np.intp)

    def fix(self, value: ir.Value | None) -> None:
        """Channels of `value` keep their scale."""
        if value is not None and value.name in self.of:
            self.fixed.update(map(int, self.of[value.name]))

    def _root(self, atom: int) -> int:
        while self._parent[atom] != atom:
            self._parent[atom] = self._parent[self._parent[atom]]
            atom = self._parent[atom]
        return atom


def trace_channels(graph: ir.Graph) -> ChannelAtoms:
    """Number the channels of `graph`, whose shapes must be known."""
    found = ChannelAtoms()
    for node in graph:
        if node.domain not in STANDARD_DOMAINS or not _follow(node, found):
            for value in node.inputs:
                found.fix(value)
    for value in graph.outputs:
        found.fix(value)
    found.fixed = {int(root) for root in found.roots(np.array(sorted(found.fixed), np.intp))}
    return found


def _follow(node: ir.Node, found: ChannelAtoms) -> bool:
    """Give the output of `node` its atoms; ``False``: scales cannot pass, and its inputs are fixed."""
    data, output = node.inputs[0] if node.inputs else None, node.outputs[0]
    if data is None:
        return True
    if node.op_type in WEIGHTED:
        return _follow_layer(node, found)
    if node.op_type == "Add":
        inputs = [value for value in node.inputs if value is not None]
        if not all(value.name in found.of for value in inputs):
            return False
        one, other = (found.of[name_of(value)] for value in inputs)
        if len(one) != len(other):
            return False
        found.tie(one, other)
        found.of[name_of(output)] = one
        return True
    if node.op_type == "Concat":
        inputs = [value for value in node.inputs if value is not None]
        if node.attributes.get_int("axis", 0) != 1 or not all(value.name in found.of for value in inputs):
            return False
        found.of[name_of(output)] = np.concatenate([found.of[name_of(value)] for value in inputs])
        return True
    atoms = found.of.get(name_of(data))
    if atoms is None:
        return True
    if node.op_type in ("Flatten", "Reshape"):
        spatial = _sizes(data)[2:]
        shape = _sizes(output)
        if len(shape) != 2 or math.prod(spatial) < 1 or shape[1] != len(atoms) * math.prod(spatial):
            return False
        found.of[name_of(output)] = np.repeat(atoms, math.prod(spatial))
        return True
    if node.op_type not in _KEEPS_CHANNELS or _sizes(output)[1:2] != [len(atoms)]:
        return False
    if node.op_type == "Clip":
        limit = _upper_limit(node)
        if limit is None:
            return False
        found.clips.append((name_of(data), limit))
    found.of[name_of(output)] = atoms
    return True


def _follow_layer(node: ir.Node, found: ChannelAtoms) -> bool:
    point = weight_point(node)
    constants = [value for value in node.inputs[1:] if value is not None]
    if (
        isinstance(point, str)
        or node.op_type == "ConvTranspose"
        or (node.op_type == "MatMul" and len(_sizes(node.outputs[0])) != 2)  # channels are not on axis 1
        or any(len(value.uses()) > 1 or value.is_graph_output() for value in constants)
    ):
        return False
    channels = _sizes(constants[0])[point.axis]
    found.of[name_of(node.outputs[0])] = found.new(channels)
    found.layers.append(Layer(node, point, node.attributes.get_int("group", 1)))
    return True


def _upper_limit(node: ir.Node) -> float | None:
    """Where a Clip that is a Relu from below cuts from above."""
    bounds = [value.const_value for value in node.inputs[1:3] if value is not None and is_constant(value)]
    if len(bounds) != 2 or bounds[0] is None or bounds[1] is None or float(bounds[0].numpy()) != 0.0:
        return None
    return float(bounds[1].numpy())


def _sizes(value: ir.Value) -> list[int]:
    """The shape with 0 for what is not known."""
    return [] if value.shape is None else [size if isinstance(size, int) else 0 for size in value.shape]
