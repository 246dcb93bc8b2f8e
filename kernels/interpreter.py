"""Triton kernels on the CPU: its interpreter, corrected, and counting what is read.

Triton 3.9's own interpreter keeps bfloat16 and float8 as raw bits and then multiplies
the bits in ``tl.dot`` and in arithmetic; its casts truncate where the hardware rounds
to nearest even. It also needs an environment variable before Triton is imported, and
copies every argument's whole storage at each launch: a KV cache, here. An access
outside of the tensors is an error instead of a crash, or of nothing at all.

Inside ``interpreted()`` any ``kernel[grid](...)`` runs on the CPU, one program after
the other, on the tensors themselves. ``tests/kernels/test_interpreter.py`` is its
self-test, against torch.
"""

import ast
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.jit import JITFunction

TensorHandle = stock.TensorHandle

_RAW = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5b16: torch.float8_e5m2fnuz,
    tl.float8e4b8: torch.float8_e4m3fnuz,
}
"""Types that numpy does not have: their arrays hold the bits."""

# All 256 values of each float8.
_FLOAT8 = {
    ours: torch.arange(256, dtype=torch.uint8).view(theirs).float().numpy()
    for ours, theirs in _RAW.items()
    if ours.primitive_bitwidth == 8
}


class Traffic:
    """Bytes that kernels load and store, by tensor.

    Counted are the elements that a mask lets through, at each load: what the kernel
    asks of the memory system, before any cache.

    Attributes:
        loaded: bytes loaded so far, by name.
        stored: bytes stored so far, by name.
    """

    def __init__(self, **tensors: torch.Tensor) -> None:
        self._ranges = []
        for name, tensor in tensors.items():
            spans = [
                (n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)
            ]
            size = (sum(spans) + 1) * tensor.element_size()
            self._ranges.append((tensor.data_ptr(), tensor.data_ptr() + size, name))
        self.loaded = dict.fromkeys(tensors, 0)
        self.stored = dict.fromkeys(tensors, 0)

    def count(self, into: dict[str, int], lowest: int, size: int) -> None:
        """Add the bytes of one access, which is to one tensor."""
        # Views may interleave (keys beside values in one cache row): the first that
        # is named wins, so name one of them, or the tensor that holds both.
        for start, end, name in self._ranges:
            if start <= lowest < end:
                into[name] += size
                return


def _widen(data: Any, dtype: Any) -> Any:
    """Return the float32 values of raw bits; other arrays as they are."""
    if dtype == tl.bfloat16:
        return (data.astype(np.uint32) << 16).view(np.float32)
    if dtype in _FLOAT8:
        return _FLOAT8[dtype][data]
    return data


def _narrow(values: Any, dtype: Any) -> Any:
    """Return values as numpy holds ``dtype``, rounded to nearest even."""
    width = stock._get_np_dtype(dtype)
    if dtype not in _RAW:
        return values.astype(width)
    plain = torch.from_numpy(np.array(values, dtype=np.float32))
    rounded = plain.to(_RAW[dtype])
    bits = rounded.view(torch.int16 if dtype.primitive_bitwidth == 16 else torch.uint8)
    return bits.numpy().view(width)


def _cast(self: Any, src: Any, dst_type: Any, *_: Any) -> Any:
    dst = dst_type.scalar
    values = _widen(src.data, src.dtype.scalar)
    return TensorHandle(_narrow(values, dst), dst)


def _dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
    left = _widen(a.data, a.dtype.scalar).astype(d.data.dtype)
    right = _widen(b.data, b.dtype.scalar).astype(d.data.dtype)
    return TensorHandle(np.matmul(left, right) + d.data, d.dtype.scalar)


def _elementwise(original: Callable[..., Any], from_end: int) -> Callable[..., Any]:
    """Return an operator that computes raw types in float32 and rounds once."""

    def operator(self: Any, *arguments: Any) -> Any:
        handles, op = arguments[:-1], arguments[-1]
        dtype = handles[from_end].dtype.scalar
        if dtype not in _RAW:
            return original(self, *arguments)
        wide = [_widen(handle.data, handle.dtype.scalar) for handle in handles]
        result = op(*wide)
        if result.dtype != np.bool_:
            result = _narrow(result, dtype)
        return TensorHandle(result, dtype)

    return operator


def _no_raw_reduction(self: Any, values: Any) -> None:
    for value in values:
        if isinstance(value, tl.core.tensor) and value.dtype.scalar in _RAW:
            raise NotImplementedError(
                f"a reduction of {value.dtype.scalar}: cast to float32 first"
            )
    _CHECK_TENSOR(self, values)


_CHECK_TENSOR = stock.ReduceScanOpInterface.check_tensor
_LOAD = stock.InterpreterBuilder.create_masked_load
_STORE = stock.InterpreterBuilder.create_masked_store


class _Rewriter(stock.FunctionRewriter):
    """Rewrites a kernel without adding names to the module it lives in."""

    def _compile_and_exec(self, transformed_ast: ast.Module) -> Any:
        code = compile(transformed_ast, filename=self.filename, mode="exec")
        names = {**vars(stock), **self.fn.__globals__}
        local: dict[str, Any] = {}
        exec(code, names, local)
        return local[self.fn.__name__]


# What the kernel that runs may touch: start and end of its tensors' storages.
_memory: set[tuple[int, int]] = set()

