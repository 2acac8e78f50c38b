"""Complex numbers inside forward: Fourier transforms, spectral layers, Schroedinger equations."""

from __future__ import annotations

import pytest
import torch
import torchdiffeq
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import sparseflow_kernels as sfk
from test_capture_graph import FLAT, check, made, net

F64, C128 = torch.float64, torch.complex128
LINE, PLANE, WAVES = (torch.zeros(*shape, dtype=F64) for shape in ((3, 8), (2, 6, 5), (3, 4, 2)))


def complex_parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, dtype=C128))


def spectral(x, weight, modes):
    """FNO's layer: [batch, channels, n]."""
    found = torch.fft.rfft(x)
    kept = torch.zeros(len(x), weight.shape[1], x.shape[-1] // 2 + 1, dtype=C128)
    kept[:, :, :modes] = torch.einsum("bix,iox->box", found[:, :, :modes], weight)
    return torch.fft.irfft(kept, n=x.shape[-1])


def fourier_operator(m, t, y):
    h = m.up(y[:, None])
    h = F.gelu(spectral(h, torch.view_as_complex(m.w) if m.w.dim() == 4 else m.w, 3) + m.skip(h))
    return m.down(h)[:, 0]


def plane_operator(m, t, y):
    found = torch.fft.rfft2(y, norm="ortho")
    kept = torch.zeros_like(found)
    kept[:, :2, :2] = found[:, :2, :2] * m.w[0]
    kept[:, -2:, :2] = found[:, -2:, :2] * m.w[1]
    return torch.fft.irfft2(kept, s=y.shape[-2:], norm="ortho") - y**3


def burgers(m, t, y):
    k = 2j * torch.pi * torch.fft.fftfreq(8, d=1 / 8, dtype=F64)
    hat = torch.fft.fft(y)
    return -y * torch.fft.ifft(k * hat).real + m.nu * torch.fft.ifft(k**2 * hat).real


def schroedinger(m, t, y):
    """y [batch, n, 2]: the parts of psi."""
    psi = torch.view_as_complex(y)
    h = torch.complex(m.a + m.a.T, m.b - m.b.T)
    drive = torch.exp(1j * m.w * t)
    return torch.view_as_real(-1j * (psi @ h.T + drive * psi + psi * psi.abs() ** 2))


def lindblad(m, t, y):
    rho = torch.complex(y[:, :4].view(-1, 2, 2), y[:, 4:].view(-1, 2, 2))
    l = torch.view_as_complex(m.l)
    decay = l @ rho @ l.mH - 0.5 * (l.mH @ l @ rho + rho @ l.mH @ l)
    made = -1j * (m.h.to(C128) @ rho - rho @ m.h.to(C128)) + decay
    return torch.cat([made.real.flatten(1), made.imag.flatten(1)], 1)


def many(m, t, y):
    z = torch.complex(m.n(y), y.sin())
    one = torch.polar(y.cos() + 2, y) / (z + 3j) + z.conj() * z.angle().cos() - z.sgn() + (z * 0.1).exp() * z**2 - z**-1
    other = torch.where(y > 0, z.sin(), z.cos()) + torch.tanh(z) + z.sigmoid() + z.sqrt() + (z * z + 4).log() + 1 / (z + 5)
    return (one * other).real + (one - 2j * other).imag + (1j * t).exp().real + z.abs() + torch.linalg.vector_norm(z, dim=-1)[:, None]


def moved(m, t, y):
    z = torch.complex(m.n(y), y)
    out = torch.stack([z, z.flip(-1).conj()], 1).sum(1) + torch.cat([z[:, 1:], z[:, :1]], 1).cumsum(1)
    out[:, 0] = y[:, 0] * 1j
    out[:, 1:] *= 2.0 - 1j
    out *= 1j
    own = torch.view_as_complex(torch.stack([y, m.n(y)], -1))
    own *= 1j
    out = out + own
    return out.real + torch.vdot(torch.ones(3, dtype=C128), torch.arange(3, dtype=F64) * (1 + 1j)).imag * out.imag


FIELDS = {
    "Fourier operator": (fourier_operator, lambda: {
        "up": nn.Conv1d(1, 3, 1), "w": complex_parameter(3, 3, 3), "skip": nn.Conv1d(3, 3, 1), "down": nn.Conv1d(3, 1, 1)}, LINE),
    "Fourier operator of real numbers": (fourier_operator, lambda: {
        "up": nn.Conv1d(1, 2, 1), "w": nn.Parameter(torch.randn(2, 2, 3, 2)), "skip": nn.Conv1d(2, 2, 1), "down": nn.Conv1d(2, 1, 1)}, LINE),
    "a plane": (plane_operator, lambda: {"w": complex_parameter(2, 2, 2)}, PLANE),
    "Burgers": (burgers, lambda: {"nu": nn.Parameter(torch.tensor(0.1))}, LINE),
    "Schroedinger": (schroedinger, lambda: {
        "a": nn.Parameter(torch.randn(4, 4)), "b": nn.Parameter(torch.randn(4, 4)), "w": nn.Parameter(torch.tensor(1.3))}, WAVES),
    "Lindblad": (lindblad, lambda: {"l": nn.Parameter(torch.randn(2, 2, 2)), "h": torch.tensor([[1.0, 0.3], [0.3, -1.0]])},
                 torch.zeros(3, 8, dtype=F64)),
    "functions": (many, lambda: {"n": net(3, 5, 3)}, FLAT),
    "parts that are written to": (moved, lambda: {"n": net(3, 5, 3)}, FLAT),
    "a diagonal state space": (
        lambda m, t, y: (2 * (m.c * torch.exp(m.a * t)) @ (m.b[:, None] * m.n(y).T.to(C128))).real.T,
        lambda: {"a": complex_parameter(3), "b": complex_parameter(3), "c": complex_parameter(3, 3), "n": net(3, 4, 3)}, FLAT),
    "a spectrum's energy": (
        lambda m, t, y: torch.func.grad(lambda x: (torch.fft.rfft(m.n(x), norm="forward").abs() ** 2).sum())(y),
        lambda: {"n": net(3, 5, 4)}, FLAT),
    "other transforms": (
        lambda m, t, y: torch.fft.hfft(torch.fft.ihfft(m.n(y)), n=3) + torch.fft.fftshift(torch.fft.ifft(y * y, n=3)).abs()
        + torch.fft.irfft(torch.fft.rfft(y, n=5)[:, :2], n=3) + torch.fft.fft2(y[:, None] * y[:, :, None]).real.mean(1), lambda: {"n": net(3, 5, 3)}, FLAT),
    "an evolution of constants": (
        lambda m, t, y: torch.view_as_real(torch.view_as_complex(m.n(y).view(-1, 2, 2)) @ torch.matrix_exp(-1j * m.h * t)).flatten(1),
        lambda: {"n": net(4, 5, 4), "h": torch.tensor([[1.0, 0.2], [0.2, -0.5]])}, torch.zeros(3, 4, dtype=F64)),
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_complex_numbers(name: str) -> None:
    rule, parts, like = FIELDS[name]
    check(made(rule, parts), like, True)


def test_a_pruned_fourier_layer_is_trained_as_its_module() -> None:
    """A complex parameter stays one, its pruned entries cost nothing, and gradients are torch's, of live fields too."""
    rule, parts, like = FIELDS["Fourier operator"]
    module = made(rule, parts)
    whole = sfk.compile(module, like=like).nnz
    prune.l1_unstructured(module, "w", 0.8)
    field, live = sfk.compile(module, like=like), sfk.compile(module, like=like, live=True)
    assert field.engine_name == "cpu" and field.nnz < whole
    assert field.entries.w_orig.dtype == C128
    y = torch.randn(3, 8, dtype=F64)
    times, options = torch.tensor([0.0, 1.0], dtype=F64), {"first_step": 0.1}
    module_loss = torchdiffeq.odeint(module, y, times, options=options)[-1].square().sum()
    want = torch.autograd.grad(module_loss, module.w_orig)[0]
    for f, of in ((field, field.entries.w_orig), (live, module.w_orig)):
        loss = sfk.odeint(f, y, times, options=options)[-1].square().sum()
        torch.testing.assert_close(torch.autograd.grad(loss, of)[0] * module.w_mask, want, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        field.entries.w_orig.mul_(1.5j)
    field.copy_to(module)
    torch.testing.assert_close(field(0.2, y), module(torch.tensor(0.2, dtype=F64), y))


def test_a_module_of_complex_numbers_alone() -> None:
    module = made(lambda m, t, y: torch.fft.irfft(torch.fft.rfft(y) * m.w, n=8), {"w": complex_parameter(5)})
    field = sfk.compile(module, dim=8)
    assert field.dtype == F64
    y = torch.randn(3, 8, dtype=F64)
    torch.testing.assert_close(field(0.2, y), module(0.2, y))


def test_what_is_not_read_is_refused() -> None:
    for rule, words in (
        (lambda m, t, y: torch.fft.rfft(y, n=4), "complex derivative of a real state"),
        (lambda m, t, y: torch.linalg.eigvals(y[:, :, None] * y[:, None]).real, "linalg_eig"),
        (lambda m, t, y: torch.complex(y, y).asin().real, "asin on complex numbers"),
        (lambda m, t, y: y * torch.complex(y, y)[0, 0].item().real, "complex number"),
        (lambda m, t, y: torch.complex(y, y.sin()).real.mul_(2.0) * y, r"writing into \.real"),
    ):
        with pytest.raises(sfk.UnsupportedFieldError, match=words):
            sfk.compile(made(rule, {}), like=FLAT)
