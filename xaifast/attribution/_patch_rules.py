"""Which nodes of a traced network can be computed on a patch of their map, and how."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

_POINTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Tanhshrink, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus,
    nn.Softsign, nn.Softshrink, nn.Hardshrink, nn.Threshold,
)  # fmt: skip
_POINTWISE_FUNCTIONS = {
    torch.relu, torch.relu_, torch.sigmoid, torch.tanh, torch.abs, torch.neg, torch.exp, torch.sqrt, torch.clamp,
    F.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.hardtanh, F.hardswish,
    F.hardsigmoid, F.softplus, F.softsign, F.sigmoid, F.tanh, F.logsigmoid, operator.neg, operator.pos, operator.pow,
}  # fmt: skip
_POINTWISE_METHODS = {"relu", "relu_", "sigmoid", "tanh", "abs", "neg", "exp", "sqrt", "clamp", "square"}
_ARITHMETIC = {
    operator.add, operator.iadd, operator.sub, operator.isub, operator.mul, operator.imul, operator.truediv,
    torch.add, torch.sub, torch.mul, torch.div, "add", "add_", "sub", "mul", "mul_", "div",
}  # fmt: skip
_IN_PLACE_OPERATORS = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift,
}  # fmt: skip

Pair = tuple[int, int]


@dataclass(frozen=True)
class Spatial:
    """A kernel that slides over a map.

    Attributes:
        sources: The map.
        run: From the padded map, without padding of its own.
        axes: (kernel, stride, padding, dilation) along height and width.
        fill: What padding shows.
    """

    sources: tuple[fx.Node]
    run: Callable[[Tensor], Tensor]
    axes: tuple[tuple[int, int, int, int], tuple[int, int, int, int]]
    fill: float


@dataclass(frozen=True)
class Local:
    """A function of every pixel by itself, of one map."""

    sources: tuple[fx.Node]
    run: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Joined:
    """A function of every pixel by itself, of several maps."""

    sources: tuple[fx.Node, ...]
    run: Callable[..., Tensor]


def rule_of(
    node: fx.Node, modules: dict[str, nn.Module], values: dict[fx.Node, object], depends: set[fx.Node]
) -> Spatial | Local | Joined | None:
    """How a node is computed on patches of its inputs; None where it is not known.

    Args:
        node: With maps among its inputs.
        modules: By path.
        values: What nodes answered to an example.
        depends: Nodes that depend on the image.
    """
    maps = [source for source in node.all_input_nodes if source in depends]
    if not all(_is_map(values[source]) for source in (*maps, node)):
        return None
    if node.op == "call_module":
        alone = len(node.args) == 1 and not node.kwargs
        return _module_rule(node, modules[node.target]) if alone else None
    if node.target is torch.cat:
        return _cat_rule(node)
    if node.target in _ARITHMETIC:
        return _arithmetic_rule(node, maps, values)
    if node.target in (F.max_pool2d, torch.max_pool2d, F.avg_pool2d):
        return _pool_rule(node)
    known = _POINTWISE_METHODS if node.op == "call_method" else _POINTWISE_FUNCTIONS
    if node.target in known and maps == list(node.args[:1]) and _same_everywhere(node, maps, values):
        return Local((maps[0],), _bound(node, maps, values))
    return None


def passes_through(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node answers with its input."""
    if node.op == "call_module":
        module = modules[node.target]
        idle = isinstance(module, nn.modules.dropout._DropoutNd) and not module.training
        return idle or type(module) is nn.Identity
    if node.target is F.dropout:
        return not node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
    return node.op == "call_method" and node.target == "contiguous"


