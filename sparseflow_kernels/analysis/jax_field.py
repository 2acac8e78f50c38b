"""A chain problem's field for jax, and its solve by diffrax; jax is imported when it is first asked for."""

from __future__ import annotations

import functools

from torch import Tensor

from ..capture import capture
from .problems import Problem


class JaxField:
    """A problem's field for jax, dense, in the layout of the captured field. Nothing of a problem is in it but its spec
    and tolerances, so that what is compiled for one keep ratio serves all of them; the rest is in `arguments`."""

    def __init__(self, problem: Problem) -> None:
        self.spec, self.rtol, self.atol = problem.spec, problem.rtol, problem.atol
        self.activations = [layer.activation for layer in capture(problem.module).layers]

    @staticmethod
    def arguments(problem: Problem) -> tuple:
        """weights: a list of (W, b, gate, shift) per layer, gate and shift (slope, offset) or None; noise [batch, dim] or
        None; the state (x, l) at t = 0."""
        import jax

        def part(value):
            return None if value is None else (value.slope.numpy(), value.offset.numpy())

        layers = capture(problem.module).map_tensors(Tensor.detach).layers
        weights = [(layer.weight.numpy(), layer.bias.numpy(), part(layer.gate), part(layer.shift)) for layer in layers]
        noise = None if problem.noise is None else problem.noise.numpy()
        return jax.device_put((weights, noise, tuple(p.numpy() for p in problem.state())), jax.devices("cpu")[0])

    def field(self, weights, t, x):
        import jax
        import jax.numpy as jnp

        h = x
        for (w, b, gate, shift), activation in zip(weights, self.activations):
            z = h @ w.T + b
            if gate is not None:
                z = jax.nn.sigmoid(gate[0] * t + gate[1]) * z
            if shift is not None:
                z = z + (shift[0] * t + shift[1])
            if activation.name == "tanh":
                z = jnp.tanh(z)
            elif activation.name == "sigmoid":
                z = jax.nn.sigmoid(z)
            elif activation.name == "softplus":
                beta = activation.params[0] if activation.params else 1.0
                z = jax.nn.softplus(beta * z) / beta
            h = z
        return h

    def alone(self, t, state, arguments):
        """(dx/dt,) at (x,); arguments: (weights, noise)."""
        return (self.field(arguments[0], t, state[0]),)

    def with_divergence(self, t, state, arguments):
        """(dx/dt, -trace) at (x, l); arguments: (weights, noise)."""
        import jax
        import jax.numpy as jnp

        (x, _), (weights, noise), dim = state, arguments, self.spec.dim
        if noise is not None:
            f, product = jax.jvp(lambda x: self.field(weights, t, x), (x,), (noise,))
            return f, -(noise * product).sum(1)
        f, linear = jax.linearize(lambda x: self.field(weights, t, x), x)

        def diagonal(m):
            return linear(jnp.zeros_like(x).at[:, m].set(1.0))[:, m]

        each = jax.vmap(diagonal) if dim <= 8 else (lambda index: jax.lax.map(diagonal, index))
        return f, -each(jnp.arange(dim)).sum(0)

    def solve(self, weights, noise, start, **settings):
        """((x, l), or (x,), at t = 1, steps)."""
        ys, steps = self.outputs(weights, noise, start, **settings)
        return tuple(part[-1] for part in ys), steps

    def outputs(self, weights, noise, start, **settings):
        """(the parts of the state at t = 1, or at the times of settings["saveat"], the last being 1; steps): one ODE over the
        whole batch, shared steps, torchdiffeq's mixed error norm."""
        import diffrax
        import jax.numpy as jnp

        def norm(state):
            return functools.reduce(jnp.maximum, (jnp.sqrt(jnp.mean(part * part)) for part in state))

        rhs = self.alone if self.spec.divergence is None else self.with_divergence
        controller = diffrax.PIDController(rtol=self.rtol, atol=self.atol, norm=norm)
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(rhs), diffrax.Dopri5(), 0.0, 1.0, None, start, (weights, noise),
            stepsize_controller=controller, **settings,
        )  # fmt: skip
        return solution.ys, solution.stats["num_steps"]

    @staticmethod
    def evaluations(steps) -> int:
        """6 new stages a step (the first is the last one of the step before), 2 for the choice of the first step."""
        return 6 * int(steps) + 2
