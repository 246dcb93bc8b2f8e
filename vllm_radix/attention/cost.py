"""What attention costs: bytes, operations and launches, on a device's roofline.

One model for two uses: the planner asks it whether grouping pays, and
``benchmarks/attention/roofline.py`` prints what it predicts. Its assumptions:

- A kernel takes as long as the slowest of four streams: bytes from memory, bytes from
  the device's last-level cache to its processors, operations of the tensor cores, and
  the keys that the busiest program reads one after the other. The last is what a small
  batch over long prefixes waits for: a program has few loads in flight.
- A range of keys that several requests read comes from memory once where the programs
  walk it side by side, as those of vLLM's kernel do that read whole requests. Where
  requests are cut into segments, it does if all such ranges fit in the cache together,
  and comes once per reader if they do not.
- Operations count whole tiles, idle rows too.
- Partial results are written and read once each, from memory.
- Each launch costs ``launch_s`` and nothing overlaps.
- For vLLM's kernel, its own partials (its 3D variant) are not counted.

The constants of sm_90 are fitted to a measurement; see ``DEVICES``.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """What kernels reach on a device, not its maker's peaks.

    Attributes:
        memory: bytes per second from memory.
        cache: bytes per second from the last-level cache.
        cache_size: bytes of that cache.
        flops: operations per second of the tensor cores, 16-bit inputs.
        processors: of them.
        stream: bytes of keys and values per second that one program reads.
        launch_s: seconds that a kernel takes to start and to end.
        margin: how many times faster than vLLM's kernel a plan must seem: for what
            the model does not know. On an H100 it is off by 7 % of a time.
    """

    memory: float
    cache: float
    cache_size: float
    flops: float
    processors: int
    stream: float = 11e9
    launch_s: float = 10e-6
    margin: float = 1.1


def _like_h100(
    memory: float, cache_size: float, flops: float, processors: int
) -> Device:
    """Return a device that was not measured, from its maker's peaks.

    Taken to reach the fractions that an H100 reaches; its programs and launches to be
    as fast as an H100's.
    """
    measured, peak = DEVICES["sm_90"], (3.35e12, 989e12)
    return Device(
        measured.memory / peak[0] * memory,
        measured.cache / peak[0] * memory,
        cache_size,
        measured.flops / peak[1] * flops,
        processors,
    )


DEVICES = {
    # Fitted by tools/gpu/fit_cost.py to the times in
    # benchmarks/results/gpu/2026-11-26-h100-kernels/2-timing.json; the operations are
    # those of the matrix product in 0-env.json beside it. An H100's maker says 3.35e12
    # bytes and 989e12 operations.
    "sm_90": Device(2.2e12, 4.35e12, 50e6, 760e12, 132),
    # Every byte saved is worth it: tests want to see groups.
    "interpreter": Device(1e3, 1.0, 0.0, 1e9, 4, 1e3, 0.0, 1.0),
}
"""By architecture: A100 80 GB, L40S, H100 SXM, B200, RTX 5090, MI300X, MI355X."""

DEVICES |= {
    "sm_80": _like_h100(2.04e12, 40e6, 312e12, 108),
    "sm_89": _like_h100(0.86e12, 48e6, 362e12, 142),
    "sm_100": _like_h100(8.0e12, 126e6, 2250e12, 148),
    "sm_120": _like_h100(1.79e12, 96e6, 210e12, 170),
    "gfx942": _like_h100(5.3e12, 256e6, 1307e12, 304),
    "gfx950": _like_h100(8.0e12, 256e6, 2500e12, 256),
}


@dataclass(frozen=True)
class Layer:
    """An attention layer, as one device holds it.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_size: elements of each.
        kv_bytes: bytes of an element of the cache.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    kv_bytes: int

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return 2 * self.num_kv_heads * self.head_size * self.kv_bytes

    @property
    def partial_bytes(self) -> int:
        """Bytes to write and read one row's partial result and log-sum-exp."""
        return 2 * 4 * self.num_heads * (self.head_size + 1)


@dataclass(frozen=True)
class Work:
    """What a kernel does for one batch.

    Attributes:
        loaded: tokens of keys and values that tiles load, again for each tile.
        unique: different tokens among them.
        repeated: different tokens that several requests read, not side by side.
        tile: rows of a tile, idle ones included.
        partials: partial results, one per row and range.
        launches: kernel launches.
        longest: tokens of keys that the busiest program loads, one after the other.
    """

    loaded: int
    unique: int
    repeated: int
    tile: int
    partials: int
    launches: int
    longest: int = 0


def loaded_bytes(layer: Layer, work: Work) -> int:
    """Return what a kernel's tiles load, and its partial results."""
    return work.loaded * layer.token_bytes + work.partials * layer.partial_bytes


def operations(layer: Layer, work: Work) -> int:
    """Return the operations of a kernel's matrix products, idle rows included."""
    return 4 * work.tile * layer.head_size * layer.num_kv_heads * work.loaded


def seconds(device: Device, layer: Layer, work: Work) -> float:
    """Return how long a kernel takes on a device, by the model above."""
    fits = work.repeated * layer.token_bytes <= device.cache_size
    from_memory = work.unique if fits else max(work.unique, work.loaded)
    partials = work.partials * layer.partial_bytes
    # A program computes one KV head.
    chain = work.longest * layer.token_bytes / layer.num_kv_heads
    return work.launches * device.launch_s + max(
        (from_memory * layer.token_bytes + partials) / device.memory,
        loaded_bytes(layer, work) / device.cache,
        operations(layer, work) / device.flops,
        chain / device.stream,
    )
