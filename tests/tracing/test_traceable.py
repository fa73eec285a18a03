"""Wrapped, compiled, scripted, sparse and quantised networks: pruned exactly, or refused in one sentence."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from lightning_prune import SurgeryError, TraceError, prune_, trace
from lightning_prune.testing import error, randomise_, with_dead_filters, with_zeroed_consumers
from tests.support.nets import (
    Attention,
    Net,
    Outcome,
    Small,
    assert_same,
    counted_macs,
    cut,
    parameters,
    random_units,
    state,
)

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:None of the inputs have requires_grad:UserWarning"
    ),  # in the oracles' no_grad
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
    ),  # dynamo
]


@pytest.fixture(autouse=True)
def _reset_compiler() -> None:
    torch._dynamo.reset()


def block() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1))


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), block(), nn.ReLU(), nn.Conv2d(8, 2, 1))


def around(inner: nn.Module, run: Callable[[nn.Module, Tensor], Tensor] | None = None) -> nn.Module:
    """Build a network of a stem, ``inner`` and a head; ``run(inner, x)``, if given, calls ``inner``."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = F.relu(m.stem(x))
        return m.head(m.inner(x) if run is None else run(m.inner, x))

    return Net(forward, stem=nn.Conv2d(3, 8, 3, padding=1), inner=inner, head=nn.Conv2d(8, 2, 1))


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def compiled_and_run(model: nn.Module) -> nn.Module:
    fast = compiled(model)
    fast(X), fast.eval()(X)
    return fast


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager", fullgraph=True)
    return model


def parallel(model: nn.Module) -> nn.Module:
    return nn.DataParallel(model)


def cut_one(build: Callable[[], nn.Module]) -> Outcome:
    """Prune like ``nets.cut``, without copies of the model: a copied script has no trainable parameters."""
    dense, small = randomise_(build()).eval(), build().eval()
    small.load_state_dict(dense.state_dict())
    graph = trace(small, X)
    remove = random_units(graph, seed=1)
    dead, zeroed = with_dead_filters(dense, graph, remove), with_zeroed_consumers(dense, graph, remove)
    record = prune_(small, graph, remove)
    errors = error(dead, small, X), error(zeroed, small, X)
    return Outcome(dense, small, graph, remove, record, *errors)


# -- pruned like the network inside ------------------------------------------------------------

EIGHT = torch.zeros(2, 8, 8, 8)
CUT: dict[str, Callable[[], nn.Module]] = {
    "compiled": lambda: compiled(plain()),
    "compiled and run before": lambda: compiled_and_run(plain()),
    "compiled in place": lambda: compiled_in_place(plain()),
    "compiled submodule": lambda: around(compiled(block())),
    "compiled function": lambda: around(block(), torch.compile(lambda m, x: m(x), backend="eager")),
    "data parallel": lambda: parallel(plain()),
    "data parallel submodule": lambda: around(parallel(block())),
    "scripted submodule": lambda: around(torch.jit.script(block())),
    "traced submodule": lambda: around(torch.jit.trace(block(), EIGHT)),
    "graph module": lambda: torch.fx.symbolic_trace(plain()),
    "graph submodule": lambda: around(torch.fx.symbolic_trace(block())),
    "checkpoint": lambda: around(block(), lambda m, x: checkpoint(m, x, use_reentrant=False)),
    "reentrant checkpoint": lambda: around(block(), lambda m, x: checkpoint(m, x, use_reentrant=True)),
    "checkpoint of a sequence": lambda: around(
        block(), lambda m, x: checkpoint_sequential(m, 2, x, use_reentrant=False)
    ),
    "reentrant checkpoint of a sequence": lambda: around(
        block(), lambda m, x: checkpoint_sequential(m, 2, x, use_reentrant=True)
    ),
}


