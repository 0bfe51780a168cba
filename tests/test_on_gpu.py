"""From weights to a rotary that trains on a GPU, where torch sees one, against the same calls on the CPU."""

from functools import partial

import pytest
import torch
from torch import Tensor

from clex_kernels import (
    ClexAttention,
    ClexConfig,
    ClexRotaryEmbedding,
    append_kv,
    apply_rotary,
    attention,
    decode_attention,
    qkv_rotary,
)
from clex_kernels.frequencies import solve_frequencies
from clex_kernels.tables import RotaryTable

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CONFIG = ClexConfig(head_dim=80, rotary_dim=32, train_length=64, max_factor=8, hidden_factor=2)


def make_weights(device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (CONFIG.pairs, CONFIG.hidden_size), (CONFIG.hidden_size, CONFIG.pairs)
    return tuple((0.1 * torch.randn(size, generator=generator)).to(device).requires_grad_() for size in sizes)


def make_embedding(device: str) -> ClexRotaryEmbedding:
    rope = ClexRotaryEmbedding(CONFIG)
    with torch.no_grad():
        for parameter, weight in zip(rope.parameters(), make_weights("cpu"), strict=True):
            parameter.copy_(weight)
    return rope.to(device)


@pytest.mark.parametrize("activation", ["tanh", "silu"])
def test_frequencies_and_their_gradients_are_the_cpus(activation: str) -> None:
    config = ClexConfig(**{**vars(CONFIG), "activation": activation})
    results = []
    for device in ("cpu", "cuda"):
        up, down = make_weights(device)
        times = torch.tensor([1.0, 2.5, 2.5, 8.0], dtype=torch.float64, device=device)
        freq = solve_frequencies(up, down, times, config)
        freq.log().square().sum().backward()
        results.append([x.detach().cpu() for x in (freq, up.grad, down.grad)])
    for expected, actual, tolerance in zip(*results, (1e-10, 1e-5, 1e-5), strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("method", ["forward", "stack", "at"])
def test_evaluation_tables_are_the_cpus(method: str) -> None:
    tables = []
    for device in ("cpu", "cuda"):
        rope = make_embedding(device).eval()
        lengths = torch.tensor([3, 100, 500], device=device)
        arguments = {"forward": (200,), "stack": (), "at": (lengths, 512)}[method]
        tables.append(getattr(rope, method)(*arguments))
    for name in ("freq", "coarse", "fine"):
        expected, actual = (getattr(table, name) for table in tables)
        assert actual.is_cuda
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-9, atol=2e-7 if name != "freq" else 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "in place"])
def test_rotary_and_its_gradients_are_the_cpus(dtype: torch.dtype, inplace: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    shape = (2, 129, 6, CONFIG.head_dim)
    x, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    results = []
    for device in ("cpu", "cuda"):
        freq = (10000.0 ** -(torch.arange(16, dtype=torch.float64) / 16)).to(device).requires_grad_()
        source = x.to(device, copy=True).requires_grad_()
        # not a leaf, and q and k are views of it.
        packed = source * 1
        table = RotaryTable.from_frequencies(freq, length=256)
        q, k = apply_rotary(packed[:, :, :4], packed[:, :, 4:], table, offset=100, inplace=inplace)
        torch.autograd.backward((q, k), (dy[:, :, :4].to(device), dy[:, :, 4:].to(device)))
        results.append([y.detach().cpu().double() for y in (q, k, source.grad, freq.grad)])
    eps = torch.finfo(dtype).eps
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0.0, atol=4 * eps * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["triton", "sdpa", "auto"])
def test_attention_and_its_gradients_are_the_cpus(backend: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    sizes = [(2, 129, heads, CONFIG.head_dim) for heads in (4, 2, 2, 4)]
    *q_k_v, dout = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    results = []
    for device in ("cpu", "cuda"):
        freq = (10000.0 ** -(torch.arange(16, dtype=torch.float64) / 16)).to(device).requires_grad_()
        leaves = [x.to(device, copy=True).requires_grad_() for x in q_k_v]
        table = RotaryTable.from_frequencies(freq, length=192)
        out = attention(*leaves, table, is_causal=True, backend=backend if device == "cuda" else "auto")
        out.backward(dout.to(device))
        results.append([x.detach().cpu().double() for x in (out, *(leaf.grad for leaf in leaves), freq.grad)])
    eps = torch.finfo(dtype).eps
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0.0, atol=8 * eps * expected.abs().max().item())


