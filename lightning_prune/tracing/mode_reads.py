"""Find out whether a forward does the same in train mode as in eval mode, apart from reviewed operators.

A forward depends on its mode where code reads ``module.training``, or where ``train()`` does more than set it. While
a forward is recorded in eval mode, ``nn.Module.training`` is a property that receives every read, with the code that
reads. If all of that code is known to treat channels alike in both modes (batch norms, dropout, stochastic depth), a
second recording in train mode would show the same ties, and is left out. One read by any other code, and both modes
are recorded.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from types import CodeType
from typing import Any

from torch import nn
from torch.nn import functional as F
from torch.nn.modules import batchnorm, dropout, instancenorm

__all__ = ["ModeReads", "mode_reads"]

#: Whether the code that reads its mode treats channels alike in both, given the module that it runs for.
Condition = Callable[[nn.Module], bool]
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


def _always(module: nn.Module) -> bool:
    return True


def _has_momentum(module: nn.Module) -> bool:
    return getattr(module, "momentum", None) is not None  # without it, the number of batches becomes a value


def _normalises_by_batch(module: nn.Module) -> bool:
    return not module.track_running_stats


def _drops_nothing(module: nn.Module) -> bool:
    return not getattr(module, "dropout", 1)


#: Code of torch that reads the mode, and the condition under which both modes treat channels alike.
_TORCH_CODE: dict[CodeType, Condition] = {
    batchnorm._BatchNorm.forward.__code__: _has_momentum,
    instancenorm._InstanceNorm._apply_instance_norm.__code__: _normalises_by_batch,
    nn.MultiheadAttention.forward.__code__: _always,
    nn.LSTM.forward.__code__: _drops_nothing,
    nn.GRU.forward.__code__: _drops_nothing,
    nn.RNN.forward.__code__: _drops_nothing,
    **{
        kind.forward.__code__: _always
        for kind in vars(dropout).values()
        if isinstance(kind, type) and issubclass(kind, dropout._DropoutNd) and "forward" in vars(kind)
    },
}
#: The same for libraries, which may not be loaded: module -> class -> condition. Their code was read, too.
_LIBRARY_CODE: dict[str, dict[str, Condition]] = {
    "timm.layers.drop": {"DropPath": _always},
    "timm.layers.norm_act": {"BatchNormAct2d": _has_momentum},
    "torchvision.ops.stochastic_depth": {"StochasticDepth": _always},
    "torchvision.models.swin_transformer": {
        "ShiftedWindowAttention": _always,
        "ShiftedWindowAttentionV2": _always,
    },
    "segmentation_models_pytorch.encoders._efficientnet": {"MBConvBlock": _always},
}


class ModeReads:
    """The places in code that read the mode while a forward ran.

    Attributes:
        unknown: descriptions of the code that may do something else in train mode.
    """

    def __init__(self) -> None:
        self.unknown: set[str] = set()

    def add(self, module: nn.Module) -> None:
        """Note that the code two frames above reads the mode of ``module``."""
        frame = sys._getframe(2)
        condition = _TORCH_CODE.get(frame.f_code) or _condition_of(frame.f_code)
        if condition is None:
            condition = _review(frame.f_code, frame.f_globals)
        if not condition(module):
            self.unknown.add(f"{frame.f_code.co_filename}:{frame.f_lineno}")


@contextlib.contextmanager
def mode_reads() -> Iterator[ModeReads]:
    """Receive every read of the mode of any module within the block."""
    reads = ModeReads()

    def get(module: nn.Module) -> bool:
        try:
            training: bool = vars(module)["training"]
        except KeyError:  # a scripted module
            raise AttributeError("training") from None
        reads.add(module)
        return training

    def put(module: nn.Module, training: bool) -> None:
        vars(module)["training"] = training

    missing = object()
    before = vars(nn.Module).get("training", missing)
    nn.Module.training = property(get, put)  # type: ignore[assignment]
    try:
        yield reads
    finally:
        if before is missing:
            del nn.Module.training
        else:
            nn.Module.training = before


def _condition_of(code: CodeType) -> Condition | None:
    """Return the condition for code of the forward of a class in ``_LIBRARY_CODE``; None for other code."""
    if code.co_name != "forward":
        return None
    for library, classes in _LIBRARY_CODE.items():
        module = sys.modules.get(library)
        for name, condition in classes.items() if module is not None else ():
            if getattr(getattr(getattr(module, name, None), "forward", None), "__code__", None) is code:
                return condition
    return None


_REVIEWED: dict[CodeType, Condition] = {}


def _review(code: CodeType, names: Mapping[str, Any]) -> Condition:
    """Return the condition for code that is not known: true if it passes its mode to dropout and nowhere else."""
    if code not in _REVIEWED:
        _REVIEWED[code] = _always if _only_drops(code, names) else _never
    return _REVIEWED[code]


def _never(module: nn.Module) -> bool:
    return False


def _only_drops(code: CodeType, names: Mapping[str, Any]) -> bool:
    """Return whether the mode is read only as an argument of a dropout, or for the dropout of an attention."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):  # code without a file, or a lambda within a line
        return False
    reads = {id(node) for node in ast.walk(tree) if _reads_mode(node)}
    local = {*code.co_varnames, *code.co_cellvars, *code.co_freevars}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        function = _resolve(call.func, names, local)
        if any(function is each for each in _DROPOUTS):
            reads -= {id(value) for value in (*call.args, *(keyword.value for keyword in call.keywords))}
        elif function is F.scaled_dot_product_attention:
            reads -= {
                id(_switch_of(keyword.value)) for keyword in call.keywords if keyword.arg == "dropout_p"
            }
    return (
        not reads and "training" in code.co_names and not {"getattr", "vars", "__dict__"} & {*code.co_names}
    )


def _reads_mode(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "training" and isinstance(node.ctx, ast.Load)


def _switch_of(node: ast.AST) -> ast.AST | None:
    """Return the condition of ``... if self.training else 0.0``; None for any other expression."""
    if not isinstance(node, ast.IfExp) or not isinstance(node.orelse, ast.Constant) or node.orelse.value != 0:
        return None
    return node.test


def _resolve(node: ast.AST, names: Mapping[str, Any], local: set[str]) -> Any:
    """Return the object that a dotted name stands for; None if it is not known."""
    if isinstance(node, ast.Name):
        return None if node.id in local else names.get(node.id)
    return (
        getattr(_resolve(node.value, names, local), node.attr, None)
        if isinstance(node, ast.Attribute)
        else None
    )
