"""The graph problems' fields for jax, dense, written as a user of jax would write each; for the diffrax contenders."""

from __future__ import annotations

from typing import Any

from .graph_problems import GraphProblem
from .jax_field import JaxField

Weights = dict[str, Any]  # a module's parameters and buffers by name, and its context


def _linear(w: Weights, name: str, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _mlp(w: Weights, name: str, x, activation):
    """A Sequential of linear layers with activations between them, numbered as torch does."""
    numbers = sorted(int(key.split(".")[1]) for key in w if key.startswith(f"{name}.") and key.endswith(".weight"))
    for number in numbers:
        x = _linear(w, f"{name}.{number}", x)
        x = activation(x) if number != numbers[-1] else x
    return x


def _cfm(w: Weights, t, x):
    import jax
    import jax.numpy as jnp

    angles = jnp.reshape(t, (-1, 1)) * w["frequencies"]
    features = jnp.concatenate((jnp.sin(angles), jnp.cos(angles)), -1)
    features = jnp.broadcast_to(features, (x.shape[0], features.shape[1]))
    return _mlp(w, "net", jnp.concatenate((x, w["context"], features), -1), jax.nn.silu)


def _resnet(w: Weights, t, x):
    import jax
    import jax.numpy as jnp

    for block in range(sum(key.startswith("up.") and key.endswith(".weight") for key in w)):
        centred = x - jnp.mean(x, -1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + 1e-5)
        normed = centred * scale * w[f"norms.{block}.weight"] + w[f"norms.{block}.bias"]
        x = x + _linear(w, f"down.{block}", jax.nn.gelu(_linear(w, f"up.{block}", normed), approximate=False))
    return x


def _gru(w: Weights, t, h):
    import jax
    import jax.numpy as jnp

    r, z = jax.nn.sigmoid(_linear(w, "reset", h)), jax.nn.sigmoid(_linear(w, "update", h))
    return (1 - z) * (jnp.tanh(_linear(w, "new", r * h)) - h)


def _hnn(w: Weights, t, x):
    import jax
    import jax.numpy as jnp

    gradient = jax.grad(lambda x: _mlp(w, "energy", x, jnp.tanh).sum())(x)
    n = x.shape[1] // 2
    return jnp.concatenate((gradient[:, n:], -gradient[:, :n]), 1)


def _latent(w: Weights, t, x):
    import jax

    return _mlp(w, "net", x, jax.nn.elu)


def _points(w: Weights, t, x):
    import jax.numpy as jnp

    mean = jnp.broadcast_to(jnp.mean(x, 1, keepdims=True), x.shape)
    return _mlp(w, "net", jnp.concatenate((x, mean), -1), jnp.tanh)


def _images(w: Weights, t, x):
    import jax
    import jax.numpy as jnp

    shape, channels = x.shape, w["layers.0.weight"].shape[1] - 1
    side = round((shape[1] / channels) ** 0.5)
    x = x.reshape(-1, channels, side, side)
    for number in range(sum(key.endswith(".weight") for key in w)):
        x = jax.nn.softplus(x) if number else x
        x = jnp.concatenate((jnp.full_like(x[:, :1], 1.0) * t, x), 1)
        x = jax.lax.conv_general_dilated(x, w[f"layers.{number}.weight"], (1, 1), "SAME")
        x = x + w[f"layers.{number}.bias"][:, None, None]
    return x.reshape(shape)


_FIELDS = {
    "cfm": _cfm, "resnet": _resnet, "gru": _gru, "hnn": _hnn, "latent": _latent, "points": _points,
    "images": _images,
}  # fmt: skip


class JaxGraph(JaxField):
    """As JaxField; the weights of `arguments` are a module's parameters and buffers by name."""

    def __init__(self, problem: GraphProblem) -> None:
        self.spec, self.rtol, self.atol = problem.spec, problem.rtol, problem.atol

    @staticmethod
    def arguments(problem: GraphProblem) -> tuple:
        import jax

        weights = {name: tensor.numpy() for name, tensor in problem.module.state_dict().items()}
        if getattr(problem.module, "context", None) is not None:
            weights["context"] = problem.module.context.numpy()
        noise = None if problem.noise is None else problem.noise.numpy()
        state = problem.state()
        start = tuple(part.numpy() for part in (state if isinstance(state, tuple) else (state,)))
        return jax.device_put((weights, noise, start), jax.devices("cpu")[0])

    def outputs(self, weights: Weights, noise, start, **settings):
        import diffrax
        import jax.numpy as jnp

        saveat = diffrax.SaveAt(ts=jnp.linspace(0.0, 1.0, self.spec.outputs))
        return super().outputs(weights, noise, start, **{"saveat": saveat, **settings})

    def field(self, weights: Weights, t, x):
        return _FIELDS[self.spec.module](weights, t, x)
