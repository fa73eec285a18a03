"""Signatures of classes and functions, read from source text without importing it.

Torch and Lightning take seconds to import, and the command line is checked before. What cannot be read with certainty
(extension modules, names made while a module runs) is answered with None.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

__all__ = ["Definition", "Parameter", "Signature", "find_definition", "signature_of"]

DEEPEST = 30  # imports followed for one name, against circles


@dataclass(frozen=True)
class Module:
    """A module's source.

    Attributes:
        name: dotted.
        is_package: whether relative imports start at the module itself.
        body: statements at its top, those within ``if`` and ``try`` included.
    """

    name: str
    is_package: bool
    body: tuple[ast.stmt, ...]


@dataclass(frozen=True)
class Definition:
    """A statement that defines a name: a class, a function or an assignment, and its module."""

    node: ast.stmt
    module: Module


@dataclass(frozen=True)
class Parameter:
    """A parameter: its annotation and default as expressions, and the module where they are to be read."""

    annotation: ast.expr | None
    default: ast.expr | None
    module: Module


@dataclass(frozen=True)
class Signature:
    """Parameters that can be given by name, and whether other names are accepted as well."""

    parameters: dict[str, Parameter]
    is_open: bool


def signature_of(target: str) -> Signature | None:
    """Return the signature of an import path; None if it cannot be read.

    Example:
        >>> list(signature_of("fractions.Fraction.limit_denominator").parameters), signature_of("no.such")
        (['max_denominator'], None)
    """
    definition = find_definition(target)
    if definition is None:
        return None
    if isinstance(definition.node, ast.ClassDef):
        return _of_class(definition)
    is_function = isinstance(definition.node, (ast.FunctionDef, ast.AsyncFunctionDef))
    return _of_function(definition, skip_self=_is_method(target)) if is_function else None


def _is_method(target: str) -> bool:
    owner = find_definition(target.rpartition(".")[0])
    return owner is not None and isinstance(owner.node, ast.ClassDef)


def find_definition(path: str) -> Definition | None:
    """Return where the source defines an import path; None if that cannot be read."""
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        if (module := _module(".".join(parts[:length]))) is not None:
            definition = lookup(module, parts[length])
            for name in parts[length + 1 :]:
                definition = definition and _member(definition, name)
            return definition
    return None


def _member(definition: Definition, name: str) -> Definition | None:
    body = definition.node.body if isinstance(definition.node, ast.ClassDef) else []
    found = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == name]
    return Definition(found[-1], definition.module) if found else None


def lookup(module: Module, name: str, depth: int = 0) -> Definition | None:
    """Return the definition of a name that a module has, following its imports."""
    for node in reversed(module.body if depth < DEEPEST else ()):
        is_definition = isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if (is_definition and node.name == name) or name in _assigned(node):  # type: ignore[attr-defined]
            return Definition(node, module)
        if isinstance(node, ast.ImportFrom) and (found := _imported(module, node, name, depth)):
            return found
    return None


def _assigned(node: ast.stmt) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        return [target.id for target in targets if isinstance(target, ast.Name)]
    return []


def _imported(module: Module, node: ast.ImportFrom, name: str, depth: int) -> Definition | None:
    for alias in node.names:
        if alias.name == "*" or (alias.asname or alias.name) == name:
            source = _module(_source(module, node))
            original = name if alias.name == "*" else alias.name
            if source is not None and (found := lookup(source, original, depth + 1)):
                return found
    return None


def _source(module: Module, node: ast.ImportFrom) -> str:
    """Return the absolute name of the module that an import names."""
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    package = parts[: len(parts) - node.level + module.is_package]
    return ".".join([*package, *filter(None, [node.module])])


@lru_cache(maxsize=512)
def _module(name: str) -> Module | None:
    path = _path(name)
    if path is None or path.suffix != ".py":
        return None
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return None
    return Module(name, path.name == "__init__.py", tuple(_statements(tree.body)))


def _path(name: str) -> Path | None:
    """Return the file of a module; its packages are not imported."""
    top, *others = name.split(".")
    try:
        spec = find_spec(top) if top else None
    except (ValueError, ImportError):
        return None
    for part in others:
        if spec is None or spec.submodule_search_locations is None:
            return None
        # by its last name only: a folder without __init__.py would look for its parent among the imported modules
        spec = PathFinder.find_spec(part, list(spec.submodule_search_locations))
    return Path(spec.origin) if spec is not None and spec.origin and spec.has_location else None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements, those of both branches of ``if`` and of ``try`` included."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try)):
            yield from _statements([*node.body, *node.orelse])
            for handler in getattr(node, "handlers", ()):
                yield from _statements(handler.body)


def _of_class(definition: Definition, depth: int = 0) -> Signature | None:
    """Return the signature by which a class is called: of its ``__init__``, its fields, or its first base's."""
    node = definition.node
    assert isinstance(node, ast.ClassDef)
    methods = {child.name for child in node.body if isinstance(child, ast.FunctionDef)}
    if depth > DEEPEST or "__new__" in methods or node.keywords:
        return None
    if "__init__" in methods and (init := _member(definition, "__init__")):
        return _of_function(init, skip_self=True)
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return _of_dataclass(definition, depth)
    for base in node.bases:
        if (parent := _base(definition, base)) is None:
            return None
        if (signature := _of_class(parent, depth + 1)) is not None:
            return signature
    return None


