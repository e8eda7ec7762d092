"""The update: a loss and an optimizer, as one pure function `(state, batch) -> (state, metrics)`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from ..transforms.autodiff.grad import value_and_grad
from ..transforms.core.errors import ArgumentError, NotScalarError, OptionError, location
from ..transforms.cost.formatting import parse_bytes


class TrainState(NamedTuple):
    """What training changes; a pytree of arrays.

    Attributes:
      step: int32[], the number of steps done.
      params: what the loss is differentiated by.
      opt_state: the optimizer's.
      model_state: what the model changes without a gradient, as the averages of batch norm; None if there is none.
      key: the PRNG key that each step folds its number into; never changes. None if the loss takes none.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    model_state: Any = None
    key: Any = None


def step(loss: Callable[..., Any], optimizer: Any, *, has_aux: bool = False, memory: int | str | None = None) -> Update:
    """A training step: the gradient of `loss`, given to `optimizer`.

    What `init` is given decides what `loss` is given, by keyword, and what it returns besides its scalar:

        update.init(params)                     loss(params, batch) -> scalar
        update.init(params, key=key)            loss(params, batch, key=key) -> scalar; another key at each step
        update.init(params, model_state=s)      loss(params, batch, model_state=s) -> scalar, s

    With `has_aux`, `loss` returns metrics of its own in the last place: `scalar, metrics`, or `scalar, (s, metrics)`.

    Args:
      loss: the function to minimise; its scalar is a float of shape ().
      optimizer: an optax.GradientTransformation, or anything with its `init` and `update`.
      has_aux: whether `loss` also returns a dict of metrics, name -> array.
      memory: a budget for the gradient, as in `fg.value_and_grad`.
    Returns:
      An Update: call `update.init(params)` for the first state, `update(state, batch)` for the next one and
      {"loss": scalar, **metrics}.
    Raises:
      OptionError: `optimizer` has no `init` and `update`, or `memory` is no number of bytes. Also a ValueError.
      ArgumentError: from `init`, params hold other than floats. At the first step, `loss` does not take or return what
        the above says, or the state is not a TrainState.
      NotScalarError: at the first step, the loss is not a float scalar.

    >>> import optax
    >>> update = step(lambda w, x: jnp.mean((w - x) ** 2), optax.sgd(0.5))
    >>> state, metrics = update(update.init(jnp.zeros(())), jnp.array([1.0, 3.0]))
    >>> print(state.params, metrics["loss"])
    2.0 5.0
    """
    if isinstance(optimizer, type) or not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        name = getattr(optimizer, "__name__", type(optimizer).__name__)
        hint = "make one, as in optax.adam(1e-3)"
        raise OptionError(f"step needs an optimizer with init and update, not {name}.", hint=hint)
    if memory is not None:
        parse_bytes(memory)  # says what is wrong with it
    return Update(loss, optimizer, has_aux, memory)


@dataclass(frozen=True, eq=False)
class Update:
    """What `step` returns; calls are pure, and work under every JAX transform."""

    loss: Callable[..., Any]
    optimizer: Any
    has_aux: bool = False
    memory: int | str | None = None
    slopes: dict[bool, Callable] = field(default_factory=dict, repr=False)  # kept, with what is planned for a budget

    def init(self, params: Any, *, key: Any = None, model_state: Any = None) -> TrainState:
        """The state before the first step."""
        for path, leaf in tree_leaves_with_path(params):
            dtype = getattr(leaf, "dtype", np.dtype(type(leaf)))
            if not jnp.issubdtype(dtype, jnp.inexact):
                what = f"step differentiates by floats, and params{keystr(path)} holds {dtype}."
                raise ArgumentError(what, hint="keep integers in model_state or in the batch")
        return TrainState(jnp.zeros((), jnp.int32), params, self.optimizer.init(params), model_state, key)

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """The state after one more step, and the metrics of this one."""
        import optax

        if not isinstance(state, TrainState):
            what = f"an update needs the TrainState that its init returned, and got {type(state).__name__}."
            raise ArgumentError(what, hint="pass update.init(params)")
        given: dict[str, Any] = {}
        if state.key is not None:
            given["key"] = jax.random.fold_in(state.key, state.step)
        if state.model_state is not None:
            given["model_state"] = state.model_state
        self._check_taken(given)
        stateful = "model_state" in given
        if stateful not in self.slopes:
            self.slopes[stateful] = value_and_grad(self._loss(stateful), has_aux=True, memory=self.memory)
        (value, (model_state, metrics)), grads = self.slopes[stateful](state.params, batch, **given)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state, model_state, state.key), {**metrics, "loss": value}

    def _check_taken(self, given: dict[str, Any]) -> None:
        """Raises an ArgumentError where `loss` takes not all that it is given by keyword."""
        try:
            known = inspect.signature(self.loss).parameters
        except (TypeError, ValueError):
            return
        missing = [name for name in given if name not in known]
        if missing and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            name, missed = _name(self.loss), ", ".join(missing)
            what = f"init was given {missed}, and {name} does not take it by keyword."
            hint = f"def {name}(params, batch, *, {', '.join(given)}), or leave {missed} out of init"
            raise ArgumentError(what, at=location(self.loss), hint=hint)

    def _loss(self, stateful: bool) -> Callable[..., Any]:
        """The loss in its widest form, that returns `scalar, (model_state, metrics)`."""
        aux = {
            (False, True): '{"accuracy": accuracy}',
            (True, False): "model_state",
            (True, True): '(model_state, {"accuracy": accuracy})',
        }.get((stateful, self.has_aux))
        name, at = _name(self.loss), location(self.loss)

        def refused(out: Any) -> ArgumentError:
            what = f"step needs {name} to return scalar, {aux}, but it returned {_summary(out)}."
            return ArgumentError(what, at=at, hint=f"return scalar, {aux}")

        @wraps(self.loss, updated=())
        def whole(*args: Any, **given: Any) -> Any:
            out = self.loss(*args, **given)
            if aux is None:
                if _is_pair(out):
                    what = f"step needs {name} to return a scalar, but it returned {_summary(out)}."
                    raise NotScalarError(what, at=at, hint="fg.step(..., has_aux=True), where it returns metrics too")
                return out, (None, {})
            if not _is_pair(out):
                raise refused(out)
            value, rest = out
            if stateful and self.has_aux and not _is_pair(rest):
                raise refused(out)
            model_state, metrics = rest if stateful and self.has_aux else (rest, {}) if stateful else (None, rest)
            if not isinstance(metrics, dict):
                kind = type(metrics).__name__
                what = f"step with has_aux=True needs a loss that returns a dict of metrics, not {kind}."
                raise ArgumentError(what, at=at, hint=f"return scalar, {aux}")
            return value, (model_state, metrics)

        return whole


def _is_pair(out: Any) -> bool:
    return isinstance(out, tuple | list) and len(out) == 2


def _summary(out: Any) -> str:
    if isinstance(out, tuple | list):
        return "(" + ", ".join(map(_summary, out)) + ")"
    return jax.typeof(out).str_short() if hasattr(out, "dtype") else type(out).__name__


def _name(loss: Callable[..., Any]) -> str:
    return getattr(loss, "__name__", type(loss).__name__)
