"""kernels.py and its candidate benchmarks/fused_mlp.py against plain versions: natively on a GPU, elsewhere in Triton's
interpreter in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import model  # noqa: E402
import ops  # noqa: E402
import train_muon  # noqa: E402
from benchmarks import fused_mlp  # noqa: E402

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"
native = pytest.mark.skipif(
    not (ON_GPU or INTERPRETED), reason="no CUDA device; run by test_the_kernels_in_tritons_interpreter"
)
plain_nll, plain_quantise = ops.softcap_nll.__wrapped__, ops.quantise.__wrapped__


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="here the kernels are tested directly")
def test_the_kernels_in_tritons_interpreter():
    """The interpreter has to be chosen before triton is imported."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: `pip install triton==3.6.0`")
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "17 passed" in done.stdout, done.stdout[-4000:]


def test_the_file_imports_without_triton():
    """transformers looks for a package of this name and imports what it finds."""
    hide = "import sys; sys.modules['triton'] = None; import kernels; print(kernels.triton.jit(len) is len)"
    done = subprocess.run([sys.executable, "-c", hide], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


LOGITS = dict(z_ptr="*bf16", target_ptr="*i64", nll_ptr="*fp32", inverse_half_cap="fp32", bits="fp32")
QUANTISED = dict(x_ptr="*bf16", rows="i32", cols="i32", inverse_scale="fp32")
PRODUCT = dict(x_ptr="*bf16", a_ptr="*bf16", out_ptr="*bf16", alpha="fp32", beta="fp32")
NATIVE = {  # kernel, sm -> types of its arguments, constants, instructions that must be there
    ("softcap_nll_kernel", 80): (
        LOGITS,
        dict(vocab_size=50257, padded_size=50304, BLOCK=2048, INTERPRETED=False),
        "rcp.approx",
    ),
    ("softcap_nll_kernel", 90): (
        LOGITS,
        dict(vocab_size=257, padded_size=320, BLOCK=512, INTERPRETED=False),
        "ex2.approx",
    ),
    ("quantise_kernel", 90): (
        QUANTISED | dict(q_ptr="*fp8e5", qt_ptr="*fp8e5"),
        dict(MOST=57344.0, SIDE=128),
        "max.NaN",
    ),
    ("symmetric_kernel", 80): (PRODUCT, dict(rows=768, cols=1536, HAS_A=True, SIDE=128, DEPTH=64), "mma.sync"),
    ("symmetric_kernel", 90): (PRODUCT, dict(rows=768, cols=768, HAS_A=False, SIDE=128, DEPTH=64), "wgmma"),
}


def machine_code(kernel, sm: int, types: dict, constants: dict, **options):
    """A kernel compiled down to a cubin, in the shared memory that such a GPU has (sm 86 and 89: 99 KiB)."""
    triton = pytest.importorskip("triton", reason="triton is not installed: `pip install triton==3.6.0`")
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, argument in enumerate(kernel.arg_names)
        if signature[argument].startswith("*")
    }
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", sm, 32), options=options)
    assert made.asm["cubin"] and made.metadata.shared <= {80: 99, 90: 227}[sm] * 1024
    return made.asm["ptx"]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("name, sm", NATIVE, ids=str)
def test_the_kernels_compile_to_machine_code_without_a_gpu(name, sm):
    """With annotations as strings, which the file has them as."""
    import kernels

    types, constants, instruction = NATIVE[name, sm]
    assert instruction in machine_code(getattr(kernels, name), sm, types, constants, num_warps=4, num_stages=3)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("backward", (False, True), ids=("up", "backward"))