_rewritten: dict[Any, Callable[..., Any]] = {}


def _rewrite(kernel: Any) -> Callable[..., Any]:
    fn = kernel.fn
    if fn not in _rewritten:
        _rewritten[fn] = _Rewriter(fn).rewrite_ast()
    return _rewritten[fn]


def _launch(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kw: Any) -> Any:
    if warmup:
        return None
    fn = kernel.fn
    parameters = inspect.signature(fn).parameters
    bound = inspect.getcallargs(
        fn, *args, **{name: value for name, value in kw.items() if name in parameters}
    )
    values = {
        name: value
        if _is_constexpr(parameters[name].annotation)
        else stock._implicit_cvt(value)
        for name, value in bound.items()
    }
    size = grid(values) if callable(grid) else grid
    size = tuple(size) + (1,) * (3 - len(size))
    _memory.clear()
    for value in bound.values():
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            _memory.add((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
    builder = stock.interpreter_builder
    builder.set_grid_dim(*size)
    body = _rewrite(kernel)
    for x in range(size[0]):
        for y in range(size[1]):
            for z in range(size[2]):
                builder.set_grid_idx(x, y, z)
                body(**values)
    return None


def _is_constexpr(annotation: Any) -> bool:
    return annotation is tl.constexpr or "constexpr" in str(annotation)


def _call(kernel: Any, *args: Any, **kwargs: Any) -> Any:
    """Call one jitted function from another."""
    kwargs.pop("_semantic", None)
    return _rewrite(kernel)(*args, **kwargs)


_language_changes: list[tuple[Any, str, Any]] = []


def _language() -> list[tuple[Any, str, Any]]:
    """Return what Triton's interpreter changes in ``triton.language``; found once."""
    if not _language_changes:
        probe = types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
        scope = stock._patch_lang(probe)
        seen = {(id(obj), name): (obj, name) for obj, name, _ in scope._changes}
        found = [(obj, name, vars(obj)[name]) for obj, name in seen.values()]
        scope.restore()
        _language_changes.extend(found)
    return _language_changes


def _as_bits(mask: Any) -> Any:
    """Return a mask as truth values; comparisons that were joined come as integers."""
    if mask.data.dtype == np.bool_:
        return mask
    return TensorHandle((mask.data & 1).astype(np.bool_), mask.dtype.scalar)


def _touch(ptrs: Any, mask: Any, traffic: Traffic | None, stored: bool) -> None:
    """Check that an access stays inside one of the launch's tensors, and count it."""
    addresses = np.broadcast_to(ptrs.data, mask.data.shape)[mask.data]
    if not addresses.size:
        return
    width = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
    lowest, end = int(addresses.min()), int(addresses.max()) + width
    if not any(start <= lowest and end <= stop for start, stop in _memory):
        raise IndexError(
            f"a kernel {'stores' if stored else 'loads'} outside of its tensors"
        )
    if traffic is not None:
        into = traffic.stored if stored else traffic.loaded
        traffic.count(into, lowest, addresses.size * width)


def _corrections(traffic: Traffic | None) -> list[tuple[Any, str, Any]]:
    builder = stock.InterpreterBuilder

    def load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        mask = _as_bits(mask)
        _touch(ptrs, mask, traffic, stored=False)
        return _LOAD(self, ptrs, mask, *rest)

    def store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        mask = _as_bits(mask)
        _touch(ptrs, mask, traffic, stored=True)
        return _STORE(self, ptrs, value, mask, *rest)

    return [
        (builder, "cast_impl", _cast),
        (builder, "create_fp_to_fp", _cast),
        (builder, "create_dot", _dot),
        (builder, "create_masked_load", load),
        (builder, "create_masked_store", store),
        (builder, "binary_op", _elementwise(builder.binary_op, 0)),
        (builder, "unary_op", _elementwise(builder.unary_op, 0)),
        (stock.ReduceScanOpInterface, "check_tensor", _no_raw_reduction),
        # Triton 3.6 leaves the last dimension to numpy, which has ceased to drop it.
        (tl.core.tensor, "__index__", lambda self: int(self.handle.data.item())),
        (JITFunction, "run", _launch),
        (JITFunction, "__call__", _call),
        (stock.InterpretedFunction, "run", _launch),
        (stock.InterpretedFunction, "__call__", _call),
    ]


_depth = 0


@contextmanager
def interpreted(traffic: Traffic | None = None) -> Iterator[None]:
    """Run all Triton kernels that are launched inside on the CPU.

    Not for several threads at once: Triton's language is one per process. Numbers
    of warps and stages are ignored, autotuned kernels are not supported.

    Args:
        traffic: counts bytes, if given.

    Raises:
        NotImplementedError: a kernel reduces bfloat16 or float8.
        IndexError: a kernel touches memory outside of the tensors it was given.
    """
    global _depth
    if _depth and traffic is None:
        yield
        return
    undo: list[tuple[Any, str, Any]] = []
    _depth += 1
    try:
        for obj, name, new in [*_language(), *_corrections(traffic)]:
            undo.append((obj, name, vars(obj).get(name, undo)))
            setattr(obj, name, new)
        yield
    finally:
        for obj, name, old in reversed(undo):
            if old is undo:
                delattr(obj, name)
            else:
                setattr(obj, name, old)
        _depth -= 1
