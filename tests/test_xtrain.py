"""XtrAIn beside a literal loop over all steps and players that substitutes columns of the first layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

import xaifast
from xaifast.attribution import _xtrain_walk
from xaifast.trajectory import class_gradients

FIRST = "0.weight"


def mlp(activation=nn.ReLU, n_inputs=6, n_outputs=3):
    return nn.Sequential(nn.Linear(n_inputs, 8), activation(), nn.Linear(8, 5), activation(), nn.Linear(5, n_outputs))


def data(n=7, n_inputs=6, n_outputs=3):
    x = torch.randn(n, n_inputs, dtype=torch.float64)
    x[1, 2] = x[4, 0] = 0.0
    return x, torch.randint(n_outputs, (n,))


def trained(net, x, y, n_steps=6, lr=1.5, split=False):
    """A run of plain gradient descent on half of the samples, with steps large enough to make logits fall as well."""
    net, traj = net.double().eval(), xaifast.Trajectory()
    optimizer = torch.optim.SGD(net.parameters(), lr)
    traj.record(net)
    for step in range(n_steps):
        optimizer.zero_grad()
        losses = nn.functional.cross_entropy(net(x[step % 2 :: 2]), y[step % 2 :: 2], reduction="none")
        parts = -lr * class_gradients(losses, y[step % 2 :: 2], net[0].weight) if split else None
        losses.mean().backward()
        optimizer.step()
        traj.record(net, class_updates={FIRST: parts} if split else None)
    return traj


def literal(net, old, new, x, target, mask, direction="symmetric", context="endpoint", part=None):
    """A ``[B, M]`` of one step: players' columns substituted one after the other; ``part`` replaces the update."""
    part = new[FIRST] - old[FIRST] if part is None else part
    rest_old, rest_new = ({k: v for k, v in state.items() if k != FIRST} for state in (old, new))
    at_end = rest_old if context == "old" else rest_new
    at_start = rest_new if context == "new" else rest_old

    def f(weight, rest):
        with torch.no_grad():
            return functional_call(net, {**rest, FIRST: weight}, (x,))[torch.arange(len(x)), target]

    mask = mask.expand(x.shape)
    values = torch.zeros(len(x), int(mask.max()) + 1, dtype=torch.float64)
    for m in range(values.shape[1]):
        for b in range(len(x)):
            moved = torch.where(mask[b] == m, part, 0)
            undone = f(new[FIRST], at_end)[b] - f(new[FIRST] - moved, at_end)[b]
            applied = f(old[FIRST] + moved, at_start)[b] - f(old[FIRST], at_start)[b]
            values[b, m] = {"symmetric": (undone + applied) / 2, "forward": undone, "reverse": applied}[direction]
    return values


def target_logits(net, traj, x, target):
    with torch.no_grad():
        logits = torch.stack([functional_call(net, state, (x,)) for state in traj])
    return logits[:, torch.arange(len(x)), target]


def close(shown, expected):
    assert shown.shape == expected.shape and shown.dtype == torch.float64
    assert (shown - expected).abs().max() <= 1e-12 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("context", ["endpoint", "old", "new"])
@pytest.mark.parametrize("direction", ["symmetric", "forward", "reverse"])
def test_equals_the_literal_loop(direction, context, activation):
    net, (x, y) = mlp(activation), data()
    traj = trained(net, x, y, 3)
    result = xaifast.xtrain(net, traj, x, target=y, direction=direction, context=context, per_step=True)
    steps = [literal(net, traj[t], traj[t + 1], x, y, torch.arange(6), direction, context) for t in range(3)]
    close(result.per_step, torch.stack(steps))
    close(result.values, sum(steps))
    growth = target_logits(net, traj, x, y)
    close(result.logits, growth)
    close(result.residual, growth[-1] - growth[0] - sum(steps).sum(1))
    assert result.steps == [(0, 1), (1, 2), (2, 3)] and result.gates is None and result.error is None


