"""Compile the kernels for every target without a device: ``make aot``.

Builds each kernel for each architecture at the tile its table names, reads registers,
stack, local-memory instructions and matrix instructions from the machine code, and
compares them with ``kernels/aot.json``. ``--write`` writes that file instead.

Status: 0 when all is as committed and nothing spills, 1 otherwise.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

TABLE = Path(__file__).resolve().parent.parent / "kernels" / "aot.json"

VARIANTS: dict[str, dict[str, Any]] = {
    "bf16, heads of 128": {"head": 128, "q": "bf16", "kv": "bf16"},
    "bf16, heads of 64": {"head": 64, "q": "bf16", "kv": "bf16"},
    "fp16, heads of 96": {"head": 96, "q": "fp16", "kv": "fp16"},
    "bf16, heads of 256": {"head": 256, "q": "bf16", "kv": "bf16"},
    "bf16 over fp8, heads of 128": {"head": 128, "q": "bf16", "kv": "fp8e4nv"},
    "all features, heads of 128": {
        "head": 128,
        "q": "bf16",
        "kv": "bf16",
        "features": True,
    },
    "merge, heads of 128": {"head": 128, "q": "bf16", "merge": True},
}
# The first with float8, and the format it has.
_NO_FP8 = {"sm_80"}
_FP8 = {"gfx942": "fp8e4b8"}
_MATRIX = {
    "sm_90": "HGMMA",
    "sm_100": "UTCHMMA",
    "gfx942": "v_mfma",
    "gfx950": "v_mfma",
}


def signature(
    kernel: Any, types: dict[str, str], constants: dict[str, Any]
) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], Any]]:
    """Return a kernel's signature as a launch on aligned tensors would have it."""
    names = [parameter.name for parameter in kernel.params]
    kinds, attributes = {}, {}
    for place, name in enumerate(names):
        aligned = name.endswith("_ptr") or ("stride" in name and "table" not in name)
        if name in constants:
            kinds[name] = "constexpr"
            continue
        default = "*i32" if name.endswith("_ptr") else "i32"
        kinds[name] = types.get(name, default)
        if aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    values = {(names.index(name),): value for name, value in constants.items()}
    return kinds, values, attributes


def source(architecture: str, variant: dict[str, Any]) -> tuple[Any, dict[str, int]]:
    """Return what to compile, and its launch options."""
    import torch
    from triton.compiler import ASTSource

    from vllm_radix_kernels.grouped_attention import grouped_attention_kernel
    from vllm_radix_kernels.merge_partials import merge_partials_kernel
    from vllm_radix_kernels.tiles import choose

    head, q = variant["head"], variant["q"]
    padded = 1 << (head - 1).bit_length()
    types = {"part_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": f"*{q}"}
    if variant.get("merge"):
        constants = {"HEAD": head, "HEAD_PADDED": padded, "BLOCK_H": 8}
        kinds = signature(merge_partials_kernel, types, constants)
        return ASTSource(merge_partials_kernel, *kinds), {}
    kv = variant["kv"]
    if kv.startswith("fp8"):
        kv = _FP8.get(architecture, kv)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[q]
    tile = choose(architecture, head, 4, dtype)
    features = variant.get("features", False)
    types |= {"q_ptr": f"*{q}", "k_ptr": f"*{kv}", "v_ptr": f"*{kv}"}
    types |= dict.fromkeys(("slopes_ptr", "k_scale_ptr", "v_scale_ptr"), "*fp32")
    types |= {"sinks_ptr": f"*{q}", "scale": "fp32", "softcap": "fp32"}
    constants = {
        "k_stride_d": 1,
        "v_stride_d": 1,
        "GROUP": 4,
        "HEAD": head,
        "HEAD_PADDED": padded,
        "PAGE": 16,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "WINDOW": 4096 if features else 0,
        "USE_SOFTCAP": features,
        "USE_ALIBI": features,
        "USE_SINKS": features,
        "FP8_KV": kv.startswith("fp8"),
    }
    if not features:
        constants |= {"slopes_ptr": None, "sinks_ptr": None}
    if not constants["FP8_KV"]:
        constants |= {"k_scale_ptr": None, "v_scale_ptr": None}
    kinds = signature(grouped_attention_kernel, types, constants)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return ASTSource(grouped_attention_kernel, *kinds), options


