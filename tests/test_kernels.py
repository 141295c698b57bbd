"""kernels.py against the plain versions in model.py: natively on a GPU, elsewhere through Triton's interpreter in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import model as M  # noqa: E402

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"
native = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="no CUDA device here; test_the_kernels_in_tritons_interpreter runs this one")
plain_nll, plain_quantise = M.softcap_nll.__wrapped__, M.quantise.__wrapped__


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="here the kernels are tested directly")
def test_the_kernels_in_tritons_interpreter():
    """The interpreter has to be chosen before triton is imported."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: `pip install triton==3.6.0`")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "--no-header", __file__], cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0 and "6 passed" in done.stdout, done.stdout[-4000:]


def rng():
    return torch.Generator().manual_seed(1)


@native
@pytest.mark.parametrize("padded, used", ((64, 64), (192, 150), (5056, 5000)))
def test_softcap_nll(padded, used):
    """The loss to fp32's precision, the gradient to that of the type it is stored in, nothing for ignored targets and padded ids."""
    import kernels

    z, target = torch.randn(37, padded, generator=rng()) * 6, torch.randint(used, (37,), generator=rng())
    target[::5] = -1
    want_z = z.double()
    s = (2 * want_z[:, :used] / 15).sigmoid()
    want_nll = torch.nn.functional.cross_entropy(30 * s, target, ignore_index=-1, reduction="none")
    p = (30 * s).softmax(-1) * (target >= 0)[:, None]
    p[target >= 0, target[target >= 0]] -= 1
    for dtype, most in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8 if ON_GPU else 2**-7)):
        got = z.to(DEVICE, dtype, copy=True)
        rounded = got.cpu().double()[:, :used]
        nll = kernels.softcap_nll(got, target.to(DEVICE), used, 15.0)
        if dtype == torch.float32:
            assert (nll.cpu() - want_nll).abs().max() < 1e-5
            also = z.clone()
            assert (plain_nll(also, target, used, 15.0) - nll.cpu()).abs().max() < 1e-5 and (also - got.cpu()).abs().max() < 1e-6
        s = (2 * rounded / 15).sigmoid()
        p = (30 * s).softmax(-1)
        p[target >= 0, target[target >= 0]] -= 1
        want = 4 * p * s * (1 - s) * (target >= 0)[:, None]
        assert ((got.cpu().double()[:, :used] - want).abs() <= most * want.abs() + 1e-6).all()
        assert (got[:, used:] == 0).all() and (got[::5] == 0).all() and (nll[::5] == 0).all()


@native
@pytest.mark.parametrize("rows, cols, dtype", ((70, 130, torch.float8_e4m3fn), (128, 64, torch.float8_e5m2), (1, 7, torch.float8_e5m2)), ids=str)
def test_quantise(rows, cols, dtype):
    """FP8 numbers as they are and a transpose that equals them, what is too large clipped; on a GPU, rounding to the nearest."""
    import kernels

    most, x = torch.finfo(dtype).max, torch.randn(rows, cols, generator=rng()) * 3
    exact = (x / 0.25).clamp(-most, most).to(dtype).float()
    exact[0, 0] = 1e9
    for source in (torch.float32, torch.bfloat16):
        q, qt = (y.float().cpu() for y in kernels.quantise((exact * 0.25).to(DEVICE, source), 0.25, dtype))
        assert torch.equal(q.T, qt) and torch.equal(q, exact.clamp(max=most))
    if ON_GPU:  # the interpreter does not round as the hardware does
        q, want = kernels.quantise(x.to(DEVICE), 0.01, dtype)[0].float().cpu(), x / 0.01
        half_a_step = {torch.float8_e4m3fn: 2**-4, torch.float8_e5m2: 2**-3}[dtype]
        assert ((q - want).abs() <= 1.01 * half_a_step * want.abs() + 1e-3).all()
        assert (q != plain_quantise(x, 0.01, dtype)[0].float()).float().mean() < 0.01
