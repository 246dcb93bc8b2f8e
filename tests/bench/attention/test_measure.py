"""The attention benchmark: what it runs without a GPU, and what stand-ins can show."""

import importlib.util
import inspect
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from vllm_radix.attention.cost import DEVICES
from vllm_radix.attention.planner import AttentionPlanner, Limits
from vllm_radix_bench.attention import (
    batches,
    cli,
    implementations,
    measure,
    report,
    vllm_kernel,
)
from vllm_radix_bench.attention.batches import Shape
from vllm_radix_bench.attention.implementations import CASCADE, FLASH, OURS, VLLM
from vllm_radix_bench.report.tables import console
from vllm_radix_kernels.grouped_attention import grouped_attention_reference

CPU = torch.device("cpu")
SIZES = {"tail": 21, "head_size": 32}


def names_of(value):
    if isinstance(value, dict):
        yield from value
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from names_of(inner)


def source_of(name):
    return Path(importlib.util.find_spec(name).origin)


@pytest.mark.interpreted
def test_interpreted_it_compares_and_counts_and_times_nothing(tmp_path):
    path = tmp_path / "made" / "out.json"
    command = [sys.executable, "-m", "vllm_radix_bench.attention", "--interpret"]
    command += ["--batch", "4", "2x3", "--prefix", "320", "--levels", "0", "1"]
    done = subprocess.run(
        [*command, "--heads", "2/1", "--output", str(path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert result["mode"] == "interpreted"
    times = re.compile(r"(_s|_ms|_us)$|second|time|predicted$|of_model|speed|launch")
    found = [name for name in names_of(result) if times.search(name)]
    assert set(found) <= {"bytes_predicted"}
    assert not re.search(r"\d (us|ms|s)\b|TB/s", done.stdout)
    assert len(result["rows"]) == 4
    for row in result["rows"]:
        left = row["levels"] == 0
        every = row["contenders"]
        for name in [VLLM] if left else [OURS, VLLM]:
            assert every[name]["status"] == "agrees"
            assert every[name]["difference"] < implementations.TOLERANCE
            assert every[name]["bytes_counted"] == every[name]["bytes_predicted"]
        if left:
            assert every[OURS]["status"] == "left to vLLM"
        else:
            # The shared range is read once, for the whole of a batch.
            assert every[OURS]["partials"] > 0
            tokens = row["prefix"] + row["requests"] * row["tail"]
            assert every[OURS]["bytes_counted"] == tokens * 2 * 32 * 2
        assert every[VLLM]["variant"] == ("3D" if row["new_tokens"] == 1 else "2D")
    assert "FlashAttention: " in done.stdout
    assert "FlashInfer: " in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "none"], "neither a number of requests nor"),
        (["--batch", "8x0"], "neither"),
        (["--batch", "2", "--levels", "3"], "--levels 3 needs batches of 8"),
        (["--batch", "8x300"], "at most 256 new tokens"),
        (["--prefix", "100"], "in pages of 16"),
        (["--prefix", "16", "--levels", "2", "--batch", "8"], "no page for each level"),
        (["--levels", "4"], "invalid choice"),
        (["--heads", "32"], "is not query heads / KV heads"),
        (["--heads", "32/5"], "no multiple"),
        (["--repeats", "0"], "not a number of 1 or more"),
        (["--quick", "--interpret"], "not allowed with"),
        (["--interpret", "--repeats", "3"], "nothing is timed"),
        (["--interpret", "--plot", "a.png"], "nothing is timed"),
        (["--replot", "missing.json"], "missing.json"),
        (["--nonsense"], "unrecognized arguments"),
    ],
)
def test_bad_options_exit_with_2_and_say_why(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_it_names_interpret(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "out.json"
    assert cli.main(["--quick", "--output", str(output)]) == 2
    printed = capsys.readouterr().err
    assert "--interpret" in printed
    assert printed.count("\n") == 1
    assert not output.exists()


def made_up(**changes):
    rows = []
    for levels in (0, 1, 2):
        for prefix in (1024, 4096):
            for batch in ((8, 1), (32, 16)):
                shape = Shape(*batch, prefix, levels, 32, 8)
                declined = levels == 0
                gain = 1.0 if declined else prefix / 800 / levels
                speedup = dict.fromkeys(("predicted", "cold", "warm"), gain)
                speedup["declined"] = declined
                figures = {"status": "measured", "bytes": 10**9, "bytes_per_s": 2e12}
                figures |= {"predicted_s": 1e-5, "of_model": 0.5, "difference": 0.002}
                for name in ("cold_s", "warm_s"):
                    figures[name] = {"median": 2e-5, "min": 1e-5, "max": 3e-5}
                every = {name: dict(figures) for name in (OURS, VLLM, FLASH)}
                if declined:
                    every[OURS] = {"status": "left to vLLM"}
                every[CASCADE] = {"status": "FlashInfer is not installed"}
                rows.append(vars(shape) | {"contenders": every, "speedup": speedup})
    rows.append(vars(Shape(128, 1, 16384, 0, 32, 32)) | {"skipped": "needs 36 GB"})
    device = {"name": "made up", "model": {"of": "sm_90"}}
    return {"mode": "timed", "device": device, "rows": rows, **changes}


def test_a_result_is_drawn_and_drawn_again(tmp_path, capsys):
    report.plot(made_up(), tmp_path / "one.png")
    path = tmp_path / "two.json"
    path.write_text(json.dumps(made_up()))
    assert cli.main(["--replot", str(path)]) == 0
    assert "two.png" in capsys.readouterr().out.replace("\n", "")
    for name in ("one.png", "two.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "text",
    ["[]", "{", json.dumps(made_up(mode="interpreted")), json.dumps(made_up(rows=[]))],
)
def test_what_is_no_timed_result_is_not_drawn(text, tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        cli.main(["--replot", str(path)])
    assert stop.value.code == 2
    assert "--replot" in capsys.readouterr().err
    assert not path.with_suffix(".png").exists()


def test_the_table_says_who_is_left_to_vllm(capsys):
    console(240).print(report.table(made_up()))
    printed = capsys.readouterr().out
    assert "left to vLLM" in printed
    assert "20 (10-30) 2.00 TB/s 50%" in printed
    assert "needs 36 GB" in printed
    lines = report.absences(made_up())
    assert "FlashInfer: FlashInfer is not installed (12 of 12 batches)" in lines


def shapes(levels=(0, 1, 2, 3)):
    for level in levels:
        for new in (1, 3, 20):
            yield Shape(12, new, 1008, level, 8, 2, tail=37)


@pytest.mark.parametrize("shape", shapes(), ids=str)
def test_stock_work_is_what_the_planner_takes_it_for(shape):
    batch = batches.make_batch(shape, CPU)
    limits = Limits(shape.layer, DEVICES["interpreter"], batches.PAGE, 64)
    plan = AttentionPlanner(limits).plan(*batch.host)
    assert (plan is None) == (shape.levels == 0)
    if plan is not None:
        assert plan.stock_work == shape.stock_work(16)
        assert plan.levels <= shape.levels
    else:
        assert shape.stock_work(16).repeated == 0
        assert shape.stock_work(16).unique == shape.requests * shape.length


@pytest.mark.parametrize("shape", shapes(), ids=str)
def test_a_batch_shares_as_much_as_its_shape_says(shape):
    batch = batches.make_batch(shape, CPU)
    tables = batch.host[0]
    assert tables.shape[1] * batches.PAGE >= shape.length
    assert sorted(np.unique(tables)) == list(range(shape.blocks()))
    pages = shape.prefix // batches.PAGE
    common = (tables[:, None, :pages] == tables[None, :, :pages]).cumprod(2).sum(2)
    depths = {0, *np.cumsum([length for _, length in shape.runs()]).tolist()}
    assert set(common[~np.eye(len(tables), dtype=bool)].tolist()) <= depths
    if shape.levels:
        # Nobody is alone with the whole of a prefix.
        np.fill_diagonal(common, 0)
        assert (common.max(1) == pages).all()
        assert len(shape.runs()) == shape.levels


def expected_of(batch):
    return grouped_attention_reference(
        batch.q,
        batch.k,
        batch.v,
        batch.tables,
        batch.seq_lens,
        batch.starts,
        batch.shape.head_size**-0.5,
    )


class Cascade:
    """What FlashInfer documents of its wrapper, in float64."""

    def __init__(self, num_levels, workspace, kv_layout):
        assert kv_layout == "NHD"
        self.num_levels = num_levels

    def plan(
        self,
        qo_indptr_arr,
        paged_kv_indptr_arr,
        paged_kv_indices_arr,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        causal=False,
        q_data_type="float16",
    ):
        self.levels = list(
            zip(
                qo_indptr_arr,
                paged_kv_indptr_arr,
                paged_kv_indices_arr,
                paged_kv_last_page_len,
                strict=True,
            )
        )
        assert len(self.levels) == self.num_levels
        assert all(x.dtype == torch.int32 for level in self.levels for x in level)
        assert q_data_type == torch.bfloat16
        self.group, self.causal = num_qo_heads // num_kv_heads, causal
        self.scale, self.page = head_dim**-0.5, page_size

    def run(self, q, caches):
        value = torch.zeros(q.shape, dtype=torch.float64)
        total = torch.zeros(q.shape[:2], dtype=torch.float64)
        for number, (rows, pages, indices, last) in enumerate(self.levels):
            assert rows[-1] == len(q)
            for node in range(len(rows) - 1):
                low, high = rows[node], rows[node + 1]
                blocks = indices[pages[node] : pages[node + 1]].long()
                length = (len(blocks) - 1) * self.page + int(last[node])
                k, v = (
                    cache[blocks]
                    .flatten(0, 1)[:length]
                    .double()
                    .repeat_interleave(self.group, 1)
                    for cache in caches
                )
                score = torch.einsum("thd,khd->thk", q[low:high].double(), k)
                weight = torch.exp(score * self.scale)
                if self.causal and number == self.num_levels - 1:
                    count = int(high - low)
                    seen = torch.ones(count, length).tril(length - count)
                    weight *= seen[:, None]
                total[low:high] += weight.sum(-1)
                value[low:high] += torch.einsum("thk,khd->thd", weight, v)
        return (value / total[:, :, None]).to(q.dtype)


@pytest.mark.parametrize("shape", shapes(), ids=str)
def test_flashinfer_gets_the_tree_that_the_batch_has(shape, monkeypatch):
    module = types.SimpleNamespace(MultiLevelCascadeAttentionWrapper=Cascade)
    monkeypatch.setitem(sys.modules, "flashinfer", types.ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.cascade", module)
    monkeypatch.setattr(implementations, "need_gpu", lambda device: None)
    batch = batches.make_batch(shape, CPU)
    if shape.levels == 0:
        with pytest.raises(implementations.MissingError, match="nothing is shared"):
            implementations.cascade(batch)
        return
    implementations.check(batch, implementations.cascade(batch), expected_of(batch))


def test_flash_attention_is_called_as_vllm_has_it(monkeypatch):
    folder = source_of("vllm.v1").parent.parent / "vllm_flash_attn"
    path = folder / "flash_attn_interface.py"
    spec = importlib.util.spec_from_file_location("real_interface", path)
    real = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(real)

    def attend(**given):
        inspect.signature(real.flash_attn_varlen_func).bind(**given)
        assert given["causal"] and given["scheduler_metadata"] == "schedule"
        result = grouped_attention_reference(
            given["q"],
            given["k"],
            given["v"],
            given["block_table"],
            given["seqused_k"],
            given["cu_seqlens_q"],
            given["softmax_scale"],
        )
        given["out"].copy_(result)

    def schedule(**given):
        inspect.signature(real.get_scheduler_metadata).bind(**given)
        return "schedule"

    import vllm.v1.attention.backends.fa_utils as utils

    monkeypatch.setattr(utils, "get_flash_attn_version", lambda head_size: 3)
    fake = types.SimpleNamespace(
        flash_attn_varlen_func=attend, get_scheduler_metadata=schedule
    )
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", fake)
    monkeypatch.setattr(implementations, "need_gpu", lambda device: None)
    batch = batches.make_batch(Shape(4, 3, 96, 1, 4, 2, **SIZES), CPU)
    implementations.check(batch, implementations.flash(batch), expected_of(batch))


class Event:
    """Time that goes by as stand-ins for implementations say."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.now

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return measure.Clock(CPU, 0.0)


def test_implementations_take_turns_cold_then_warm(clock):
    calls = []

    def takes(name, cold, warm):
        def call():
            calls.append(name)
            Event.now += warm if calls[-2:] == [name, name] else cold
            if calls[-2:] == [name, name]:
                calls.append("flush")

        return implementations.Implementation(name, call)

    who = [takes("a", 3.0, 1.0), takes("b", 5.0, 2.0)]
    first, second = clock.measure(who, 4)
    assert first == {
        "cold_s": {"median": 3.0, "min": 3.0, "max": 3.0},
        "warm_s": {"median": 1.0, "min": 1.0, "max": 1.0},
    }
    assert second["cold_s"]["median"] == 5.0
    assert second["warm_s"]["max"] == 2.0
    order = [name for name in calls if name != "flush"]
    rounds = measure.WARM_UP + 4
    assert order == [*"aabbbbaa"] * (rounds // 2) + [*"aabb"] * (rounds % 2)


def test_a_timed_result_is_whole_and_drawn(monkeypatch, tmp_path):
    class Ticks:
        def __init__(self, device, cache_size):
            pass

        def measure(self, who, repeats):
            times = {OURS: 2.0, VLLM: 6.0}
            spread = [measure.spread([times[w.name]] * repeats) for w in who]
            return [{"cold_s": s, "warm_s": s} for s in spread]

    monkeypatch.setattr(measure, "Clock", Ticks)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "stand-in")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 << 30, 2 << 30))
    sizes = [(4, 1, 320, 0), (4, 1, 320, 1), (4, 1, 1 << 24, 0)]
    asked = [Shape(*size, 2, 1, **SIZES) for size in sizes]
    path = tmp_path / "out.json"
    with measure.on_cpu():
        measure.run(asked, CPU, 3, path)
    result = json.loads(path.read_text())
    assert result["mode"] == "timed"
    assert result["device"]["name"] == "stand-in"
    assert result["device"]["model"]["memory"] == DEVICES["interpreter"].memory
    assert result["settings"]["repeats"] == 3
    rows = list(result["rows"])
    assert re.fullmatch(r"needs \d+ GB of 2 free", rows.pop()["skipped"])
    left, grouped = rows
    assert left["speedup"] == {
        "declined": True,
        "predicted": 1.0,
        "cold": 1.0,
        "warm": 1.0,
    }
    assert left["contenders"][OURS] == {"status": "left to vLLM"}
    gain, every = grouped["speedup"], grouped["contenders"]
    assert gain["cold"] == gain["warm"] == 3.0
    assert gain["predicted"] > 1
    for name, taken in ((OURS, 2.0), (VLLM, 6.0)):
        one = every[name]
        assert one["bytes_per_s"] == one["bytes"] / taken
        assert one["of_model"] == one["predicted_s"] / taken
    assert every[VLLM]["bytes"] == 4 * (320 + 21) * 2 * 32 * 2
    assert every[FLASH]["status"] and every[CASCADE]["status"]
    assert cli.main(["--replot", str(path)]) == 0
    assert path.with_suffix(".png").exists()
    assert report.table(result).row_count == 3


def test_an_implementation_that_differs_stops_everything(monkeypatch, tmp_path, capsys):
    attend = vllm_kernel.attend

    def wrong(q, k, v, out, *rest):
        attend(q, k, v, out, *rest)
        out[0, 0] *= 1.05

    monkeypatch.setattr(vllm_kernel, "attend", wrong)
    options = ["--interpret", "--batch", "2x2", "--prefix", "64", "--levels", "1"]
    options += ["--output", str(tmp_path / "out.json")]
    assert cli.main(options) == 1
    printed = capsys.readouterr().err
    assert re.search(r"MISMATCH: vLLM Triton differs by 0\.0(49|5)", printed)
    assert "2 x 2 requests, prefix 64" in printed


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 0.0])
def test_a_head_that_is_lost_is_a_difference(broken):
    expected = torch.randn(3, 2, 32)
    result = expected.clone()
    result[1, 1] = broken
    assert not implementations.difference(result, expected) <= implementations.TOLERANCE
    assert implementations.difference(expected, expected) == 0


def test_the_kernel_is_vllms_and_vllm_keeps_its_own():
    import vllm.triton_utils as utils
    import vllm.v1.attention.ops.triton_unified_attention as theirs

    before = utils.triton, utils.tl, theirs.kernel_unified_attention
    function = vllm_kernel.unified_attention()
    assert function is vllm_kernel.unified_attention()
    assert hasattr(function.__globals__["kernel_unified_attention"], "run")
    assert (utils.triton, utils.tl, theirs.kernel_unified_attention) == before
    name = theirs.__name__
    assert sys.modules[name] is theirs
    assert sys.modules[name.rpartition(".")[0]].triton_unified_attention is theirs


def test_segments_are_as_vllms_backend_makes_them():
    source = source_of("vllm.v1.attention.backends.triton_attn").read_text()
    for name, ours in (
        ("MIN_LAUNCH_GRID_SIZE_2D", vllm_kernel.LEAST_PROGRAMS),
        ("NUM_PAR_SOFTMAX_SEGMENTS", vllm_kernel.SEGMENTS),
    ):
        assert re.search(rf"^{name} = {ours}\b", source, re.M)
    made = vllm_kernel.segment_buffers(32, 8, 80, 4, CPU)
    assert made["seq_threshold_3D"] == 16
    assert made["softmax_segm_output"].shape == (16, 32, 16, 128)
    assert vllm_kernel.splits(16, 1, 8)
    assert not vllm_kernel.splits(17, 1, 8)
    assert not vllm_kernel.splits(2, 4, 8)
