"""Single kernels of the CPU extension against this core's rates: sparse products, gradients of matrices, activations.

extra_info of every benchmark: multiply_adds_per_s (or activations_per_s) and share_of_peak.
"""

import pytest

from sparseflow_kernels.analysis.floor import KERNELS, activation_rate, fma_rate, kernel_share

pytest.importorskip("sparseflow_kernels._cpu", reason="the CPU extension is not built")


@pytest.mark.parametrize("density", [0.05, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("width", [64, 256, 860, 1260])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel(benchmark, kernel, width, density):
    """A sparse matrix [width, width], or its gradient, on one tile of float32 activations."""
    shares = []
    benchmark.pedantic(lambda: shares.append(kernel_share(kernel, width, density)), rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(multiply_adds_per_s=max(shares) * fma_rate(), share_of_peak=max(shares))


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "softplus", "relu", "elu", "silu", "sin"])
def test_activation(benchmark, name):
    """Value and slope together, float32."""
    benchmark.extra_info["activations_per_s"] = benchmark.pedantic(activation_rate, args=(name,), rounds=1)
