"""Plans against arithmetic by hand, bytes against packed files, memory against what autograd keeps; units; hardware."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bitquest as bq
from bitquest.errors import ConfigError, DataError
from bitquest.evaluation.plan import Measured, Request, make_plan, size_text
from bitquest.evaluation.plan_hardware import HARDWARE, find_hardware
from bitquest.evaluation.plan_measured import read_measured
from bitquest.evaluation.plan_models import Shapes, cache_bytes, packed_bytes, training_bytes, training_flops
from bitquest.evaluation.plan_units import Budget, parse_budget, parse_bytes, parse_count, parse_seconds
from bitquest.evaluation.plan_words import advice, assumptions, plan_table
from bitquest.evaluation.scaling_fitted import load_law
from bitquest.export import packed_sizes, save
from bitquest.inference.kv_cache import KVCache
from bitquest.models import PRESETS, Llama, LlamaConfig


def _shape(width, hidden, layers, vocabulary):
    return Shapes(np.array([width]), np.array([hidden]), np.array([layers]), vocabulary)


# --- bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme", ["w1a1", "w2a8-g64", "w3a3-norot", "w4a4-4:8", "w4a4-2:4", "w4a4-fp4", "w8a8", "none"]
)
def test_bytes_are_those_of_a_packed_model(tmp_path, scheme):
    config = LlamaConfig(100, 128, 384, 2, 2, 2, 32)
    tables = "" if scheme == "none" else "-h8"
    model = bq.quantize_(Llama(config), scheme + tables)
    if scheme == "none":
        model = model.to(torch.bfloat16)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data = parameter.data.float()
    save(model, tmp_path / "packed")
    sizes = packed_sizes(tmp_path / "packed")
    weights = packed_bytes(_shape(128, 384, 2, 100), scheme, 16 if scheme == "none" else 8)
    assert weights.total[0] == sizes["total_bytes"]
    assert (weights.embedding[0], weights.head[0]) == (sizes["embedding_bytes"], sizes["head_bytes"])
    assert weights.read_per_token[0] == sizes["total_bytes"] - weights.embedding[0] + weights.row[0]


def test_counts_are_the_models():
    config = LlamaConfig(100, 128, 384, 3, 2, 2, 32)
    shapes = _shape(128, 384, 3, 100)
    model = Llama(config)
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert shapes.parameters[0] == config.non_embedding_parameters
    assert shapes.parameters[0] + 2 * shapes.table_parameters[0] == everything
    cache = KVCache(config, positions=32, dtype=torch.bfloat16)
    assert cache_bytes(shapes, 32, 16)[0] == 2 * (cache.keys.numel() + cache.values.numel())
    assert training_flops(shapes)[0] == 6 * (everything - 128 * 100)


def test_the_presets_are_candidates():
    shapes = Shapes.candidates(32_000)
    found = set(zip(shapes.layers.tolist(), shapes.width.tolist(), strict=True))
    assert {(layers, width) for layers, width, _ in PRESETS.values()} <= found
    sizes = np.sort(shapes.parameters[shapes.parameters > 10**7])
    assert (sizes[1:] / sizes[:-1]).max() < 1.2


@pytest.mark.parametrize("scheme", ["none", "w4a4", "w1a16"])
def test_training_memory_is_about_what_autograd_keeps(scheme):
    """Saved tensors under bfloat16 autocast; the estimate is of the largest kind and must not be below by a tenth."""
    config, tokens = LlamaConfig(512, 256, 768, 3, 4, 4, 128), 4 * 128
    model = bq.quantize_(Llama(config), scheme).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    words = torch.randint(0, 512, (4, 128))
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        F.cross_entropy(model(words).flatten(0, 1).float(), words.flatten())
    state, activations = training_bytes(_shape(256, 768, 3, 512), tokens)
    measured = sum(kept.values())
    assert 0.9 * measured < activations[0] < 1.7 * measured
    assert state[0] == 16 * sum(parameter.numel() for parameter in model.parameters())


# --- plans ---------------------------------------------------------------------------------------------------------


def _request(**changes):
    fields = {
        "law": load_law(None),
        "formats": ("bf16", "w4a4", "w1a1"),
        "train_on": HARDWARE["h100"],
        "run_on": HARDWARE["desktop"],
    }
    return Request(**(fields | changes))


def test_a_plan_by_hand():
    """Every number of one choice, computed again from its shape."""
    plan = make_plan(_request(memory=3e8, tokens=2e10, context=1024, utilization=0.4, devices=8, overhead=1.2))
    one = next(choice for choice in plan.choices if choice.format == "w4a4")
    d, h, layers, v = one.width, one.hidden, one.layers, 32_000
    n = layers * (4 * d * d + 3 * d * h + 2 * d) + d
    assert one.parameters == n
    codes = layers * (4 * d * d + 3 * d * h) // 2
    scales = 4 * layers * (4 * d + 2 * h + d)
    norms = 4 * (2 * layers * d + d)
    assert one.blocks_bytes == codes + scales + norms
    assert one.embedding_bytes == one.head_bytes == v * (d + 4)
    assert one.cache_bytes == 2 * layers * d * 1024 * 2
    assert one.packed_bytes + one.cache_bytes <= 3e8
    law, eff = plan.request.law.law, plan.request.law.efficiencies["w4a4"]
    assert one.loss == pytest.approx(law.a / (n * eff) ** law.alpha + law.b / 2e10**law.beta + law.e)
    assert one.loss_interval[0] < one.loss < one.loss_interval[1]
    assert one.training_flops == pytest.approx(1.2 * 6 * (n + v * d) * 2e10)
    assert one.device_hours == pytest.approx(one.training_flops / (989.4e12 * 0.4) / 3600)
    assert one.wall_hours == pytest.approx(one.device_hours / 8)
    assert one.dollars == pytest.approx(one.device_hours * 2.69)
    read = one.blocks_bytes + one.head_bytes + (d + 4) + one.cache_bytes
    assert one.decode_seconds == pytest.approx(read / 89.6e9)
    assert not one.decode_measured
    assert one.training_state_bytes == 16 * (n + 2 * v * d)


def test_nothing_allowed_is_better():
    """No candidate that keeps the limits has a lower loss than the chosen one."""
    request = _request(memory=2e8, latency=2e-3)
    for one in make_plan(request).choices:
        shapes = Shapes.candidates(32_000)
        weights = packed_bytes(shapes, one.format, 16 if one.format == "bf16" else 8)
        cache = cache_bytes(shapes, 2048, 16)
        allowed = (weights.total + cache <= 2e8) & ((weights.read_per_token + cache) / 89.6e9 <= 2e-3)
        n = shapes.parameters[allowed]
        law, eff = request.law.law, request.law.efficiencies[one.format]
        losses = law.a / (n * eff) ** law.alpha + law.b / (100.0 * n) ** law.beta + law.e
        assert one.loss == pytest.approx(losses.min())


def test_a_loss_that_everything_meets_is_said():
    said = "Every format meets a loss of 100 at every size considered; the smallest model considered is shown."
    assert said in advice(make_plan(_request(loss=100.0, prefer="bytes")))
    assert "it rules nothing out" in " ".join(advice(make_plan(_request(loss=100.0, memory=1e9))))
    assert not make_plan(_request(loss=2.8, prefer="bytes")).loss_is_idle


def test_a_loss_is_reached_with_the_fewest_bytes():
    plan = make_plan(_request(loss=2.8, prefer="bytes"))
    assert all(choice.loss <= 2.8 for choice in plan.choices)
    stored = [choice.packed_bytes + choice.cache_bytes for choice in plan.choices]
    assert stored == sorted(stored)
    assert [choice.format for choice in plan.choices] == ["w4a4", "bf16", "w1a1"]
    cheap = make_plan(_request(loss=2.8, prefer="cost"))
    assert [c.training_flops for c in cheap.choices] == sorted(c.training_flops for c in cheap.choices)
    assert cheap.choices[0].training_flops <= min(c.training_flops for c in plan.choices)


def test_a_budget_is_spent_within_the_laws_range_of_tokens():
    flops = 100 * 3600 * 989.4e12 * 0.35
    for one in make_plan(_request(flops=flops)).choices:
        assert 0.9 * flops < one.training_flops <= flops * (1 + 1e-6)
        assert 24.3 <= one.tokens / one.parameters <= 101
    fixed = make_plan(_request(flops=flops, tokens=1e10)).best
    assert fixed.tokens == 1e10
    assert 0.8 * flops < fixed.training_flops <= flops * (1 + 1e-6)
    ratio = make_plan(_request(flops=flops, tokens_per_parameter=20)).best
    assert ratio.tokens == pytest.approx(20 * ratio.parameters)


def test_extrapolation_is_said_loudly():
    words = advice(make_plan(_request(memory=2e9, tokens=1e11)))
    assert any(line.startswith("EXTRAPOLATED: size 2.6B is 3.16 times above the fit's") for line in words)
    plan = make_plan(_request(memory=3e8))
    assert not any("EXTRAPOLATED" in line for line in advice(plan))
    assert {row[-1] for row in plan_table(plan).rows} == {"yes"}
    text = " ".join(assumptions(plan))
    for piece in ("quest_paper_runs.csv", "100 tokens per parameter", "32,000 words", "2,048 positions", "35 %", "2.69",
                  "an assumption", "89.6 GB/s", "16 bytes a parameter", "not identifiable"):  # fmt: skip
        assert piece in text, piece


def test_what_was_measured_replaces_the_floor(tmp_path):
    path = tmp_path / "bench.json"
    row = {"bytes_per_token": 3e8, "decode": {"median_seconds": 0.1}}
    result = {"formats": {"w4a4": row}, "threads": 2, "hardware": {"cpu": "some CPU", "date": "2026-01-01"}}
    path.write_text(json.dumps(result))
    measured = read_measured(path)
    assert measured.bytes_per_second == {"w4a4": 3e9}
    plan = make_plan(_request(memory=3e8, measured=measured))
    by_format = {choice.format: choice for choice in plan.choices}
    assert by_format["w4a4"].decode_measured
    assert not by_format["w1a1"].decode_measured
    floor = {choice.format: choice for choice in make_plan(_request(memory=3e8)).choices}["w4a4"]
    assert by_format["w4a4"].decode_seconds == pytest.approx(floor.decode_seconds * 89.6 / 3)
    assert "some CPU, 2 threads, 2026-01-01" in " ".join(assumptions(plan))
    for text in ("no", "{}", json.dumps({**result, "formats": {}})):
        path.write_text(text)
        with pytest.raises(DataError, match=r"bench\.json"):
            read_measured(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "nothing is asked"),
        (
            {"memory": 1e3},
            "the memory that is asked: the smallest model takes 12.7 MB with 32,000 words and a cache of",
        ),
        ({"latency": 1e-6}, "the latency that is asked: the fastest model takes 0.0951 ms a token on desktop"),
        ({"loss": 0.1}, r"the lowest loss is 1\.\d+ nats per token \(the law's floor with 100 tokens per parameter\)"),
        ({"loss": 1.2, "tokens": 1e9}, "the law's floor with 1B tokens"),
        ({"flops": 1e9}, "the training budget is too small: the budget pays for"),
        ({"flops": 1e9, "tokens": 1e9}, "the training budget that is asked: the cheapest training takes"),
        (
            {"memory": 1e8, "loss": 2.5},
            "memory and loss together. bf16: the lowest loss is .* within the limits of memory",
        ),
        ({"memory": 1e9, "tokens": 1e9, "tokens_per_parameter": 20.0}, "leave one out"),
        ({"loss": -1.0}, "a loss is a positive number"),
        ({"loss": math.nan}, "a loss is a positive number"),
        ({"memory": 1e9, "table_bits": 5}, "--tables 5"),
        ({"memory": 1e9, "prefer": "speed"}, "--prefer speed"),
        ({"memory": 1e9, "train_on": HARDWARE["pi5"]}, "--hardware pi5: no peak speed"),
    ],
)
def test_impossible_requests(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(_request(**changes))


def test_a_format_that_cannot_is_named():
    plan = make_plan(_request(memory=3e8, loss=2.8, prefer="bytes"))
    assert [choice.format for choice in plan.choices] == ["w4a4"]
    assert set(plan.impossible) == {"bf16", "w1a1"}
    assert any(line.startswith("w1a1 cannot: the lowest loss is 3.") for line in advice(plan))


# --- units and hardware --------------------------------------------------------------------------------------------


def test_quantities():
    assert [parse_count("", text) for text in ("100B", "3.5M tokens", "2e10", "1_000", "7k")] == [
        1e11, 3.5e6, 2e10, 1000, 7000,
    ]  # fmt: skip
    assert [parse_bytes("", text) for text in ("2GB", "512 MiB", "1gib", "300000", "1.5 kB")] == [
        2e9, 512 * 2**20, 2**30, 3e5, 1500,
    ]  # fmt: skip
    assert [parse_seconds("", text) for text in ("20ms", "0.5 s", "300us")] == [0.02, 0.5, pytest.approx(3e-4)]
    assert parse_budget("", "100 H100-hours") == Budget(hours=100, machine="h100")
    assert parse_budget("", "1 rtx4090 hour") == Budget(hours=1, machine="rtx4090")
    assert (
        parse_budget("", "$5000")
        == parse_budget("", "5,000 USD")
        == parse_budget("", "5k dollars")
        == Budget(dollars=5e3)
    )
    assert parse_budget("", "1e21 FLOP") == Budget(flops=1e21)
    assert [size_text(size) for size in (12, 1234, 5.6e6, 999.9e6, 2e9, 3e12)] == [
        "12 bytes", "1.23 kB", "5.6 MB", "1 GB", "2 GB", "3 TB",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("parse", "text", "example"),
    [
        (parse_count, "banana", "100B"),
        (parse_count, "0", "more than nothing"),
        (parse_count, "-5B", "100B"),
        (parse_bytes, "2 gigs", "2GB"),
        (parse_bytes, "", "2GB"),
        (parse_seconds, "20", "20ms"),
        (parse_budget, "three bananas", "H100-hours"),
        (parse_budget, "$", "H100-hours"),
    ],
)
def test_what_is_no_quantity(parse, text, example):
    with pytest.raises(ConfigError) as caught:
        parse("--option", text)
    assert f"--option {text!r}" in str(caught.value)
    assert example in str(caught.value)


def test_hardware_has_sources_and_dates():
    for machine in HARDWARE.values():
        assert machine.source
        assert machine.date
        assert (machine.price_per_hour is None) == (not machine.price_source)


def test_hardware_of_ones_own(tmp_path):
    path = tmp_path / "machines.toml"
    path.write_text('[h100]\nprice_per_hour = 4\n[box]\nmemory_gb = 64\nbandwidth_gbs = 200\nsource = "measured"\n')
    ours = find_hardware("H100", path)
    assert (ours.price_per_hour, ours.peak_tflops, ours.price_source) == (4, 989.4, str(path))
    box = find_hardware("box", path)
    assert (box.memory_gb, box.source, box.trains) == (64, "measured", False)
    with pytest.raises(ConfigError, match="unknown hardware 'h10'; did you mean 'h100'"):
        find_hardware("h10")
    for text, message in (
        ("[box]\nmemory_gb = 64\n", r"\[box\]: bandwidth_gbs missing"),
        ("[box]\nmemory = 64\n", "unknown key 'memory'; did you mean 'memory_gb'"),
        ("[h100]\nprice_per_hour = -1\n", "must be a positive number, not -1"),
        ("[h100]\nsource = 3\n", "source must be text"),
        ("h100 = 3\n", "a machine is a table"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            find_hardware("h100", path)


def test_a_law_of_ones_own_decides():
    law = load_law(None)
    better = replace(law, efficiencies={**law.efficiencies, "w1a1": 1.0}, samples=())
    plan = make_plan(_request(law=better, memory=3e8))
    assert plan.best.format == "w1a1"
    assert plan.best.loss_interval is None
    assert plan_table(plan, wide=False).rows[0][3] == "–"
    json.dumps(plan.to_json())
    assert make_plan(_request(memory=3e8, measured=Measured({}, "nowhere"))).best.format == "w4a4"


def test_a_format_that_cannot_be_packed():
    law = load_law(None)
    other = replace(law, efficiencies={**law.efficiencies, "w8a8-4:8": 0.5}, samples=())
    plan = make_plan(_request(law=other, memory=3e8, formats=("w4a4", "w8a8-4:8")))
    assert plan.impossible == {"w8a8-4:8": "sparse 8-bit weights have no packed form"}
    with pytest.raises(ConfigError, match="w8a8-4:8: sparse 8-bit"):
        make_plan(_request(law=other, memory=3e8, formats=("w8a8-4:8",)))
