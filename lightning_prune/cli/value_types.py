"""Values of a configuration against annotations that are read from source text.

A value that might be right is accepted: where an annotation cannot be read, or where a class could hold plain values.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from lightning_prune.cli.source_signatures import Module, Parameter, lookup, resolved

__all__ = ["accepts", "choices", "expected", "kind"]

LISTS = {"list", "List", "Sequence", "MutableSequence", "Iterable", "Collection", "set", "Set", "frozenset"}
TUPLES = {"tuple", "Tuple"}
MAPPINGS = {"dict", "Dict", "Mapping", "MutableMapping", "OrderedDict"}
TEXTS = {"str", "Path", "PathLike"}
WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}
#: plain values can be of classes with these bases
FLEXIBLE = (
    "Enum",
    "str",
    "Protocol",
    "TypedDict",
    "NamedTuple",
    "Generic",
    "Mapping",
    "Sequence",
    "dict",
    "list",
)
DEEPEST = 20


def accepts(parameter: Parameter, value: Any) -> bool:
    """Return whether a parameter may be given this value of a configuration."""
    if value is None:
        default = parameter.default
        if isinstance(default, ast.Constant) and default.value is None:  # ``x: int = None``
            return True
    return parameter.annotation is None or _fits(parameter.annotation, parameter.module, value)


def kind(value: Any) -> str:
    """Return a value as messages show it, with the name of its kind.

    Example:
        >>> kind("drei"), kind(2.5), kind([1]), kind(None), kind(True)
        ("'drei', which is text", '2.5', '[1], a list', 'null', 'true')
    """
    if isinstance(value, str):
        return f"{value!r}, which is text"
    if isinstance(value, list):
        return f"{value}, a list"
    if isinstance(value, dict):
        return f"{value}, a mapping"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def expected(parameter: Parameter) -> str:
    """Return in words what a parameter accepts; classes, which a ``_target_`` builds, only if that is all.

    Example:
        >>> from lightning_prune.cli.source_signatures import signature_of
        >>> expected(signature_of("lightning_prune.FilterPruningCallback").parameters["every_n_steps"])
        'a whole number or null'
    """
    words = list(dict.fromkeys(_words(parameter.annotation, parameter.module)))
    words = [word for word in words if word != "a whole number" or "a number" not in words]
    plain = [word for word in words if word != "null"] or ["an object, built by a _target_"]
    return " or ".join([*plain, *(["null"] if "null" in words else [])])


def choices(parameter: Parameter) -> list[str]:
    """Return the texts that a parameter may be, if it is a choice; else an empty list."""
    return [text for text in _literals(parameter.annotation, parameter.module, 0) if isinstance(text, str)]


def _fits(node: ast.expr, module: Module, value: Any, depth: int = 0) -> bool:
    if depth > DEEPEST or (isinstance(value, dict) and "_target_" in value):
        return True
    if isinstance(node, ast.Constant):
        return _fits_constant(node, module, value, depth)
    if (parts := _alternatives(node)) is not None:
        return any(_fits(part, module, value, depth + 1) for part in parts)
    if isinstance(node, ast.Subscript):
        return _fits_subscript(node, module, value, depth)
    return _fits_name(node, module, value, depth) if isinstance(node, (ast.Name, ast.Attribute)) else True


def _fits_constant(node: ast.Constant, module: Module, value: Any, depth: int) -> bool:
    if isinstance(node.value, str):  # an annotation in quotation marks
        return _fits(ast.parse(node.value, mode="eval").body, module, value, depth + 1)
    return node.value is not None or value is None


def _alternatives(node: ast.expr | None) -> list[ast.expr] | None:
    """Return the parts of ``A | B``, ``Union[A, B]`` and ``Optional[A]``; None for other annotations."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [node.left, node.right]
    name = _last(node.value) if isinstance(node, ast.Subscript) else ""
    if name == "Union" and isinstance(node, ast.Subscript):
        return list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]
    return (
        [node.slice, ast.Constant(None)] if name == "Optional" and isinstance(node, ast.Subscript) else None
    )


