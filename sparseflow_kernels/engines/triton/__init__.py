"""The Triton engine: fused sparse kernels at any width, on NVIDIA GPUs, and on the CPU in Triton's interpreter."""

from .engine import TritonEngine

__all__ = ["TritonEngine"]
