"""Settings of the emulated device, in the words of ``pytest --emulate-gpu=timing=late,devices=1``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

TIMINGS = ("early", "late", "copies", "work")
PAGEABLE = ("early", "late")
CAPABILITIES = (70, 72, 75, 80, 86, 87, 89, 90, 100, 103, 120, 121)
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True)
class Options:
    """What the emulated machine is like.

    ``timing`` says what runs as soon as it may: all ("early"), nothing ("late"), copies between host and device alone
    ("copies") or all but these ("work"). The rest runs when something waits for it.

    ``pageable="late"``: copies from ordinary memory read it when they run, not when they are asked for, as on machines
    whose GPU reads that memory itself.

    ``memory`` is that of each device, in bytes; the last one holds for all devices that follow.
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
        """From words like "timing=late,devices=2,memory=1GiB/256MiB"; no words, the defaults."""
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
        """Bytes of every device."""
        return [self.memory[min(i, len(self.memory) - 1)] for i in range(self.devices)]


def check(name: str, value: object, allowed: object) -> None:
    if value not in allowed:  # type: ignore[operator]
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")  # type: ignore[call-overload]


def bytes_of(text: str) -> int:
    """ "256MiB" as a number."""
    for unit, size in UNITS.items():
        if text.endswith(unit):
            return int(text.removesuffix(unit)) * size
    raise ValueError(f"memory must be given in KiB, MiB or GiB, got {text!r}")