@pytest.mark.parametrize("direction", ["symmetric", "forward"])
@pytest.mark.parametrize("own", [False, True])
def test_groups(own, direction):
    net, (x, y) = mlp(), data()
    traj = trained(net, x, y, 2)
    mask = torch.tensor([0, 2, 1, 1, 0, 2])
    if own:  # a player that some inputs lack
        mask = torch.stack([mask if b % 3 else mask.clamp(max=1) for b in range(len(x))])
    result = xaifast.xtrain(net, traj, x, target=y, feature_mask=mask, batch_size=2, direction=direction)
    expected = sum(literal(net, traj[t], traj[t + 1], x, y, mask, direction) for t in range(2))
    close(result.values, expected)
    assert not own or (result.values[::3, 2] == 0).all()
    rows = torch.arange(len(x))[:, None]
    assert torch.equal(result.expand(), result.values[rows, mask.expand(x.shape)])


@pytest.mark.parametrize("gate", ["step", "step_feature"])
def test_gates(gate):
    net, (x, y) = mlp(nn.Tanh), data()
    traj = trained(net, x, y, 6)
    result = xaifast.xtrain(net, traj, x, target=y, variant="xtrain+", gate=gate, per_step=True)
    logits = target_logits(net, traj, x, y)
    expected, growth = torch.zeros_like(result.values), torch.zeros(len(x), dtype=torch.float64)
    for t in range(6):
        step = literal(net, traj[t], traj[t + 1], x, y, torch.arange(6))
        close(result.per_step[t], step)
        opened = logits[t + 1] > logits[t]
        assert torch.equal(result.gates[t], opened)
        step = step.clamp(min=0) if gate == "step_feature" else step
        expected += torch.where(opened[:, None], step, 0)
        growth += torch.where(opened, logits[t + 1] - logits[t], 0)
    assert result.gates.any(0).all() and (~result.gates).sum() > 3  # open at some steps only
    close(result.values, expected)
    close(result.residual, growth - expected.sum(1))
    close(result.formed()[-1], expected)


def test_a_step_without_a_change_is_shut():
    net, (x, y) = mlp(), data()
    traj = trained(net, x, y, 1)
    traj.record(net)
    result = xaifast.xtrain(net, traj, x, target=y, variant="xtrain+", per_step=True)
    assert result.gates[0].any() and not result.gates[1].any() and (result.per_step[1] == 0).all()


@pytest.mark.parametrize("context", ["endpoint", "old"])
def test_class_updates(context):
    net, (x, y) = mlp(nn.Tanh), data(9)
    y[:] = torch.tensor([2, 0, 1, 0, 2, 2, 0, 0, 0])  # class 1 has no part in odd steps
    traj = trained(net, x, y, 4, split=True)
    options = dict(target=y, variant="xtrain+", gate="class_update", context=context, per_step=True)
    result = xaifast.xtrain(net, traj, x, **options)
    expected = torch.zeros(4, *result.values.shape, dtype=torch.float64)
    opened = torch.zeros(4, len(x), dtype=torch.bool)
    for t in range(4):
        parts = traj.class_updates(t)[FIRST].parts
        for c in range(3):
            part = parts[c] if c < len(parts) else torch.zeros_like(parts[0])
            mine = y == c
            opened[t, mine] = bool(part.any())
            step = literal(net, traj[t], traj[t + 1], x[mine], y[mine], torch.arange(6), "symmetric", context, part)
            expected[t, mine] = step
    assert not opened.all() and opened.any(0).all()
    assert torch.equal(result.gates, opened)
    close(result.per_step, expected)
    close(result.values, expected.sum(0))
    assert torch.equal(xaifast.xtrain(net, traj, x, batch_size=1, **options).gates, opened)


def test_class_updates_over_coarse_steps_and_own_masks():
    net, (x, _) = mlp(nn.Tanh), data(8)
    y = torch.arange(8) % 3
    traj = trained(net, x, y, 4, split=True)
    mask = torch.stack([torch.tensor([0, 2, 1, 1, 0, 2]).roll(b % 3) for b in range(8)])
    options = dict(target=y, variant="xtrain+", gate="class_update", feature_mask=mask)
    result = xaifast.xtrain(net, traj, x, checkpoints=[0, 3, 4], **options)
    expected = torch.zeros_like(result.values)
    for first, last in ((0, 3), (3, 4)):
        for c in range(3):
            part, mine = torch.zeros_like(traj[0][FIRST]), y == c
            for t in range(first, last):
                parts = traj.class_updates(t)[FIRST].parts
                part += parts[c] if c < len(parts) else 0
            expected[mine] += literal(net, traj[first], traj[last], x[mine], y[mine], mask[mine], part=part)
    close(result.values, expected)
    assert result.steps == [(0, 3), (3, 4)]


