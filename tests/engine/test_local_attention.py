"""Models with local layers beside full attention, served with all tokens kept.

Today's way for them: vLLM's flag makes one full-attention group of all layers, whose
kernels still attend locally.
"""

import pytest

from support.answers import ENGINE, both, compare
from support.prompts import RequestMix
from support.toy_models import TOYS, make_toy

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("toy", TOYS)
def test_answers_of_a_toy_with_local_layers_equal_stocks(toy, tiny, tmp_path):
    model = make_toy(toy, tmp_path, tiny)
    # Prefixes longer than the windows and chunks, so that they have left them.
    mix = RequestMix(3, vocabulary=(10, 900))
    shared = mix.words(300)
    for _ in range(14):
        mix.add(shared + mix.words(30))
    turn = mix.add(mix.words(280))
    mix.add(mix.words(20), after=turn)
    mix.add(mix.words(200))
    engine = {
        **ENGINE,
        "load_format": "dummy",
        "num_gpu_blocks_override": 50,
        "disable_hybrid_kv_cache_manager": True,
    }
    theirs, ours = both(model, mix.requests, engine)
    compared, ties = compare(theirs, ours, mix.requests)
    assert compared >= 17
    assert ties <= 1
    assert ours["counts"]["scheduler"] == "RadixScheduler"
    assert ours["counts"]["copies"] > 0, "no hits inside blocks"
    assert ours["counts"]["scheduled"] < theirs["counts"]["scheduled"]