@pytest.mark.parametrize("tile", fused_mlp.TILES.values(), ids=fused_mlp.TILES)
def test_every_tile_of_the_fused_mlp_fits_a_gpu(tile, backward):
    """At the speedrun's shape, with Hopper's matmuls and copies."""
    block = [tile.depth, tile.cols] if backward else [tile.cols, tile.depth]
    descriptor = lambda rows, cols: f"tensordesc<bf16[{rows},{cols}]>"
    types = dict(
        rows_desc=descriptor(tile.rows, tile.depth),
        weight_desc=descriptor(*block),
        a_ptr="*bf16",
        out_ptr="*bf16",
        offs_ptr="*i32",
    )
    constants = dict(
        E=8, K=768, N=1536, BACKWARD=backward, TURNS=36, ROWS=tile.rows, COLS=tile.cols, DEPTH=tile.depth, EXPERTS=8
    )
    ptx = machine_code(fused_mlp.grouped_kernel, 90, types, constants, num_warps=tile.warps, num_stages=tile.stages)
    assert "wgmma" in ptx and "cp.async.bulk.tensor" in ptx


def rng():
    return torch.Generator().manual_seed(1)


@native
@pytest.mark.parametrize("padded, used", ((64, 64), (192, 150), (5056, 5000)))
def test_softcap_nll(padded, used):
    """The loss in fp32, the gradient in the type of z, zeros for ignored targets and padded ids."""
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
            assert (plain_nll(also, target, used, 15.0) - nll.cpu()).abs().max() < 1e-5 and (
                also - got.cpu()
            ).abs().max() < 1e-6
        s = (2 * rounded / 15).sigmoid()
        p = (30 * s).softmax(-1)
        p[target >= 0, target[target >= 0]] -= 1
        want = 4 * p * s * (1 - s) * (target >= 0)[:, None]
        assert ((got.cpu().double()[:, :used] - want).abs() <= most * want.abs() + 1e-6).all()
        assert (got[:, used:] == 0).all() and (got[::5] == 0).all() and (nll[::5] == 0).all()


@native
@pytest.mark.parametrize(
    "rows, cols, dtype",
    ((70, 130, torch.float8_e4m3fn), (128, 64, torch.float8_e5m2), (1, 7, torch.float8_e5m2)),
    ids=str,
)
def test_quantise(rows, cols, dtype):
    """FP8 numbers stay, the transpose equals them, large values are clipped; on a GPU, rounding to the nearest."""
    import kernels

    most, x = torch.finfo(dtype).max, torch.randn(rows, cols, generator=rng()) * 3
    exact = (x / 0.25).clamp(-most, most).to(dtype).float()
    exact[0, 0] = 1e9
    for source in (torch.float32, torch.bfloat16):
        q, qt = (y.float().cpu() for y in kernels.quantise((exact * 0.25).to(DEVICE, source), 0.25, dtype))
        assert torch.equal(q.T, qt) and torch.equal(q, exact.clamp(max=most))
    if ON_GPU:  # a loss that is not finite must stay so; the interpreter's conversion to FP8 knows no NaN
        assert kernels.quantise(torch.full((4, 4), torch.nan, device=DEVICE), 0.25, dtype)[0].float().isnan().all()
    if ON_GPU:  # the interpreter does not round as the hardware does
        q, want = kernels.quantise(x.to(DEVICE), 0.01, dtype)[0].float().cpu(), x / 0.01
        half_a_step = {torch.float8_e4m3fn: 2**-4, torch.float8_e5m2: 2**-3}[dtype]
        assert ((q - want).abs() <= 1.01 * half_a_step * want.abs() + 1e-3).all()
        assert (q != plain_quantise(x, 0.01, dtype)[0].float()).float().mean() < 0.01


@native
@pytest.mark.parametrize("count, rows, cols", ((3, 70, 100), (2, 64, 64), (1, 300, 40), (2, 8, 200), (2, 129, 64)))
def test_symmetric_products(count, rows, cols):
    """As the plain versions, symmetric to the bit, of transposed matrices too."""
    import kernels

    X = torch.randn(count, cols, rows, generator=rng()).mT / cols**0.5
    plain_gram, plain_polynomial = train_muon.gram.__wrapped__, train_muon.gram_polynomial.__wrapped__
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 2**-7))[: 1 + ON_GPU]:  # no bf16 in the interpreter
        A = plain_gram(X.to(dtype).float())
        got = kernels.gram(X.to(DEVICE, dtype))
        assert torch.equal(got, got.mT) and (got.float().cpu() - A).norm() < most * A.norm()
        A = got.float().cpu()
        B = plain_polynomial(A, -4.775, 2.0315)
        got = kernels.gram_polynomial(got, -4.775, 2.0315)
        assert got.dtype == dtype and torch.equal(got, got.mT) and (got.float().cpu() - B).norm() < most * B.norm()


