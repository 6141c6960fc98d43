"""What a model's state consists of, and a copy of it on the CPU that shares nothing with the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


@dataclass(frozen=True)
class Entry:
    """One tensor of a state dict.

    Attributes:
        name: Of the state dict.
        dtype: As text, ``"float32"``.
        shape: Of the tensor.
        parameter: Else a buffer.
        tied_to: The earlier name with the same memory, or None.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parameter: bool
    tied_to: str | None

    def __str__(self) -> str:
        tie = f", tied to {self.tied_to}" if self.tied_to else ""
        return f"{self.name} ({'parameter' if self.parameter else 'buffer'} {self.dtype} {list(self.shape)}{tie})"


@dataclass(frozen=True)
class Layout:
    """Names, shapes, dtypes and ties of a state dict, in its order."""

    entries: tuple[Entry, ...]

    @property
    def stored(self) -> list[Entry]:
        """Entries with memory of their own: tied ones once."""
        return [entry for entry in self.entries if entry.tied_to is None]

    @property
    def buffers(self) -> list[Entry]:
        """Entries of buffers with memory of their own."""
        return [entry for entry in self.stored if not entry.parameter]

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters with memory of their own."""
        return [entry.name for entry in self.stored if entry.parameter]

    def as_json(self) -> list:
        """For a manifest; `from_json` reads it."""
        return [[e.name, e.dtype, list(e.shape), e.parameter, e.tied_to] for e in self.entries]

    @classmethod
    def from_json(cls, entries: list) -> Layout:
        """The layout that `as_json` wrote."""
        return cls(tuple(Entry(name, dtype, tuple(shape), *rest) for name, dtype, shape, *rest in entries))

    def check_same(self, given: Layout, caller: str) -> None:
        """A model has this layout.

        Raises:
            ValueError: it does not; names what differs.
        """
        if given == self:
            return
        had, has = ({entry.name: entry for entry in layout.entries} for layout in (self, given))
        names = [name for name in {**had, **has} if had.get(name) != has.get(name)]
        shown = "; ".join(f"{had.get(name, 'nothing')} became {has.get(name, 'nothing')}" for name in names[:4])
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        raise ValueError(
            f"{caller}: model must have the architecture and dtypes recorded before, but "
            f"{shown or 'the order of names differs'}{more}; record another model to another directory"
        )


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside of `DistributedDataParallel`, `DataParallel` and `torch.compile`."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def take_state(model: nn.Module, caller: str) -> tuple[Layout, State]:
    """Layout of a model and copies on the CPU of its tensors, tied ones once.

    Raises:
        TypeError: no module, or a state that is not made of whole dense tensors.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be an nn.Module, got {type(model).__name__}")
    model = unwrap(model)
    state = model.state_dict()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    entries, owners = [], {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.is_quantized:
            given = f"{value.layout} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{caller}: the state dict must hold dense tensors, got {given} for {name}")
        if hasattr(value, "full_tensor"):
            raise TypeError(f"{caller}: {name} is sharded over processes; record the gathered model")
        memory = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride()) if value.numel() else name
        owner = owners.setdefault(memory, name)
        dtype = str(value.dtype).removeprefix("torch.")
        tied_to = None if owner == name else owner
        entries.append(Entry(name, dtype, tuple(value.shape), name in parameters, tied_to))
    if not entries:
        raise ValueError(
            f"{caller}: model must have parameters or buffers, got none; record the network that is trained"
        )
    layout = Layout(tuple(entries))
    # From a GPU all copies are queued, into pinned memory, before one wait for them.
    copies = {
        entry.name: state[entry.name]
        .detach()
        .to("cpu", non_blocking=True, copy=True, memory_format=torch.contiguous_format)
        for entry in layout.stored
    }
    for device in {value.device for value in state.values() if value.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return layout, copies


def check_finite(entries: Iterable[Entry], state: State, caller: str) -> None:
    """Parameters are finite; floating buffers, which may mask with infinity, are not NaN.

    Raises:
        ValueError: names the first that is not.
    """
    for entry in entries:
        value = state[entry.name]
        if not (value.is_floating_point() or value.is_complex()):
            continue
        bad = ~value.isfinite() if entry.parameter else value.isnan()
        if bool(bad.any()):
            where = bad.nonzero()[0].tolist()
            raise ValueError(
                f"{caller}: weights must be finite, got {value[tuple(where)].item()} in {entry.name} at {where} "
                f"({int(bad.sum())} such values); the training diverged: lower the learning rate, or stop before this "
                "step. Checkpoints recorded before are kept"
            )
