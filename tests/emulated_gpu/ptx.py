"""Reads PTX, as NVRTC writes it: text to functions, variables and instructions, of which nothing is interpreted yet.

The sections named here and in translate.py are those of NVIDIA's "Parallel Thread Execution ISA".
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

BITS = {f"{kind}{bits}": bits for kind in "bus" for bits in (8, 16, 32, 64)}
BITS |= {"f16": 16, "f32": 32, "f64": 64, "b128": 128, "u128": 128, "pred": 1}
SPACES = ("global", "const", "shared", "local", "param")
NAME = re.compile(r"(?<![\w$%.])[%$A-Za-z_][\w$]*")


class UnknownPTX(Exception):  # noqa: N818 - it is no error of the program
    """PTX that the emulated GPU does not know."""


@dataclass(frozen=True)
class Instruction:
    """``@!%p1 ld.global.f32 %f1, [%rd1+8]``: predicate ``!%p1``, opcode ``ld``, modifiers ``global``, ``f32``."""

    predicate: str  # empty where there is none
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Label:
    """A place that a branch may go to; ``targets``: of a list of labels for brx.idx."""

    name: str
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Variable:
    """A variable or parameter in one of the state spaces (5.4)."""

    space: str
    type: str
    name: str
    count: int  # elements; 0: shared memory whose size the launch says
    align: int
    values: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return self.count * BITS[self.type] // 8


@dataclass
class Function:
    """A kernel (``entry``), or a function that kernels call. One without a ``body`` is declared only."""

    name: str
    entry: bool
    parameters: tuple[Variable, ...]
    returns: tuple[Variable, ...]
    max_threads: int
    registers: dict[str, str] = field(default_factory=dict)  # name: type
    variables: list[Variable] = field(default_factory=list)
    body: list[Instruction | Label] | None = None


@dataclass
class Program:
    """All of a PTX text."""

    functions: list[Function]
    variables: list[Variable]


def read(text: str) -> Program:
    """The program in a PTX text."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.S)
    text = re.sub(r"^\s*\.(version|target|address_size|loc|file)\b[^\n]*", "", text, flags=re.M)
    program = Program([], [])
    tree = iter(_statements(iter(re.findall(r"[{};]|[^{};]+", text))))
    for statement in tree:
        if isinstance(statement, list):
            raise UnknownPTX(f"a block that belongs to no function: {statement[:1]}")
        if not re.search(r"\.(entry|func)\b", statement):
            program.variables.append(_variable(statement))
            continue
        function = _function(statement.removesuffix("{"))
        if statement.endswith("{"):
            body = next(tree)
            assert isinstance(body, list)
            _Body(function).add(body, {})
        program.functions.append(function)
    return program


def split(text: str) -> tuple[str, ...]:
    """Operands: what stands between commas that are in no bracket."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and not depth:
            parts.append("")
        else:
            parts[-1] += c
    return tuple(part.strip() for part in parts if part.strip())


def _statements(tokens: Iterator[str]) -> list[str | list]:
    """Statements up to the brace that closes their block. A block in it is a list; its function's head ends with {."""
    found: list[str | list] = []
    pending, depth = "", 0
    for token in tokens:
        opens_block = re.fullmatch(r"(\s*[\w$]+\s*:(?!:))*\s*", pending) or re.search(r"\.(entry|func)\b", pending)
        if token == "{" and not depth and opens_block:
            if pending.strip():
                found.append(pending.strip() + (" {" if "." in pending else ""))
            found.append(_statements(tokens))
            pending = ""
        elif token == "}" and not depth:
            break
        elif token == ";" and not depth:
            found.append(pending.strip())
            pending = ""
        else:
            depth += (token == "{") - (token == "}")
            pending += token
    if pending.strip():
        found.append(pending.strip())
    return found