def _last(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _fits_subscript(node: ast.Subscript, module: Module, value: Any, depth: int) -> bool:
    name, inner = _last(node.value), node.slice
    if name == "Literal":
        return value in [*_literals(node, module, depth)]
    if name == "Annotated" and isinstance(inner, ast.Tuple):
        return _fits(inner.elts[0], module, value, depth + 1)
    if name in LISTS:
        return isinstance(value, list) and all(_fits(inner, module, item, depth + 1) for item in value)
    if name in TUPLES and isinstance(inner, ast.Tuple):
        return isinstance(value, list) and _fits_tuple(inner.elts, module, value, depth)
    if name in MAPPINGS and isinstance(inner, ast.Tuple):
        is_right = isinstance(value, dict)
        return is_right and all(_fits(inner.elts[1], module, item, depth + 1) for item in value.values())
    return _fits_name(node.value, module, value, depth)


def _fits_tuple(parts: list[ast.expr], module: Module, value: list[Any], depth: int) -> bool:
    if isinstance(parts[-1], ast.Constant) and parts[-1].value is ...:
        return all(_fits(parts[0], module, item, depth + 1) for item in value)
    pairs = zip(parts, value, strict=False)
    return len(parts) == len(value) and all(_fits(part, module, item, depth + 1) for part, item in pairs)


def _fits_name(node: ast.expr, module: Module, value: Any, depth: int) -> bool:
    name = _last(node)
    if name in ("int", "float"):
        is_number = isinstance(value, (int, float) if name == "float" else int)
        return is_number and not isinstance(value, bool)
    if name == "bool":
        return isinstance(value, bool) or value in (0, 1)
    for names, form in ((TEXTS, str), (LISTS | TUPLES, list), (MAPPINGS, dict)):
        if name in names:
            return isinstance(value, form)
    if name == "Callable":
        return isinstance(value, (dict, list))
    return _fits_definition(node, module, value, depth)


def _fits_definition(node: ast.expr, module: Module, value: Any, depth: int) -> bool:
    """Follow an alias; a class of its own is built by a ``_target_`` and not by a plain value."""
    definition = resolved(node, module)
    if definition is None:
        return True
    if isinstance(definition.node, (ast.Assign, ast.AnnAssign)):
        alias = definition.node.value
        return alias is None or _fits(alias, definition.module, value, depth + 1)
    if isinstance(definition.node, ast.ClassDef):
        bases = [
            _last(base.value if isinstance(base, ast.Subscript) else base) for base in definition.node.bases
        ]
        return any(base.endswith(FLEXIBLE) for base in bases)
    return True


def _literals(node: ast.expr | None, module: Module, depth: int) -> Iterator[Any]:
    """Yield the values of all ``Literal`` in an annotation."""
    if depth > DEEPEST or node is None:
        return
    if (parts := _alternatives(node)) is not None:
        for part in parts:
            yield from _literals(part, module, depth + 1)
    elif isinstance(node, ast.Subscript) and _last(node.value) == "Literal":
        values = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        yield from (value.value for value in values if isinstance(value, ast.Constant))
    elif (alias := _alias(node, module)) is not None:
        yield from _literals(*alias, depth + 1)


def _alias(node: ast.expr, module: Module) -> tuple[ast.expr, Module] | None:
    """Return the annotation that a name stands for, and its module."""
    definition = lookup(module, node.id) if isinstance(node, ast.Name) else None
    if definition is None or not isinstance(definition.node, (ast.Assign, ast.AnnAssign)):
        return None
    return (definition.node.value, definition.module) if definition.node.value is not None else None


def _words(node: ast.expr | None, module: Module, depth: int = 0) -> Iterator[str]:
    """Yield what an annotation accepts, in words."""
    if node is None or depth > DEEPEST:
        return
    if isinstance(node, ast.Constant):
        yield from ["null"] if node.value is None else []
    elif (parts := _alternatives(node)) is not None:
        for part in parts:
            yield from _words(part, module, depth + 1)
    elif (alias := _alias(node, module)) is not None:
        yield from _words(*alias, depth + 1)
    elif literals := [*_literals(node, module, depth)]:
        yield from map(str, literals)
    elif isinstance(node, ast.Subscript):
        yield from _container_words(node, module, depth)
    else:
        yield from _name_words(_last(node))


def _container_words(node: ast.Subscript, module: Module, depth: int) -> Iterator[str]:
    name = _last(node.value)
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    inner = [*_words(parts[-1] if name in MAPPINGS else parts[0], module, depth + 1)]
    noun = "mapping" if name in MAPPINGS else "list"
    of = f", each {' or '.join(inner)}" if inner else ""
    if name in LISTS | TUPLES | MAPPINGS:
        yield f"a {noun}{of}"


def _name_words(name: str) -> Iterator[str]:
    if name in WORDS:
        yield WORDS[name]
    for names, word in ((TEXTS, "text"), (LISTS | TUPLES, "a list"), (MAPPINGS, "a mapping")):
        if name in names:
            yield word
