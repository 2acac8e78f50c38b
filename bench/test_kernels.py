"""Single kernels of the CPU extension against this core's measured rates: sparse products and activations.

extra_info of every benchmark: multiply_adds_per_s (or activations_per_s) and share_of_peak.
"""

import pytest

from sparseflow_kernels.analysis.floor import activation_rate, fma_rate

_cpu = pytest.importorskip("sparseflow_kernels._cpu", reason="the CPU extension is not built")


@pytest.mark.parametrize("density", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("width", [64, 256, 860, 1260])
def test_spmm(benchmark, width, density):
    """W [width, width] at `density` times a tile of activations, float32."""
    results = []

    def run():
        results.append(_cpu.bench_spmm(width, width, density, 0, 20))

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    rate = max(multiply_adds / seconds for seconds, multiply_adds in results)
    benchmark.extra_info.update(multiply_adds_per_s=rate, share_of_peak=rate / fma_rate())


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "softplus", "relu", "elu", "silu", "sin"])
def test_activation(benchmark, name):
    """Value and slope together, float32."""
    benchmark.extra_info["activations_per_s"] = benchmark.pedantic(activation_rate, args=(name,), rounds=1)