def build(job: tuple[str, str]) -> dict[str, Any]:
    """Compile one kernel for one architecture; return what it uses."""
    architecture, name = job
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    warnings.simplefilter("ignore")
    import triton
    from triton.backends.compiler import GPUTarget

    made, options = source(architecture, VARIANTS[name])
    if architecture.startswith("sm_"):
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
        compiled = triton.compile(made, target=target, options=options)
        found = _read_cubin(compiled.asm["cubin"])
    else:
        target = GPUTarget("hip", architecture, 64)
        compiled = triton.compile(made, target=target, options=options)
        found = _read_amdgcn(compiled.asm["amdgcn"])
    found["shared"] = int(compiled.metadata.shared)
    return found


def _read_cubin(cubin: bytes) -> dict[str, Any]:
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run(
                [tool, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )

    def used(what: str) -> int:
        return max(map(int, re.findall(rf"\b{what}:(\d+)", usage)))

    return {
        "registers": used("REG"),
        "stack": used("STACK"),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "matrix": _kinds(r"\b(HGMMA|UTCHMMA|HMMA|QGMMA|UTCQMMA)\b", sass),
    }


def _read_amdgcn(assembly: str) -> dict[str, Any]:
    def used(what: str) -> int:
        return max(map(int, re.findall(rf"\.{what}:\s*(\d+)", assembly)))

    return {
        "registers": used("vgpr_count"),
        "stack": used("private_segment_fixed_size"),
        "spills": used("vgpr_spill_count"),
        "matrix": _kinds(r"\b(v_mfma)", assembly),
    }


def _kinds(pattern: str, text: str) -> dict[str, int]:
    found = re.findall(pattern, text)
    return {kind: found.count(kind) for kind in sorted(set(found))}


def problems(table: dict[str, dict[str, Any]]) -> list[str]:
    """Return what is wrong with a table, a sentence each."""
    found = []
    for architecture, rows in table.items():
        # A wave of CDNA has 512 vector registers, a thread of CUDA 255.
        most = 512 if architecture.startswith("gfx") else 255
        for name, row in rows.items():
            where = f"{architecture}, {name}"
            if row["registers"] > most:
                found.append(f"{where}: {row['registers']} registers, {most} at most")
            if row["stack"] or row["spills"]:
                found.append(f"{where}: {row['stack']} bytes of stack, it spills")
            wanted = _MATRIX.get(architecture, "HMMA")
            if not name.startswith("merge") and wanted not in row["matrix"]:
                found.append(f"{where}: no {wanted}")
    return found


def jobs(only: list[str]) -> list[tuple[str, str]]:
    """Return architecture and variant of everything to build."""
    from vllm_radix_kernels.tiles import ARCHITECTURES

    return [
        (architecture, name)
        for architecture in ARCHITECTURES
        for name, variant in VARIANTS.items()
        if (not only or architecture in only)
        and not (architecture in _NO_FP8 and variant.get("kv", "").startswith("fp8"))
    ]


def main() -> int:
    """Build, compare, report."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--only", nargs="+", default=[], metavar="ARCH")
    arguments = parser.parse_args()
    wanted = jobs(arguments.only)
    if not wanted:
        parser.error(f"--only: none of {', '.join(arguments.only)} is a target")
    table: dict[str, dict[str, Any]] = {}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        built = tqdm(pool.map(build, wanted), total=len(wanted), leave=False)
        for (architecture, name), found in zip(wanted, built, strict=True):
            table.setdefault(architecture, {})[name] = found
    for architecture, rows in table.items():
        for name, row in rows.items():
            print(f"{architecture:8} {name:32} {row}")
    wrong = problems(table)
    if arguments.write and not wrong and not arguments.only:
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
    elif not arguments.write:
        known = json.loads(TABLE.read_text())
        wrong += [
            f"{architecture}, {name}: {row}, committed is {known[architecture][name]}"
            for architecture, rows in table.items()
            for name, row in rows.items()
            if row != known.get(architecture, {}).get(name)
        ]
    print("\n".join(wrong) or "As committed, and nothing spills.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