def test_attention_runs_in_a_cuda_graph() -> None:
    q = torch.randn(2, 64, 4, CONFIG.head_dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(2, 64, 2, CONFIG.head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    starts = torch.tensor([0, 9], device="cuda")
    stack = make_embedding("cuda").eval().stack()
    run = partial(attention, q, k, v, stack, is_causal=True, kv_start=starts, backend="triton")
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    starts.copy_(torch.tensor([30, 0]))
    graph.replay()
    torch.testing.assert_close(captured, run(), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("page", [None, 16, 64])
def test_decode_is_the_cpus(page: int | None, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    q, k, v = (
        torch.randn(3, slots, heads, CONFIG.head_dim, generator=generator).to(dtype)
        for slots, heads in ((2, 4), (512, 2), (512, 2))
    )
    ends, starts = torch.tensor([500, 65, 0]), torch.tensor([0, 9, 0])
    block_table = None
    if page is not None:
        k, v = (x.reshape(-1, page, 2, CONFIG.head_dim) for x in (k, v))
        block_table = torch.arange(len(k)).reshape(3, -1)
    results = []
    for device in ("cpu", "cuda"):
        stack = make_embedding(device).eval().stack()
        tensors = (None if x is None else x.to(device) for x in (q, k, v, ends, starts, block_table))
        q_, k_, v_, ends_, starts_, block_table_ = tensors
        out, lse = decode_attention(
            q_, k_, v_, stack, ends_, kv_start=starts_, block_table=block_table_, return_lse=True
        )
        results.append([x.cpu().double() for x in (out, lse)])
    eps = torch.finfo(dtype).eps
    for expected, actual in zip(*results, strict=True):
        scale = expected[expected.isfinite()].abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=0.0, atol=8 * eps * scale)


def test_a_captured_decode_step_follows_growing_sequences_across_t() -> None:
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, 1, heads, CONFIG.head_dim, generator=generator).cuda() for heads in (4, 2, 2))
    caches = [torch.randn(2, 512, 2, CONFIG.head_dim, generator=generator).cuda() for _ in range(2)]
    ends = torch.tensor([64, 200], device="cuda")
    stack = make_embedding("cuda").eval().stack()

    def step() -> Tensor:
        append_kv(k, v, *caches, ends)
        return decode_attention(q, *caches, stack, ends)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for grown in ([65, 201], [129, 256], [130, 257]):
        ends.copy_(torch.tensor(grown))
        graph.replay()
        torch.testing.assert_close(captured, step(), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [1, 33, 300])
@pytest.mark.parametrize("backend", ["triton", "linear", "auto"])
def test_qkv_rotary_and_its_gradients_are_the_cpus(backend: str, tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    width, rows = 200, (4 + 2 * 2) * CONFIG.head_dim
    x = torch.randn(2, tokens, width, generator=generator).to(dtype)
    weight, bias = (torch.randn(size, generator=generator).to(dtype) / 14 for size in ((rows, width), (rows,)))
    results = []
    for device in ("cpu", "cuda"):
        freq = (10000.0 ** -(torch.arange(16, dtype=torch.float64) / 16)).to(device).requires_grad_()
        leaves = [y.to(device, copy=True).requires_grad_() for y in (x, weight, bias)]
        table = RotaryTable.from_frequencies(freq, length=512)
        chosen = backend if device == "cuda" else "auto"
        outs = qkv_rotary(*leaves[:2], table, 4, 2, leaves[2], 100, "both", backend=chosen)
        torch.autograd.backward(outs, [out.detach().cos() for out in outs])
        results.append([y.detach().cpu().double() for y in (*outs, *(leaf.grad for leaf in leaves), freq.grad)])
    eps = torch.finfo(dtype).eps
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0.0, atol=16 * eps * expected.abs().max().item())


def test_a_captured_decode_step_of_a_layer_follows_growing_sequences() -> None:
    torch.manual_seed(7)
    layer = ClexAttention(CONFIG, 96, 4, 2, device="cuda", dtype=torch.bfloat16)
    stack = make_embedding("cuda").eval().stack()
    x = torch.randn(2, 1, 96, device="cuda", dtype=torch.bfloat16)
    caches = [torch.randn(2, 512, 2, CONFIG.head_dim, device="cuda").bfloat16() for _ in range(2)]
    ends = torch.tensor([64, 200], device="cuda")
    layer.decode(x, stack, *caches, ends)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer.decode(x, stack, *caches, ends)
    for grown in ([65, 201], [129, 256]):
        ends.copy_(torch.tensor(grown))
        graph.replay()
        torch.testing.assert_close(captured, layer.decode(x, stack, *caches, ends), rtol=0.0, atol=0.0)


def test_a_training_step_reaches_both_weights_of_the_ode() -> None:
    rope = make_embedding("cuda")
    table = rope.sample(96, batch=3, generator=torch.Generator().manual_seed(2), positions="runs")
    q = torch.randn(3, 96, 4, CONFIG.head_dim, device="cuda", requires_grad=True)
    apply_rotary(q, None, table)[0].pow(3).sum().backward()
    for parameter in rope.parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("is_static", [False, True], ids=["dynamic", "static"])
@pytest.mark.filterwarnings("ignore:.*past_key_values.*", "ignore:.*max_factor.*", "ignore:lengths past.*")
def test_patched_transformers_model_is_the_cpus(is_static: bool) -> None:
    from transformers import DynamicCache, StaticCache
    from transformers_models import clex_model, pad_left, random_tokens

    tokens, mask = pad_left([random_tokens(1, 9, 1)[0], random_tokens(1, 30, 2)[0]])
    logits = []
    for device in ("cpu", "cuda"):
        model = clex_model("llama").float().to(device)
        cache = StaticCache(config=model.config, max_cache_len=40) if is_static else DynamicCache(config=model.config)
        parts, first = [], 0
        for last in (28, 29, 30):
            part, seen = tokens[:, first:last].to(device), mask[:, :last].to(device)
            with torch.no_grad():
                parts.append(model(part, attention_mask=seen, past_key_values=cache).logits)
            first = last
        logits.append(torch.cat(parts, dim=1).cpu())
    for row, length in enumerate((9, 30)):
        expected, actual = (x[row, -length:] for x in logits)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3 * expected.abs().max().item())
