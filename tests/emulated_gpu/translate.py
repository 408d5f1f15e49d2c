"""PTX to C++: a program's variables, functions and kernels. What an instruction becomes is in instructions.py."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .instructions import TRANSLATORS, WAITING, label
from .operation import Operation, cpp_name, cpp_text, cpp_type, literal, unsigned
from .ptx import Function, Instruction, Program, UnknownPTX, Variable


@dataclass(frozen=True)
class Kernel:
    """What a launch needs to know of a kernel."""

    symbol: str  # of its launch function
    parameters: tuple[tuple[int, int], ...]  # (offset, size) of each
    parameter_bytes: int
    max_threads: int
    shared_bytes: int  # without those of the launch


@dataclass(frozen=True)
class Translation:
    source: str
    kernels: dict[str, Kernel]
    variables: dict[str, tuple[str, int]]  # name: (symbol, size)


def translate(program: Program) -> Translation:
    """The C++ of a program, each kernel of it as ``launch_NAME``."""
    module = Module(program)
    bodies = {f.name: Body(module, f) for f in program.functions if f.body is not None}
    texts = [body.text() for body in bodies.values()]
    kernels = {f.name: kernel_of(f, bodies[f.name]) for f in program.functions if f.entry}
    sites = ", ".join(map(cpp_text, module.sites))
    places = "".join(f"{{{cpp_name(v.name)}, {v.size}}}, " for v in module.memory)
    source = [
        '#include "thread.h"',
        *map(definition, module.memory),
        *(f"{head(body.function)};" for body in bodies.values()),
        *texts,
        f"static const char* const instructions[] = {{{sites}}};",
        f"static const ModuleVariable variables[] = {{{places}{{nullptr, 0}}}};",
        *(launcher(module, kernel, bodies[name], bodies) for name, kernel in kernels.items()),
    ]
    return Translation("\n".join(source) + "\n", kernels, {v.name: (cpp_name(v.name), v.size) for v in module.memory})


class Module:
    """What the functions of a program share: variables, and the instructions that may be at fault."""

    def __init__(self, program: Program) -> None:
        self.functions = {f.name: f for f in program.functions}
        self.memory = [v for v in program.variables if v.space in ("global", "const")]
        inner = [v for f in program.functions if not f.entry for v in f.variables]
        shared = [v for v in (*program.variables, *inner) if v.space == "shared"]
        if any(v.align > 16 for f in program.functions for v in (*shared, *f.variables)):
            raise UnknownPTX("a variable that is aligned to more than 16 bytes")
        if len({v.name for v in shared}) != len(shared):
            raise UnknownPTX("shared memory of two functions under one name")
        self.shared: dict[str, int] = {}  # offsets of those that belong to no kernel
        self.shared_bytes = place(self.shared, (v for v in shared if v.count))
        self.dynamic = {v.name for v in shared if not v.count}
        self.sites = ["a call"]  # texts of instructions, as Launch has them

    def reached(self, function: Function) -> list[Function]:
        """A function and all that it calls."""
        found, new = {function.name}, {function.name}
        while new:
            new = {name for f in new for name in names_of(self.functions[f]) & self.functions.keys()} - found
            found |= new
        return [self.functions[name] for name in sorted(found)]


class Body:
    """A function being translated."""

    def __init__(self, module: Module, function: Function) -> None:
        self.module, self.function = module, function
        self.used: set[str] = set()  # registers
        self.offsets: dict[str, int] = {}  # of shared and local variables, and of a kernel's parameters
        self.variables = {v.name: v for v in (*function.variables, *function.parameters, *function.returns)}
        self.variables |= {v.name: v for v in module.memory}
        if function.entry:
            place(self.offsets, function.parameters)
        own = (v for v in function.variables if v.space == "shared" and function.entry)
        behind = any(module.shared.keys() & names_of(f) for f in module.reached(function))
        self.shared_bytes = place(self.offsets, own, module.shared_bytes if behind else 0)
        local = (v for v in function.variables if v.space == "local")
        self.local_bytes = -(-place(self.offsets, local) // 16) * 16

    def text(self) -> str:
        lines = []
        for item in self.function.body or ():
            if isinstance(item, Instruction):
                lines.append(f"    {self.statement(item)}  // {item.text}")
            elif not item.targets:
                lines.append(f"{label(item.name)}:;")
        registers = [(unsigned(self.function.registers[name]), name) for name in sorted(self.used)]
        arguments = [v for v in self.function.variables if v.space == "param"]  # of functions that this one calls
        return "\n".join(
            [
                f"{head(self.function)} {{",
                *(f"    {cpp_type(type_)} {cpp_name(name)};" for type_, name in registers),
                *(f"    alignas(16) char {cpp_name(v.name)}[{max(v.size, 1)}];" for v in arguments),
                "    u32 carry = 0;",
                *([f"    Frame frame(me, {self.local_bytes});"] if self.local_bytes else []),
                *lines,
                "}",
            ]
        )

    def statement(self, instruction: Instruction) -> str:
        operation = Operation(instruction, self)
        try:
            if instruction.opcode not in TRANSLATORS:
                raise UnknownPTX(f"the opcode {instruction.opcode}")
            statement = TRANSLATORS[instruction.opcode](operation)
            operation.check_taken()
            condition = f"if ({operation.predicate(instruction.predicate)}) " if instruction.predicate else ""
        except UnknownPTX as unknown:
            raise UnknownPTX(f"{unknown}, in {instruction.text!r} of {self.function.name}") from None
        return f"{condition}{{ {statement} }}"

    def address(self, name: str) -> tuple[str, str]:
        """(state space, C++ address) of a variable: an offset in shared memory, elsewhere a place in main memory."""
        if name in self.module.dynamic:
            return "shared", "((me.launch->static_shared + 15) & ~15ull)"
        if name in self.module.shared:
            return "shared", f"{self.module.shared[name]}u"
        if name not in self.variables:
            raise UnknownPTX(f"the name {name}")
        space = self.variables[name].space
        if name not in self.offsets:
            return space, f"reinterpret_cast<u64>({cpp_name(name)})"
        bases = {"shared": "0u", "local": "frame", "param": "reinterpret_cast<u64>(me.launch->parameters)"}
        return space, f"({bases[space]} + {self.offsets[name]})"


def place(offsets: dict[str, int], variables: Iterable[Variable], start: int = 0) -> int:
    """Give each variable its offset behind the last; where the last ends."""
    for variable in variables:
        offsets[variable.name] = -(-start // variable.align) * variable.align
        start = offsets[variable.name] + variable.size
    return start


def names_of(function: Function) -> set[str]:
    """All that the instructions of a function name."""
    texts = (i.text for i in function.body or () if isinstance(i, Instruction))
    return {name for text in texts for name in re.findall(r"[\w$%]+", text)}


def definition(variable: Variable) -> str:
    """A variable in global or constant memory, found by its symbol."""
    values = ", ".join(literal(value, variable.type) for value in variable.values)
    declared = f"{cpp_type(unsigned(variable.type))} {cpp_name(variable.name)}[{max(variable.count, 1)}]"
    return f'extern "C" {{ alignas({max(variable.align, 8)}) {declared} = {{{values}}}; }}'


def head(function: Function) -> str:
    """Parameters of a function that is no kernel are the memory of what it returns and takes, which is its caller's."""
    variables = () if function.entry else (*function.returns, *function.parameters)
    parameters = ", ".join(["Thread& me", *(f"char* {cpp_name(v.name)}" for v in variables)])
    return f"static void {cpp_name(function.name)}({parameters})"


