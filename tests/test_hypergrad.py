"""The hypergradient against closed forms and numerical derivatives."""

import pytest
import torch

from rankwise.hypergrad import TrainGradient, hypergradient


def quadratic(n: int = 5, k: int = 3):
    """L_train = ½‖θ - Mβ‖², L_val = ½‖θ - t‖² + ½‖β‖²: everything in closed form, in float64."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(n, k, generator=generator, dtype=torch.float64)
    target = torch.randn(n, generator=generator, dtype=torch.float64)
    theta = torch.randn(n, generator=generator, dtype=torch.float64).requires_grad_()
    beta = torch.randn(k, generator=generator, dtype=torch.float64).requires_grad_()
    train = lambda: 0.5 * ((theta - matrix @ beta) ** 2).sum()  # noqa: E731
    val = lambda: 0.5 * ((theta - target) ** 2).sum() + 0.5 * (beta**2).sum()  # noqa: E731
    eta = 0.3
    # θ' = (1-η)θ + ηMβ, so d/dβ = ηMᵀ(θ' - t) + β
    with torch.no_grad():
        ahead = (1 - eta) * theta + eta * matrix @ beta
        expected = eta * matrix.T @ (ahead - target) + beta
    return theta, beta, train, val, eta, expected


@pytest.mark.parametrize("estimator", ["exact", "finite_difference"])
def test_matches_the_closed_form_of_a_quadratic(estimator):
    theta, beta, train, val, eta, expected = quadratic()
    found = hypergradient(estimator, [theta], [beta], [train], [val], eta)[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_first_order_is_the_plain_validation_gradient():
    theta, beta, train, val, eta, _ = quadratic()
    found = hypergradient("first_order", [theta], [beta], [train], [val], eta)[0]
    torch.testing.assert_close(found, beta.detach())


def mlp_problem(seed: int = 0):
    """A gated two-layer network with tanh: no derivative of any order vanishes. float64."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    a, b, head = (
        rand(4, 6).requires_grad_(),
        rand(7, 4).requires_grad_(),
        rand(3, 7).requires_grad_(),
    )
    beta = rand(4).requires_grad_()
    sets = [(rand(16, 6), torch.randint(0, 3, (16,), generator=g)) for _ in range(2)]

    def loss(which):
        x, y = sets[which]
        hidden = torch.tanh(x @ a.T * torch.softmax(beta, 0) @ b.T)
        return torch.nn.functional.cross_entropy(hidden @ head.T, y)

    return [a, b, head], beta, (lambda: loss(0)), (lambda: loss(1))


def numerical(theta, beta, train, val, eta, h=1e-5):
    """Central differences of β -> L_val(θ - η ∇L_train(θ, β), β)."""

    def outer():
        gradient = torch.autograd.grad(train(), theta)
        before = [t.detach().clone() for t in theta]
        with torch.no_grad():
            for t, d in zip(theta, gradient, strict=True):
                t -= eta * d
            value = val()
            for t, d in zip(theta, before, strict=True):
                t.copy_(d)
        return value

    out = torch.zeros_like(beta)
    for j in range(beta.numel()):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                beta[j] += sign * h
            values.append(outer())
            with torch.no_grad():
                beta[j] -= sign * h
        out[j] = (values[0] - values[1]) / (2 * h)
    return out


@pytest.mark.parametrize("eta", [1e-4, 0.5])
def test_exact_matches_a_numerical_derivative(eta):
    theta, beta, train, val = mlp_problem()
    found = hypergradient("exact", theta, [beta], [train], [val], eta)[0]
    expected = numerical(theta, beta, train, val, eta)
    assert (found - expected).norm() / expected.norm() < 1e-6


def test_the_look_ahead_matters_at_this_step_size():
    """Guards the test above: at η = 0.5 the second term is a large part of what is compared."""
    theta, beta, train, val = mlp_problem()
    whole = hypergradient("exact", theta, [beta], [train], [val], 0.5)[0]
    plain = hypergradient("first_order", theta, [beta], [train], [val], 0.5)[0]
    assert (whole - plain).norm() / whole.norm() > 0.1


@pytest.mark.parametrize(("two_sided", "order"), [(False, 1), (True, 2)])
def test_finite_difference_converges_at_its_order(two_sided, order):
    theta, beta, train, val = mlp_problem()
    exact = hypergradient("exact", theta, [beta], [train], [val], 0.5)[0]
    errors = []
    for radius in (1e-2, 1e-3):
        found = hypergradient(
            "finite_difference",
            theta,
            [beta],
            [train],
            [val],
            0.5,
            radius=radius,
            two_sided=two_sided,
        )[0]
        errors.append(float((found - exact).norm()))
    assert errors[0] / errors[1] == pytest.approx(10.0**order, rel=0.2)


@pytest.mark.parametrize("estimator", ["exact", "finite_difference"])
def test_micro_batches_add_up(estimator):
    theta, beta, train, val = mlp_problem()
    whole = hypergradient(estimator, theta, [beta], [train], [val], 0.5)[0]
    quarter = [lambda: 0.25 * train()] * 4
    half = [lambda: 0.5 * val()] * 2
    parts = hypergradient(estimator, theta, [beta], quarter, half, 0.5)[0]
    torch.testing.assert_close(parts, whole, rtol=1e-8, atol=1e-10)


def test_one_sided_difference_reuses_the_train_gradient():
    theta, beta, train, val = mlp_problem()
    calls = []

    def counted():
        calls.append(1)
        return train()

    both = torch.autograd.grad(train(), [*theta, beta])
    at_hand = TrainGradient(both[:-1], both[-1:])
    reused = hypergradient(
        "finite_difference", theta, [beta], [counted], [val], 0.5, train_gradient=at_hand
    )[0]
    assert len(calls) == 1
    fresh = hypergradient("finite_difference", theta, [beta], [train], [val], 0.5)[0]
    torch.testing.assert_close(reused, fresh)


def test_parameters_are_restored_bit_for_bit_also_when_a_loss_raises():
    theta, beta, train, val = mlp_problem()
    before = [t.detach().clone() for t in theta]
    hypergradient("finite_difference", theta, [beta], [train], [val], 0.5)

    def broken():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        hypergradient("finite_difference", theta, [beta], [train], [broken], 0.5)
    assert all(torch.equal(t, b) for t, b in zip(theta, before, strict=True))


def test_a_validation_loss_that_ignores_the_parameters_leaves_the_direct_term():
    theta, beta, train, _ = mlp_problem()
    found = hypergradient(
        "finite_difference", theta, [beta], [train], [lambda: (beta**2).sum()], 0.5
    )[0]
    torch.testing.assert_close(found, 2 * beta.detach())


def test_unknown_estimator_is_named():
    theta, beta, train, val = mlp_problem()
    with pytest.raises(ValueError, match="'secant'; it has to be one of finite_difference"):
        hypergradient("secant", theta, [beta], [train], [val], 0.5)
