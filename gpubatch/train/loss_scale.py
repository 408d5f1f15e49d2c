"""The loss scale: keeps float16 gradients from vanishing; as large as they allow, found while training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gpubatch.errors import ArgumentError, check_int, check_real
from gpubatch.own import as_written

# The gradients of a network that has learnt everything are zero, and nothing else would stop the growth. If they become
# large again, eight skipped steps lead from here back to the usual scale.
LARGEST = 2.0**24


@as_written
class LossScale:
    """The factor of a mixed network's loss, ``value``, adjusted step by step.

    initial: the first value, a power of two from 1 to 2²⁴
    growth_interval: how many steps in a row must have a finite gradient before the value is doubled

    A step whose gradient is not finite is left out and halves the value: the rule of Micikevicius et al.
    (arXiv:1710.03740, section 3.2) with the numbers of PyTorch's GradScaler. The value stays a power of two from 1 to
    2²⁴, so that multiplying by it never rounds.

    >>> gb.fit(net, loader, opt, epochs=5, loss_scale=gb.LossScale())  # doctest: +SKIP
    """

    def __init__(self, initial: float = 2.0**16, growth_interval: int = 2000) -> None:
        self.value = check_scale("initial", initial)
        self.growth_interval = check_int("growth_interval", growth_interval, 1)
        self.good_steps = 0  # since the last change

    def __repr__(self) -> str:
        return f"LossScale({self.value}, growth_interval={self.growth_interval}), good_steps={self.good_steps}"

    @property
    def room(self) -> int:
        """Good steps until ``value`` changes, including the one that changes it."""
        return self.growth_interval - self.good_steps

    def good(self, steps: int = 1) -> None:
        """Count steps with a finite gradient, at most :attr:`room`."""
        assert 0 <= steps <= self.room
        self.good_steps += steps
        if self.good_steps == self.growth_interval:
            self.value, self.good_steps = min(2 * self.value, LARGEST), 0

    def overflow(self) -> bool:
        """Halve ``value`` after a gradient that is not finite; False if it is 1 and so not to blame."""
        self.good_steps = 0
        if self.value == 1:
            return False
        self.value /= 2
        return True

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON can hold it."""
        return {"value": self.value, "good_steps": self.good_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        if set(state) != {"value", "good_steps"}:
            raise ArgumentError(f"state must have value and good_steps, got {sorted(state)}")
        value = check_scale("state['value']", state["value"])
        good_steps = check_int("state['good_steps']", state["good_steps"], 0)
        # The saved run may have had a longer interval.
        self.value, self.good_steps = value, min(good_steps, self.growth_interval - 1)


def check_scale(name: str, value: Any) -> float:
    """``value`` as a float, if it is a power of two from 1 to LARGEST."""
    scale = check_real(name, value, 1, LARGEST)
    if math.frexp(scale)[0] != 0.5:
        raise ArgumentError(f"{name} must be a power of two from 1 to 2**24, got {value!r}")
    return scale