@pytest.mark.parametrize("name", CUT)
def test_a_wrapped_network_is_pruned_like_the_network_inside(name):
    result = cut_one(CUT[name])
    assert len(result.graph.prunable) == 8 + 6 + 8
    assert result.graph.cost("macs") == counted_macs(plain(), X)
    assert result.dead < 1e-5
    assert result.zeroed < 1e-5
    assert set(result.record.kept) <= set(result.dense.state_dict())
    assert parameters(result.model) == result.graph.cost("params", result.remove) < parameters(result.dense)
    assert error(result.record.apply_(result.dense), result.model, X) == 0


@pytest.mark.parametrize("name", CUT)
def test_a_wrapped_network_can_be_trained_after_the_cut(name):
    result = cut_one(CUT[name])
    result.model.train()(X).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in result.model.parameters())


def test_a_compiled_network_runs_the_pruned_network_after_the_cut():
    model = randomise_(plain()).eval()
    fast = compiled_and_run(model)
    graph = trace(fast, X)
    prune_(fast, graph, graph.layers["_orig_mod.0.weight"][:3])
    assert model[0].weight.shape[0] == 5
    assert torch.equal(fast(X), model(X))


def test_compiled_code_runs_compiled_after_a_trace():
    runs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        runs.append(len(inputs))
        return graph.forward

    fast = torch.compile(plain(), backend=backend)
    trace(fast, X)
    assert not runs
    fast(X)
    assert runs


def test_data_parallel_on_devices_runs_the_inner_module_instead_of_replicas():
    model = parallel(plain())
    model.device_ids, model.src_device_obj = [0, 1], torch.device("cuda:0")  # its forward would raise
    before = state(model)
    graph = trace(model, X)
    assert_same(state(model), before)
    assert "forward" not in vars(model)
    prune_(model, graph, graph.layers["module.0.weight"][:2])
    assert model.module(X).shape == (2, 2, 8, 8)


def test_sizes_written_as_constants_in_a_graph_module_pin_attention():
    model = nn.Sequential(nn.Linear(5, 12), torch.fx.symbolic_trace(Attention(12, 4)), nn.Linear(12, 2))
    x = torch.randn(2, 7, 5)
    result = cut(model, x, share=0.3)
    assert result.dead < 1e-5
    reasons = {result.graph.pinned.get(int(unit), "") for unit in result.graph.layers["1.qkv.weight"]}
    assert all("split" in reason or "written" in reason for reason in reasons), reasons


