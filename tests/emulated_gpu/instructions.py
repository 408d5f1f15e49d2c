"""What each instruction does, in C++: a small function for each kind, in the table TRANSLATORS by opcode.

Headings are those of the chapter "Instruction Set" in NVIDIA's "Parallel Thread Execution ISA", which describes each
instruction under its name. What the statements call is in thread.h.
"""

from __future__ import annotations

from collections.abc import Callable

from .operation import FLOATS, Operation, cpp_name, cpp_type, unsigned
from .ptx import BITS, Label, UnknownPTX, split

Translator = Callable[[Operation], str]
TRANSLATORS: dict[str, Translator] = {}


def translates(*opcodes: str) -> Callable[[Translator], Translator]:
    def enter(translator: Translator) -> Translator:
        TRANSLATORS.update(dict.fromkeys(opcodes, translator))
        return translator

    return enter


def label(name: str) -> str:
    return "at" + cpp_name(name)


# --- Floating-Point Instructions, Half Precision Floating-Point Instructions -----------------------------------------


def float_result(op: Operation, value: str, type_: str, saturated: bool = False) -> str:
    """Into the first operand: flushed where .ftz was taken, NaN canonical."""
    if op.flush:
        value = f"flush({value})"
    return op.assign(0, f"saturate({value})" if saturated else f"canonical({value})", type_)


def float_operation(op: Operation, type_: str, function: str, count: int) -> str:
    """``function`` of ``count`` operands with the rounding, .ftz and .sat of the instruction."""
    rounding = op.optional("rn", "rz", "rm", "rp") or "rn"
    op.flush = op.flag("ftz")
    saturated = op.flag("sat")
    values = op.values(1, *[type_] * count)
    if rounding == "rn":
        return float_result(op, f"{function}({values})", type_, saturated)
    if type_ == "f16":
        raise UnknownPTX(f"the rounding .{rounding} of f16")
    names = "abc"[:count]
    lambda_ = f"[]({', '.join(f'{type_} {n}' for n in names)}) {{ return {function}({', '.join(names)}); }}"
    return float_result(op, f"rounded<{rounding.upper()}>({lambda_}, {values})", type_, saturated)


@translates("add", "sub")
def add(op: Operation) -> str:
    type_ = op.type()
    if type_ in FLOATS:
        return float_operation(op, type_, op.opcode, 2)
    if op.flag("cc"):
        return with_carry(op, unsigned(type_), op.values(1, *[unsigned(type_)] * 2), "0", True)
    if op.flag("sat"):
        if type_ != "s32":
            raise UnknownPTX("saturation of a type that is not s32")
        sign = {"add": "+", "sub": "-"}[op.opcode]
        return op.assign(0, f"clamp<s32>(s64({op.value(1, type_)}) {sign} {op.value(2, type_)})", type_)
    return op.assign(0, f"{op.opcode}({op.values(1, type_, type_)})", type_)


@translates("mul", "mad")
def mul(op: Operation) -> str:
    type_ = op.type()
    if type_ in FLOATS:
        return float_operation(op, type_, *(("mul", 2) if op.opcode == "mul" else ("fma", 3)))
    value, result = product(op, type_)
    if op.opcode == "mul":
        return op.assign(0, value, result)
    if op.flag("cc"):
        return with_carry(op, unsigned(result), f"{value}, {op.value(3, unsigned(result))}", "0", True)
    return op.assign(0, f"add<{cpp_type(result)}>({value}, {op.value(3, result)})", result)


@translates("fma")
def fma(op: Operation) -> str:
    """One rounding."""
    return float_operation(op, op.type(*FLOATS), "fma", 3)


@translates("div", "rem")
def div(op: Operation) -> str:
    """.approx and .full: the exact quotient, rounded."""
    type_ = op.type()
    if type_ in FLOATS and op.opcode == "div":
        op.optional("approx", "full")
        return float_operation(op, type_, "div", 2)
    function = {"div": "quotient", "rem": "remainder"}[op.opcode]
    return op.assign(0, f"{function}({op.values(1, type_, type_)})", type_)