def _function(head: str) -> Function:
    match = re.fullmatch(
        r"(?:\.(?:visible|weak|extern)\s+)*\.(entry|func)\s*(\([^)]*\))?\s*([\w$]+)\s*(\([^)]*\))?\s*(.*)", head, re.S
    )
    if not match:
        raise UnknownPTX(f"the head of a function: {head}")
    kind, returns, name, parameters, directives = match.groups()
    max_threads = 1024
    for directive, values in re.findall(r"\.(\w+)\s*([\d,\s]*)", directives):
        if directive in ("maxntid", "reqntid"):
            max_threads = 1
            for value in values.split(","):
                max_threads *= int(value)
        elif directive not in ("minnctapersm", "maxnreg", "noreturn"):
            raise UnknownPTX(f"the directive .{directive} of {name}")
    lists = [tuple(_variable(v) for v in split((text or "()")[1:-1])) for text in (parameters, returns)]
    return Function(name, kind == "entry", *lists, max_threads)


def _variable(text: str) -> Variable:
    match = re.fullmatch(r"((?:\.\w+\s+(?:\d+\s+)?)+)([\w$%]+)\s*((?:\[\d*\])*)\s*(?:=\s*(.*))?", text.strip(), re.S)
    if not match:
        raise UnknownPTX(f"the declaration {text!r}")
    words, name, dimensions, values = match.groups()
    align = re.search(r"\.align\s+(\d+)", words.split(".ptr")[0])
    properties = re.findall(r"\.([a-z]\w*)", words.split(".ptr")[0])
    spaces = [p for p in properties if p in SPACES]
    types = [p for p in properties if p in BITS]
    if len(spaces) != 1 or len(types) != 1 or set(properties) - {*SPACES, *BITS, "align", "visible", "weak", "extern"}:
        raise UnknownPTX(f"the declaration {text!r}")
    count = 1
    for size in re.findall(r"\[(\d*)\]", dimensions):
        count *= int(size or 0)
    listed = split((values or "").strip().removeprefix("{").removesuffix("}"))
    return Variable(spaces[0], types[0], name, count, int(align[1]) if align else BITS[types[0]] // 8, listed)


class _Body:
    """Makes a function's blocks one list: names of an inner block (5.4.1, and inline assembly) become its own."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.function.body = []
        self.numbers = itertools.count(1)

    def add(self, block: list, names: dict[str, str], inner: bool = False) -> None:
        number = next(self.numbers)
        statements = []
        names = dict(names)
        for statement in block:
            while isinstance(statement, str) and (label := re.match(r"([\w$]+)\s*:(?!:)\s*", statement)):
                if inner:
                    names[label[1]] = f"{label[1]}_{number}"
                statement = statement[label.end() :]
                targets = re.fullmatch(r"\.branchtargets\s+(.*)", statement, re.S)
                statements.append(Label(label[1], split(targets[1]) if targets else ()))
                statement = "" if targets else statement
            if isinstance(statement, str) and statement.startswith("."):
                self.declare(statement, names, f"_{number}" if inner else "")
            elif statement:
                statements.append(statement)
        for statement in statements:
            if isinstance(statement, list):
                self.add(statement, names, inner=True)
            elif isinstance(statement, Label):
                targets = tuple(names.get(t, t) for t in statement.targets)
                self.function.body.append(Label(names.get(statement.name, statement.name), targets))
            else:
                self.function.body.append(_instruction(NAME.sub(lambda m: names.get(m[0], m[0]), statement)))

    def declare(self, text: str, names: dict[str, str], suffix: str) -> None:
        if text.startswith(".pragma"):
            return
        if not text.startswith(".reg"):
            variable = _variable(text)
            names[variable.name] = f"{variable.name}{suffix}"
            self.function.variables.append(Variable(**{**vars(variable), "name": names[variable.name]}))
            return
        match = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S)
        if not match or match[1] not in BITS:
            raise UnknownPTX(f"the declaration {text!r}")
        for name in split(match[2]):
            many = re.fullmatch(r"([%\w$]+)<(\d+)>", name)
            for register in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                names[register] = f"{register}{suffix}"
                self.function.registers[names[register]] = match[1]


def _instruction(text: str) -> Instruction:
    text = " ".join(text.split())
    match = re.fullmatch(r"(?:@(!?[%\w$]+)\s+)?([a-z]\w*)((?:\.[\w:]+)*)(?:\s+(.*))?", text)
    if not match:
        raise UnknownPTX(f"the instruction {text!r}")
    predicate, opcode, modifiers, operands = match.groups()
    parts = tuple(modifiers.split(".")[1:])
    return Instruction(predicate or "", opcode, parts, split(operands or ""), text)