@pytest.mark.parametrize("context", ["endpoint", "old", "new"])
@pytest.mark.parametrize("direction", ["symmetric", "forward", "reverse"])
def test_rest(direction, context):
    net, (x, y) = mlp(), data()
    traj = trained(net, x, y, 2)
    options = dict(target=y, direction=direction, context=context)
    plain = xaifast.xtrain(net, traj, x, **options)
    result = xaifast.xtrain(net, traj, x, include_rest=True, **options)
    assert torch.equal(result.values[:, :-1], plain.values) and result.values.shape == (7, 7)

    def f(weight, rest):
        with torch.no_grad():
            state = {**traj[rest], FIRST: traj[weight][FIRST]}
            return functional_call(net, state, (x,))[torch.arange(len(x)), y]

    undone = sum(f(t + 1, t + 1) - f(t + 1, t) for t in range(2))
    applied = sum(f(t, t + 1) - f(t, t) for t in range(2))
    expected = {"symmetric": (undone + applied) / 2, "forward": undone, "reverse": applied}[direction]
    close(result.values[:, -1], expected)
    close(result.residual, plain.residual - expected)
    assert result.expand().shape == x.shape


@pytest.mark.parametrize("context", ["endpoint", "old", "new"])
@pytest.mark.parametrize("mode", ["exact", "linear"])
def test_reversing_the_run_negates_every_step(mode, context):
    net, (x, y) = mlp(nn.Tanh).float(), data()
    traj = trained(net, x, y, 4)
    backwards = xaifast.Trajectory()
    for state in reversed(list(traj)):
        net.load_state_dict(state)
        backwards.record(net)
    swapped = {"old": "new", "new": "old"}.get(context, context)
    options = dict(target=y, mode=mode, per_step=True, include_rest=True)
    one = xaifast.xtrain(net, traj, x, context=context, **options)
    two = xaifast.xtrain(net, backwards, x, context=swapped, **options)
    assert torch.equal(two.per_step.flip(0), -one.per_step)
    close(two.values, -one.values)


def test_dummies_get_exactly_zero():
    net, (x, y) = mlp(), data()
    traj, frozen = trained(net, x, y, 3), xaifast.Trajectory()
    for t, state in enumerate(traj):
        state[FIRST][:, 4] = 0.3
        net.load_state_dict(state)
        frozen.record(net, step=t)
    result = xaifast.xtrain(net.float(), frozen, x.float(), target=0)
    assert (result.values[x == 0] == 0).all() and (result.values[:, 4] == 0).all()
    assert (result.values != 0).sum() == 7 * 6 - 2 - 7 + 0


@pytest.mark.parametrize("checkpoints", ["endpoints", "uniform", "update_norm", None, [0, 2, -1]])
def test_coarse_steps(checkpoints):
    net, (x, y) = mlp(), data()
    traj = trained(net, x, y, 11)
    result = xaifast.xtrain(net, traj, x, target=y, variant="xstep", checkpoints=checkpoints)
    chosen = traj.select(checkpoints or "update_norm", layer=FIRST)
    assert result.steps == list(zip(chosen, chosen[1:], strict=False))
    assert checkpoints != "endpoints" or result.steps == [(0, 11)]
    expected = sum(literal(net, traj[a], traj[b], x, y, torch.arange(6)) for a, b in result.steps)
    close(result.values, expected)
    both = xaifast.occlude_update(net, traj[0], traj[11], x, target=y, precision="float64")
    assert checkpoints != "endpoints" or torch.equal(result.values, both)


def test_linear_mode_is_the_first_order():
    net, (x, y) = mlp(nn.Tanh), data()
    traj = trained(net, x, y, 3)
    for direction, weights in (("reverse", (1, 0)), ("forward", (0, 1)), ("symmetric", (0.5, 0.5))):
        result = xaifast.xtrain(net, traj, x, target=y, mode="linear", direction=direction)
        expected = torch.zeros_like(result.values)
        for t in range(3):
            step = traj[t + 1][FIRST] - traj[t][FIRST]
            for b in range(len(x)):
                for weight, state in zip(weights, (traj[t], traj[t + 1]), strict=True):
                    first = state[FIRST].requires_grad_()
                    output = functional_call(net, {**state, FIRST: first}, (x[b : b + 1],))[0, y[b]]
                    (gradient,) = torch.autograd.grad(output, first)
                    expected[b] += weight * (gradient * step).sum(0)
        close(result.values, expected)


