"""Keep the sizes of a trace out of the caches of functions.

A function under ``functools.lru_cache`` returns for equal arguments what it returned before. A traced int equals the
plain int of an earlier forward, of another module or of another trace: what such a function returns would then be a
constant, or a size of another module. For the time of a trace these functions are called without their caches
wherever an argument carries traced sizes. (einops reshapes by such functions.) The same holds for those that return
tensors, which have no values in a trace, and would not be made a second time in the trace of the smaller network.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.tracing.traced_int import TracedInt
from lightning_prune.utils.cached_functions import FUNCTIONS, CachedPlace, cached_at
from lightning_prune.utils.module_walk import modules_of

__all__ = ["caches_bypassed"]

#: the place of a cached function, and what is called in its stead
Replacement = tuple[CachedPlace, Callable[..., Any]]
#: the same of a function in a Python module: its names, the function's name there, what is kept, what is called
InModule = tuple[dict[str, Any], str, Any, Callable[..., Any]]
#: Libraries whose caches never see sizes of a network; scanning them would take longer than a trace.
_SCANNED_NEVER = {
    *sys.stdlib_module_names,
    *(
        "torch",
        "torchgen",
        "triton",
        "cuda",
        "numpy",
        "scipy",
        "sympy",
        "mpmath",
        "networkx",
        "pandas",
        "sklearn",
    ),
    *(
        "lightning",
        "pytest",
        "_pytest",
        "hydra",
        "omegaconf",
        "jsonargparse",
        "pydantic",
        "pydantic_core",
        "yaml",
    ),
    *(
        "matplotlib",
        "mpl_toolkits",
        "PIL",
        "fontTools",
        "kiwisolver",
        "pyparsing",
        "dateutil",
        "jinja2",
        "rich",
    ),
    *(
        "wandb",
        "mlflow",
        "huggingface_hub",
        "tokenizers",
        "safetensors",
        "opentelemetry",
        "google",
        "filelock",
    ),
    *(
        "httpx",
        "httpcore",
        "httpx2",
        "httpcore2",
        "h11",
        "anyio",
        "requests",
        "urllib3",
        "charset_normalizer",
    ),
    *("click", "tqdm", "packaging", "platformdirs", "idna", "fsspec", "aiohttp", "git", "IPython"),
}
#: Types of most attributes of modules, of which no instance is a function.
_NO_FUNCTIONS = frozenset((int, bool, float, str, tuple, list, dict, OrderedDict, set, TracedInt, type(None)))
#: name of a Python module -> number of its attributes when it was scanned, and what was found in it and elsewhere
_SCANNED: dict[str, tuple[int, list[InModule], list[Replacement]]] = {}
_NOTHING: tuple[int, list[InModule], list[Replacement]] = (-1, [], [])


@contextlib.contextmanager
def caches_bypassed(model: nn.Module) -> Iterator[None]:
    """Call cached functions without their caches, within the block, if sizes or tensors go in or come out."""
    in_modules, others = _replacements_in_libraries()
    others += _replacements(_cached_in_network(model))
    swapped = []
    for namespace, name, value, function in in_modules:
        if namespace.get(name) is value:  # the name may have been bound anew since it was found
            namespace[name] = function
            swapped.append((namespace, name, value))
    for place, function in others:
        place.put(function)
    try:
        yield
    finally:
        for place, _ in others:
            place.restore()
        for namespace, name, value in swapped:
            namespace[name] = value


def _replacements(places: Iterable[CachedPlace]) -> list[Replacement]:
    return [(place, _bypass(place.function)) for place in places]


def _bypass(function: Any) -> Callable[..., Any]:
    """Return a function that calls ``function`` without its cache if the arguments carry traced sizes."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(leaf, (TracedInt, Tensor, nn.Module)) for leaf in tree_leaves((args, kwargs))):
            return function.__wrapped__(*args, **kwargs)
        misses = function.cache_info().misses
        result = function(*args, **kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            return result
        if function.cache_info().misses == misses:  # of an earlier forward: each trace shows how it is made
            return function.__wrapped__(*args, **kwargs)
        function.cache_clear()  # tensors of a trace have no values
        return result

    for name in ("cache_info", "cache_clear", "cache_parameters"):
        setattr(call, name, getattr(function, name))
    return call


def _cached_in_network(model: nn.Module) -> Iterator[CachedPlace]:
    """Yield the places in a network's modules and their classes; a class may have been defined anew in a notebook."""
    modules = modules_of(model)
    kinds = {type(module) for module in modules}
    classes = {base for kind in kinds for base in kind.__mro__ if _is_scanned(base.__module__)}
    for owner in (*classes, *modules):
        for name, value in vars(owner).items():
            if type(value) not in _NO_FUNCTIONS and isinstance(value, FUNCTIONS):
                yield from cached_at(owner, name, value)


def _replacements_in_libraries() -> tuple[list[InModule], list[Replacement]]:
    """Return the replacement of every cached function of the loaded modules: in modules, and in their classes."""
    in_modules: list[InModule] = []
    others: list[Replacement] = []
    for name, module in _scanned_modules(len(sys.modules), next(reversed(sys.modules))):
        count, plain, found = _SCANNED.get(name, _NOTHING)
        if count != len(vars(module)):
            places = _replacements(_cached_in(module, name))
            plain = [(vars(p.owner), p.name, p.value, new) for p, new in places if p.owner is module]
            found = [replacement for replacement in places if replacement[0].owner is not module]
            _SCANNED[name] = len(vars(module)), plain, found
        if plain:
            in_modules += plain
        if found:
            others += (replacement for replacement in found if replacement[0].is_current)
    return in_modules, others


@functools.lru_cache(maxsize=1)
def _scanned_modules(count: int, last: str) -> list[tuple[str, ModuleType]]:
    """Return the modules whose functions may see sizes, given how many are loaded and the last one's name."""
    return [
        (name, module)
        for name, module in list(sys.modules.items())
        if isinstance(module, ModuleType) and _is_scanned(name)
    ]


def _is_scanned(name: str) -> bool:
    return name.partition(".")[0] not in _SCANNED_NEVER and not name.startswith(f"{__package__}.")


def _cached_in(module: ModuleType, name: str) -> Iterator[CachedPlace]:
    for attribute, value in list(vars(module).items()):
        if isinstance(value, type) and value.__module__ == name:
            for method, function in list(vars(value).items()):
                yield from cached_at(value, method, function)
        else:
            yield from cached_at(module, attribute, value)
