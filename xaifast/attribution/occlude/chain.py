"""Networks that are a chain of linear layers and elementwise activations, found by tracing, and folded at a state."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
}
_ACTIVATIONS: dict[type, Callable[[nn.Module], str]] = {
    nn.ReLU: lambda m: "relu",
    nn.LeakyReLU: lambda m: f"leaky_relu:{m.negative_slope}",
    nn.ELU: lambda m: f"elu:{m.alpha}",
    nn.Tanh: lambda m: "tanh",
    nn.Sigmoid: lambda m: "sigmoid",
    nn.SiLU: lambda m: "silu",
    nn.GELU: lambda m: "gelu_tanh" if m.approximate == "tanh" else "gelu",
}
_CALLS = {  # functions and methods without parameters
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu: "relu",
    "relu": "relu",
    "relu_": "relu",
    torch.tanh: "tanh",
    F.tanh: "tanh",
    "tanh": "tanh",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    "sigmoid": "sigmoid",
    F.silu: "silu",
}
_RESHAPES = (torch.flatten, torch.reshape, "flatten", "view", "reshape")
_SHAPES = (getattr, operator.getitem, "size")
_LINKS = {
    nn.Linear: "linear",
    nn.BatchNorm1d: "norm",
    nn.Flatten: "reshape",
    nn.Identity: "nothing",
    nn.Dropout: "nothing",  # in evaluation
    nn.AlphaDropout: "nothing",
}


def activation(name: str, z: Tensor) -> Tensor:
    """phi(z) for a name of `xaifast.ops.occlude_linear`."""
    kind, _, parameter = name.partition(":")
    return FUNCTIONS[kind](z, float(parameter)) if parameter else FUNCTIONS[kind](z)


def slope(name: str, z: Tensor) -> Tensor:
    """phi'(z), 0 for ReLU at 0."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        return torch.autograd.grad(activation(name, leaf).sum(), leaf)[0]


@dataclass(frozen=True)
class Step:
    """One link: kind is "linear", "norm" or "activation"; path a module's, name an activation's."""

    kind: str
    path: str = ""
    name: str = ""


@dataclass
class Stage:
    """A linear layer with the norms around it folded in, in float64, and the activation behind it."""

    weight: Tensor  # [H_out, H_in]
    bias: Tensor  # [H_out]
    activation: str | None = None


@dataclass
class Folded:
    """A chain at a state.

    Attributes:
        scale, shift: Of the input, ``[N]`` or numbers, from a norm before the first layer.
        first_scale: Of the first layer's outputs, ``[H]`` or a number, from the norm behind it.
        stages: Linear layers in order.
    """

    scale: Tensor | float = 1.0
    shift: Tensor | float = 0.0
    first_scale: Tensor | float = 1.0
    stages: list[Stage] = field(default_factory=list)