class ConstantSizes(nn.Module):
    """A module whose sizes are constants in TorchScript: groups, a view, or parts."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a = nn.Conv2d(8, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.kind == "groups":
            return self.depthwise(x)
        if self.kind == "view":
            b, c, h, w = x.shape
            return x.view(b, c, h * w).view(b, c, h, w)
        first, second = x.chunk(2, 1)
        return torch.cat([second, first], 1)


@pytest.mark.parametrize(
    "script", [torch.jit.script, lambda m: torch.jit.trace(m, EIGHT)], ids=["script", "trace"]
)
@pytest.mark.parametrize("kind", ["groups", "view", "parts"])
def test_sizes_inside_a_script_are_constants_and_pin_the_channels(kind, script):
    result = cut_one(lambda: around(script(ConstantSizes(kind))))
    pinned = [result.graph.pinned.get(int(unit), "") for unit in result.graph.layers["inner.a.weight"]]
    assert all("in inner" in reason for reason in pinned), pinned
    assert len(result.graph.prunable) == 8
    assert max(result.dead, result.zeroed) < 1e-5


# -- refused ------------------------------------------------------------


def quantised(how: str) -> nn.Module:
    from torch.ao import quantization

    if how == "dynamic":
        return around(quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear}))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    model.qconfig = quantization.get_default_qconfig(torch.backends.quantized.engine)
    quantization.prepare(model, inplace=True)
    model(X)
    return quantization.convert(model)


def quantised_buffer() -> nn.Module:
    inner = block()
    inner.register_buffer("codes", torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))
    return around(inner)


def lazy_head() -> nn.Module:
    return around(nn.Sequential(nn.LazyConv2d(8, 1)))


def exported() -> nn.Module:
    return torch.export.export(plain(), (X,)).module()


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "scripted": (lambda: torch.jit.script(plain()), "network is scripted: trace and prune the network that was"),
    "traced": (lambda: torch.jit.trace(plain(), X), "network is scripted: trace and prune the network that was"),
    "exported": (exported, "the network .* is an exported program: trace and prune the network that was"),
    "lazy": (lazy_head, r"'inner.0' \(LazyConv2d\) has no shape yet: run the network once"),
    "dynamically quantised": (lambda: quantised("dynamic"), r"'inner.0' \(Linear\) is quantised: prune the float"),
    "statically quantised": (lambda: quantised("static"), r"'0' \(Conv2d\) is quantised: prune the float"),
    "a quantised buffer": (quantised_buffer, r"'inner' \(Sequential\) is quantised: prune the float"),
    "no module": (lambda: F.relu, "can trace an nn.Module, not a function"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_untraceable_network_is_refused_with_module_name_and_advice(name):
    build, message = REFUSED[name]
    with pytest.raises(TraceError, match=message) as raised:
        trace(build(), X)
    assert "\n" not in str(raised.value)


@pytest.fixture
def one_process(tmp_path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("place", ["whole", "submodule"])
def test_peer_04_a_ddp_wrapped_network_is_refused_and_its_module_is_pruned_and_wrapped_again(
    place, one_process
):
    inner = plain() if place == "whole" else block()
    wrapped = DistributedDataParallel(inner)
    model = wrapped if place == "whole" else around(wrapped)
    named = "the network" if place == "whole" else "'inner'"
    with pytest.raises(TraceError, match=rf"{named} \(DistributedDataParallel\) stores .* prune its .module"):
        trace(model, X)
    result = cut(wrapped.module, X if place == "whole" else EIGHT)  # as the message says
    assert max(result.dead, result.zeroed) < 1e-5
    again = DistributedDataParallel(result.model)
    again(X if place == "whole" else EIGHT).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in result.model.parameters())


def test_a_network_on_the_meta_device_is_traced_but_not_pruned():
    model = plain().to("meta")
    graph = trace(model, X)
    assert len(graph.prunable) == 8 + 6 + 8
    shapes = [p.shape for p in model.parameters()]
    with pytest.raises(SurgeryError, match=r"'0\.weight' is on the meta device: load the network's values"):
        prune_(model, graph, graph.prunable[:2])
    assert [p.shape for p in model.parameters()] == shapes


# -- unprunable tensors ------------------------------------------------------------


def frequency_filter(m: nn.Module, x: Tensor) -> Tensor:
    x = m.b(F.relu(m.a(x)))
    return m.head(torch.fft.irfft2(torch.fft.rfft2(x) * m.waves, s=x.shape[-2:]))


def sparse_graph_product(m: nn.Module, x: Tensor) -> Tensor:
    x = m.b(F.relu(m.a(x))).flatten(2)
    rows = torch.stack([torch.sparse.mm(m.graph, sample.t()).t() for sample in x])
    return m.head(rows.view(2, 6, 8, 8))


def sparse_mask_product(m: nn.Module, x: Tensor) -> Tensor:
    return m.head(m.b(F.relu(m.a(x))) * m.graph.to_dense()[:6, :1, None])


def waves() -> nn.Parameter:
    return nn.Parameter(torch.randn(6, 8, 5, dtype=torch.cfloat))


def sparse(layout: torch.layout) -> Tensor:
    return torch.eye(64).to_sparse(layout=layout)


UNPRUNABLE: dict[str, tuple[Callable[..., Tensor], dict[str, Callable[[], Any]], str]] = {
    "complex weight": (frequency_filter, {"waves": waves}, "without a rule|complex numbers"),
    "sparse matrix": (
        sparse_graph_product,
        {"graph": lambda: sparse(torch.sparse_coo)},
        "without a rule|sparse",
    ),
    "sparse mask": (sparse_mask_product, {"graph": lambda: sparse(torch.sparse_coo)}, "of fixed size"),
}


@pytest.mark.parametrize("name", UNPRUNABLE)
def test_sparse_and_complex_tensors_are_pinned_and_the_rest_is_pruned(name):
    run, parts, reason = UNPRUNABLE[name]
    model = Net(run, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 6, 1), head=nn.Conv2d(6, 2, 1))
    for name, part in parts.items():
        tensor = part()
        register = model.register_parameter if isinstance(tensor, nn.Parameter) else model.register_buffer
        register(name, tensor)
    graph = trace(model, X)
    assert len(graph.prunable) == 8
    reasons = {graph.pinned[int(unit)] for unit in graph.layers["b.weight"]}
    assert all(re.search(reason, text) for text in reasons), reasons
    result = cut(model, X)
    assert max(result.dead, result.zeroed) < 1e-5


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
def test_networks_with_csr_tensors_are_pruned_like_coo():  # without oracles, which copy: torch cannot copy CSR
    models = [
        Net(sparse_graph_product, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 6, 1), head=nn.Conv2d(6, 2, 1))
        for _ in "ab"
    ]
    values = copy.deepcopy(models[0].state_dict())
    for model, layout in zip(models, (torch.sparse_coo, torch.sparse_csr), strict=True):
        model.register_buffer("graph", sparse(layout), persistent=False)
        model.load_state_dict(values)
        graph = trace(model, X)
        prune_(model, graph, graph.layers["a.weight"][:3])
        assert model.b.in_channels == 5
    assert error(*models, X) == 0


def test_channels_that_are_converted_to_numpy_are_pinned():
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(torch.from_numpy(m.b(F.relu(m.a(x))).detach().numpy()[:, ::-1].copy()))

    model = Net(run, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 6, 1), head=nn.Conv2d(6, 2, 1))
    result = cut(model, X)
    assert len(result.graph.prunable) == 8
    reasons = {result.graph.pinned[int(unit)] for unit in result.graph.layers["b.weight"]}
    assert reasons == {"leaves torch for numpy, where it cannot be followed"}
    assert max(result.dead, result.zeroed) < 1e-5


# -- networks that raise ------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_the_error_of_a_network_is_shown_and_its_state_is_restored(training):
    class NetworkError(LookupError):
        pass

    def run(m: nn.Module, x: Tensor) -> Tensor:
        m.calls += 1
        x = m.norm(m.stem(x))
        raise NetworkError("no such scale: 'x8'")

    inner = Net(run, stem=nn.Conv2d(3, 8, 1), norm=nn.BatchNorm2d(8), calls=0)
    model = nn.Sequential(inner, nn.Conv2d(8, 2, 1)).train(training)
    before = state(model)
    with pytest.raises(TraceError, match=r"NetworkError: no such scale: 'x8' \(in '0'\)") as raised:
        trace(model, X)
    assert isinstance(raised.value.__cause__, NetworkError)
    assert_same(state(model), before)


def test_the_error_for_an_input_of_wrong_shape_names_the_layer():
    model = Small()
    before = state(model)
    with pytest.raises(TraceError, match=r"RuntimeError: .*channels.*\(in 'stem'\)"):
        trace(model, torch.zeros(1, 4, 16, 16))
    assert_same(state(model), before)


def test_code_runs_compiled_after_a_compiled_network_raised():
    def run(m: nn.Module, x: Tensor) -> Tensor:
        raise ValueError("not today")

    model = compiled(Net(run, a=nn.Conv2d(3, 2, 1)))
    with pytest.raises(TraceError, match="ValueError: not today"):
        trace(model, X)
    fast = compiled(plain())
    assert torch.equal(fast(X), fast._orig_mod(X))