def kernel_of(function: Function, body: Body) -> Kernel:
    parameters = tuple((body.offsets[p.name], p.size) for p in function.parameters)
    size = place({}, function.parameters)
    return Kernel(f"launch_{function.name}", parameters, size, function.max_threads, body.shared_bytes)


def launcher(module: Module, kernel: Kernel, body: Body, bodies: dict[str, Body]) -> str:
    """The launch function of a kernel, which fills in a Launch."""
    reached = [f for f in module.reached(body.function) if f.name in bodies]
    opcodes = {i.opcode for f in reached for i in f.body or () if isinstance(i, Instruction)}
    values = {
        "kernel": cpp_text(body.function.name),
        "run": cpp_name(body.function.name),
        "waits": "true" if opcodes.intersection(WAITING) else "false",
        "instructions": "instructions",
        "instruction_count": len(module.sites),
        "variables": "variables",
        "variable_count": len(module.memory),
        "static_shared": kernel.shared_bytes,
        "dynamic_shared": "dynamic_shared",
        "local_bytes": sum(bodies[f.name].local_bytes for f in reached),
        "parameters": "parameters",
        "parameter_bytes": kernel.parameter_bytes,
        "grid": "{grid[0], grid[1], grid[2]}",
        "block": "{block[0], block[1], block[2]}",
        "hooks": "hooks",
    }
    return (
        f'extern "C" const char* {kernel.symbol}(const u32 grid[3], const u32 block[3], u64 dynamic_shared,'
        " const char* parameters, const Hooks* hooks) {\n    return emulated_launch({"
        + ", ".join(f".{name} = {value}" for name, value in values.items())
        + "});\n}"
    )
