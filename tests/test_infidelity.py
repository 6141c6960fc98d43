"""Infidelity: against Captum for the same perturbations, exact on linear models, against a loop for its own."""

from __future__ import annotations

import pytest
import torch
from captum.metrics import infidelity as captum_infidelity
from games import IntegerNet, integers
from torch import Tensor, nn

from xaifast import noise
from xaifast.metrics import infidelity


class Recorder(nn.Module):
    """A model that is not linear, and keeps the inputs it saw."""

    def __init__(self, n_elements: int, n_outputs: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.weight = torch.randn(n_elements, n_outputs, generator=generator, dtype=torch.float64)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.clone())
        return torch.tanh(x.double().flatten(1) @ self.weight)


def ramp(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Perturbations that depend on the input alone."""
    change = 0.3 * torch.sin(7 * rows) + 0.1
    return change, rows - change


@pytest.mark.parametrize("normalise", [False, True])
def test_equals_captum_for_the_same_perturbations(normalise):
    x, attributions = torch.rand(4, 3, 5, 6, dtype=torch.float64), torch.randn(4, 3, 5, 6, dtype=torch.float64)
    model, target = Recorder(90), torch.tensor([0, 2, 1, 1])
    table = torch.randn(4 * 6, 3, 5, 6, dtype=torch.float64)

    def from_table(rows: Tensor) -> tuple[Tensor, Tensor]:
        return table, rows - table

    for perturb in (ramp, from_table):
        expected = captum_infidelity(
            model, perturb, x, attributions, target=target, n_perturb_samples=6, normalize=normalise
        )
        got = infidelity(
            model, x, attributions, perturb=perturb, n_samples=6, normalise=normalise, target=target, batch_size=24
        )
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    blind = infidelity(model, x, torch.zeros_like(x), perturb=ramp, normalise=normalise, target=target)
    torch.testing.assert_close(
        blind, captum_infidelity(model, ramp, x, torch.zeros_like(x), target=target, normalize=normalise)
    )


def test_equals_captum_for_several_inputs_and_arguments():
    x, y = torch.rand(3, 4, dtype=torch.float64), torch.rand(3, 2, 2, dtype=torch.float64)
    phi = (torch.randn_like(x), torch.randn_like(y))
    shift = torch.rand(3, dtype=torch.float64)

    def model(a: Tensor, b: Tensor, c: Tensor, power: int) -> Tensor:
        return (a.sum(1) * b.flatten(1).prod(1) + c) ** power

    def perturb(rows: tuple[Tensor, Tensor]) -> tuple[tuple, tuple]:
        changes = tuple(0.2 * t for t in rows)
        return changes, tuple(t - change for t, change in zip(rows, changes, strict=True))

    expected = captum_infidelity(model, perturb, (x, y), phi, additional_forward_args=(shift, 2))
    got = infidelity(model, (x, y), phi, perturb=perturb, target=None, additional_forward_args=(shift, 2), batch_size=4)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("perturb", ["gaussian", "noisy_baseline", "square"])
def test_gradients_of_linear_models_are_faithful(perturb):
    x = torch.rand(3, 2, 6, 9, dtype=torch.float64)
    weight = torch.randn(2, 6, 9, dtype=torch.float64)
    settings = dict(perturb=perturb, target=None, n_samples=20, baselines=torch.rand(2, 6, 9, dtype=torch.float64))

    def model(rows: Tensor) -> Tensor:
        return (rows * weight).flatten(1).sum(1)

    phi = weight.expand_as(x)
    assert float(infidelity(model, x, phi, **settings).max()) < 1e-20
    assert float(infidelity(model, x, -3 * phi, normalise=True, **settings).max()) < 1e-20
    assert float(infidelity(model, x, 2 * phi, **settings).min()) > 1e-3


def expected_rows(x: Tensor, b: int, n: int, perturb: str, n_samples: int, **settings) -> tuple[Tensor, Tensor]:
    """Perturbation and perturbed input, one sample at a time."""
    stream = dict(domain=noise.INFIDELITY, seed=settings["seed"], first_index=0)
    unit = (settings["first_index"] + b) * n_samples + n
    base = settings["baselines"].expand_as(x)[b]
    if perturb == "square":
        u, v = noise.uniform_units(unit, unit + 1, n_samples, 2, **stream)[0].tolist()
        side, (height, width) = settings["side"], x.shape[2:]
        top, left = int(u * (height - side + 1)), int(v * (width - side + 1))
        shown = x[b].clone()
        shown[:, top : top + side, left : left + side] = base[:, top : top + side, left : left + side]
        return x[b] - shown, shown
    drawn = settings["std"] * noise.normal_units(unit, unit + 1, n_samples, x[b].numel(), **stream)
    if perturb == "gaussian":
        return drawn.view(x[b].shape), x[b] - drawn.view(x[b].shape)
    shown = base + drawn.view(x[b].shape)
    return x[b] - shown, shown


@pytest.mark.parametrize("perturb", ["gaussian", "noisy_baseline", "square"])
def test_own_perturbations_equal_a_loop(perturb):
    x, phi = torch.rand(2, 3, 5, 7, dtype=torch.float64), torch.randn(2, 3, 5, 7)
    model = Recorder(105)
    settings = dict(std=0.4, side=3, seed=8, first_index=5, baselines=torch.rand(3, 1, 7, dtype=torch.float64))
    got = infidelity(model, x, phi, perturb=perturb, n_samples=9, target=2, batch_size=5, **settings)
    rows = torch.cat(model.seen)[2:].view(2, 9, 3, 5, 7)
    for b in range(2):
        full, total = model(x[b : b + 1])[0, 2], 0.0
        for n in range(9):
            change, shown = expected_rows(x, b, n, perturb, 9, **settings)
            torch.testing.assert_close(rows[b, n], shown, rtol=0, atol=1e-12)
            total += float((change * phi[b].double()).sum() - (full - model(shown[None])[0, 2])) ** 2
        assert float(got[b]) == pytest.approx(total / 9, rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("perturb", ["gaussian", "noisy_baseline", "square"])
def test_the_perturbation_is_the_one_the_model_sees(perturb, dtype):
    """Rows are rounded to the inputs' dtype, which is no error of the attribution."""
    x, weight = torch.rand(3, 2, 6, 9).to(dtype), torch.randn(2, 6, 9, dtype=torch.float64)
    model = lambda rows: (rows.double() * weight).flatten(1).sum(1)  # noqa: E731
    settings = dict(perturb=perturb, target=None, baselines=0.3)
    assert float(infidelity(model, x, weight.expand_as(x), **settings).max()) < 1e-20


def test_perturbations_may_follow_gradients():
    x, phi = torch.rand(3, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    model = Recorder(8)

    def adversarial(rows: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = rows.detach().requires_grad_()
            change = 0.1 * torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)[0].sign()
        return change, rows - change

    expected = captum_infidelity(model, adversarial, x, phi, target=0, n_perturb_samples=2)
    torch.testing.assert_close(infidelity(model, x, phi, perturb=adversarial, target=0, n_samples=2), expected)


def test_squares_reach_every_place():
    x = torch.ones(1, 1, 4, 6)
    model = Recorder(24)
    infidelity(model, x, x, perturb="square", side=2, n_samples=400, target=0)
    corners = {tuple((row[0] == 0).nonzero()[0].tolist()) for row in torch.cat(model.seen)[1:]}
    assert corners == {(i, j) for i in range(3) for j in range(5)}


def test_nothing_leaks_from_behind_a_square():
    x, seen = torch.full((1, 1, 4, 4), torch.nan), []
    with pytest.raises(ValueError, match="perturbations must be finite.* input 0, perturbation 0"):
        infidelity(
            lambda rows: seen.append(rows.clone()) or rows.new_zeros(len(rows)),
            x, torch.zeros_like(x), perturb="square", side=4, baselines=2.0, target=None, n_samples=3,
        )  # fmt: skip
    assert (torch.cat(seen)[1:] == 2).all()


def test_results_do_not_depend_on_chunks_or_neighbours():
    model, x, phi = IntegerNet(30), integers(5, 30), integers(5, 30, seed=1)
    steps = dict(perturb=lambda rows: (torch.sign(rows), rows - torch.sign(rows)), n_samples=7, target=1)
    for settings in (steps, dict(perturb="gaussian", n_samples=7, target=1, first_index=10, seed=2)):
        if settings is not steps:
            model = lambda rows: (rows * 2**20).round().sum(1)  # noqa: E731
            settings["target"] = None
        whole = infidelity(model, x, phi, **settings)
        for batch_size in (1, 6, 1000):
            assert torch.equal(infidelity(model, x, phi, batch_size=batch_size, **settings), whole)
        if settings is not steps:
            settings["first_index"] += 2
        assert torch.equal(infidelity(model, x[2:3], phi[2:3], **settings), whole[2:3])


def test_long_rows_alone_and_together():
    x, phi = torch.rand(2, 40000), torch.randn(2, 40000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        model = lambda rows: (rows.double() * 2**20).round().sum(1)  # noqa: E731
        settings = dict(n_samples=2, target=None, seed=3)
        whole = infidelity(model, x, phi, **settings)
        alone = infidelity(model, x[1:], phi[1:], first_index=1, batch_size=1, **settings)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, whole[1:])


def test_one_sample_and_dtypes():
    x = torch.rand(2, 4)
    model = Recorder(4)
    one = infidelity(model, x, x, n_samples=1, target=0)
    assert one.shape == (2,) and one.dtype == torch.float32 and (one > 0).all()
    assert infidelity(model, x.double(), x.double(), target=0).dtype == torch.float64
    assert infidelity(model, x.half(), x.half(), target=0).dtype == torch.float32
    softmax = infidelity(model, x, x, target=0, score="softmax")
    torch.testing.assert_close(softmax, infidelity(lambda rows: model(rows).softmax(1), x, x, target=0))


def test_the_default_device_does_not_enter():
    x, settings = torch.rand(2, 1, 4, 4), dict(target=0, perturb="square", n_samples=3)
    expected = infidelity(Recorder(16), x, x, **settings)
    model = Recorder(16)
    with torch.device("meta"):
        assert torch.equal(infidelity(model, x, x, **settings), expected)


def never(x: Tensor) -> Tensor:
    raise AssertionError("the model ran")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(perturb="noise"), "perturb must be"),
        (dict(n_samples=0), "n_samples must be"),
        (dict(std=0.0), "std must be"),
        (dict(perturb="square", side=5), "side must be an int from 1 to 4"),
        (dict(perturb="square", inputs=torch.rand(2, 4), attributions=torch.rand(2, 4)), "needs one tensor of images"),
        (dict(attributions=torch.rand(2, 4, 4)), "attributions must have the inputs' shapes"),
        (dict(attributions=torch.full((2, 1, 4, 4), torch.nan)), "must be finite, got NaN or infinity for input 0"),
        (dict(baselines=torch.rand(3)), "baselines must be"),
        (dict(seed=1.5), "seed must be"),
        (dict(score="other"), "score must be"),
    ],
)
def test_bad_input_is_said_before_the_model_runs(changed, message):
    x = torch.rand(2, 1, 4, 4)
    with pytest.raises(ValueError, match=message):
        infidelity(**{**dict(forward=never, inputs=x, attributions=x, target=0), **changed})


def test_bad_perturbations_and_types():
    x = torch.rand(2, 3)
    model = Recorder(3)
    with pytest.raises(TypeError, match="inputs must be floating"):
        infidelity(never, x.long(), x.long(), target=0)
    for phi in (x.to(torch.complex64), x.to_sparse()):
        with pytest.raises(TypeError, match="attributions must be dense and real"):
            infidelity(never, x, phi, target=0)
    with pytest.raises(ValueError, match="perturbations must be finite.* input 1, perturbation 0"):
        change = torch.tensor([[0.0], [0.0], [torch.nan], [0.0]]).expand(4, 3)
        infidelity(model, x, x, target=0, n_samples=2, perturb=lambda rows: (change, rows))
    with pytest.raises(ValueError, match="must return the pair"):
        infidelity(model, x, x, target=0, perturb=lambda rows: rows)
    with pytest.raises(ValueError, match="must return tensors of the shapes it was given"):
        infidelity(model, x, x, target=0, perturb=lambda rows: (rows, rows[:, :2]))
    with pytest.raises(ValueError, match="target must name an output"):
        infidelity(model, x, x, target=None)
