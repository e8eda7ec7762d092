"""Manual axes: the axes of a mesh along which a value varies between the shards of a `shard_map`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import get_abstract_mesh, use_abstract_mesh

from . import _jax


def unforeseen(values: Sequence[Any]) -> frozenset[str]:
    """The mesh axes along which some of these values vary, where an equation was traced outside of the `shard_map`."""
    axes = varying(values)
    return axes if axes and get_abstract_mesh().empty else frozenset()


def varying(values: Sequence[Any]) -> frozenset[str]:
    """The mesh axes along which some of these values vary, inside a `shard_map` that checks this."""
    varying_axes: frozenset[str] = frozenset()
    for value in values:  # called for each equation: a loop is quicker than a union of generated sets
        axes = getattr(getattr(value, "aval", None), "manual_axis_type", None)
        if axes and axes.varying:
            varying_axes |= axes.varying
    return varying_axes


def axes_of(aval: Any) -> frozenset[str]:
    """The mesh axes along which values of this type vary."""
    axes = getattr(aval, "manual_axis_type", None)
    return axes.varying if axes else frozenset()


def mesh_of(values: Sequence[Any]) -> Any:
    """A context in the mesh that varying values lie on, which an equation traced outside of it does not know."""
    return use_abstract_mesh(next(jax.typeof(v).sharding.mesh for v in values if varying([v])))


def vary(value: Any, axes: frozenset[str]) -> Any:
    """`value`, or a type, as one that varies along all of `axes`."""
    if isinstance(value, jax.core.ShapedArray) and axes:
        sharding = value.sharding.update(mesh=get_abstract_mesh())
        return value.update(sharding=sharding, manual_axis_type=_jax.ManualAxisType(varying=value.mat.varying | axes))
    if isinstance(value, jax.core.AbstractValue):
        return value
    missing = axes - varying([value])
    return lax.pcast(value, tuple(sorted(missing)), to="varying") if missing else value
