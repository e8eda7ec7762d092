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
from ..transforms.core.signatures import name_of
from ..transforms.cost.formatting import parse_bytes


class TrainState(NamedTuple):
    """The state of a training; a pytree of arrays.

    Attributes:
      step: int32[], the number of steps done.
      params: the loss is differentiated with respect to these.
      opt_state: the state of the optimizer.
      model_state: state of the model without a gradient, such as the averages of batch norm; None if there is none.
      key: PRNG key, constant; each step folds its number into it. None if the loss takes no key.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    model_state: Any = None
    key: Any = None


def step(loss: Callable[..., Any], optimizer: Any, *, has_aux: bool = False, memory: int | str | None = None) -> Update:
    """A training step: the gradient of `loss`, given to `optimizer`.

    The arguments of `init` decide which keywords `loss` takes, and what it returns besides its scalar:

        update.init(params)                     loss(params, batch) -> scalar
        update.init(params, key=key)            loss(params, batch, key=key) -> scalar; another key at each step
        update.init(params, model_state=s)      loss(params, batch, model_state=s) -> scalar, s

    With `has_aux`, `loss` also returns its own metrics, last: `scalar, metrics`, or `scalar, (s, metrics)`.

    Args:
      loss: the function to minimise; its scalar is a float of shape ().
      optimizer: an optax.GradientTransformation, or any object with its `init` and `update`.
      has_aux: whether `loss` also returns a dict of metrics, name -> array.
      memory: a memory budget for the gradient, as in `fg.value_and_grad`.
    Returns:
      An Update: `update.init(params)` gives the first state, `update(state, batch)` the next state and
      {"loss": scalar, **metrics}.
    Raises:
      OptionError: `optimizer` has no `init` and `update`, or `memory` is no number of bytes. Also a ValueError.
      ArgumentError: from `init`, params hold non-floats. At the first step, `loss` does not have the signature or the
        outputs above, or the state is not a TrainState.
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
        parse_bytes(memory)  # raises an OptionError if it is invalid
    return Update(loss, optimizer, has_aux, memory)


@dataclass(frozen=True, eq=False)
class Update:
    """The result of `step`. Calls are pure, and work under every JAX transform."""

    loss: Callable[..., Any]
    optimizer: Any
    has_aux: bool = False
    memory: int | str | None = None
    # By whether there is a model state; kept, since they hold the plans of a budget.
    gradients: dict[bool, Callable] = field(default_factory=dict, repr=False)

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
        options: dict[str, Any] = {}
        if state.key is not None:
            options["key"] = jax.random.fold_in(state.key, state.step)
        if state.model_state is not None:
            options["model_state"] = state.model_state
        self._check_keywords(options)
        has_state = "model_state" in options
        if has_state not in self.gradients:
            self.gradients[has_state] = value_and_grad(self._loss(has_state), has_aux=True, memory=self.memory)
        (value, (model_state, metrics)), grads = self.gradients[has_state](state.params, batch, **options)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state, model_state, state.key), {**metrics, "loss": value}

    def _check_keywords(self, options: dict[str, Any]) -> None:
        """Raises an ArgumentError if `loss` does not take all of `options` by keyword."""
        try:
            parameters = inspect.signature(self.loss).parameters
        except (TypeError, ValueError):
            return
        missing = ", ".join(name for name in options if name not in parameters)
        if missing and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            name = name_of(self.loss)
            what = f"init was given {missing}, and {name} does not take it by keyword."
            hint = f"def {name}(params, batch, *, {', '.join(options)}), or leave {missing} out of init"
            raise ArgumentError(what, at=location(self.loss), hint=hint)

    def _loss(self, has_state: bool) -> Callable[..., Any]:
        """The loss in its most general form, which returns `scalar, (model_state, metrics)`."""
        aux_form = {
            (False, True): '{"accuracy": accuracy}',
            (True, False): "model_state",
            (True, True): '(model_state, {"accuracy": accuracy})',
        }.get((has_state, self.has_aux))
        name, at, hint = name_of(self.loss), location(self.loss), f"return scalar, {aux_form}"

        @wraps(self.loss, updated=())
        def general(*args: Any, **options: Any) -> Any:
            out = self.loss(*args, **options)
            if aux_form is None:
                if _is_pair(out):
                    what = f"step needs {name} to return a scalar, but it returned {_summary(out)}."
                    raise NotScalarError(what, at=at, hint="fg.step(..., has_aux=True), where it returns metrics too")
                return out, (None, {})
            if not _is_pair(out) or (has_state and self.has_aux and not _is_pair(out[1])):
                what = f"step needs {name} to return scalar, {aux_form}, but it returned {_summary(out)}."
                raise ArgumentError(what, at=at, hint=hint)
            value, aux = out
            model_state, metrics = (None, aux) if not has_state else aux if self.has_aux else (aux, {})
            if not isinstance(metrics, dict):
                kind = type(metrics).__name__
                what = f"step with has_aux=True needs a loss that returns a dict of metrics, not {kind}."
                raise ArgumentError(what, at=at, hint=hint)
            return value, (model_state, metrics)

        return general


def _is_pair(out: Any) -> bool:
    return isinstance(out, tuple | list) and len(out) == 2


def _summary(out: Any) -> str:
    if isinstance(out, tuple | list):
        return "(" + ", ".join(map(_summary, out)) + ")"
    return jax.typeof(out).str_short() if hasattr(out, "dtype") else type(out).__name__