def _base(definition: Definition, base: ast.expr) -> Definition | None:
    parent = resolved(base, definition.module)
    return parent if parent is not None and isinstance(parent.node, ast.ClassDef) else None


def resolved(expression: ast.expr, module: Module) -> Definition | None:
    """Return what a name or ``module.name`` in a module's source is defined as; None if that cannot be read."""
    if isinstance(expression, ast.Subscript):
        return resolved(expression.value, module)
    text = ast.unparse(expression) if isinstance(expression, (ast.Name, ast.Attribute)) else ""
    first, _, rest = text.partition(".")
    if text and not rest:
        return lookup(module, first)
    return find_definition(f"{_modules(module).get(first, '')}.{rest}") if rest else None


def _modules(module: Module) -> dict[str, str]:
    """Return the names under which a module imports others -> what it imports."""
    names: dict[str, str] = {}
    for node in module.body:
        if isinstance(node, ast.Import):
            plain = (alias.name.split(".")[0] for alias in node.names if not alias.asname)
            names |= {**{name: name for name in plain}, **{a.asname: a.name for a in node.names if a.asname}}
        if isinstance(node, ast.ImportFrom):
            source = _source(module, node)
            names |= {alias.asname or alias.name: f"{source}.{alias.name}" for alias in node.names}
    return names


def _of_dataclass(definition: Definition, depth: int) -> Signature | None:
    node, fields = definition.node, dict[str, Parameter]()
    assert isinstance(node, ast.ClassDef)
    for base in node.bases:
        parent = _base(definition, base)
        inherited = parent and _of_class(parent, depth + 1)
        fields |= inherited.parameters if inherited else {}
    for child in node.body:
        if not isinstance(child, ast.AnnAssign) or "ClassVar" in ast.unparse(child.annotation):
            continue
        if isinstance(child.target, ast.Name):
            fields[child.target.id] = Parameter(child.annotation, child.value, definition.module)
    return Signature(fields, is_open=bool(node.bases))


def _of_function(definition: Definition, skip_self: bool) -> Signature:
    node, module = definition.node, definition.module
    assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    pairs = [*zip(positional, [*missing, *arguments.defaults], strict=True)]
    pairs = [*pairs[skip_self:], *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    parameters = {item.arg: Parameter(item.annotation, default, module) for item, default in pairs}
    more = _unpacked(arguments.kwarg, module)
    is_open = (arguments.kwarg is not None and more is None) or (bool(node.decorator_list) and not skip_self)
    return Signature(parameters | (more or {}), is_open)


def _unpacked(kwarg: ast.arg | None, module: Module) -> dict[str, Parameter] | None:
    """Return the keys of ``**kwargs: Unpack[SomeTypedDict]``; None for other ``**kwargs``."""
    annotation = kwarg.annotation if kwarg else None
    if not isinstance(annotation, ast.Subscript) or not ast.unparse(annotation.value).endswith("Unpack"):
        return None
    keys = resolved(annotation.slice, module)
    body = keys.node.body if keys is not None and isinstance(keys.node, ast.ClassDef) else []
    named = [
        child for child in body if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name)
    ]
    where = keys.module if keys else module
    return {child.target.id: Parameter(child.annotation, None, where) for child in named} or None  # type: ignore[union-attr]
