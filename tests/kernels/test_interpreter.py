"""The interpreter's self-test: bfloat16 and float8 as torch has them, and bytes."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from vllm_radix_kernels.interpreter import Traffic, interpreted

RAW = [
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
]


@triton.jit
def cast_kernel(source, target, n, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    value = tl.load(source + offset, mask=offset < n, other=0.0)
    tl.store(target + offset, value.to(target.dtype.element_ty), mask=offset < n)


@triton.jit
def dot_kernel(a, b, c, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    left = tl.load(a + m[:, None] * K + k[None, :])
    right = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(left, right))


@triton.jit
def arithmetic_kernel(a, b, c, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    left, right = tl.load(a + offset), tl.load(b + offset)
    tl.store(c + offset, left * right + left - tl.where(left < right, left, right))


@triton.jit
def helper(value):
    return value * 2 + tl.sum(value, 0)


@triton.jit
def nested_kernel(a, c, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(c + offset, helper(tl.load(a + offset)))


@triton.jit
def raw_sum_kernel(a, c, BLOCK: tl.constexpr):
    tl.store(c, tl.sum(tl.load(a + tl.arange(0, BLOCK)), 0))


def values(count=512):
    generator = torch.Generator().manual_seed(0)
    return torch.cat(
        [
            torch.randn(count - 16, generator=generator) * 3,
            # Halfway between neighbours, tiny, and zero.
            torch.tensor([1 + 2**-9, 1 + 3 * 2**-9, 1.0625, 1.1875, 0.0, -0.0, 1e-8]),
            torch.tensor([3.3e-3, -2.2e-3, 0.0009765625, 200.0, -200.0, 0.5, 0.25]),
            torch.tensor([1.5, 2.5]),
        ]
    )


def run(kernel, *arguments, grid=(1,), traffic=None, **constants):
    with interpreted(traffic):
        kernel[grid](*arguments, **constants)


@pytest.mark.parametrize("dtype", RAW, ids=str)
def test_casts_round_to_nearest_even(dtype):
    source = values()
    narrow = torch.empty(len(source), dtype=dtype)
    run(cast_kernel, source, narrow, len(source), BLOCK=512)
    assert torch.equal(narrow.float(), source.to(dtype).float())
    wide = torch.empty(len(source))
    run(cast_kernel, narrow, wide, len(source), BLOCK=512)
    assert torch.equal(wide, narrow.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_between_the_small_types(dtype):
    for other in RAW:
        source = values().to(other)
        target = torch.empty(len(source), dtype=dtype)
        run(cast_kernel, source, target, len(source), BLOCK=512)
        assert torch.equal(target, source.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *RAW], ids=str)
def test_dot_multiplies_values(dtype):
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(16, 32, generator=generator).to(dtype)
    b = torch.randn(32, 16, generator=generator).to(dtype)
    c = torch.empty(16, 16)
    run(dot_kernel, a, b, c, M=16, K=32, N=16)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-6, atol=1e-5)


def test_arithmetic_rounds_each_operation():
    a, b = values().bfloat16(), values().flip(0).bfloat16()
    c = torch.empty_like(a)
    run(arithmetic_kernel, a, b, c, BLOCK=512)
    assert torch.equal(c, a * b + a - torch.where(a < b, a, b))


def test_functions_call_functions():
    a = torch.arange(32.0)
    c = torch.empty_like(a)
    run(nested_kernel, a, c, grid=(2,), BLOCK=16)
    halves = a.view(2, 16)
    assert torch.equal(c.view(2, 16), halves * 2 + halves.sum(1, keepdim=True))


def test_a_reduction_of_raw_bits_is_refused():
    a, c = torch.ones(16, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="cast to float32"):
        run(raw_sum_kernel, a, c, BLOCK=16)


def test_bytes_are_counted_through_the_mask_and_by_tensor():
    source, target = torch.zeros(300), torch.zeros(300, dtype=torch.bfloat16)
    traffic = Traffic(source=source, target=target)
    run(cast_kernel, source, target, 300, traffic=traffic, BLOCK=512)
    assert traffic.loaded == {"source": 1200, "target": 0}
    assert traffic.stored == {"source": 0, "target": 600}


@triton.jit
def stray_kernel(source, target, offset, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(target + lanes, tl.load(source + lanes + offset))


def test_an_access_outside_of_the_tensors_is_an_error():
    source, target = torch.zeros(16), torch.zeros(16)
    run(stray_kernel, source, target, 0, BLOCK=16)
    for offset in (1, -1, 1 << 40):
        with pytest.raises(IndexError, match="loads outside of its tensors"):
            run(stray_kernel, source, target, offset, BLOCK=16)
    with pytest.raises(IndexError, match="stores outside of its tensors"):
        run(stray_kernel, source, target[8:].clone(), 0, BLOCK=16)


def test_the_language_is_as_before_afterwards():
    before = tl.load, tl.dot, tl.tensor.__add__, dot_kernel.run
    with pytest.raises(ZeroDivisionError), interpreted(), interpreted():
        assert tl.load is not before[0]
        raise ZeroDivisionError
    assert tl.load is before[0]
    assert tl.dot is before[1]
    assert tl.tensor.__add__ is before[2]
    assert dot_kernel.run.__func__ is before[3].__func__


def test_kernel_writes_to_its_arguments_not_to_copies():
    """Storages are not copied: a launch next to a large one stays cheap."""
    storage = torch.zeros(1024)
    view = storage[512:528]
    run(cast_kernel, torch.arange(16.0), view, 16, BLOCK=16)
    assert np.array_equal(storage[512:528].numpy(), np.arange(16.0))
    assert not storage[:512].any() and not storage[528:].any()


@triton.jit
def counted_kernel(a, c, BLOCK: tl.constexpr):
    total = 0.0
    for _ in range(tl.load(a)):
        total += 1.0
    tl.store(c + tl.arange(0, BLOCK), total)


def test_a_bound_that_is_loaded_is_a_number_for_any_numpy(monkeypatch):
    """Triton 3.6's own conversion fails with numpy 2.5, and warns before."""
    import warnings

    from vllm_radix_kernels import interpreter

    old = (tl.core.tensor, "__index__", lambda self: int(self.handle.data))
    changes = [one for one in interpreter._language() if one[1] != "__index__"]
    monkeypatch.setattr(interpreter, "_language_changes", [*changes, old])
    out = torch.zeros(4)
    with warnings.catch_warnings(), interpreted():
        warnings.simplefilter("error")
        counted_kernel[(1,)](torch.tensor([3], dtype=torch.int32), out, BLOCK=4)
    assert out.tolist() == [3.0] * 4


@triton.jit
def unpacked_kernel(bits, c, WORDS: tl.constexpr):
    packed = tl.load(bits + tl.arange(0, WORDS))
    mask = ((packed[:, None] >> tl.arange(0, 32)[None, :]) & 1) == 0
    offset = tl.arange(0, WORDS * 32)
    here = tl.load(bits) != 0
    tl.store(c + offset, 1.0, mask=here & mask.reshape(WORDS * 32) & (offset < 60))


def test_a_mask_may_be_unpacked_from_bits():
    """As vLLM's kernel for grammars does."""
    out = torch.zeros(64)
    words = torch.tensor([5, -1], dtype=torch.int32)
    with interpreted():
        unpacked_kernel[(1,)](words, out, WORDS=2)
    expected = torch.ones(64)
    expected[[0, 2]] = 0.0
    expected[32:] = 0.0
    assert torch.equal(out, expected)
