"""One instruction on its way to C++: a translator takes its modifiers and operands, and what is left is an error.

C++ values have the types of thread.h, which are named as PTX's are; registers are unsigned, and predicates bool.
"""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING

from .ptx import BITS, SPACES, Instruction, UnknownPTX

if TYPE_CHECKING:
    from .translate import Body

FLOATS = ("f16", "f32", "f64")
MEMORY_MODIFIERS = (
    "ca cg cs lu cv wb wt nc weak volatile relaxed acquire release acq_rel sc cta cluster gpu sys".split()
)
SPECIAL_REGISTERS = {
    "%laneid": "me.lane",
    "%warpid": "me.number / 32",
    "WARP_SZ": "32",
    "%lanemask_eq": "1u << me.lane",
    "%lanemask_lt": "(1u << me.lane) - 1",
    "%lanemask_le": "(2u << me.lane) - 1",
    "%lanemask_gt": "-(2u << me.lane)",
    "%lanemask_ge": "-(1u << me.lane)",
    "%clock": "__builtin_ia32_rdtsc()",
    "%clock64": "__builtin_ia32_rdtsc()",
}
for _axis in "xyz":
    SPECIAL_REGISTERS[f"%tid.{_axis}"] = f"me.tid.{_axis}"
    SPECIAL_REGISTERS[f"%ctaid.{_axis}"] = f"me.ctaid.{_axis}"
    SPECIAL_REGISTERS[f"%ntid.{_axis}"] = f"me.launch->block.{_axis}"
    SPECIAL_REGISTERS[f"%nctaid.{_axis}"] = f"me.launch->grid.{_axis}"


def cpp_name(name: str) -> str:
    """The C++ name of what PTX calls ``name``; no name of C++ or thread.h begins with a dollar."""
    return "$" + name.replace("%", "$")


def cpp_type(type_: str) -> str:
    """The C++ type of a value; bits are an unsigned integer."""
    return "bool" if type_ == "pred" else type_.replace("b", "u")


def cpp_text(text: str) -> str:
    """A C++ string."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def unsigned(type_: str) -> str:
    """The unsigned type of a type's width."""
    return "pred" if type_ == "pred" else f"u{BITS[type_]}"


def literal(text: str, type_: str) -> str:
    """A constant as the bits of ``type_``: an integer, or the bits of a float (0f) or double (0d)."""
    bits = BITS[type_]
    if match := re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", text):
        number, given = int(match[2], 16), 4 * len(match[2])
        if (given, bits) == (32, 64):
            number = int.from_bytes(struct.pack("<d", *struct.unpack("<f", number.to_bytes(4, "little"))), "little")
        elif given != bits:
            raise UnknownPTX(f"the constant {text} of type {type_}")
    elif re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|0|[1-9]\d*)U?", text):
        number = int(text.removesuffix("U"), 0) % 2 ** min(bits, 64)
    else:
        raise UnknownPTX(f"the constant {text}")
    return f"{number:#x}{'ull' if number >= 2**32 else 'u'}"


