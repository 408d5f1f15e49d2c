"""gpubatch's docstrings in Sphinx.

A line ``lr: the rate`` that names an argument or an attribute, and the indented lines below it, become a field. Stars
and bars outside of literals are signs of formulas. A name such as gpubatch.sizing.choose_batch_size, which says where
an object lies inside, leads to where the same object is documented.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

import gpubatch

FIELD = re.compile(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*): (\S.*)")
LITERAL = re.compile(r"(``.*?``|`[^`]*`)", re.DOTALL)
PUBLIC = {id(getattr(gpubatch, name)): f"gpubatch.{name}" for name in gpubatch.HOMES}


def to_rst(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Make reStructuredText of a docstring, in place."""
    known = names_of(obj)
    takes_any = takes_any_name(obj)
    result: list[str] = []
    in_fields = in_example = False
    for line in lines:
        found = FIELD.fullmatch(line)
        is_field = found is not None and (
            {n.strip("*") for n in found[1].split(", ")} <= known or (takes_any and in_fields)
        )
        in_example = bool(line.strip()) and (in_example or line.startswith(">>>"))
        if is_field != in_fields and not line.startswith("    "):
            result += [""] if line else []
            in_fields = is_field
        if found is not None and is_field:
            line = f":param {found[1].replace('*', '')}: {found[2]}"
        result.append(line if in_example else escaped(line))
    lines[:] = result


def names_of(obj: Any) -> set[str]:
    """The arguments of a function or class, and the attributes of a class."""
    names = {*dir(obj), *getattr(obj, "__annotations__", ())} if inspect.isclass(obj) else set()
    with contextlib.suppress(TypeError, ValueError):  # neither a function nor a class
        names |= inspect.signature(obj).parameters.keys()
    return names


def takes_any_name(obj: Any) -> bool:
    """Whether a function or class has ``**options``, which a docstring may list one by one after other arguments."""
    with contextlib.suppress(TypeError, ValueError):
        return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(obj).parameters.values())
    return False


def plain_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """Types by their last name, and no address of a function that is a default."""
    if signature is None:
        return None
    return re.sub(r"<function [^()]*>", "...", re.sub(r"~(?:\w+\.)*(\w+)", r"\1", signature)), returns


def escaped(line: str) -> str:
    """A line whose single stars, bars and trailing underscores are no markup: they are formulas and names."""
    parts = LITERAL.split(line)
    parts[::2] = [re.sub(r"(?<!\*)\*(?!\*)|\||(?<=\w)_(?!\w)", r"\\\g<0>", text) for text in parts[::2]]
    return "".join(parts)


def find_object(app: Sphinx, env: Any, node: Any, contnode: nodes.Node) -> nodes.Node | None:
    """Lead a reference to an object's place inside gpubatch to its page."""
    if node.get("refdomain") != "py":
        return None
    found = resolved(node["reftarget"])
    entry = env.get_domain("py").objects.get(PUBLIC.get(id(found)))
    if entry is not None:
        uri = app.builder.get_relative_uri(node.get("refdoc", ""), entry.docname) + f"#{entry.node_id}"
        return nodes.reference("", "", contnode, internal=True, refuri=uri)
    # Types in signatures need no page of their own.
    within = node.parent
    while within is not None and not isinstance(within, addnodes.desc_signature):
        within = within.parent
    return contnode if within is not None or (found is None and "." not in node["reftarget"]) else None


def resolved(name: str) -> Any:
    """The object of a dotted name, or None."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
            for part in parts[length:]:
                found = getattr(found, part)
        except (ImportError, AttributeError):
            continue
        return found
    return None


def setup(app: Sphinx) -> dict[str, bool]:
    """Add both to Sphinx."""
    app.connect("autodoc-process-docstring", to_rst)
    app.connect("autodoc-process-signature", plain_signature)
    app.connect("missing-reference", find_object)
    return {"parallel_read_safe": True}
