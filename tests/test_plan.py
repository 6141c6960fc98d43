"""Plans made once for many small calls, and calls that go past the dispatcher: nothing may be seen of either."""

import itertools

import pytest
import torch
from masking_cases import assert_bytes, random

from xaifast.ops import mask_inputs, pack_coalitions, plan_selection
from xaifast.ops.plan import _plan_of_shape
from xaifast.reference import masking as reference

PRESENT = torch.tensor([[1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()


def test_plans_of_one_shape_differ_in_all_they_depend_on():
    _plan_of_shape.cache_clear()
    values = (0.0, -0.0, 1.0, -float("inf"), 1 / 3)
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    for value, given, dtype in itertools.product(values, dtypes, (None, *dtypes)):
        for shape in ((2, 6), (1, 6, 1, 1), (2, 3, 2, 1), (3, 2, 1, 3)):
            x = random(shape, given)
            formats = (torch.contiguous_format, torch.channels_last) if x.dim() == 4 else (torch.contiguous_format,)
            for memory_format in formats:
                for _ in range(2):
                    actual = mask_inputs(x, PRESENT, None, value, dtype=dtype, memory_format=memory_format)
                    assert_bytes(actual, reference.mask_inputs(x, PRESENT, None, value, dtype=dtype))
    assert _plan_of_shape.cache_info().hits > 0


def test_a_shared_baseline_is_no_output():
    x, nobody = torch.ones(1, 6), torch.zeros(1, 1, dtype=torch.int64)
    mask_inputs(x, nobody).fill_(7)
    plan_selection(x).rows(nobody).fill_(7)
    assert_bytes(mask_inputs(x, nobody), torch.zeros(1, 1, 6))


def test_inputs_are_never_kept():
    bits = pack_coalitions(PRESENT)
    for x in (random((2, 6)), random((2, 6), seed=1), random((4, 6), seed=2)):
        assert_bytes(mask_inputs(x, bits), reference.mask_inputs(x, PRESENT))
        x += 1
        assert_bytes(mask_inputs(x, bits), reference.mask_inputs(x, PRESENT))


def test_plans_made_in_inference_mode_serve_gradients():
    _plan_of_shape.cache_clear()
    with torch.inference_mode():
        mask_inputs(torch.ones(1, 6), PRESENT)
    x = torch.ones(1, 6, requires_grad=True)
    mask_inputs(x, PRESENT).sum().backward()
    assert x.grad.tolist() == [[2.0, 1.0, 2.0, 1.0, 1.0, 2.0]]
    with torch.no_grad():
        assert not mask_inputs(x, PRESENT).requires_grad


def test_a_baseline_that_does_not_fit_is_refused_every_time():
    for _ in range(2):
        with pytest.raises(ValueError, match="baselines must be a value of the inputs' torch.int64, got 0.5"):
            mask_inputs(torch.ones(1, 6, dtype=torch.int64), PRESENT, None, 0.5)


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the operators that were called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_and_profiles_see_the_operator():
    x = random((2, 6))
    with Seen() as seen:
        rows = mask_inputs(x, pack_coalitions(PRESENT))
    assert "xaifast.select_rows.default" in seen.names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert_bytes(mask_inputs(x, PRESENT), rows)
    assert "xaifast::select_rows" in {event.key for event in profile.key_averages()}


class Wrapped(torch.Tensor):
    """A subclass: results have its type."""


def test_tensors_whose_memory_does_not_hold_their_values():
    x = torch.complex(torch.zeros(2, 6), random((2, 6))).conj().imag
    assert x.is_neg()
    expected = reference.mask_inputs(x.clone(), PRESENT)
    assert_bytes(mask_inputs(x, PRESENT).resolve_neg(), expected)
    assert_bytes(plan_selection(x).rows(pack_coalitions(PRESENT)).resolve_neg(), expected.flatten(0, 1))
    zeros = torch._efficientzerotensor((2, 6))
    assert_bytes(mask_inputs(zeros, PRESENT, None, 1.0), reference.mask_inputs(torch.zeros(2, 6), PRESENT, None, 1.0))
    wrapped = mask_inputs(random((2, 6)).as_subclass(Wrapped), PRESENT)
    assert type(wrapped) is Wrapped
    assert_bytes(wrapped.as_subclass(torch.Tensor), reference.mask_inputs(random((2, 6)), PRESENT))
