"""The update: a loss and an optimizer, as one pure function `(state, batch) -> (state, metrics)`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..transforms.errors import ArgumentError, OptionError, location
from ..transforms.gradient import value_and_grad


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


def step(loss: Callable[..., Any], optimizer: Any, *, has_aux: bool = False) -> Update:
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
    Returns:
      An Update: call `update.init(params)` for the first state, `update(state, batch)` for the next one and
      {"loss": scalar, **metrics}.
    Raises:
      OptionError: `optimizer` has no `init` and `update`.
      ArgumentError: at the first step, the metrics of `loss` are not a dict.
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
    return Update(loss, optimizer, has_aux)


@dataclass(frozen=True, eq=False)
class Update:
    """What `step` returns; calls are pure, and work under every JAX transform."""

    loss: Callable[..., Any]
    optimizer: Any
    has_aux: bool = False

    def init(self, params: Any, *, key: Any = None, model_state: Any = None) -> TrainState:
        """The state before the first step."""
        return TrainState(jnp.zeros((), jnp.int32), params, self.optimizer.init(params), model_state, key)

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """The state after one more step, and the metrics of this one."""
        import optax

        given, stateful = {}, state.model_state is not None
        if state.key is not None:
            given["key"] = jax.random.fold_in(state.key, state.step)
        if stateful:
            given["model_state"] = state.model_state
        slope = value_and_grad(self.loss, has_aux=stateful or self.has_aux)
        value, grads = slope(state.params, batch, **given)
        model_state, metrics = None, {}
        if stateful and self.has_aux:
            value, (model_state, metrics) = value
        elif stateful:
            value, model_state = value
        elif self.has_aux:
            value, metrics = value
        if not isinstance(metrics, dict):
            what = f"step with has_aux=True needs a loss that returns a dict of metrics, not {type(metrics).__name__}."
            raise ArgumentError(what, at=location(self.loss), hint='return scalar, {"accuracy": accuracy}')
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state, model_state, state.key), {**metrics, "loss": value}
