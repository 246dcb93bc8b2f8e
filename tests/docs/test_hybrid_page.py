"""What the page on hybrid models says is served is served, and the rest refused."""

import re
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    RSWASpec,
    SlidingWindowSpec,
)

from support.pages import ROOT
from support.toy_configs import HYBRID_TOYS
from vllm_radix.config import RadixConfig
from vllm_radix.engine.compat import get_kv_cache_groups
from vllm_radix.engine.groups.mamba import MambaGroup
from vllm_radix.engine.hybrid_manager import MIN_TOKENS_PER_STATE
from vllm_radix.engine.resume_plans import MAX_JUNCTIONS
from vllm_radix.engine.support import (
    config_problem,
    feature_problem,
    is_one_full_group,
    layout_problem,
)
from vllm_radix_bench.sim.engine import make_vllm_config

PAGE = (ROOT / "docs" / "hybrid-models.md").read_text()
TEXT = " ".join(PAGE.split())
ROWS = dict(re.findall(r"^\| ([^|]+) \|[^|]*\| (.+) \|$", PAGE, re.MULTILINE))
SIZES = {"block_size": 32, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
FULL = FullAttentionSpec(**SIZES)
MLA = MLAAttentionSpec(**SIZES)
WINDOW = SlidingWindowSpec(**SIZES, sliding_window=128)
CHUNKS = ChunkedLocalAttentionSpec(**SIZES, attention_chunk_size=64)
RSWA = RSWASpec(**SIZES, rswa_window=64)


def states(**fields):
    fields = {"mamba_cache_mode": "align", **fields}
    return MambaSpec(block_size=32, shapes=((16,),), dtypes=(torch.float32,), **fields)


DELTA = states(mamba_type=MambaAttentionBackendEnum.GDN_ATTN)
CONVOLUTIONS = states(mamba_type=MambaAttentionBackendEnum.SHORT_CONV)


def is_one_sentence(problem):
    return problem.endswith(".") and ". " not in problem


def layout(*specs):
    groups = [KVCacheGroupSpec([f"layer{i}"], spec) for i, spec in enumerate(specs)]
    return KVCacheConfig(16, kv_cache_tensors=[], kv_cache_groups=groups)


LAYOUTS = {
    "full attention alone, MLA alone": [[FULL], [MLA]],
    "sliding windows beside full attention, or alone": [[FULL, WINDOW], [WINDOW]],
    "chunked local attention beside full attention": [[FULL, CHUNKS]],
    "Mamba2 or Mamba states beside full attention": [[FULL, states()]],
    "gated delta nets beside full attention": [[FULL, DELTA]],
    "short convolutions beside full attention": [[FULL, CONVOLUTIONS]],
    "MLA beside windows or states": [[MLA, WINDOW], [MLA, states()]],
    "windows over answers only (RSWA), sinks with blocks of their own, "
    "cross-attention": [[FULL, RSWA]],
}


def cases():
    for row, layouts in LAYOUTS.items():
        for specs in layouts:
            yield row, specs


@pytest.mark.parametrize(("row", "specs"), cases())
def test_layers_are_served_or_refused_as_the_table_says(row, specs):
    problem = layout_problem(layout(*specs))
    assert ROWS[row].startswith("served" if problem is None else "refused"), problem
    assert problem is None or is_one_sentence(problem)


def test_the_table_has_no_row_that_is_not_tried():
    # Those that are refused by the model's kind, before there is a layout.
    others = {"states alone", "encoders, pooling models, diffusion"}
    said = {row for row, text in ROWS.items() if text.startswith(("served", "refused"))}
    assert said == LAYOUTS.keys() | others


def test_states_alone_are_refused():
    config = make_vllm_config()
    model = SimpleNamespace(is_encoder_decoder=False, is_attention_free=True)
    problem = config_problem(
        SimpleNamespace(model_config=model, cache_config=config.cache_config)
    )
    assert "states alone" in problem


def test_the_grain_of_delta_nets_is_the_one_that_is_named():
    def grain(spec):
        manager = SimpleNamespace(block_size=spec.block_size, kv_cache_spec=spec)
        return MambaGroup.component(manager).grain

    assert (
        f"multiples of {grain(DELTA)} tokens"
        in ROWS["gated delta nets beside full attention"]
    )
    assert grain(states()) == 1


def with_features(**changes):
    """A configuration with several groups, and one feature beside them."""
    config = {
        "kv_transfer_config": None,
        "speculative_config": None,
        "parallel_config": {
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "worker_cls": "auto",
        },
        "cache_config": {"use_replayssm": False},
        "aux_output_config": SimpleNamespace(enabled=False),
        "num_prefill_lookahead_tokens": 1,
    }
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            config[part][field] = value
        else:
            config[part] = value
    for part in ("parallel_config", "cache_config"):
        config[part] = SimpleNamespace(**config[part])
    return SimpleNamespace(**config)


DRAFT, EAGLE, NGRAM = (
    SimpleNamespace(uses_draft_kv_cache=lambda answer=own: answer, method=method)
    for own, method in ((True, "draft_model"), (True, "eagle3"), (False, "ngram"))
)
FEATURES = {
    "a KV connector": ({"kv_transfer_config": object()}, states()),
    "a draft model with KV of its own": ({"speculative_config": DRAFT}, WINDOW),
    "MTP of several modules": (
        {"speculative_config": EAGLE, "num_prefill_lookahead_tokens": 2},
        WINDOW,
    ),
    "EAGLE or MTP beside chunked attention": ({"speculative_config": EAGLE}, CHUNKS),
    "option `sub_block` off": ({"speculative_config": EAGLE}, WINDOW),
    "decode or": ({"parallel_config__decode_context_parallel_size": 2}, states()),
    "prefill context parallelism": (
        {"parallel_config__prefill_context_parallel_size": 2},
        states(),
    ),
    "`--use-replayssm`": ({"cache_config__use_replayssm": True}, states()),
    "grouped attention": (
        {"parallel_config__worker_cls": "vllm_radix.attention.worker.Worker"},
        states(),
    ),
}
"""What is refused: the configuration, and the group beside full attention."""


@pytest.mark.parametrize("named", FEATURES)
def test_what_is_not_served_with_several_groups_is_refused(named):
    changes, other = FEATURES[named]
    config = with_features(**changes)
    groups = layout(FULL, other)
    radix = RadixConfig(sub_block="sub_block" not in named)
    problem = feature_problem(config, groups, radix)
    assert is_one_sentence(problem)
    (refused,) = re.findall(r"With several groups radix is also refused.*?\. ", TEXT)
    assert named in refused
    # One group is another matter, and so is a configuration without the feature.
    assert feature_problem(config, layout(FULL), radix) is None
    assert feature_problem(with_features(), groups, radix) is None


@pytest.mark.parametrize("other", [WINDOW, states(), DELTA])
@pytest.mark.parametrize("drafts", [NGRAM, EAGLE])
def test_drafts_are_served_beside_windows_and_states(drafts, other):
    config = with_features(speculative_config=drafts)
    config.parallel_config.worker_cls = "vllm.v1.worker.gpu_worker.Worker"
    assert feature_problem(config, layout(FULL, other), RadixConfig()) is None
    off = RadixConfig(sub_block=False)
    refused = feature_problem(config, layout(FULL, other), off) is not None
    assert refused == (drafts is EAGLE and other is WINDOW)


def test_the_flag_that_makes_one_group_still_does():
    config = make_vllm_config(disable_hybrid_kv_cache_manager=True)
    config.cache_config.kv_cache_layout = "LBNHC"  # an engine would resolve it
    groups = get_kv_cache_groups(config, {"layer0": FULL, "layer1": WINDOW})
    made = KVCacheConfig(16, kv_cache_tensors=[], kv_cache_groups=groups)
    assert is_one_full_group(made)
    assert "--disable-hybrid-kv-cache-manager" in PAGE


def test_numbers_in_its_text_are_the_codes():
    assert MAX_JUNCTIONS == 4 and "up to four a request" in TEXT
    assert f"save fewer than {MIN_TOKENS_PER_STATE} tokens" in TEXT


def test_the_toys_it_names_are_those_that_are_run():
    (named,) = re.findall(r"random weights: (.+?)\. ", TEXT)
    said = named.replace("a Mistral with windows alone", "mistral_swa")
    assert set(re.split(r", | and ", said)) == HYBRID_TOYS.keys()
