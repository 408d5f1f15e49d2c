"""The factor that keeps gradients of float16 from vanishing: as large as they bear, found while training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gpubatch.errors import ArgumentError, check_int, check_real
from gpubatch.own import as_written

__all__ = ["LossScale"]

# A network that has learnt all there is has gradients that are zero, and nothing would stop the growth. From here it
# takes eight steps that are left out to come back to where most trainings are, should they then be large again.
LARGEST = 2.0**24


@as_written
class LossScale:
    """What the loss of a mixed network is multiplied by for its gradients: ``value``, adjusted step by step.

    It is doubled after ``growth_interval`` steps in a row, and halved by a step whose gradient is not finite, which is
    left out: the rule of Micikevicius et al. (arXiv:1710.03740, section 3.2), with the numbers of PyTorch's GradScaler.
    It stays within 1 and 2²⁴, and a power of two, so that multiplying by it rounds nothing. ``initial`` is one, too.
    """

    def __init__(self, initial: float = 2.0**16, growth_interval: int = 2000) -> None:
        self.value = check_scale("initial", initial)
        self.growth_interval = check_int("growth_interval", growth_interval, 1)
        self.good_steps = 0  # since the last change

    def __repr__(self) -> str:
        return f"LossScale({self.value}, growth_interval={self.growth_interval}), good_steps={self.good_steps}"

    @property
    def room(self) -> int:
        """How many good steps there are until ``value`` changes, the last of them included."""
        return self.growth_interval - self.good_steps

    def good(self, steps: int = 1) -> None:
        """Count steps, at most :attr:`room` of them, whose gradients were finite."""
        assert 0 <= steps <= self.room
        self.good_steps += steps
        if self.good_steps == self.growth_interval:
            self.value, self.good_steps = min(2 * self.value, LARGEST), 0

    def overflow(self) -> bool:
        """Give way to a gradient that is not finite; False where ``value`` is 1, so that it is not to blame."""
        self.good_steps = 0
        if self.value == 1:
            return False
        self.value /= 2
        return True

    def state_dict(self) -> dict[str, Any]:
        """What there is to save, as JSON can hold it."""
        return {"value": self.value, "good_steps": self.good_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        if set(state) != {"value", "good_steps"}:
            raise ArgumentError(f"state must have value and good_steps, got {sorted(state)}")
        value = check_scale("state['value']", state["value"])
        good_steps = check_int("state['good_steps']", state["good_steps"], 0)
        # A shorter interval than the one of the run that was saved may be over already.
        self.value, self.good_steps = value, min(good_steps, self.growth_interval - 1)


def check_scale(name: str, value: Any) -> float:
    """``value`` as a float, if it is a power of two from 1 to LARGEST."""
    scale = check_real(name, value, 1, LARGEST)
    if math.frexp(scale)[0] != 0.5:
        raise ArgumentError(f"{name} must be a power of two from 1 to 2**24, got {value!r}")
    return scale
