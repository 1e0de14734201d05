"""Sampled gradients: unbiased, of the variance that the formula says, controlled; pruning at initialisation."""

from __future__ import annotations

import pytest
import randfuse
import torch
from randfuse import _extension, sketch
from torch import nn

pytestmark = pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))

METHODS = pytest.mark.parametrize("method", ["pivotal", "independent"])
T = 400  # draws; |z| < 5.5 for at most 60 entries a test: a false alarm in 4e5


def z_scores(samples: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    samples = samples.double()
    return (samples.mean(0) - expected.double()) / samples.std(0).clamp(min=1e-12) * len(samples) ** 0.5


def layer_gradients(
    method: str, ratio: float, draws: int
) -> tuple[torch.Tensor, torch.Tensor, randfuse.nn.SketchedLinear]:
    """Weight gradients (draws, 4, 6) of tokens of very different sizes, the exact one, and the layer."""
    torch.manual_seed(0)
    layer = randfuse.nn.SketchedLinear(6, 4, ratio=ratio, method=method)
    x, g = torch.randn(5, 20, 6) * torch.rand(5, 20, 1) ** 4, torch.randn(5, 20, 4)
    layer.track = True
    gradients = []
    for _ in range(draws):
        layer.weight.grad = None
        layer(x).backward(g)
        gradients.append(layer.weight.grad)
    return torch.stack(gradients), g.flatten(0, 1).T @ x.flatten(0, 1), layer


@METHODS
def test_weight_gradient_is_unbiased_and_has_the_variance_of_the_formula(method):
    gradients, exact, layer = layer_gradients(method, 0.3, T)
    assert z_scores(gradients, exact).abs().max() < 5.5
    squares = (gradients - exact).square().sum((1, 2)).double()
    if method == "independent":
        assert abs(squares.mean() - layer.variance) < 5.5 * squares.std() / T**0.5
    else:
        assert squares.mean() < 1.1 * layer.variance, "rivals do no worse"


def test_uniform_tokens_have_far_more_variance():
    """Negative control and the point: probabilities by ‖g‖‖x‖ against equal ones."""
    layer = layer_gradients("independent", 0.3, 1)[2]
    x, g = torch.randn(100, 6) * torch.rand(100, 1) ** 4, torch.randn(100, 4)
    uniform = (1 / 0.3 - 1) * (g.norm(dim=1) * x.norm(dim=1)).square().sum()
    assert layer.variance < uniform / 5


def test_other_gradients_and_the_result_are_those_of_linear():
    layer = randfuse.nn.SketchedLinear(6, 4, ratio=0.2)
    plain = nn.Linear(6, 4)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(3, 7, 6, requires_grad=True)
    ours, theirs = layer(x), plain(x)
    assert torch.equal(ours, theirs)
    gradients = [torch.autograd.grad(y.square().sum(), (x, m.bias)) for y, m in ((ours, layer), (theirs, plain))]
    torch.testing.assert_close(*gradients)
    assert torch.equal(layer.eval()(x), theirs)
    whole = randfuse.nn.SketchedLinear(6, 4, ratio=1.0)
    (whole(x) ** 2).sum().backward()
    assert "ratio=0.2" in repr(layer)


@METHODS
def test_everything_at_once_zero_gradients_and_tiny_batches(method):
    layer = randfuse.nn.SketchedLinear(6, 4, ratio=0.5, method=method)
    layer(torch.randn(20, 6)).backward(torch.zeros(20, 4))
    assert torch.equal(layer.weight.grad, torch.zeros(4, 6))
    layer.zero_grad()
    layer(torch.randn(1, 6)).sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_bfloat16_and_autocast():
    layer = randfuse.nn.SketchedLinear(6, 4, ratio=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(20, 6)).sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    layer = layer.bfloat16()
    layer.zero_grad()
    layer(torch.randn(20, 6, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("sampler", [randfuse.nn.SketchedLinear(4, 4, ratio=0.5), sketch.GradientSampler(0.5)])
def test_compiled_without_a_graph_break(sampler):
    """The draws are eager's too; with several samplers in a graph their order may differ."""
    model = nn.Sequential(nn.Linear(6, 4), sampler, nn.Linear(4, 2))
    sampled = sampler if isinstance(sampler, nn.Linear) else model[0]
    compiled, x, gradients = torch.compile(model, fullgraph=True, backend="aot_eager"), torch.randn(20, 6), []
    for f, seed in ((compiled, 0), (model, 0), (compiled, 1)):
        model.zero_grad()
        torch.manual_seed(seed)
        f(x).square().sum().backward()
        gradients.append(sampled.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert not torch.allclose(gradients[0], gradients[2]), "a compiled step draws anew"


def test_draws_follow_torchs_seed():
    def gradient() -> torch.Tensor:
        torch.manual_seed(3)
        return layer_gradients("pivotal", 0.3, 1)[0]

    assert torch.equal(gradient(), gradient())


# --- samples of a batch


@METHODS
def test_gradient_sampler_is_unbiased(method):
    """Every gradient before it keeps its mean; exactly int(N ρ) samples stay where the size is fixed."""
    torch.manual_seed(0)
    x, weights = torch.randn(16, 3), torch.rand(16, 1) ** 3
    first = nn.Linear(3, 4)
    model = nn.Sequential(first, sketch.GradientSampler(0.3, method), nn.Linear(4, 1))

    def gradient() -> torch.Tensor:
        first.weight.grad = None
        (model(x).tanh() * weights).sum().backward()
        return first.weight.grad

    samples = torch.stack([gradient() for _ in range(T)])
    model[1].ratio = 1.0
    assert z_scores(samples, gradient()).abs().max() < 5.5
    sampler, leaf = sketch.GradientSampler(0.3, method), torch.ones(16, 5, requires_grad=True)
    (sampler(leaf) * weights).sum().backward()
    kept = int((leaf.grad.sum(1) > 0).sum())
    assert kept == 4 if method == "pivotal" else 0 <= kept <= 16
    assert sampler.eval()(leaf) is leaf


def model_with(ratio: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    make = randfuse.nn.SketchedLinear
    return nn.Sequential(
        make(10, 32),
        nn.Tanh(),
        sketch.GradientSampler(ratio),
        make(32, 32),
        nn.Tanh(),
        sketch.GradientSampler(ratio),
        make(32, 3),
    )


def batches(model: nn.Module, spread: float):
    """Batches of 64 in which a few samples have nearly all of the loss."""

    def backward(i: int) -> None:
        g = torch.Generator().manual_seed(i)
        x, y = torch.randn(64, 10, generator=g), torch.randint(0, 3, (64,), generator=g)
        weight = torch.exp(spread * torch.randn(64, generator=g))
        (nn.functional.cross_entropy(model(x), y, reduction="none") * weight).mean().backward()

    return backward


def test_controller_lowers_ratios_and_keeps_the_variance():
    model = model_with()
    controller = sketch.VarianceController(model, step=0.05, tolerance=0.1)
    model[0].weight.grad = torch.ones(32, 10)
    logs = [controller.update(batches(model, 2.0)) for _ in range(20)]
    assert torch.equal(model[0].weight.grad, torch.ones(32, 10)), "gradients of the step are not touched"
    ratios = [m.ratio for m in controller.samplers]
    assert ratios == sorted(ratios), "never fewer samples than before"
    assert all(0 < r < 0.9 for r in ratios)
    assert all(layer.ratio < 0.9 for layer in controller.layers)
    late = logs[10:]
    share = sum(log["activations"] for log in late) / sum(log["sgd"] for log in late)
    assert 0.01 < share < 0.4, "the added variance settles around its tolerance"
    strict = sketch.VarianceController(model_with(), tolerance=0.0)
    strict.update(batches(strict.model, 2.0))
    strict.update(batches(strict.model, 2.0))
    assert strict.s > 0.98
    assert all(not m.track for m in (*strict.samplers, *strict.layers))


def test_controller_rules():
    """Shares are the least that hold s of the sum; layers move by the factor, up or down, and stop at 1."""
    norms = torch.tensor([4.0, 1.0, 3.0, 2.0])
    shares = [sketch.vcas._share(norms, s) for s in (0.0, 0.4, 0.41, 0.7, 0.71, 1.0)]
    assert shares == [0.25, 0.25, 0.5, 0.5, 0.75, 1.0]
    model = model_with()
    controller = sketch.VarianceController(model)
    controller.update(batches(model, 0.0))
    assert all(layer.ratio == 0.95 for layer in controller.layers), "nothing is sampled yet, so no variance is added"
    for layer in controller.layers:
        layer.ratio = 0.02
    controller.update(batches(model, 0.0))
    assert all(layer.ratio == 0.02 / 0.95 for layer in controller.layers)


def test_sampled_training_learns():
    """300 samples, a quarter kept: the loss falls to that of plain training within 0.15."""
    losses = []
    for ratio in (1.0, 0.25):
        model = model_with(ratio)
        for layer in (model[0], model[3], model[6]):
            layer.ratio = ratio
        g = torch.Generator().manual_seed(0)
        x = torch.randn(300, 10, generator=g)
        y = (x @ torch.randn(10, 3, generator=g)).argmax(1)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(40):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        losses.append(nn.functional.cross_entropy(model.eval()(x), y).item())
    assert losses[1] < losses[0] + 0.15


# --- pruning


def test_pruned_layer_is_right_in_the_mean_and_by_the_formula():
    torch.manual_seed(0)
    weight, x = torch.randn(5, 12) * torch.rand(1, 12) ** 3, torch.randn(40, 12) * torch.rand(12) * 3
    keys = randfuse.split(randfuse.key(0), T)
    masks = [sketch.prune_at_init_mask(weight, 0.4, activations=x, method="independent", key=k) for k in keys]
    pruned = torch.stack([weight * m.factor for m in masks]).double()
    score = weight.abs() * x.norm(dim=0)
    p = sketch.inclusion_probabilities(score.flatten(), 24).view(5, 12)
    deviation = weight.abs() * ((1 / p - 1) / T).sqrt()
    common = p > 0.05  # of rarer ones T draws have too few for a normal law
    assert ((pruned.mean(0) - weight).abs() <= 5.5 * deviation + 1e-7)[common].all()
    errors = ((pruned - weight) @ x.T.double()).square().sum((1, 2))
    expected = ((1 / p - 1) * score.double().square()).sum()
    assert abs(errors.mean() - expected) < 5.5 * errors.std() / T**0.5
    mask, factor = sketch.prune_at_init_mask(weight, 0.4, key=randfuse.key(1))
    assert mask.sum() == 24
    assert mask.shape == factor.shape == weight.shape


def test_largest_weights_fail_the_mean():
    """Negative control: the mask of the largest scores is biased."""
    torch.manual_seed(0)
    weight = torch.randn(5, 12)
    score = weight.abs().flatten()
    top = torch.zeros(60).index_fill(0, score.topk(24).indices, 1.0).view(5, 12)
    assert ((weight * top).abs() <= weight.abs()).all()
    assert (weight * top - weight).norm() > 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: randfuse.nn.SketchedLinear(3, 4, ratio=0), r"SketchedLinear: ratio must be in \[1e-09, 1.0\], got 0"),
        (
            lambda: randfuse.nn.SketchedLinear(3, 4, method="systematic"),
            "SketchedLinear: method must be one of independent",
        ),
        (lambda: sketch.GradientSampler(1.5), "GradientSampler: ratio must be in"),
        (lambda: sketch.VarianceController(nn.Linear(2, 2)), "VarianceController: model must have a GradientSampler"),
        (lambda: sketch.VarianceController(model_with(), repeats=1), r"VarianceController: repeats must be in \[2,"),
        (lambda: sketch.prune_at_init_mask(torch.ones(3, 4), 0.0), "prune_at_init_mask: density must be in"),
        (lambda: sketch.prune_at_init_mask(torch.zeros(3, 4), 0.5), "weights must have a positive element"),
        (lambda: sketch.prune_at_init_mask(torch.eye(4), 0.5), r"k must be in \[1, 4\], got 8"),
        (
            lambda: sketch.prune_at_init_mask(torch.ones(3, 4), 0.5, activations=torch.ones(5)),
            "activations must have 4 columns",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
