"""Derivatives of the package's operators under plain autograd, `torch.func` transforms and `torch.compile` alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch._C._functorch as functorch

from xaifast.ops._registry import _library, implementations

_CPU = torch._C.DispatchKey.CPU


def register_differentiable(name: str, reference: Callable, setup_context: Callable, backward: Callable) -> None:
    """Give operator `name` gradients and the `torch.func` transforms.

    Plain autograd calls `setup_context(ctx, inputs)` and `backward(ctx, grad) -> one gradient per argument`. Inside a
    `torch.func` transform (grad, jacrev, jvp, vmap; eager or compiled) the operator becomes `reference`, made of aten
    operations. `torch.library.register_autograd` fails in those transforms, and an operator without an autograd
    kernel that is wrapped in an autograd Function yields zero gradients silently under compile(vmap(grad)); the
    dispatch below has neither fault.
    """
    op, cpu = getattr(torch.ops.xaifast, name).default, implementations[name]["CPU"]

    def below(keyset, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def forward(ctx, keyset, *args):
        setup_context(ctx, args)
        return below(keyset, *args)

    function = type(
        f"{name}_function",
        (torch.autograd.Function,),
        {
            "forward": staticmethod(forward),
            "backward": staticmethod(lambda ctx, grad: (None, *backward(ctx, grad))),
        },
    )

    def autograd(keyset, *args):
        if functorch.peek_interpreter_stack() is not None:
            return reference(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(keyset, *args)
        if (keyset & torch._C._after_autograd_keyset).highestPriorityTypeId() == _CPU:
            return cpu(*args)  # what dispatching again would do, a microsecond sooner
        return below(keyset, *args)

    _library.impl(name, autograd, "Autograd", with_keyset=True)
    _library.impl(name, reference, "FuncTorchBatched")