@dataclass(frozen=True)
class Chain:
    """Links of a network whose first linear layer reads the flattened input."""

    steps: tuple[Step, ...]
    epsilons: Mapping[str, float]

    @property
    def first(self) -> str:
        """Path of the first linear layer."""
        return next(step.path for step in self.steps if step.kind == "linear")

    def fold(self, state: Mapping[str, Tensor]) -> Folded:
        """Norms become part of the linear layers beside them; float64."""
        folded, scale, shift = Folded(), 1.0, 0.0
        for step in self.steps:
            stages = folded.stages
            if step.kind == "linear":
                weight, bias = (state.get(_key(step.path, name)) for name in ("weight", "bias"))
                weight = weight.double()
                bias = weight.new_zeros(len(weight)) if bias is None else bias.double()
                if not stages:
                    folded.scale, folded.shift = scale, shift
                else:
                    stages[-1].activation = stages[-1].activation or "identity"
                    bias, weight = bias + (weight * shift).sum(1), weight * scale
                stages.append(Stage(weight, bias))
                scale, shift = 1.0, 0.0
            elif step.kind == "activation":
                stages[-1].activation = step.name
            else:
                factor, offset = self._norm(step.path, state)
                if stages and stages[-1].activation is None:
                    last = stages[-1]
                    last.weight, last.bias = last.weight * factor[:, None], last.bias * factor + offset
                    if len(stages) == 1:
                        folded.first_scale = folded.first_scale * factor
                else:
                    scale, shift = scale * factor, shift * factor + offset
        return folded

    def _norm(self, path: str, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        mean, variance = (state[_key(path, name)].double() for name in ("running_mean", "running_var"))
        factor = (variance + self.epsilons[path]).rsqrt()
        if _key(path, "weight") in state:
            factor = factor * state[_key(path, "weight")].double()
        offset = -mean * factor
        if _key(path, "bias") in state:
            offset = offset + state[_key(path, "bias")].double()
        return factor, offset


def _key(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def find_chain(model: nn.Module, x: Tensor) -> Chain | None:
    """The chain that a network is, checked against one run in float64; None if it is none.

    Seen are Linear, BatchNorm1d, the activations above, dropout, flattening and what does nothing, as modules in any
    nesting or as functions.
    """
    if not x.is_floating_point():
        return None
    try:
        links = _links(fx.Tracer().trace(nn.Sequential(model)), model)
    except Exception:  # tracing runs code of the user's with stand-ins; whatever fails there is no chain
        return None
    kinds = [step.kind for step in links]
    steps = [step for step in links if step.kind in ("linear", "norm", "activation")]
    if not _can_fold(steps) or (x.dim() != 2 and "reshape" not in kinds[: kinds.index("linear")]):
        return None
    norms = {step.path: model.get_submodule(step.path).eps for step in steps if step.kind == "norm"}
    chain = Chain(tuple(steps), norms)
    return chain if _agrees(chain, model, x) else None


def _links(graph: fx.Graph, model: nn.Module) -> list[Step]:
    """What happens to the one input, in order.

    Raises:
        ValueError: something that is no link of a chain.
    """
    modules, steps, current = dict(model.named_modules()), [], None
    for node in graph.nodes:
        if node.op == "placeholder" and current is None:
            current = node
        elif node.op == "output" and node.args[0] is current:
            return steps
        elif node.op not in ("call_module", "placeholder") and node.target in _SHAPES:
            continue  # of use to reshapes alone, which take nodes beside the input
        else:
            step = _step(node, modules)
            beside = [n for n in node.all_input_nodes if n is not current]
            if node.args[:1] != (current,) or (beside and step.kind != "reshape"):
                raise ValueError(node)
            steps.append(step)
            current = node
    raise ValueError(graph)


def _step(node: fx.Node, modules: Mapping[str, nn.Module]) -> Step:
    if node.op == "call_module":
        path = node.target.partition(".")[2]
        module = modules[path]
        if type(module) in _ACTIVATIONS:
            return Step("activation", name=_ACTIVATIONS[type(module)](module))
        if type(module) in _LINKS:
            return Step(_LINKS[type(module)], path)
    elif node.target in _RESHAPES:
        return Step("reshape")
    elif node.target in _CALLS:
        return Step("activation", name=_CALLS[node.target])
    elif node.target is F.gelu:
        return Step("activation", name="gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu")
    elif node.target is F.leaky_relu:
        negative = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
        return Step("activation", name=f"leaky_relu:{negative}")
    elif node.target is F.dropout:
        return Step("nothing")  # or the run that checks the chain differs
    raise ValueError(node)


def _can_fold(steps: list[Step]) -> bool:
    """Whether linear layers, each once, come before activations, and no norm ends the chain behind an activation."""
    kinds = [step.kind for step in steps if step.kind != "norm"]
    paths = [step.path for step in steps if step.kind == "linear"]
    if kinds[:1] != ["linear"] or len(set(paths)) < len(paths):
        return False
    alternates = all(a == "linear" for a, b in zip(kinds, kinds[1:], strict=False) if b == "activation")
    return alternates and not (kinds[-1] == "activation" and steps[-1].kind == "norm")


def _agrees(chain: Chain, model: nn.Module, x: Tensor) -> bool:
    """Whether the folded chain gives what the model does: what tracing cannot see would show here."""
    state = {k: v.double() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    row = x[:1].double()
    try:
        with torch.no_grad():
            expected = functional_call(model, state, (row,), tie_weights=False)
            folded = chain.fold(state)
            return torch.allclose(forward(folded, row.flatten(1))[1], expected, rtol=1e-8, atol=1e-10)
    except Exception:  # a model that cannot run in float64, or whose shapes do not fit
        return False


def forward(folded: Folded, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Pre-activations of all stages ``[B, H_l]`` and the outputs ``[B, K]``."""
    h, base = x * folded.scale + folded.shift, []
    for stage in folded.stages:
        base.append(torch.addmm(stage.bias, h, stage.weight.t()))
        h = activation(stage.activation or "identity", base[-1])
    return base, h