def is_written_to(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The input that a node overwrites; None where it overwrites none."""
    in_place = node.kwargs.get("inplace", False) or node.target in _IN_PLACE_OPERATORS
    if node.op == "call_module":
        in_place = getattr(modules[node.target], "inplace", False)
    elif node.op == "call_method" or getattr(torch, getattr(node.target, "__name__", ""), None) is node.target:
        name = node.target if node.op == "call_method" else node.target.__name__
        in_place = in_place or (name.endswith("_") and not name.endswith("__"))
    return node.args[0] if in_place and node.args and isinstance(node.args[0], fx.Node) else None


def _is_map(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4


def _module_rule(node: fx.Node, module: nn.Module) -> Spatial | Local | None:
    source = (node.args[0],)
    if type(module) is nn.Conv2d and module.padding_mode == "zeros" and module.padding != "same":
        padding = (0, 0) if module.padding == "valid" else module.padding

        def convolve(x: Tensor) -> Tensor:
            return F.conv2d(x, module.weight, module.bias, module.stride, 0, module.dilation, module.groups)

        return _spatial(source, convolve, module.kernel_size, module.stride, padding, module.dilation, 0.0)
    if type(module) is nn.MaxPool2d and not module.return_indices:
        return _max_pool(source, module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
    if type(module) is nn.AvgPool2d:
        return _avg_pool(
            source, module.kernel_size, module.stride, module.padding, module.ceil_mode, module.count_include_pad,
            module.divisor_override,
        )  # fmt: skip
    if isinstance(module, nn.BatchNorm2d) and not module.training and module.running_mean is not None:
        return Local(source, module)
    if type(module) in _POINTWISE_MODULES and not (isinstance(module, nn.RReLU) and module.training):
        return Local(source, module)
    return None


def _pool_rule(node: fx.Node) -> Spatial | None:
    if len(node.all_input_nodes) > 1:  # a computed size
        return None

    def max_pool(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
        return None if return_indices else _max_pool((input,), kernel_size, stride, padding, dilation, ceil_mode)

    def avg_pool(
        input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
    ):
        return _avg_pool((input,), kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)

    return (avg_pool if node.target is F.avg_pool2d else max_pool)(*node.args, **node.kwargs)


def _max_pool(
    source: tuple[fx.Node], kernel: int | Pair, stride: int | Pair | None, padding: int | Pair, dilation: int | Pair,
    ceil_mode: bool,
) -> Spatial | None:  # fmt: skip
    if ceil_mode:
        return None
    step = stride or kernel

    def pool(x: Tensor) -> Tensor:
        return F.max_pool2d(x, kernel, step, 0, dilation)

    return _spatial(source, pool, kernel, step, padding, dilation, float("-inf"))


def _avg_pool(
    source: tuple[fx.Node], kernel: int | Pair, stride: int | Pair | None, padding: int | Pair, ceil_mode: bool,
    count_include_pad: bool, divisor_override: int | None,
) -> Spatial | None:  # fmt: skip
    if ceil_mode or (not count_include_pad and any(_pair(padding))):
        return None
    step = stride or kernel

    def pool(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, kernel, step, 0, divisor_override=divisor_override)

    return _spatial(source, pool, kernel, step, padding, 1, 0.0)


def _spatial(
    source: tuple[fx.Node], run: Callable[[Tensor], Tensor], kernel: int | Pair, stride: int | Pair,
    padding: int | Pair, dilation: int | Pair, fill: float,
) -> Spatial:  # fmt: skip
    axes = zip(_pair(kernel), _pair(stride), _pair(padding), _pair(dilation), strict=True)
    return Spatial(source, run, tuple(axes), fill)


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _cat_rule(node: fx.Node) -> Joined | None:
    parts = node.args[0] if node.args else node.kwargs["tensors"]
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if dim not in (1, -3) or len(set(parts)) < len(parts):
        return None
    return Joined(tuple(parts), lambda *maps: torch.cat(maps, 1))


def _arithmetic_rule(node: fx.Node, maps: list[fx.Node], values: dict[fx.Node, object]) -> Joined | None:
    """Of maps of one shape, numbers, and constants that are the same for all pixels."""
    if len({values[source].shape for source in maps}) > 1 or not _same_everywhere(node, maps, values):
        return None
    return Joined(tuple(maps), _bound(node, maps, values))


def _same_everywhere(node: fx.Node, maps: list[fx.Node], values: dict[fx.Node, object]) -> bool:
    """Whether a node's constants are the same for all pixels."""
    constants = (values[source] for source in node.all_input_nodes if source not in maps)
    return all(not isinstance(c, Tensor) or c.dim() == 0 or c.shape[-2:] == (1, 1) for c in constants)


def _bound(node: fx.Node, maps: list[fx.Node], values: dict[fx.Node, object]) -> Callable[..., Tensor]:
    """The node as a function of its maps; its constants do not change."""
    constants = {source: values[source] for source in node.all_input_nodes if source not in maps}

    def run(*given: Tensor) -> Tensor:
        known = {**constants, **dict(zip(maps, given, strict=True))}
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return node.target(*args, **kwargs)

    return run