@translates("rcp", "sqrt")
def rcp(op: Operation) -> str:
    type_ = op.type("f32", "f64")
    if op.flag("approx") and type_ == "f64":
        op.flush = op.flag("ftz")
        return op.assign(0, f"upper_half({op.opcode}(upper_half({op.value(1, type_)})))", type_)
    return float_operation(op, type_, op.opcode, 1)


@translates("rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def approximation(op: Operation) -> str:
    """The exact value, rounded."""
    type_ = op.type("f32", "f64") if op.opcode == "rsqrt" else op.type("f32")
    op.one_of("approx")
    op.flush = op.flag("ftz")
    if type_ == "f64" and op.flush:
        return op.assign(0, f"upper_half({op.opcode}(upper_half({op.value(1, type_)})))", type_)
    return float_result(op, f"{op.opcode}({op.value(1, type_)})", type_)


@translates("neg", "abs")
def neg(op: Operation) -> str:
    """Of a float the sign bit alone, be it NaN."""
    type_ = op.type()
    if type_ in FLOATS:
        op.flush = op.flag("ftz")
        sign = f"(1ull << {BITS[type_] - 1})"
        bits = f"bits({op.value(1, type_)}) {'^' if op.opcode == 'neg' else '& ~'}{sign}"
        return op.assign(0, bits, unsigned(type_))
    value = op.value(1, type_)
    return op.assign(0, f"-{value}" if op.opcode == "neg" else f"{value} < 0 ? -{value} : {value}", type_)


@translates("min", "max")
def minimum(op: Operation) -> str:
    type_ = op.type()
    op.flush = op.flag("ftz")
    nan = op.flag("NaN")
    values = op.values(1, type_, type_)
    result = f"{op.opcode}({values})"
    return op.assign(0, f"or_nan({values}, {result})" if nan else result, type_)


@translates("copysign")
def copysign(op: Operation) -> str:
    """The sign of the first, the size of the second."""
    type_ = unsigned(op.type("f32", "f64"))
    sign = f"(1ull << {BITS[type_] - 1})"
    return op.assign(0, f"({op.value(1, type_)} & {sign}) | ({op.value(2, type_)} & ~{sign})", type_)


@translates("testp")
def testp(op: Operation) -> str:
    type_ = op.type("f32", "f64")
    test = op.one_of("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    value = op.value(1, type_)
    tests = {
        "finite": f"__builtin_isfinite({value})",
        "infinite": f"__builtin_isinf({value})",
        "number": f"!__builtin_isnan({value})",
        "notanumber": f"__builtin_isnan({value})",
        "normal": f"__builtin_isnormal({value})",
        "subnormal": f"{value} != 0 && flush({value}) == 0",
    }
    return op.assign(0, f"({tests[test]}) != 0", "pred")


# --- Integer Arithmetic Instructions, Extended-Precision Integer Arithmetic Instructions -----------------------------


def with_carry(op: Operation, type_: str, values: str, carried: str, sets: bool) -> str:
    """A sum or difference with the carry that the last such instruction left."""
    function = "sub_carry" if op.opcode.startswith("sub") else "add_carry"
    result = op.assign(0, f"{function}<{cpp_type(type_)}>({values}, {carried}, next)", type_)
    return f"u32 next; {result}" + " carry = next;" * sets


@translates("addc", "subc")
def addc(op: Operation) -> str:
    type_ = unsigned(op.type())
    return with_carry(op, type_, op.values(1, type_, type_), "carry", op.flag("cc"))


@translates("madc")
def madc(op: Operation) -> str:
    value, result = product(op, op.type())
    sets = op.flag("cc")
    return with_carry(op, unsigned(result), f"{value}, {op.value(3, unsigned(result))}", "carry", sets)


def product(op: Operation, type_: str) -> tuple[str, str]:
    """The lower or upper half of a product, or all of it, and its type."""
    part = op.one_of("lo", "hi", "wide")
    function = {"lo": "mul", "hi": "high", "wide": "product"}[part]
    result = type_ if part != "wide" else f"{type_[0]}{2 * BITS[type_]}"
    return f"{function}({op.values(1, type_, type_)})", result


# Opcodes that are one function of thread.h: types of the instruction, types of its operands and result; t is its own.
FUNCTIONS = {
    "popc": ("b32 b64", "t", "u32"),
    "clz": ("b32 b64", "t", "u32"),
    "bfind": ("u32 s32 u64 s64", "t", "u32"),
    "brev": ("b32 b64", "t", "t"),
    "bfe": ("u32 s32 u64 s64", "t u32 u32", "t"),
    "bfi": ("b32 b64", "t t u32 u32", "t"),
    "lop3": ("b32", "t t t u32", "t"),
    "prmt": ("b32", "t t u32", "t"),
    "shl": ("b16 b32 b64", "t u32", "t"),
    "shr": ("b16 b32 b64 u16 u32 u64 s16 s32 s64", "t u32", "t"),
}


@translates(*FUNCTIONS)
def function(op: Operation) -> str:
    types, operands, result = FUNCTIONS[op.opcode]
    type_ = op.type(*types.split())
    values = op.values(1, *(type_ if operand == "t" else operand for operand in operands.split()))
    return op.assign(0, f"{op.opcode}({values})", type_ if result == "t" else result)


# --- Logic and Shift Instructions ------------------------------------------------------------------------------------


LOGIC = {"and": "&", "or": "|", "xor": "^"}


@translates(*LOGIC)
def logic(op: Operation) -> str:
    type_ = op.type()
    return op.assign(0, f"{op.value(1, type_)} {LOGIC[op.opcode]} {op.value(2, type_)}", type_)


@translates("not", "cnot")
def not_(op: Operation) -> str:
    type_ = op.type()
    return op.assign(0, f"{'~' if op.opcode == 'not' and type_ != 'pred' else '!'}{op.value(1, type_)}", type_)


@translates("shf")
def shf(op: Operation) -> str:
    op.type("b32")
    direction, mode = op.one_of("l", "r"), op.one_of("clamp", "wrap")
    return op.assign(0, f"shf_{direction}({op.values(1, 'u32', 'u32')}, shift_{mode}({op.value(3, 'u32')}))", "u32")


# --- Comparison and Selection Instructions ---------------------------------------------------------------------------

COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
UNSIGNED_COMPARISONS = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
UNORDERED_COMPARISONS = {f"{name}u": operator for name, operator in COMPARISONS.items()}


def comparison(op: Operation, type_: str) -> str:
    """A comparison, combined with a third operand where the instruction says how."""
    operators = COMPARISONS | UNSIGNED_COMPARISONS | UNORDERED_COMPARISONS
    name = op.one_of(*operators, "num", "nan")
    combined = op.optional("and", "or", "xor")
    op.flush = op.flag("ftz")
    a, b = op.value(1, type_), op.value(2, type_)
    nan = f"({a} != {a} || {b} != {b})"
    if name in operators:
        result = f"{a} {operators[name]} {b}"
        if name in UNORDERED_COMPARISONS:
            result = f"{nan} || {result}"
        elif name == "ne" and type_ in FLOATS:
            result = f"!{nan} && {result}"
    else:
        result = "!" * (name == "num") + nan
    if combined:
        return f"(({result}) {LOGIC[combined]} {op.value(3, 'pred')})"
    return f"({result})"


@translates("setp")
def setp(op: Operation) -> str:
    """p, or p|q, of which q has the comparison reversed."""
    type_ = op.type()
    first, _, second = op.operand(0).partition("|")
    result = comparison(op, type_)
    if not second:
        return op.assign_to(first.strip(), result, "pred")
    if 3 in op.taken:
        raise UnknownPTX("two results that are combined with a third predicate")
    results = op.assign_to(first.strip(), "p", "pred"), op.assign_to(second.strip(), "!p", "pred")
    return f"const bool p = {result}; {' '.join(results)}"


@translates("set")
def set_(op: Operation) -> str:
    """Ones or 1.0, or zero."""
    type_, result = op.type(), op.type("u32", "s32", "f32")
    true = "1.0f" if result == "f32" else f"{result}(~0u)"
    return op.assign(0, f"{comparison(op, type_)} ? {true} : {result}(0)", result)


@translates("selp")
def selp(op: Operation) -> str:
    type_ = unsigned(op.type())
    return op.assign(0, f"{op.value(3, 'pred')} ? {op.value(1, type_)} : {op.value(2, type_)}", type_)


@translates("slct")
def slct(op: Operation) -> str:
    """By the sign of the third; NaN counts as negative."""
    sign, type_ = op.type("s32", "f32"), unsigned(op.type())
    op.flush = op.flag("ftz")
    return op.assign(0, f"{op.value(3, sign)} >= 0 ? {op.value(1, type_)} : {op.value(2, type_)}", type_)


# --- Data Movement and Conversion Instructions -----------------------------------------------------------------------


def elements(operand: str) -> tuple[str, ...]:
    """Those of a vector; an operand that is none is its own."""
    return split(operand[1:-1]) if operand.startswith("{") else (operand,)


@translates("mov")
def mov(op: Operation) -> str:
    """Also packs and unpacks vectors."""
    type_ = unsigned(op.type())
    targets, sources = elements(op.operand(0)), elements(op.operand(1))
    if len(targets) > 1:
        part = f"u{BITS[type_] // len(targets)}"
        shifted = (op.assign_to(t, f"{part}(x >> {BITS[part] * i})", part) for i, t in enumerate(targets) if t != "_")
        return f"const {cpp_type(type_)} x = {op.value_of(*sources, type_)}; {' '.join(shifted)}"
    part = f"u{BITS[type_] // len(sources)}"
    values = [op.value_of(source, type_ if len(sources) == 1 else part) for source in sources]
    if len(sources) > 1:
        values = [f"({cpp_type(type_)}({value}) << {BITS[part] * i})" for i, value in enumerate(values)]
    return op.assign(0, " | ".join(values), type_)


@translates("ld", "ldu")
def ld(op: Operation) -> str:
    type_ = op.type()
    space = op.space()
    count = int(op.optional("v2", "v4", "v8")[1:] or 1)
    targets, size = elements(op.operand(0)), BITS[type_] // 8
    if len(targets) != count:
        raise UnknownPTX(f"{len(targets)} registers for {count} elements")
    address = op.memory(1, space, size * count)
    loads = (
        op.assign_to(target, f"load<{cpp_type(type_)}>(address + {size * i})", type_)
        for i, target in enumerate(targets)
        if target != "_"
    )
    return f"const u64 address = {address}; {' '.join(loads)}"


@translates("st")
def st(op: Operation) -> str:
    type_ = unsigned(op.type())
    space = op.space()
    count = int(op.optional("v2", "v4", "v8")[1:] or 1)
    values, size = elements(op.operand(1)), BITS[type_] // 8
    if space == "const" or len(values) != count:
        raise UnknownPTX(f"{len(values)} registers for {count} elements of .{space}")
    address = op.memory(0, space, size * count)
    stores = (f"store(address + {size * i}, {op.value_of(v, type_)});" for i, v in enumerate(values))
    return f"const u64 address = {address}; {' '.join(stores)}"


@translates("prefetch", "prefetchu", "membar", "fence", "nanosleep")
def nothing(op: Operation) -> str:
    """There are no caches, memory is coherent, and threads run one after another."""
    op.modifiers.clear()
    op.taken.update(range(len(op.operands)))
    return ";"


@translates("cvt")
def cvt(op: Operation) -> str:
    """.ftz concerns what is f32."""
    source, target = op.type(), op.type()
    rounding = op.optional("rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi")
    ftz, saturated = op.flag("ftz"), op.flag("sat")
    op.flush = ftz and source == "f32"
    value = op.value(1, source)
    if target not in FLOATS and source not in FLOATS:
        return op.assign(0, f"clamp<{target}>({value})" if saturated else value, target)
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
    return float_result(op, f"{target}({value})", target, saturated)


@translates("cvta")
def cvta(op: Operation) -> str:
    """A generic address is one in main memory; only those of shared memory are others."""
    op.type("u64")
    to, space, address = op.flag("to"), op.space(), op.value(1, "u64")
    if space == "shared":
        address += f" {'-' if to else '+'} reinterpret_cast<u64>(me.shared)"
    return op.assign(0, address, "u64")


@translates("isspacep")
def isspacep(op: Operation) -> str:
    space, address = op.space(), op.value(1, "u64")
    tests = {name: f"is_{name}(me, {address})" for name in ("shared", "local", "param")}
    tests["global"] = " && ".join(f"!{test}" for test in tests.values())
    if space not in tests:
        raise UnknownPTX(f"the state space {space}")
    return op.assign(0, tests[space], "pred")


@translates("shfl")
def shfl(op: Operation) -> str:
    op.type("b32")
    op.one_of("sync")
    mode = op.one_of("up", "down", "bfly", "idx").upper()
    target, _, in_range = op.operand(0).partition("|")
    call = f"shfl(me, {op.site()}, {mode}, {op.values(1, 'u32', 'u32', 'u32', 'u32')}, in_range)"
    second = f" {op.assign_to(in_range.strip(), 'in_range', 'pred')}" if in_range else ""
    return f"bool in_range; {op.assign_to(target.strip(), call, 'u32')}{second}"


# --- Control Flow Instructions ---------------------------------------------------------------------------------------


@translates("bra")
def bra(op: Operation) -> str:
    op.flag("uni")
    return f"goto {label(op.operand(0))};"


@translates("brx")
def brx(op: Operation) -> str:
    """To the label of that number in a list."""
    op.one_of("idx")
    op.flag("uni")
    name = op.operand(1)
    lists = [i for i in op.body.function.body or () if isinstance(i, Label) and i.name == name and i.targets]
    if len(lists) != 1:
        raise UnknownPTX(f"no list of labels {name}")
    cases = (f"case {i}: goto {label(target)};" for i, target in enumerate(lists[0].targets))
    return f"switch ({op.value(0, 'u32')}) {{ {' '.join(cases)} }} {op.trap('no such label')}"


@translates("ret", "exit")
def ret(op: Operation) -> str:
    op.flag("uni")
    if op.opcode == "exit" and not op.body.function.entry:
        raise UnknownPTX("exit in a function")
    return "return;"


@translates("trap")
def trap(op: Operation) -> str:
    return op.trap("a trap")


@translates("call")
def call(op: Operation) -> str:
    """Of a function that is named, its parameters in variables."""
    op.flag("uni")
    texts = [op.operand(i) for i in range(len(op.operands))]
    returns = split(texts.pop(0)[1:-1]) if texts[0].startswith("(") else ()
    name = texts.pop(0)
    arguments = split(texts.pop(0)[1:-1]) if texts else ()
    if name == "__assertfail":
        return op.trap("an assertion does not hold")
    called = op.body.module.functions.get(name)
    if texts or called is None or called.body is None:
        raise UnknownPTX(f"a call of {name}")
    if (len(returns), len(arguments)) != (len(called.returns), len(called.parameters)):
        raise UnknownPTX(f"a call of {name} with other parameters than it has")
    places = [op.body.address(text) for text in (*returns, *arguments)]
    if any(space != "param" for space, _ in places):
        raise UnknownPTX("an argument that is not in .param")
    return f"{cpp_name(name)}({', '.join(['me', *(f'reinterpret_cast<char*>({address})' for _, address in places)])});"


# --- Parallel Synchronization and Communication Instructions ---------------------------------------------------------

WAITING = ("bar", "barrier", "shfl", "vote", "match", "redux")  # opcodes at which a thread waits for others


@translates("bar", "barrier")
def bar(op: Operation) -> str:
    """``bar`` is ``barrier`` with .aligned."""
    op.flag("cta")
    kind = op.one_of("sync", "arrive", "warp", "red")
    if kind == "warp":
        op.one_of("sync")
        return f"emulated_exchange(me, {op.site()}, {op.value(0, 'u32')}, 0);"
    reduction = op.one_of("popc", "and", "or") if kind == "red" else ""
    aligned = "true" if op.flag("aligned") or op.opcode == "bar" else "false"
    first, last = (1, len(op.operands) - 1) if reduction else (0, len(op.operands))  # of: barrier, count if any
    count = op.value(first + 1, "u32") if last - first > 1 else "0"
    predicate = op.value(last, "pred") if reduction else "false"
    if reduction == "and":
        predicate = f"!{predicate}"  # how many are false
    call = f"emulated_barrier(me, {op.site()}, {'ARRIVE' if kind == 'arrive' else 'SYNC'}, {aligned}"
    call += f", {op.value(first, 'u32')}, {count}, {predicate})"
    if not reduction:
        return f"{call};"
    tests = {"popc": "threads", "and": "threads == 0", "or": "threads != 0"}
    return f"const u32 threads = {call}; {op.assign(0, tests[reduction], op.type('u32', 'pred'))}"


@translates("atom", "red")
def atom(op: Operation) -> str:
    """Sums of f32 in global memory flush subnormal numbers, those in shared memory do not."""
    type_ = op.type()
    space = op.space()
    name = op.one_of("add", "min", "max", *LOGIC, "exch", "cas", "inc", "dec")
    if not op.flag("noftz") and type_ == "f16":
        raise UnknownPTX("an atomic operation on f16 without .noftz")
    first, t = int(op.opcode == "atom"), cpp_type(type_)
    flushing = "is_shared(me, address) ? add(old, value) : flush(add(flush(old), flush(value)))"
    changed = {
        "add": flushing if type_ == "f32" else "add(old, value)",
        "min": "min(old, value)",
        "max": "max(old, value)",
        **{opcode: f"old {operator} value" for opcode, operator in LOGIC.items()},
        "exch": "value",
        "cas": "old == value ? other : old",
        "inc": "old >= value ? 0 : old + 1",
        "dec": "old == 0 || old > value ? value : old - 1",
    }[name]
    known = f"const u64 address = {op.memory(first, space, BITS[type_] // 8)};"
    known += f" const {t} value = {op.value(first + 1, type_)};"
    if name == "cas":
        known += f" const {t} other = {op.value(first + 2, type_)};"
    call = f"atomic<{t}>(address, [&]({t} old) -> {t} {{ return {changed}; }})"
    return f"{known} {op.assign(0, call, type_) if first else call + ';'}"


def exchange(op: Operation, value: str) -> str:
    """Waits for the lanes of the mask, the third operand, and shows what they gave."""
    return f"const Exchange all = emulated_exchange(me, {op.site()}, {op.value(2, 'u32')}, {value});"


@translates("vote")
def vote(op: Operation) -> str:
    type_ = op.type("pred", "b32")
    op.one_of("sync")
    mode = op.one_of(*(("all", "any", "uni") if type_ == "pred" else ("ballot",)))
    tests = {
        "all": "lanes == all.participants",
        "any": "lanes != 0",
        "uni": "lanes == 0 || lanes == all.participants",
        "ballot": "lanes",
    }
    lanes = f"{exchange(op, op.value(1, 'pred'))} const u32 lanes = lanes_with(all, 1);"
    return f"{lanes} {op.assign(0, tests[mode], type_)}"


@translates("match")
def match(op: Operation) -> str:
    type_ = op.type("b32", "b64")
    mode = op.one_of("any", "all")
    op.one_of("sync")
    value = op.value(1, type_)
    lanes = f"{exchange(op, value)} const u32 lanes = lanes_with(all, {value});"
    target, _, same = op.operand(0).partition("|")
    if mode == "any":
        return f"{lanes} {op.assign_to(target, 'lanes', 'u32')}"
    second = f" {op.assign_to(same.strip(), 'same', 'pred')}" if same else ""
    found = op.assign_to(target.strip(), "same ? lanes : 0", "u32")
    return f"{lanes} const bool same = lanes == all.participants; {found}{second}"


@translates("redux")
def redux(op: Operation) -> str:
    type_ = op.type("u32", "s32", "b32")
    op.one_of("sync")
    name = op.one_of("add", "min", "max", *LOGIC)
    t = cpp_type(type_)
    term = f"a {LOGIC[name]} b" if name in LOGIC else f"{name}(a, b)"
    result = f"redux<{t}>(all, []({t} a, {t} b) {{ return {t}({term}); }})"
    return f"{exchange(op, op.value(1, 'u32'))} {op.assign(0, result, type_)}"


@translates("activemask")
def activemask(op: Operation) -> str:
    """A thread runs on its own."""
    op.type("b32")
    return op.assign(0, "1u << me.lane", "u32")
