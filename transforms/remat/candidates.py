"""The data of a planner: calls, traced gradients, proposals, and compiled candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jax.tree_util import tree_unflatten

from ..while_loops.schedule import Loops
from .joint import Joint
from .policy import Policy
from .saved_set import Search
from .scan_bodies import ScanPolicy


class Config(NamedTuple):
    """What is fixed before the function is differentiated: a policy for each scan, and how `while` loops run."""

    scans: tuple[ScanPolicy, ...]
    loops: Loops


class Call(NamedTuple):
    """A call: the tree of (args, kwargs), its static leaves, and which leaves are traced."""

    tree: Any
    static: list[Any]
    is_traced: list[bool]

    def arguments(self, values: Sequence[Any]) -> tuple[tuple, dict]:
        """The arguments, with `values` as the traced leaves."""
        traced = iter(values)
        leaves = [next(traced) if ok else x for x, ok in zip(self.static, self.is_traced, strict=True)]
        return tree_unflatten(self.tree, leaves)

    def values(self, args: tuple, kwargs: dict) -> list[Any]:
        """The traced leaves of arguments."""
        leaves = self.tree.flatten_up_to((args, kwargs))
        return [x for x, ok in zip(leaves, self.is_traced, strict=True) if ok]


@dataclass(frozen=True, eq=False)
class TracedGradient:
    """The joint program of a configuration.

    `tree` is that of its results. `constants` has the leaves that no program returns, gradients of integers, and None for others.
    """

    config: Config
    joint: Joint
    search: Search
    tree: Any
    constants: list[Any]


class Proposal(NamedTuple):
    """A program to compile.

    Attributes:
      traced, policy: the gradient, and what it saves and retains; without a policy, the program as it was traced.
      seconds: of recomputation and allocation, by the device model.
      bytes: of its temporaries, as simulated.
    """

    traced: TracedGradient
    policy: Policy | None
    seconds: float
    bytes: int

    @property
    def key(self) -> tuple[Config, Policy | None]:
        """Equal for equal programs of one planner."""
        return self.traced.config, self.policy


@dataclass(frozen=True, eq=False)
class Candidate:
    """A proposal that was compiled: the bytes of its temporaries by XLA, and the jitted function of the joint's inputs."""

    proposal: Proposal
    bytes: int
    program: Callable
