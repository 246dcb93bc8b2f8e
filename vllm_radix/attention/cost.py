"""What attention costs: bytes, operations and launches, on a device's roofline.

One model for two uses: the planner asks it whether grouping pays, and
``benchmarks/roofline.py`` prints what it predicts. Its assumptions:

- A kernel takes as long as the slowest of three streams: bytes from memory, bytes
  from the device's last-level cache to its processors, and operations of the tensor
  cores, each at its peak. Real kernels reach 60-80 % of a peak; only ratios matter.
- A range of keys that several requests read comes from memory once if all such ranges
  fit in the cache together, and once per reader if they do not.
- Operations count whole tiles, idle rows too.
- Partial results are written and read once each, from memory.
- Each launch costs ``launch_s`` and nothing overlaps.
- For vLLM's kernel, its own partials (its 3D variant) are not counted.

Nothing here has been compared with a device yet.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Peaks of a device, from its maker unless said otherwise.

    Attributes:
        memory: bytes per second from memory.
        cache: bytes per second from the last-level cache.
        cache_size: bytes of that cache.
        flops: operations per second of the tensor cores, 16-bit inputs.
        processors: of them.
        launch_s: seconds that one more kernel launch takes.
        margin: how many times faster than vLLM's kernel a plan must seem: for what
            the model does not know.
    """

    memory: float
    cache: float
    cache_size: float
    flops: float
    processors: int
    launch_s: float = 3e-6
    margin: float = 1.05


# The cache's bandwidth is published for none of them; measured by others at about
# 1.7 times the memory's on H100, and taken as that everywhere.
DEVICES = {
    "sm_80": Device(2.04e12, 3.4e12, 40e6, 312e12, 108),
    "sm_89": Device(0.86e12, 1.5e12, 48e6, 362e12, 142),
    "sm_90": Device(3.35e12, 5.5e12, 50e6, 989e12, 132),
    "sm_100": Device(8.0e12, 13.6e12, 126e6, 2250e12, 148),
    "sm_120": Device(1.79e12, 3.0e12, 96e6, 210e12, 170),
    "gfx942": Device(5.3e12, 9.0e12, 256e6, 1307e12, 304),
    "gfx950": Device(8.0e12, 13.6e12, 256e6, 2500e12, 256),
    # Every byte saved is worth it: tests want to see groups.
    "interpreter": Device(1.0, 1e3, 0.0, 1e9, 4, 0.0, 1.0),
}
"""By architecture: A100 80 GB, L40S, H100 SXM, B200, RTX 5090, MI300X, MI355X."""


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
        repeated: different tokens that more than one request reads.
        tile: rows of a tile, idle ones included.
        partials: partial results, one per row and range.
        launches: kernel launches.
    """

    loaded: int
    unique: int
    repeated: int
    tile: int
    partials: int
    launches: int


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
    return work.launches * device.launch_s + max(
        (from_memory * layer.token_bytes + partials) / device.memory,
        loaded_bytes(layer, work) / device.cache,
        operations(layer, work) / device.flops,
    )
