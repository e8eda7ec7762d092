"""What a budget is planned with: a call, the joint programs of its configurations, proposals, and what was compiled of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jax.tree_util import tree_unflatten

from ..while_loops.schedule import Loops
from .joint import Joint
from .scan_bodies import Option
from .search import Search
from .simulation import Choice


class Config(NamedTuple):
    """What is decided before the function is differentiated: an option for each scan, and how `while` loops run."""

    scans: tuple[Option, ...]
    loops: Loops


class Call(NamedTuple):
    """A call: the tree of (args, kwargs), the leaves that are static, and which leaves are traced."""

    tree: Any
    static: list[Any]
    is_traced: list[bool]

    def arguments(self, values: Sequence[Any]) -> tuple[tuple, dict]:
        """The arguments with `values` as what is traced."""
        given = iter(values)
        leaves = [next(given) if ok else x for x, ok in zip(self.static, self.is_traced, strict=True)]
        return tree_unflatten(self.tree, leaves)

    def values(self, args: tuple, kwargs: dict) -> list[Any]:
        """What is traced, of such arguments."""
        leaves = self.tree.flatten_up_to((args, kwargs))
        return [x for x, ok in zip(leaves, self.is_traced, strict=True) if ok]


@dataclass(frozen=True, eq=False)
class Traced:
    """The joint program of a configuration.

    `tree` is that of its results, `constants` are those of its leaves that no program returns: gradients of integers.
    """

    config: Config
    joint: Joint
    search: Search
    tree: Any
    constants: list[Any]


class Proposal(NamedTuple):
    """What may be compiled, with its seconds and bytes as simulated; see `Candidate`."""

    traced: Traced
    choice: Choice | None
    seconds: float
    bytes: int

    @property
    def key(self) -> tuple[Config, Choice | None]:
        """Equal for equal programs of one planner."""
        return self.traced.config, self.choice


@dataclass(frozen=True, eq=False)
class Candidate:
    """A program for a budget.

    Attributes:
      traced, choice: what is computed again; without a choice, nothing.
      seconds: of what is computed again, and to have the memory, on the nominal machine.
      predicted_bytes, bytes: of its temporaries, as simulated and of the compiled program.
      program: the jitted function of the joint's inputs.
    """

    traced: Traced
    choice: Choice | None
    seconds: float
    predicted_bytes: int
    bytes: int
    program: Callable

    @property
    def key(self) -> tuple[Config, Choice | None]:
        """Equal for equal programs of one planner."""
        return self.traced.config, self.choice