class Operation:
    """An instruction whose modifiers and operands a translator takes."""

    def __init__(self, instruction: Instruction, body: Body) -> None:
        self.instruction, self.body = instruction, body
        self.opcode, self.operands = instruction.opcode, instruction.operands
        self.modifiers = list(instruction.modifiers)
        self.taken: set[int] = set()  # operands
        self.flush = False  # whether .ftz was taken: what is read and written is flushed

    def check_taken(self) -> None:
        """Nothing is left."""
        if self.modifiers:
            raise UnknownPTX(f"the modifier .{self.modifiers[0]}")
        if left := set(range(len(self.operands))) - self.taken:
            raise UnknownPTX(f"the operand {self.operands[min(left)]}")

    # --- modifiers

    def optional(self, *names: str) -> str:
        """The next modifier if it is one of ``names``, else nothing."""
        return self.modifiers.pop(0) if self.modifiers and self.modifiers[0] in names else ""

    def one_of(self, *names: str) -> str:
        """The next modifier, which must be one of ``names``."""
        found = self.optional(*names)
        if not found:
            raise UnknownPTX(f"none of {', '.join(names)}")
        return found

    def flag(self, name: str) -> bool:
        """Whether the next modifier is ``name``."""
        return bool(self.optional(name))

    def type(self, *allowed: str) -> str:
        """The last modifier, a type."""
        if not self.modifiers or self.modifiers[-1] not in (allowed or BITS):
            raise UnknownPTX(f"no type that is known here ({', '.join(allowed or BITS)})")
        return self.modifiers.pop()

    def space(self) -> str:
        """The state space of a memory instruction; without one the address is generic.

        Caches, memory order and scopes say nothing here: memory is one, and coherent.
        """
        self.modifiers = [m for m in self.modifiers if m not in MEMORY_MODIFIERS and not re.match(r"L[12]::", m)]
        found = [m for m in self.modifiers if m.split("::")[0] in SPACES]
        if len(found) > 1 or any("::" in m and m not in ("shared::cta", "param::func", "param::entry") for m in found):
            raise UnknownPTX(f"the state spaces {found}")
        if not found:
            return "generic"
        self.modifiers.remove(found[0])
        return found[0].split("::")[0]

    # --- operands

    def operand(self, place: int) -> str:
        if place >= len(self.operands):
            raise UnknownPTX(f"no operand {place + 1}")
        self.taken.add(place)
        return self.operands[place]

    def value(self, place: int, type_: str) -> str:
        """An operand as a C++ value of ``type_``, flushed where .ftz was taken."""
        value = self.value_of(self.operand(place), type_)
        return f"flush({value})" if self.flush and type_ in FLOATS else value

    def values(self, first: int, *types: str) -> str:
        """Operands from ``first`` on, as arguments of a C++ function."""
        return ", ".join(self.value(first + i, type_) for i, type_ in enumerate(types))

    def value_of(self, text: str, type_: str) -> str:
        if type_ == "pred":
            return {"0": "false", "1": "true", "-1": "true"}.get(text) or self.predicate(text)
        if text in SPECIAL_REGISTERS:
            bits = SPECIAL_REGISTERS[text]
        elif text in self.body.function.registers:
            bits = self.register(text)
        elif text[0].isdigit() or text[0] == "-":
            bits = literal(text, type_)
        else:
            name, _, offset = text.partition("+")
            bits = f"{self.body.address(name)[1]} + {int(offset or '0', 0)}"
        return f"as<{cpp_type(type_)}>({bits})"

    def register(self, name: str) -> str:
        if name not in self.body.function.registers:
            raise UnknownPTX(f"the register {name}")
        self.body.used.add(name)
        return cpp_name(name)

    def predicate(self, text: str) -> str:
        return "!" * text.startswith("!") + self.register(text.removeprefix("!").strip())

    def assign(self, place: int, value: str, type_: str) -> str:
        return self.assign_to(self.operand(place), value, type_)

    def assign_to(self, text: str, value: str, type_: str) -> str:
        """A C++ value of ``type_`` into a register; ``_`` is a sink."""
        if text == "_":
            return f"(void)({value});"
        return f"{self.register(text)} = {value if type_ == 'pred' else f'bits<{cpp_type(type_)}>({value})'};"

    # --- memory

    def site(self) -> str:
        """The place of the instruction among those that can be at fault."""
        self.body.module.sites.append(self.instruction.text)
        return str(len(self.body.module.sites) - 1)

    def trap(self, sentence: str) -> str:
        return f"emulated_trap(me, {self.site()}, {cpp_text(sentence)});"

    def memory(self, place: int, space: str, size: int) -> str:
        """A memory operand as a C++ address of ``size`` bytes in main memory, checked when it is used."""
        text = self.operand(place)
        match = re.fullmatch(r"\[\s*([\w$%.]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if not match:
            raise UnknownPTX(f"the address {text}")
        base, offset = match[1], int(match[2] or "0", 0)
        if base in self.body.function.registers:
            address = self.register(base)
        elif base.isdigit():
            address = f"{base}ull"
        else:
            found, address = self.body.address(base)
            if found != space:
                raise UnknownPTX(f"{base}, which is in .{found}")
            if space == "param":
                if not 0 <= offset <= self.body.variables[base].size - size:
                    raise UnknownPTX(f"{size} bytes at {text}, which is too small")
                return f"{address} + {offset}"
        return f"in_{space}(me, {self.site()}, {address} + {offset % 2**64:#x}ull, {size})"
