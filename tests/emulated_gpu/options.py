"""Options of the emulated device, as in ``pytest --emulate-gpu=timing=late,devices=1``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

TIMINGS = ("early", "late", "copies", "work")
PAGEABLE = ("early", "late")
CAPABILITIES = (70, 72, 75, 80, 86, 87, 89, 90, 100, 103, 120, 121)
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True)
class Options:
    """The emulated machine.

    devices: number of devices, 1 to 8
    timing: the work that runs as soon as possible: all ("early"), none ("late"), only copies between host and device
        ("copies"), or all except these ("work"); other work runs when something waits for it
    pageable: "late": a copy from pageable memory reads it when the copy runs, not when it is enqueued, as on machines
        whose GPU reads that memory itself
    capability: compute capability, such as 90
    memory: bytes of each device; the last number holds for all further devices
    """

    devices: int = 2
    timing: str = "early"
    pageable: str = "early"
    capability: int = 90
    memory: tuple[int, ...] = (4 << 30,)

    def __post_init__(self) -> None:
        check("devices", self.devices, range(1, 9))
        check("timing", self.timing, TIMINGS)
        check("pageable", self.pageable, PAGEABLE)
        check("capability", self.capability, CAPABILITIES)
        if not self.memory or min(self.memory) < 1 << 20:
            raise ValueError(f"memory must be at least 1 MiB for each device, got {self.memory}")

    @classmethod
    def parse(cls, text: str) -> Options:
        """Parse a text such as "timing=late,devices=2,memory=1GiB/256MiB"; options not named keep their defaults."""
        given: dict[str, object] = {}
        for word in filter(None, text.split(",")):
            name, _, value = word.partition("=")
            if name in ("devices", "capability"):
                given[name] = int(value)
            elif name == "memory":
                given[name] = tuple(bytes_of(part) for part in value.split("/"))
            elif name in ("timing", "pageable"):
                given[name] = value
            else:
                names = ", ".join(field.name for field in dataclasses.fields(cls))
                raise ValueError(f"the emulated device has the options {names}, got {word!r}")
        return cls(**given)  # type: ignore[arg-type]

    def __str__(self) -> str:
        memory = "/".join(f"{size >> 20}MiB" for size in self.memory)
        return (
            f"devices={self.devices},timing={self.timing},pageable={self.pageable},capability={self.capability},"
            f"memory={memory}"
        )

    def memory_of_each(self) -> list[int]:
        """The bytes of each device."""
        return [self.memory[min(i, len(self.memory) - 1)] for i in range(self.devices)]


def check(name: str, value: object, allowed: object) -> None:
    if value not in allowed:  # type: ignore[operator]
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")  # type: ignore[call-overload]


def bytes_of(text: str) -> int:
    """The number of bytes in a text such as "256MiB"."""
    for unit, size in UNITS.items():
        if text.endswith(unit):
            return int(text.removesuffix(unit)) * size
    raise ValueError(f"memory must be given in KiB, MiB or GiB, got {text!r}")