@native
@pytest.mark.parametrize("counts", ([64, 0, 1, 130, 5, 0], [0, 0, 300, 0], [17], [200, 0], [0, 0]), ids=str)
def test_the_fused_mlp_s_two_matmuls(counts):
    """As plain ones, for empty and uneven experts, shapes that no tile divides, and rows past the last end."""
    E, ends, behind = len(counts), torch.tensor(counts).cumsum(0).int(), 9
    for D, width, tile in ((48, 72, fused_mlp.Tile(64, 32, 16)), (64, 200, fused_mlp.Tile(128, 64, 32, warps=4))):
        rows, dy = torch.randn(2, sum(counts) + behind, D, generator=rng())
        up, down = torch.randn(E, width, D, generator=rng()) / D**0.5, torch.randn(E, D, width, generator=rng())
        for dtype, most in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7))[: 1 + ON_GPU]:
            rounded = [x.to(dtype).float() for x in (rows, dy, up, down)]
            on_device = [x.to(DEVICE, dtype) for x in (rows, dy, up, down)]
            a, want_a = (
                fused_mlp.up_kernel(on_device[0], on_device[2], ends.to(DEVICE), tile),
                fused_mlp.plain_up(rounded[0], rounded[2], ends),
            )
            used = a.clone()
            used[ends[-1] :] = torch.nan
            dh = fused_mlp.down_backward_kernel(on_device[1], on_device[3], used, ends.to(DEVICE), tile)
            want_dh = fused_mlp.plain_down_backward(
                rounded[1], rounded[3], a.float().cpu().nan_to_num(0).clamp(min=0), ends
            )
            for got, want in ((a, want_a), (dh, want_dh)):
                got, want = got.float().cpu()[: ends[-1]], want[: ends[-1]]
                assert got.shape == want.shape and (got - want).norm() <= most * want.norm()


@pytest.mark.skipif(INTERPRETED, reason="torch's own operators")
@pytest.mark.parametrize("pattern", ("M", "D"))
def test_a_model_with_the_fused_mlp_is_the_same_model(pattern):
    """Its parameters, loss and gradients; a block is one graph, whatever the routes."""
    config = model.Config(vocab_size=192, eot_token=191, n_layer=2, n_embd=64, n_head=2, head_dim=32, num_experts=4,
                          value_embeds=0, window_size=64, dtype="fp32", pattern=pattern)  # fmt: skip
    plain = model.build(config).train()
    with fused_mlp.in_models_built_here():
        fused, compiled = model.build(config).train(), model.build(config).train()
    names, results, graphs = [name for name, _ in plain.named_parameters()], [], []
    torch._dynamo.reset()
    compiled.blocks[1].compile(
        backend=lambda graph, inputs: graphs.append(graph) or graph.forward, fullgraph=True, dynamic=False
    )
    state = {name: value + 0.05 * torch.randn(value.shape, generator=rng()) for name, value in plain.named_parameters()}
    for net in (plain, fused, compiled):
        net.load_state_dict(state, strict=False)
        for step in range(2):
            ids = torch.randint(191, (2, 65), generator=torch.Generator().manual_seed(step))
            net.set_step(3, step)
            loss = net(ids[:, :-1], ids[:, 1:]).loss
        results.append((loss, *torch.autograd.grad(loss, list(net.parameters()))))
    assert [name for name, _ in fused.named_parameters()] == names and len(graphs) == 1
    for name, want, *got in zip(["loss", *names], *results):
        for value in got:
            assert (value - want).norm() <= 1e-5 * want.norm() + 1e-7, name
