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
import train_muon  # noqa: E402

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
    assert done.returncode == 0 and "12 passed" in done.stdout, done.stdout[-4000:]


def test_the_file_imports_without_triton():
    """transformers looks for a package of this name and imports what it finds."""
    hide = "import sys; sys.modules['triton'] = None; import kernels; print(kernels.triton.jit(len) is len)"
    done = subprocess.run([sys.executable, "-c", hide], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


LOGITS = dict(z_ptr="*bf16", target_ptr="*i64", nll_ptr="*fp32", inverse_half_cap="fp32", bits="fp32")
QUANTISED = dict(x_ptr="*bf16", rows="i32", cols="i32", inverse_scale="fp32")
PRODUCT = dict(x_ptr="*bf16", a_ptr="*bf16", out_ptr="*bf16", alpha="fp32", beta="fp32")
NATIVE = {  # kernel, sm -> types of its arguments, constants, instructions that must be there
    ("softcap_nll_kernel", 80): (LOGITS, dict(vocab_size=50257, padded_size=50304, BLOCK=2048, INTERPRETED=False), "rcp.approx"),
    ("softcap_nll_kernel", 90): (LOGITS, dict(vocab_size=257, padded_size=320, BLOCK=512, INTERPRETED=False), "ex2.approx"),
    ("quantise_kernel", 90): (QUANTISED | dict(q_ptr="*fp8e5", qt_ptr="*fp8e5"), dict(MOST=57344.0, SIDE=128), "e5m2x2"),
    ("symmetric_kernel", 80): (PRODUCT, dict(rows=768, cols=1536, HAS_A=True, SIDE=128, DEPTH=64), "mma.sync"),
    ("symmetric_kernel", 90): (PRODUCT, dict(rows=768, cols=768, HAS_A=False, SIDE=128, DEPTH=64), "wgmma"),
}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("name, sm", NATIVE, ids=str)
def test_the_kernels_compile_to_machine_code_without_a_gpu(name, sm):
    """Down to a cubin, in the shared memory that such a GPU has; with annotations as strings, which the file has them as."""
    triton = pytest.importorskip("triton", reason="triton is not installed: `pip install triton==3.6.0`")
    import kernels

    kernel, (types, constants, instruction) = getattr(kernels, name), NATIVE[name, sm]
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, argument in enumerate(kernel.arg_names) if signature[argument].startswith("*")}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", sm, 32), options=dict(num_warps=4, num_stages=3))
    assert instruction in made.asm["ptx"] and made.asm["cubin"] and made.metadata.shared <= {80: 99, 90: 227}[sm] * 1024  # sm 86 and 89 have 99 KiB


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


@native
@pytest.mark.parametrize("count, rows, cols", ((3, 70, 100), (2, 64, 64), (1, 300, 40), (2, 8, 200), (2, 129, 64)))
def test_symmetric_products(count, rows, cols):
    """As the plain versions to fp32's precision, symmetric to the bit, of transposed matrices too; in bf16 to that of its rounding."""
    import kernels

    X = torch.randn(count, cols, rows, generator=rng()).mT / cols**0.5
    plain_gram, plain_polynomial = train_muon.gram.__wrapped__, train_muon.gram_polynomial.__wrapped__
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 2**-7))[: 1 + ON_GPU]:  # the interpreter's matmul takes bf16 for whole numbers
        A = plain_gram(X.to(dtype).float())
        got = kernels.gram(X.to(DEVICE, dtype))
        assert torch.equal(got, got.mT) and (got.float().cpu() - A).norm() < most * A.norm()
        A = got.float().cpu()
        B = plain_polynomial(A, -4.775, 2.0315)
        got = kernels.gram_polynomial(got, -4.775, 2.0315)
        assert got.dtype == dtype and torch.equal(got, got.mT) and (got.float().cpu() - B).norm() < most * B.norm()
