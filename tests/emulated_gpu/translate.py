"""PTX to C++: each instruction to one statement, by the function that the table TRANSLATORS has for its opcode.

A translator takes the modifiers and operands of its instruction one by one. What it leaves is unknown, and an error:
an instruction is either translated as the PTX ISA describes it, or not at all. What the statements call is in thread.h.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

from .ptx import BITS, SPACES, Function, Instruction, Label, Program, UnknownPTX, Variable, split

FLOATS = ("f16", "f32", "f64")
SPECIAL = {f"%{name}.{axis}": f"me.{place}.{axis}" for axis in "xyz" for name, place in
           {"tid": "tid", "ntid": "launch->block", "ctaid": "ctaid", "nctaid": "launch->grid"}.items()}  # fmt: skip
SPECIAL |= {
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
WAITING = ("bar", "barrier", "shfl", "vote", "match", "redux")  # opcodes at which a thread waits for others

Translator = Callable[["Operation"], str]
TRANSLATORS: dict[str, Translator] = {}


def translates(*opcodes: str) -> Callable[[Translator], Translator]:
    def enter(translator: Translator) -> Translator:
        TRANSLATORS.update(dict.fromkeys(opcodes, translator))
        return translator

    return enter


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
    module = _Module(program)
    bodies = [_Body(module, function).text() for function in program.functions if function.body is not None]
    kernels = {f.name: module.kernel(f) for f in program.functions if f.entry}
    source = [
        '#include "thread.h"',
        *map(_definition, module.memory),
        *(f"static void {cpp(f.name)}({_parameters(f)});" for f in module.functions.values() if not f.entry and f.body),
        *bodies,
        f"static const char* const instructions[] = {{{', '.join(map(_quoted, module.sites))}}};",
        "static const ModuleVariable variables[] = {"
        + ", ".join([*(f"{{{cpp(v.name)}, {v.size}}}" for v in module.memory), "{nullptr, 0}"])
        + "};",
        *(module.launcher(f) for f in program.functions if f.entry),
    ]
    variables = {v.name: (cpp(v.name), v.size) for v in module.memory}
    return Translation("\n".join(source) + "\n", kernels, variables)


def cpp(name: str) -> str:
    """The C++ name of what PTX calls ``name``; no name of C++ or thread.h begins with a dollar."""
    return "$" + name.replace("%", "$")


def cpp_type(type_: str) -> str:
    return "bool" if type_ == "pred" else type_.replace("b", "u")


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _definition(variable: Variable) -> str:
    """A variable in global or constant memory (5.1.3, 5.1.4), found by its symbol."""
    type_ = cpp_type(variable.type.replace("f", "u"))
    values = ", ".join(literal(value, variable.type) for value in variable.values)
    size = f"[{max(variable.count, 1)}]"
    return f'extern "C" {{ alignas({max(variable.align, 8)}) {type_} {cpp(variable.name)}{size} = {{{values}}}; }}'


def literal(text: str, type_: str) -> str:
    """A constant (4.5) as the bits of ``type_``: an integer, or a float or double by its bits."""
    if match := re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", text):
        bits, number = BITS[type_], int(match[2], 16)
        if len(match[2]) * 4 != bits:
            if match[1] in "dD" or bits != 64:
                raise UnknownPTX(f"the constant {text} of type {type_}")
            number = struct.unpack("<Q", struct.pack("<d", *struct.unpack("<f", struct.pack("<I", number))))[0]
        return f"{number:#x}{'ull' if bits == 64 else 'u'}"
    if not re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|0|[1-9]\d*)U?", text):
        raise UnknownPTX(f"the constant {text}")
    number = int(text.removesuffix("U"), 0) % 2 ** min(BITS[type_], 64)
    return f"{number:#x}{'ull' if number >= 2**32 else 'u'}"


class _Module:
    """What the functions of a program share: variables, and the instructions that may be at fault."""

    def __init__(self, program: Program) -> None:
        self.functions = {f.name: f for f in program.functions}
        self.memory = [v for v in program.variables if v.space in ("global", "const")]
        inner = [v for f in program.functions if not f.entry for v in f.variables]
        shared = [v for v in (*program.variables, *inner) if v.space == "shared"]
        if any(v.align > 16 for f in program.functions for v in (*shared, *f.variables)):
            raise UnknownPTX("a variable that is aligned to more than 16 bytes")
        self.shared: dict[str, int] = {}  # offsets of those that belong to no kernel
        self.shared_bytes = _place(self.shared, [v for v in shared if v.count])
        self.dynamic = {v.name for v in shared if not v.count}
        self.sites = ["a call"]  # texts of instructions, as Launch has them
        self.bodies: dict[str, _Body] = {}

    def reached(self, function: Function) -> list[Function]:
        """A function and all that it calls."""
        found, new = {function.name}, {function.name}
        while new:
            new = {name for f in new for name in names_of(self.functions[f]) & self.functions.keys()} - found
            found |= new
        return [self.functions[name] for name in sorted(found)]

    def kernel(self, function: Function) -> Kernel:
        offsets: dict[str, int] = {}
        size = _place(offsets, function.parameters)
        parameters = tuple((offsets[p.name], p.size) for p in function.parameters)
        shared = self.bodies[function.name].static_shared
        return Kernel(f"launch_{function.name}", parameters, size, function.max_threads, shared)

    def launcher(self, function: Function) -> str:
        kernel = self.kernel(function)
        reached = [self.bodies[f.name] for f in self.reached(function) if f.name in self.bodies]
        values = {
            "kernel": _quoted(function.name),
            "run": cpp(function.name),
            "waits": "true" if any(body.waits for body in reached) else "false",
            "instructions": "instructions",
            "instruction_count": len(self.sites),
            "variables": "variables",
            "variable_count": len(self.memory),
            "static_shared": kernel.shared_bytes,
            "dynamic_shared": "dynamic_shared",
            "local_bytes": sum(body.local_bytes for body in reached),
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


def _place(offsets: dict[str, int], variables: list[Variable] | tuple[Variable, ...], start: int = 0) -> int:
    """Give each variable its offset behind the last; the size of all."""
    for variable in variables:
        offsets[variable.name] = -(-start // variable.align) * variable.align
        start = offsets[variable.name] + variable.size
    return start


def names_of(function: Function) -> set[str]:
    """All that the instructions of a function name."""
    texts = (i.text for i in function.body or () if isinstance(i, Instruction))
    return {name for text in texts for name in re.findall(r"[\w$%]+", text)}


def _parameters(function: Function) -> str:
    """Of a function that is not a kernel: the memory of what it returns and takes, which belongs to the caller."""
    return ", ".join(["Thread& me", *(f"char* {cpp(v.name)}" for v in (*function.returns, *function.parameters))])


class _Body:
    """A function being translated."""

    def __init__(self, module: _Module, function: Function) -> None:
        self.module, self.function = module, function
        module.bodies[function.name] = self
        self.waits = False
        self.used: set[str] = set()  # registers
        self.offsets: dict[str, int] = {}  # of shared and local variables, and of a kernel's parameters
        if function.entry:
            _place(self.offsets, function.parameters)
        own = [v for v in function.variables if v.space == "shared" and function.entry]
        behind = any(module.shared.keys() & names_of(f) for f in module.reached(function))
        self.static_shared = _place(self.offsets, own, module.shared_bytes if behind else 0)
        local = [v for v in function.variables if v.space == "local"]
        self.local_bytes = -(-_place(self.offsets, local) // 16) * 16
        self.spaces = {v.name: v for v in (*function.variables, *function.parameters, *function.returns)}
        self.spaces |= {v.name: v for v in module.memory}

    def text(self) -> str:
        function, lines = self.function, []
        for item in function.body or ():
            if isinstance(item, Label):
                lines.append("" if item.targets else f"{_label(item.name)}:;")
            else:
                lines.append(f"    {self.statement(item)}  // {item.text}")
        head = f"static void {cpp(function.name)}({'Thread& me' if function.entry else _parameters(function)}) {{"
        declared = [f"    {_register(function.registers[r])} {cpp(r)};" for r in sorted(self.used)]
        parameters = [v for v in function.variables if v.space == "param"]  # of functions that this one calls
        declared += [f"    alignas(16) char {cpp(v.name)}[{max(v.size, 1)}];" for v in parameters]
        frame = [f"    Frame frame(me, {self.local_bytes});"] if self.local_bytes else []
        return "\n".join([head, *declared, "    u32 carry = 0;", *frame, *lines, "}"])

    def statement(self, instruction: Instruction) -> str:
        operation = Operation(instruction, self)
        try:
            translator = TRANSLATORS.get(instruction.opcode)
            if translator is None:
                raise UnknownPTX(f"the opcode {instruction.opcode}")
            statement = translator(operation)
            operation.check_taken()
        except UnknownPTX as unknown:
            raise UnknownPTX(f"{unknown}, in {instruction.text!r} of {self.function.name}") from None
        self.waits = self.waits or instruction.opcode in WAITING
        if instruction.predicate:
            return f"if ({operation.predicate(instruction.predicate)}) {{ {statement} }}"
        return f"{{ {statement} }}" if ";" in statement[:-1] else statement

    def symbol(self, name: str) -> tuple[str, str]:
        """(state space, address) of a variable: in shared memory an offset, elsewhere where it is in main memory."""
        if name in self.module.dynamic:
            return "shared", "((me.launch->static_shared + 15) & ~15ull)"
        if name in self.module.shared:
            return "shared", f"{self.module.shared[name]}u"
        variable = self.spaces.get(name)
        if variable is None:
            raise UnknownPTX(f"the name {name}")
        if variable.space == "shared":
            return "shared", f"{self.offsets[name]}u"
        if variable.space == "local":
            return "local", f"(frame + {self.offsets[name]})"
        if variable.space == "param" and self.function.entry and name in self.offsets:
            return "param", f"(reinterpret_cast<u64>(me.launch->parameters) + {self.offsets[name]})"
        return variable.space, f"reinterpret_cast<u64>({cpp(name)})"


def _label(name: str) -> str:
    return "at" + cpp(name)


def _register(type_: str) -> str:
    return "bool" if type_ == "pred" else f"u{BITS[type_]}"


class Operation:
    """An instruction whose modifiers and operands a translator takes."""

    def __init__(self, instruction: Instruction, body: _Body) -> None:
        self.instruction, self.body = instruction, body
        self.opcode, self.operands = instruction.opcode, instruction.operands
        self.modifiers = list(instruction.modifiers)
        self.taken: set[int] = set()
        self.flush = False  # .ftz

    # --- modifiers

    def flag(self, *names: str) -> bool:
        """Whether the next modifier is one of ``names``, which is taken."""
        return bool(self.choice("", *names))

    def choice(self, default: str | None, *names: str) -> str:
        """The next modifier, which is one of ``names``; ``default``, if not None, where it is not."""
        if self.modifiers and self.modifiers[0] in names:
            return self.modifiers.pop(0)
        if default is None:
            raise UnknownPTX(f"none of {', '.join(names)}")
        return default

    def type(self, *allowed: str) -> str:
        """The last modifier, a type."""
        if not self.modifiers or self.modifiers[-1] not in (allowed or BITS):
            raise UnknownPTX(f"no type that is known here ({', '.join(allowed or BITS)})")
        return self.modifiers.pop()

    def skip_memory_modifiers(self) -> None:
        """Caches, memory order and scopes say nothing here: memory is one, and coherent (8)."""
        names = "ca cg cs lu cv wb wt nc weak volatile relaxed acquire release acq_rel sc cta cluster gpu sys".split()
        self.modifiers = [m for m in self.modifiers if m not in names and not re.match(r"L[12]::", m)]

    def check_taken(self) -> None:
        if self.modifiers:
            raise UnknownPTX(f"the modifier .{self.modifiers[0]}")
        if left := set(range(len(self.operands))) - self.taken:
            raise UnknownPTX(f"the operand {self.operands[min(left)]}")

    # --- operands

    def operand(self, place: int) -> str:
        if place >= len(self.operands):
            raise UnknownPTX(f"no operand {place + 1}")
        self.taken.add(place)
        return self.operands[place]

    def register(self, name: str) -> str:
        if name not in self.body.function.registers:
            raise UnknownPTX(f"the register {name}")
        self.body.used.add(name)
        return cpp(name)

    def predicate(self, text: str) -> str:
        return "!" * text.startswith("!") + self.register(text.removeprefix("!").strip())

    def value(self, place: int, type_: str) -> str:
        """An operand as a C++ value of ``type_``, flushed where .ftz was taken."""
        value = self.value_of(self.operand(place), type_)
        return f"flush({value})" if self.flush and type_ in FLOATS else value

    def value_of(self, text: str, type_: str) -> str:
        if type_ == "pred":
            return {"0": "false", "1": "true", "-1": "true"}.get(text) or self.predicate(text)
        if text in SPECIAL:
            return f"as<{cpp_type(type_)}>({SPECIAL[text]})"
        if text in self.body.function.registers:
            return f"as<{cpp_type(type_)}>({self.register(text)})"
        if text[0].isdigit() or text[0] == "-":
            return f"as<{cpp_type(type_)}>({literal(text, type_)})"
        name, _, offset = text.partition("+")
        return f"as<{cpp_type(type_)}>({self.body.symbol(name)[1]} + {int(offset or '0', 0)})"

    def assign(self, place: int, value: str, type_: str) -> str:
        return self.assign_to(self.operand(place), value, type_)

    def assign_to(self, text: str, value: str, type_: str) -> str:
        """A C++ value of ``type_`` into a register; ``_`` is a sink."""
        if text == "_":
            return f"(void)({value});"
        if type_ == "pred":
            return f"{self.register(text)} = {value};"
        return f"{self.register(text)} = bits<{cpp_type(type_)}>({value});"

    def result(self, value: str, type_: str, saturated: bool = False) -> str:
        """A floating-point result into the first operand: flushed where .ftz was taken, NaN canonical."""
        if self.flush:
            value = f"flush({value})"
        return self.assign(0, f"saturate({value})" if saturated else f"canonical({value})", type_)

    def site(self) -> str:
        """The place of the instruction among those that can be at fault."""
        self.body.module.sites.append(self.instruction.text)
        return str(len(self.body.module.sites) - 1)

    def memory(self, place: int, space: str, size: int) -> str:
        """The C++ address of a memory operand (6.4.1), checked."""
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
            found, address = self.body.symbol(base)
            if found == "param" and space == "param":
                if not 0 <= offset <= self.body.spaces[base].size - size:
                    raise UnknownPTX(f"{size} bytes at {text}, which is too small")
                return f"{address} + {offset}"
            if found != space:
                raise UnknownPTX(f"{base}, which is in .{found}")
        return f"in_{space}(me, {self.site()}, {address} + {offset % 2**64:#x}ull, {size})"

    def space(self) -> str:
        """The state space of a memory instruction; without one the address is generic."""
        found = [m for m in self.modifiers if m.split("::")[0] in SPACES]
        if len(found) > 1 or any("::" in m and m not in ("shared::cta", "param::func", "param::entry") for m in found):
            raise UnknownPTX(f"the state spaces {found}")
        if not found:
            return "generic"
        self.modifiers.remove(found[0])
        return found[0].split("::")[0]


# --- floating point (9.7.3, 9.7.4) ----------------------------------------------------------------------------------


def float_operation(op: Operation, type_: str, function: str, count: int) -> str:
    """``function`` of ``count`` operands with the rounding, .ftz and .sat of the instruction."""
    rounding = op.choice("rn", "rn", "rz", "rm", "rp")
    op.flush = op.flag("ftz")
    saturated = op.flag("sat")
    values = [op.value(i + 1, type_) for i in range(count)]
    if rounding == "rn":
        return op.result(f"{function}({', '.join(values)})", type_, saturated)
    if type_ == "f16":
        raise UnknownPTX(f"the rounding .{rounding} of f16")
    names = ", ".join(f"{type_} {name}" for name in "abc"[:count])
    lambda_ = f"[]({names}) {{ return {function}({', '.join('abc'[:count])}); }}"
    return op.result(f"rounded<{rounding.upper()}>({lambda_}, {', '.join(values)})", type_, saturated)


@translates("add", "sub")
def add(op: Operation) -> str:
    """9.7.1.1, 9.7.3.3, 9.7.4.1; with carry 9.7.2.1."""
    type_ = op.type()
    if type_ in FLOATS:
        return float_operation(op, type_, op.opcode, 2)
    if op.flag("cc"):
        return carry(op, type_, "0", True)
    if op.flag("sat"):
        if type_ != "s32":
            raise UnknownPTX("saturation of a type that is not s32")
        return op.assign(
            0, f"clamp<s32>(s64({op.value(1, type_)}) {'+-'[op.opcode == 'sub']} {op.value(2, type_)})", type_
        )
    return op.assign(0, f"{op.opcode}({op.value(1, type_)}, {op.value(2, type_)})", type_)


@translates("addc", "subc")
def addc(op: Operation) -> str:
    """9.7.2.2, 9.7.2.4."""
    type_ = op.type()
    return carry(op, type_, "carry", op.flag("cc"))


def carry(op: Operation, type_: str, carried: str, sets: bool) -> str:
    unsigned = f"u{BITS[type_]}"
    call = f"{op.opcode[:3]}_carry({op.value(1, unsigned)}, {op.value(2, unsigned)}, {carried}, next)"
    return f"u32 next; {op.assign(0, call, unsigned)}" + (" carry = next;" if sets else "")


@translates("mul", "mad", "madc")
def mul(op: Operation) -> str:
    """9.7.1.3, 9.7.1.4, 9.7.2.5, 9.7.3.5, 9.7.4.3."""
    type_ = op.type()
    if type_ in FLOATS:
        return float_operation(op, type_, *(("mul", 2) if op.opcode == "mul" else ("fma", 3)))
    part = op.choice(None, "lo", "hi", "wide")
    values = f"{op.value(1, type_)}, {op.value(2, type_)}"
    result = type_ if part != "wide" else f"{type_[0]}{2 * BITS[type_]}"
    product = {"lo": f"mul({values})", "hi": f"high({values})", "wide": f"product({values})"}[part]
    if op.opcode == "mul":
        return op.assign(0, product, result)
    sets = op.flag("cc")
    if sets or op.opcode == "madc":
        carried = "carry" if op.opcode == "madc" else "0"
        unsigned = f"u{BITS[result]}"
        call = f"add_carry({unsigned}({product}), {op.value(3, unsigned)}, {carried}, next)"
        return f"u32 next; {op.assign(0, call, unsigned)}" + (" carry = next;" if sets else "")
    return op.assign(0, f"add<{cpp_type(result)}>({product}, {op.value(3, result)})", result)


@translates("fma")
def fma(op: Operation) -> str:
    """9.7.3.6, 9.7.4.4: one rounding."""
    return float_operation(op, op.type(*FLOATS), "fma", 3)


@translates("div", "rem")
def div(op: Operation) -> str:
    """9.7.1.7, 9.7.1.8, 9.7.3.8: .approx and .full as the exact quotient, rounded."""
    type_ = op.type()
    if type_ in FLOATS and op.opcode == "div":
        op.choice("", "approx", "full")
        return float_operation(op, type_, "div", 2)
    name = {"div": "quotient", "rem": "remainder"}[op.opcode]
    return op.assign(0, f"{name}({op.value(1, type_)}, {op.value(2, type_)})", type_)


@translates("rcp", "sqrt")
def rcp(op: Operation) -> str:
    """9.7.3.13 to 9.7.3.15."""
    type_ = op.type("f32", "f64")
    if op.flag("approx") and type_ == "f64":
        op.flush = op.flag("ftz")
        return op.assign(0, f"upper_half({op.opcode}({op.value(1, type_)}))", type_)
    return float_operation(op, type_, op.opcode, 1)


@translates("rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def approximation(op: Operation) -> str:
    """9.7.3.16 to 9.7.3.22."""
    type_ = op.type("f32", "f64") if op.opcode == "rsqrt" else op.type("f32")
    op.choice(None, "approx")
    op.flush = op.flag("ftz")
    value = f"{op.opcode}({op.value(1, type_)})"
    return op.assign(0, f"upper_half({value})", type_) if type_ == "f64" and op.flush else op.result(value, type_)


@translates("neg", "abs")
def neg(op: Operation) -> str:
    """9.7.1.10, 9.7.1.11, 9.7.3.9, 9.7.3.10: of a NaN, the sign bit alone."""
    type_ = op.type()
    if type_ not in FLOATS:
        value = op.value(1, type_)
        return op.assign(0, f"{value} < 0 ? -{value} : {value}" if op.opcode == "abs" else f"-{value}", type_)
    op.flush = op.flag("ftz")
    unsigned, sign = f"u{BITS[type_]}", f"(1ull << {BITS[type_] - 1})"
    bits = f"bits({op.value(1, type_)}) {'^' if op.opcode == 'neg' else '& ~'}{sign}"
    return op.assign(0, bits, unsigned)


@translates("min", "max")
def minimum(op: Operation) -> str:
    """9.7.1.12, 9.7.1.13, 9.7.3.11, 9.7.3.12."""
    type_ = op.type()
    op.flush = op.flag("ftz")
    nan = op.flag("NaN")
    a, b = op.value(1, type_), op.value(2, type_)
    result = f"{op.opcode}({a}, {b})"
    return op.assign(0, f"or_nan({a}, {b}, {result})" if nan else result, type_)


@translates("copysign")
def copysign(op: Operation) -> str:
    """9.7.3.2: the sign of the first, the size of the second."""
    type_ = op.type("f32", "f64")
    a, b, sign = op.value(1, f"u{BITS[type_]}"), op.value(2, f"u{BITS[type_]}"), f"(1ull << {BITS[type_] - 1})"
    return op.assign(0, f"({a} & {sign}) | ({b} & ~{sign})", f"u{BITS[type_]}")


@translates("testp")
def testp(op: Operation) -> str:
    """9.7.3.1."""
    type_ = op.type("f32", "f64")
    name = op.choice(None, "finite", "infinite", "number", "notanumber", "normal", "subnormal")
    value = op.value(1, type_)
    classes = {
        "finite": f"__builtin_isfinite({value})",
        "infinite": f"__builtin_isinf({value})",
        "number": f"!__builtin_isnan({value})",
        "notanumber": f"__builtin_isnan({value})",
        "normal": f"__builtin_isnormal({value})",
        "subnormal": f"{value} != 0 && flush({value}) == 0",
    }
    return op.assign(0, f"({classes[name]}) != 0", "pred")


# --- comparison and selection (9.7.6) --------------------------------------------------------------------------------


COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def comparison(op: Operation, type_: str) -> str:
    unordered = [f"{name}u" for name in COMPARISONS]
    name = op.choice(None, *COMPARISONS, *UNSIGNED, *unordered, "num", "nan")
    both = op.choice("", "and", "or", "xor")
    op.flush = op.flag("ftz")
    a, b = op.value(1, type_), op.value(2, type_)
    nan = f"({a} != {a} || {b} != {b})"
    if name in ("num", "nan"):
        result = "!" * (name == "num") + nan
    elif name in unordered:
        result = f"({nan} || {a} {COMPARISONS[name[:-1]]} {b})"
    else:
        result = f"({a} {COMPARISONS[UNSIGNED.get(name, name)]} {b})"
        if name == "ne" and type_ in FLOATS:
            result = f"(!{nan} && {result})"
    return f"({result} {'&|^'[('and', 'or', 'xor').index(both)]} {op.value(3, 'pred')})" if both else result


@translates("setp")
def setp(op: Operation) -> str:
    """9.7.6.2: p, or p|q, of which q has the comparison reversed."""
    type_ = op.type()
    if any(m in ("and", "or", "xor") for m in op.modifiers) and "|" in op.operands[0]:
        raise UnknownPTX("two results that are combined with a third predicate")
    first, _, second = op.operand(0).partition("|")
    result = comparison(op, type_)
    if not second:
        return op.assign_to(first.strip(), result, "pred")
    both = op.assign_to(first.strip(), "p", "pred"), op.assign_to(second.strip(), "!p", "pred")
    return f"const bool p = {result}; {' '.join(both)}"


@translates("set")
def set_(op: Operation) -> str:
    """9.7.6.1: ones or 1.0, or zero."""
    type_, result = op.type(), op.type("u32", "s32", "f32")
    true = "1.0f" if result == "f32" else f"{result}(~0u)"
    return op.assign(0, f"{comparison(op, type_)} ? {true} : {result}(0)", result)


@translates("selp")
def selp(op: Operation) -> str:
    """9.7.6.3."""
    type_ = op.type().replace("f", "u")
    return op.assign(0, f"{op.value(3, 'pred')} ? {op.value(1, type_)} : {op.value(2, type_)}", type_)


@translates("slct")
def slct(op: Operation) -> str:
    """9.7.6.4: by the sign of the third; NaN is not above zero."""
    sign, type_ = op.type("s32", "f32"), op.type().replace("f", "u")
    op.flush = op.flag("ftz")
    return op.assign(0, f"{op.value(3, sign)} >= 0 ? {op.value(1, type_)} : {op.value(2, type_)}", type_)


# --- integers and bits (9.7.1, 9.7.8) --------------------------------------------------------------------------------


@translates("and", "or", "xor")
def logic(op: Operation) -> str:
    """9.7.8.1 to 9.7.8.3."""
    type_ = op.type()
    return op.assign(
        0, f"{op.value(1, type_)} {'&|^'[('and', 'or', 'xor').index(op.opcode)]} {op.value(2, type_)}", type_
    )


@translates("not", "cnot")
def not_(op: Operation) -> str:
    """9.7.8.4, 9.7.8.5."""
    type_ = op.type()
    return op.assign(0, f"{'~' if op.opcode == 'not' and type_ != 'pred' else '!'}{op.value(1, type_)}", type_)


@translates("shl", "shr")
def shift(op: Operation) -> str:
    """9.7.8.7, 9.7.8.8: the amount is clamped."""
    type_ = op.type()
    return op.assign(0, f"{op.opcode}({op.value(1, type_)}, {op.value(2, 'u32')})", type_)


@translates("shf")
def shf(op: Operation) -> str:
    """9.7.8.6."""
    op.type("b32")
    direction, mode = op.choice(None, "l", "r"), op.choice(None, "clamp", "wrap")
    a, b, amount = (op.value(i, "u32") for i in (1, 2, 3))
    return op.assign(0, f"shf_{direction}({a}, {b}, shift_{mode}({amount}))", "u32")


@translates("popc", "clz", "bfind")
def count_bits(op: Operation) -> str:
    """9.7.1.15 to 9.7.1.17."""
    type_ = op.type()
    return op.assign(0, f"{op.opcode}({op.value(1, type_)})", "u32")


@translates("brev")
def brev(op: Operation) -> str:
    """9.7.1.19."""
    type_ = op.type("b32", "b64")
    return op.assign(0, f"brev({op.value(1, type_)})", type_)


@translates("bfe", "bfi")
def bit_field(op: Operation) -> str:
    """9.7.1.20, 9.7.1.21."""
    type_ = op.type()
    fields = 1 if op.opcode == "bfe" else 2
    values = [op.value(i + 1, type_) for i in range(fields)] + [op.value(fields + i, "u32") for i in (1, 2)]
    return op.assign(0, f"{op.opcode}({', '.join(values)})", type_)


@translates("prmt", "lop3")
def bytes_or_bits(op: Operation) -> str:
    """9.7.8.6 lop3, 9.7.9.7 prmt without modes."""
    type_ = op.type("b32")
    count = {"prmt": 3, "lop3": 4}[op.opcode]
    return op.assign(0, f"{op.opcode}({', '.join(op.value(i + 1, type_) for i in range(count))})", type_)


# --- moves and conversions (9.7.9) -----------------------------------------------------------------------------------


@translates("mov")
def mov(op: Operation) -> str:
    """9.7.9.3, and 9.7.9.4, which packs and unpacks vectors."""
    type_ = op.type().replace("f", "u")
    target, source = op.operand(0), op.operand(1)
    if target.startswith("{"):
        names = split(target[1:-1])
        size = BITS[type_] // len(names)
        parts = (op.assign_to(n, f"u{size}(x >> {size * i})", f"u{size}") for i, n in enumerate(names) if n != "_")
        return f"const u{BITS[type_]} x = {op.value_of(source, type_)}; {' '.join(parts)}"
    if source.startswith("{"):
        names = split(source[1:-1])
        size, whole = BITS[type_] // len(names), f"u{BITS[type_]}"
        parts = (f"{whole}({op.value_of(n, f'u{size}')}) << {size * i}" for i, n in enumerate(names))
        return op.assign(0, " | ".join(f"({part})" for part in parts), type_)
    return op.assign(0, op.value_of(source, type_), type_)


@translates("cvt")
def cvt(op: Operation) -> str:
    """9.7.9.22. .ftz concerns what is f32."""
    source, target = op.type(), op.type()
    rounding = op.choice("", "rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi")
    ftz = op.flag("ftz")
    saturated = op.flag("sat")
    op.flush = ftz and source == "f32"
    value = op.value(1, source)
    if target not in FLOATS and source not in FLOATS:
        return op.assign(0, f"clamp<{target}>({value})" if saturated else f"{cpp_type(target)}({value})", target)
    if source in FLOATS and rounding.endswith("i"):
        value = f"whole_{rounding[:2]}({value})"  # in f64, exactly
    if target not in FLOATS:
        return op.assign(0, f"to_integer<{target}>({value}, {str(source == 'f64').lower()})", target)
    if rounding in ("rz", "rm", "rp"):
        if target == "f16":
            raise UnknownPTX(f"the rounding .{rounding} to f16")
        value = f"rounded<{rounding.upper()}>([]({source} x) {{ return {target}(x); }}, {value})"
    elif target == "f16":
        value = f"f64({value})"  # a detour by f32 would round twice
    op.flush = ftz and target == "f32"
    return op.result(f"{target}({value})", target, saturated)


@translates("cvta")
def cvta(op: Operation) -> str:
    """9.7.9.20: a generic address is one in main memory; only those of shared memory differ."""
    op.type("u64")
    to = op.flag("to")
    space = op.space()
    if space != "shared":
        return op.assign(0, op.value(1, "u64"), "u64")
    return op.assign(0, f"{op.value(1, 'u64')} {'-' if to else '+'} reinterpret_cast<u64>(me.shared)", "u64")


@translates("isspacep")
def isspacep(op: Operation) -> str:
    """9.7.9.19."""
    space = op.space()
    address = op.value(1, "u64")
    tests = {name: f"is_{test}(me, {address})" for name, test in
             {"shared": "shared", "local": "local", "param": "parameter"}.items()}  # fmt: skip
    tests["global"] = "!" + " && !".join(tests.values())
    return op.assign(0, tests[space], "pred")


@translates("shfl")
def shfl(op: Operation) -> str:
    """9.7.9.6."""
    op.type("b32")
    op.choice(None, "sync")
    mode = op.choice(None, "up", "down", "bfly", "idx").upper()
    target, _, in_range = op.operand(0).partition("|")
    values = ", ".join(op.value(i, "u32") for i in (1, 2, 3, 4))
    call = op.assign_to(target.strip(), f"shfl(me, {op.site()}, {mode}, {values}, in_range)", "u32")
    return f"bool in_range; {call}" + (f" {op.assign_to(in_range.strip(), 'in_range', 'pred')}" if in_range else "")


# --- memory (9.7.9.8 to 9.7.9.18, 9.7.13) ----------------------------------------------------------------------------


def elements(operand: str) -> tuple[str, ...]:
    return split(operand[1:-1]) if operand.startswith("{") else (operand,)


@translates("ld", "ldu")
def ld(op: Operation) -> str:
    """9.7.9.8, 9.7.9.9."""
    type_ = op.type()
    op.skip_memory_modifiers()
    space = op.space()
    vector = op.choice("", "v2", "v4", "v8")
    names = elements(op.operand(0))
    if len(names) != int(vector[1:] or 1):
        raise UnknownPTX(f"{len(names)} registers for {vector or 'one element'}")
    size = BITS[type_] // 8
    address = op.memory(1, space, size * len(names))
    loads = (
        op.assign_to(name, f"load<{cpp_type(type_)}>(address + {size * i})", type_)
        for i, name in enumerate(names)
        if name != "_"
    )
    return f"const u64 address = {address}; {' '.join(loads)}"


@translates("st")
def st(op: Operation) -> str:
    """9.7.9.11."""
    type_ = op.type().replace("f", "u")
    op.skip_memory_modifiers()
    space = op.space()
    vector = op.choice("", "v2", "v4", "v8")
    values = elements(op.operand(1))
    if space == "const" or len(values) != int(vector[1:] or 1):
        raise UnknownPTX(f"a store to .{space} of {len(values)} registers")
    size = BITS[type_] // 8
    address = op.memory(0, space, size * len(values))
    stores = (f"store(address + {size * i}, {op.value_of(v, type_)});" for i, v in enumerate(values))
    return f"const u64 address = {address}; {' '.join(stores)}"


@translates("atom", "red")
def atom(op: Operation) -> str:
    """9.7.13.5, 9.7.13.7. Sums of f32 in global memory flush subnormal numbers, those in shared memory do not."""
    type_ = op.type()
    op.skip_memory_modifiers()
    space = op.space()
    names = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
    name = op.choice(None, *names)
    noftz = op.flag("noftz")
    if type_ == "f16" and not noftz:
        raise UnknownPTX("an atomic operation on f16 without .noftz")
    first = 1 if op.opcode == "atom" else 0
    address = op.memory(first, space, BITS[type_] // 8)
    value = op.value(first + 1, type_)
    flushing = "is_shared(me, address) ? add(old, value) : flush(add(flush(old), flush(value)))"
    changed = {
        "add": flushing if type_ == "f32" else "add(old, value)",
        "min": "min(old, value)",
        "max": "max(old, value)",
        "and": "old & value",
        "or": "old | value",
        "xor": "old ^ value",
        "exch": "value",
        "cas": "old == value ? other : old",
        "inc": "old >= value ? 0 : old + 1",
        "dec": "old == 0 || old > value ? value : old - 1",
    }[name]
    c = cpp_type(type_)
    known = f"const u64 address = {address}; const {c} value = {value};"
    if name == "cas":
        known += f" const {c} other = {op.value(first + 2, type_)};"
    call = f"atomic<{c}>(address, [&]({c} old) -> {c} {{ return {changed}; }})"
    return f"{known} {op.assign(0, call, type_) if first else call + ';'}"


@translates("prefetch", "prefetchu", "membar", "fence", "nanosleep")
def nothing(op: Operation) -> str:
    """9.7.9.15, 9.7.13.4, 9.7.12.9: memory is coherent, and threads run one after another."""
    op.modifiers.clear()
    op.taken |= set(range(len(op.operands)))
    return ";"


# --- control flow (9.7.12) -------------------------------------------------------------------------------------------


@translates("bra")
def bra(op: Operation) -> str:
    """9.7.12.3."""
    op.flag("uni")
    return f"goto {_label(op.operand(0))};"


@translates("brx")
def brx(op: Operation) -> str:
    """9.7.12.4: to the label of that number."""
    op.choice(None, "idx")
    op.flag("uni")
    name = op.operand(1)
    lists = [i for i in op.body.function.body or () if isinstance(i, Label) and i.name == name and i.targets]
    if len(lists) != 1:
        raise UnknownPTX(f"no list of labels {name}")
    cases = (f"case {i}: goto {_label(target)};" for i, target in enumerate(lists[0].targets))
    return f"switch ({op.value(0, 'u32')}) {{ {' '.join(cases)} }} {trap_statement(op, 'no such label')}"


def trap_statement(op: Operation, sentence: str) -> str:
    return f"emulated_trap(me, {op.site()}, {_quoted(sentence)});"


@translates("ret", "exit")
def ret(op: Operation) -> str:
    """9.7.12.6, 9.7.12.7."""
    op.flag("uni")
    if op.opcode == "exit" and not op.body.function.entry:
        raise UnknownPTX("exit in a function")
    return "return;"


@translates("trap")
def trap(op: Operation) -> str:
    """9.7.19.4."""
    return trap_statement(op, "a trap")


@translates("call")
def call(op: Operation) -> str:
    """9.7.12.5: of a function that is named, its parameters in variables."""
    op.flag("uni")
    texts = [op.operand(i) for i in range(len(op.operands))]
    returns = split(texts.pop(0)[1:-1]) if texts[0].startswith("(") else ()
    name = texts.pop(0)
    arguments = split(texts.pop(0)[1:-1]) if texts else ()
    if name == "__assertfail":
        return trap_statement(op, "an assertion does not hold")
    called = op.body.module.functions.get(name)
    if texts or called is None or called.body is None:
        raise UnknownPTX(f"a call of {name}")
    if (len(returns), len(arguments)) != (len(called.returns), len(called.parameters)):
        raise UnknownPTX(f"a call of {name} with other parameters than it has")
    places = [op.body.symbol(text) for text in (*returns, *arguments)]
    if any(space != "param" for space, _ in places):
        raise UnknownPTX("an argument that is not in .param")
    return f"{cpp(name)}({', '.join(['me', *(f'reinterpret_cast<char*>({address})' for _, address in places)])});"


# --- threads together (9.7.13) ---------------------------------------------------------------------------------------


@translates("bar", "barrier")
def bar(op: Operation) -> str:
    """9.7.13.1 to 9.7.13.3. ``bar`` is ``barrier`` with .aligned."""
    op.flag("cta")
    kind = op.choice(None, "sync", "arrive", "warp", "red")
    if kind == "warp":
        op.choice(None, "sync")
        return f"emulated_exchange(me, {op.site()}, {op.value(0, 'u32')}, 0);"
    reduction = op.choice(None, "popc", "and", "or") if kind == "red" else ""
    aligned = "true" if op.flag("aligned") or op.opcode == "bar" else "false"
    if kind != "red":
        count = op.value(1, "u32") if len(op.operands) > 1 else "0"
        return f"emulated_barrier(me, {op.site()}, {kind.upper()}, {aligned}, {op.value(0, 'u32')}, {count}, false);"
    type_ = op.type("u32", "pred")
    count = op.value(2, "u32") if len(op.operands) > 3 else "0"
    predicate = op.value(len(op.operands) - 1, "pred")
    threads = "me.launch->block.x * me.launch->block.y * me.launch->block.z"
    test = {"popc": "trues", "and": f"trues == ({count} ? {count} : {threads})", "or": "trues != 0"}[reduction]
    call = f"emulated_barrier(me, {op.site()}, SYNC, {aligned}, {op.value(1, 'u32')}, {count}, {predicate})"
    return f"const u32 trues = {call}; {op.assign(0, test, type_)}"


def exchange(op: Operation, mask: int, value: str) -> str:
    return f"const Exchange all = emulated_exchange(me, {op.site()}, {op.value(mask, 'u32')}, {value});"


@translates("vote")
def vote(op: Operation) -> str:
    """9.7.13.8."""
    type_ = op.type("pred", "b32")
    op.choice(None, "sync")
    mode = op.choice(None, *(("all", "any", "uni") if type_ == "pred" else ("ballot",)))
    tests = {
        "all": "lanes == all.participants",
        "any": "lanes != 0",
        "uni": "lanes == 0 || lanes == all.participants",
        "ballot": "lanes",
    }
    lanes = f"{exchange(op, 2, op.value(1, 'pred'))} const u32 lanes = lanes_with(all, 1);"
    return f"{lanes} {op.assign(0, tests[mode], type_)}"


@translates("match")
def match(op: Operation) -> str:
    """9.7.13.9."""
    type_ = op.type("b32", "b64")
    mode = op.choice(None, "any", "all")
    op.choice(None, "sync")
    value = op.value(1, type_)
    target, _, same = op.operand(0).partition("|")
    lanes = f"{exchange(op, 2, value)} const u32 lanes = lanes_with(all, {value});"
    if mode == "any":
        return f"{lanes} {op.assign_to(target, 'lanes', 'u32')}"
    lanes += f" const bool same = lanes == all.participants; {op.assign_to(target.strip(), 'same ? lanes : 0', 'u32')}"
    return lanes + (f" {op.assign_to(same.strip(), 'same', 'pred')}" if same else "")


@translates("redux")
def redux(op: Operation) -> str:
    """9.7.13.11, of integers."""
    type_ = op.type("u32", "s32", "b32")
    op.choice(None, "sync")
    name = op.choice(None, "add", "min", "max", "and", "or", "xor")
    c = cpp_type(type_)
    term = {"and": "a & b", "or": "a | b", "xor": "a ^ b"}.get(name, f"{name}(a, b)")
    result = f"redux<{c}>(all, []({c} a, {c} b) {{ return {c}({term}); }})"
    return f"{exchange(op, 2, op.value(1, 'u32'))} {op.assign(0, result, type_)}"


@translates("activemask")
def activemask(op: Operation) -> str:
    """9.7.13.10: a thread runs on its own."""
    op.type("b32")
    return op.assign(0, "1u << me.lane", "u32")