def test_linear_mode_sums_to_the_first_layers_part_of_tracin():
    """TracIn(z, z') = sum_t lr grad l(z) . grad f(z'), summed over the training samples z of each step."""
    net, (x, y) = mlp(nn.Tanh), data()
    lr, n_steps = 0.3, 4
    traj = trained(net, x, y, n_steps, lr)
    shown, outputs = torch.randn(3, 6, dtype=torch.float64), torch.tensor([1, 0, 2])
    tracin = torch.zeros(3, dtype=torch.float64)
    for t in range(n_steps):
        state = traj[t]
        weight = state[FIRST].requires_grad_()
        logits = functional_call(net, state, (torch.cat((x[t % 2 :: 2], shown)),))
        losses = nn.functional.cross_entropy(logits[:-3], y[t % 2 :: 2], reduction="none")
        (learning,) = torch.autograd.grad(losses.mean(), weight, retain_graph=True)
        for b in range(3):
            (gradient,) = torch.autograd.grad(logits[b - 3, outputs[b]], weight, retain_graph=True)
            tracin[b] -= lr * (learning * gradient).sum()
    values = xaifast.xtrain(net, traj, shown, target=outputs, mode="linear", direction="reverse").values
    close(values.sum(1), tracin)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_chunks_and_neighbours(batch_size):
    net, (x, y) = mlp(), data()
    traj = trained(net, x, y, 4)
    options = dict(target=y, variant="xtrain+", per_step=True)
    whole = xaifast.xtrain(net, traj, x, **options)
    parts = xaifast.xtrain(net, traj, x, batch_size=batch_size, **options)
    for name in ("values", "residual", "per_step", "logits"):
        close(getattr(parts, name), getattr(whole, name))
    assert torch.equal(parts.gates, whole.gates)
    alone = xaifast.xtrain(net, traj, x[3:4], target=y[3:4], variant="xtrain+")
    close(alone.values, whole.values[3:4])


def test_out_of_memory_halves_the_chunk_and_counts_nothing_twice(monkeypatch):
    net, (x, y) = mlp(), data()
    traj = trained(net, x, y, 3, split=True)
    options = [dict(), dict(variant="xtrain+", gate="class_update"), dict(context="old", include_rest=True)]
    expected = [xaifast.xtrain(net, traj, x, target=y, **option) for option in options]
    made, calls = _xtrain_walk.Walk._toward, []

    def scarce(self, way, foreign, batch, end, *rest):
        calls.append(len(end.logits))
        if calls[-1] > 2 and len(calls) > 3:  # in the midst of a checkpoint
            raise MemoryError
        return made(self, way, foreign, batch, end, *rest)

    monkeypatch.setattr(_xtrain_walk.Walk, "_toward", scarce)
    for option, whole in zip(options, expected, strict=True):
        calls.clear()
        close(xaifast.xtrain(net, traj, x, target=y, **option).values, whole.values)
    assert max(calls) > 2 and calls[-1] <= 2


@pytest.mark.parametrize(("context", "evaluations"), [("endpoint", 6), ("old", 11)])
def test_checkpoints_are_read_and_evaluated_once(context, evaluations, tmp_path, monkeypatch):
    net, (x, y) = mlp(), data()
    kept, traj = trained(net, x, y, 5), xaifast.Trajectory(tmp_path / "run")
    for state in kept:
        net.load_state_dict(state)
        traj.record(net)
    reads, bases = [], []
    read, at = type(traj._store).read, _xtrain_walk.Occluder.at
    monkeypatch.setattr(type(traj._store), "read", lambda self, t: (reads.append(t), read(self, t))[1])
    monkeypatch.setattr(_xtrain_walk.Occluder, "at", lambda self, state: (bases.append(1), at(self, state))[1])
    result = xaifast.xtrain(net, traj, x, target=y, context=context, verify=False)
    assert reads == list(range(6))
    assert len(bases) == evaluations + 1  # and once to settle the targets
    close(result.values, xaifast.xtrain(net, kept, x, target=y, context=context).values)
