"""FlashAttention's face in Python without its compiled kernels: names only.

Goes into vLLM as ``vllm/vllm_flash_attn/__init__.py``; see ``overlay.py``.
"""

from vllm.vllm_flash_attn.flash_attn_interface import (
    FA2_AVAILABLE,
    FA3_AVAILABLE,
    compile_flash_attn_varlen_func_from_specs,
    fa_version_unsupported_reason,
    flash_attn_varlen_func,
    get_scheduler_metadata,
    is_fa_version_supported,
)

__all__ = [
    "FA2_AVAILABLE",
    "FA3_AVAILABLE",
    "compile_flash_attn_varlen_func_from_specs",
    "fa_version_unsupported_reason",
    "flash_attn_varlen_func",
    "get_scheduler_metadata",
    "is_fa_version_supported",
]
