"""Occlusion of convolutional networks by recomputing only what a window changes.

A window changes a rectangle of every map it reaches; layers widen it by their receptive field. `PatchedGraph` carries
that rectangle, a patch of one size a layer for all windows, through the traced network. Where a layer needs more than
the patch, the surroundings are read from the maps of the clean input. Once a rectangle covers most of a map, or a layer
is not understood, the whole map is put together and the network goes on as usual.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ._patch_rules import Joined, Local, Spatial, is_written_to, passes_through, rule_of
from ._patches import Axis, Chunk, Region, Span

_SHARE = 0.7  # of a map's area, up to which a patch is cheaper

Values = dict[fx.Node, object]


class FieldError(ValueError):
    """Why receptive fields cannot be used for a model."""


@dataclass(frozen=True)
class _Step:
    """How a node's patch is made.

    Attributes:
        run: From its operands.
        operands: Patched nodes, and the region to be read of each; None: its patch as it is.
    """

    run: Callable[..., Tensor]
    operands: tuple[tuple[fx.Node, Region | None], ...]


class PatchedGraph:
    """A traced network that takes windows of its input.

    Args:
        model: In the mode it is to be run in; left as it is.
        example: ``[1, C, H, W]``.
        rows: Windows along the height.
        columns: Windows along the width.
        layout: Of whole maps. Patches are cut with channels last, but networks run best in the layout they know.
        caller: Prefix of messages.

    Attributes:
        shrinkage: How many times more elements whole maps have than what is computed of them.

    Raises:
        FieldError: hooks, or a forward that cannot be traced.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        rows: Span,
        columns: Span,
        layout: torch.memory_format,
        caller: str,
    ) -> None:
        self.caller, self._layout = caller, layout
        alone = _Alone(model)
        self.modules = dict(alone.named_modules(remove_duplicate=False))
        self.nodes = list(_trace(alone, self.modules, caller).nodes)
        self.image = self.nodes[0]
        self._device = example.device
        self._spans: dict[fx.Node, tuple[Span, Span]] = {self.image: (rows, columns)}
        self._steps: dict[fx.Node, _Step] = {}
        self._whole: dict[fx.Node, Region] = {}  # patched nodes that others need as whole maps
        self._last = {used: node for node in self.nodes for used in node.all_input_nodes}  # who uses a value last
        values = self._values(example)
        self._plan(values)
        self.shrinkage = self._shrinkage(values)
        read = {source for step in self._steps.values() for source, region in step.operands if region is not None}
        self._read = read | set(self._whole)  # whose clean maps are kept

    def clean(self, images: Tensor) -> Values:
        """Maps of images ``[b, C, H, W]`` that patches are completed from, channels last."""
        maps = self._values(images, self._read)
        return {node: value.contiguous(memory_format=torch.channels_last) for node, value in maps.items()}

    def __call__(self, patches: Tensor, clean: Values, chunk: Chunk) -> object:
        """The network's answer to the images with their windows' boxes replaced.

        Args:
            patches: ``[n, C, p, q]``, the boxes of ``rows`` and ``columns``.
            clean: Of `clean`.
            chunk: Where the rows come from.
        """
        values: Values = {self.image: patches}
        whole: Values = {}

        def operand(source: fx.Node, region: Region | None) -> object:
            return values[source] if region is None else region.read(values[source], clean[source], chunk)

        def whole_map(source: fx.Node) -> object:
            if source not in self._whole:
                return values[source]
            if source not in whole:
                whole[source] = operand(source, self._whole[source]).contiguous(memory_format=self._layout)
            return whole[source]

        for node in self.nodes[1:]:
            if node in self._steps:
                step = self._steps[node]
                values[node] = step.run(*(operand(*given) for given in step.operands))
            else:
                values[node] = self._call(node, whole_map)
            for used in node.all_input_nodes:
                if self._last[used] is node:
                    values.pop(used), whole.pop(used, None)
        return values[self.nodes[-1]]

    def _values(self, images: Tensor, wanted: set[fx.Node] | None = None) -> Values:
        """What the wanted nodes answer to whole images; all nodes where None."""
        values: Values = {self.image: images.contiguous(memory_format=self._layout)}
        left = set(self.nodes if wanted is None else wanted) - {self.image}
        for node in self.nodes[1:]:
            if not left:
                break
            written = is_written_to(node, self.modules)
            values[node] = self._call(node, lambda n, w=written: values[n].clone() if n is w else values[n])
            left.discard(node)
            for used in node.all_input_nodes:
                if self._last[used] is node and wanted is not None and used not in wanted:
                    del values[used]
        return values if wanted is None else {node: values[node] for node in wanted}

    def _call(self, node: fx.Node, value_of: Callable[[fx.Node], object]) -> object:
        args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
        if node.op == "output":
            return args[0]
        if node.op == "call_module":
            return self.modules[node.target](*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        if node.op == "get_attr":
            path, _, name = node.target.rpartition(".")
            return getattr(self.modules[path], name)
        return node.target(*args, **kwargs)

    def _plan(self, values: Values) -> None:
        """Decide for every node whether it is patched, and from where its operands are read."""
        depends = {self.image}
        for node in self.nodes[1:]:
            inputs = [source for source in node.all_input_nodes if source in depends]
            if not inputs:
                continue
            depends.add(node)
            patched = all(source in self._spans for source in inputs)
            rule = rule_of(node, self.modules, values, depends) if patched else None
            if rule is not None and self._patch(node, rule, values[node]):
                continue
            for source in inputs:
                if source in self._spans and source not in self._whole:
                    self._whole[source] = self._region(source, [span.everything for span in self._spans[source]], 0.0)

    def _patch(self, node: fx.Node, rule: Spatial | Local | Joined, value: Tensor) -> bool:
        """Patch a node, unless most of its map changes."""
        spans = [self._spans[source] for source in rule.sources]
        if isinstance(rule, Spatial):
            sizes = value.shape[-2:]
            out = tuple(s.through(*geometry, n) for s, geometry, n in zip(spans[0], rule.axes, sizes, strict=True))
        else:
            out = spans[0]
            for other in spans[1:]:
                out = tuple(a.joined(b) for a, b in zip(out, other, strict=True))
        if out[0].length * out[1].length > _SHARE * out[0].size * out[1].size:
            return False
        self._spans[node] = out
        operands: list[tuple[fx.Node, Region | None]] = []
        for source, given in zip(rule.sources, spans, strict=True):
            if isinstance(rule, Spatial):
                needs = [span.needs(*geometry) for span, geometry in zip(out, rule.axes, strict=True)]
                operands.append((source, self._region(source, needs, rule.fill)))
            elif all(a.same_box(b) for a, b in zip(given, out, strict=True)):
                operands.append((source, None))
            else:
                operands.append((source, self._region(source, [span.needs(1, 1, 0, 1) for span in out], 0.0)))
        self._steps[node] = _Step(rule.run, tuple(operands))
        return True

    def _region(self, source: fx.Node, needs: list[Tensor], fill: float) -> Region:
        """Indices ``[count, l]`` of a patched node along height and width."""
        spans = self._spans[source]
        return Region(*(Axis.of(index, span, self._device) for index, span in zip(needs, spans, strict=True)), fill)

    def _shrinkage(self, values: Values) -> float:
        whole = computed = 0
        for node, value in values.items():
            if isinstance(value, Tensor) and value.dim() == 4:
                box = [span.length for span in self._spans.get(node, ())] or value.shape[-2:]
                whole += value[0].numel()
                computed += value.shape[1] * box[0] * box[1]
        return whole / computed


class _Alone(nn.Module):
    """A model of one argument, whatever else has defaults. What tracing notes, constants, it notes here."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> object:
        """The model's answer."""
        return self.model(x)


def _trace(model: _Alone, modules: dict[str, nn.Module], caller: str) -> fx.Graph:
    """The network's graph, without nodes that pass their input on and without looking back behind a write in place."""
    for path, module in modules.items():
        if module._forward_hooks or module._forward_pre_hooks:
            raise FieldError(
                f"{caller}: receptive_field needs modules without forward hooks, "
                f"{path.removeprefix('model').lstrip('.') or 'the model itself'} has some; remove them, or pass "
                "receptive_field=False"
            )
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # whatever the model's own code does with a stand-in for its input
        raise FieldError(
            f"{caller}: receptive_field needs a model that torch.fx can trace, got {type(error).__name__}: {error}; "
            "pass receptive_field=False"
        ) from error
    for node in list(graph.nodes):
        if passes_through(node, modules):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        seen.add(node)
        source = is_written_to(node, modules)
        for user in list(source.users) if source is not None else ():
            if user not in seen:
                user.replace_input_with(source, node)
    return graph
