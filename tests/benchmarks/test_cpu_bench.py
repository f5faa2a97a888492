"""The CPU benchmark: checks before times, honest ratios, targets, and what it says where something is missing."""

import time

import pytest
import torch

from bitquest.benchmarks import cpu_ceilings, cpu_layers
from bitquest.benchmarks.cpu import Bench, Plan, judged
from bitquest.benchmarks.cpu_check import WrongResultError, check_layer
from bitquest.benchmarks.cpu_decode import Generating, PlainTorch
from bitquest.benchmarks.cpu_layers import measure_layer
from bitquest.benchmarks.cpu_models import judge_model
from bitquest.benchmarks.cpu_random import float_llama, model_bytes, packed_llama, random_linear, random_weight
from bitquest.benchmarks.cpu_report import lines, one_line
from bitquest.benchmarks.cpu_roofline import draw_roofline, points
from bitquest.benchmarks.cpu_table import CASES, GROUPS, QUICK, Goal, chosen
from bitquest.benchmarks.cpu_timing import (
    PAST_CACHE,
    WARM,
    copies_past_cache,
    last_level_cache,
    sampler,
    take_turns,
    thread_counts,
    torch_threads,
)
from bitquest.benchmarks.cpu_training import measure_memory
from bitquest.errors import ConfigError
from bitquest.models import LlamaConfig
from bitquest.models.fuse import fuse_
from bitquest.nn import PackedLinear, Scheme

CONFIG = LlamaConfig.preset("1M", vocab_size=96, max_position_embeddings=32, num_hidden_layers=2)


def _layer(scheme, k=64, n=48):
    s = Scheme.parse(scheme)
    return random_linear(k, n, s.weight, s.activation, s.rotation, torch.Generator().manual_seed(0))


# --- the table -----------------------------------------------------------------------------------------------------


def test_cases_and_groups():
    assert [case.name for case in chosen(())] == list(CASES)
    assert [case.name for case in chosen(("w4a4-one", "rows"))] == ["w4a4-one", "row-1", "row-4", "row-8"]
    assert set(GROUPS["layers"]) | set(GROUPS["rows"]) | set(GROUPS["model"]) | set(GROUPS["training"]) == set(CASES)
    assert {"w1a1-one", "w8a8-many", "row-1", "decode-w4a4", "step-w1a1", "memory-w1a1"} <= set(GROUPS["targets"])
    assert "w4a8-one" not in GROUPS["targets"]
    with pytest.raises(ConfigError, match="there is no case 'w9a9'; there are layers, rows"):
        chosen(("w9a9",))
    for case in CASES.values():
        Scheme.parse(case.scheme)


@pytest.mark.parametrize(
    ("name", "result", "reached", "met"),
    [
        ("memory-w4a4", {"rows": [{"ratio": 6.4}]}, 6.4, (True, None)),
        ("memory-w1a1", {"rows": [{"ratio": 15.9}]}, 15.9, (False, None)),
        ("step-w1a1", {"rows": [{"speedup": {"of_medians": 1.1}}]}, 1.1, (True, False)),
        ("row-1", {"rows": [{"seconds": {"a row": {"median_seconds": 1.2e-6}}}]}, 1.2e-6, (True, True)),
        ("row-8", {"rows": [{"seconds": {"a row": {"median_seconds": 1.4e-6}}}]}, 1.4e-6, (True, False)),
        ("decode-w4a4", {"rows": [{"goals": [{"of_medians": 1.2, "baseline": "llama.cpp Q4_0"}]}]}, 1.2, (True, False)),
        ("decode-w4a4", {"rows": [{"goals": [{"reason": "llama.cpp Q4_0 was not measured"}]}]}, None, None),
    ],
)
def test_targets(name, result, reached, met):
    case = judged(CASES[name], {"status": "measured", **result})
    (goal,) = case["goals"]
    assert goal["reached"] == reached
    assert (None if met is None else (goal["target_met"], goal["beyond_met"])) == met
    assert "target_met" not in judged(CASES[name], {"status": "measured", **result}, real=False)["goals"][0]


def test_layers_are_judged_by_the_engine_at_the_most_threads():
    def row(ratio):
        speed = {"engine": {"of_medians": ratio, "of_minima": 9.0}, "layer": {"of_medians": 99.0, "of_minima": 99.0}}
        return {"rows": [{"memory": WARM, "speedup": speed}, {"memory": PAST_CACHE, "speedup": {}}]}

    case = judged(CASES["w1a1-one"], {"status": "measured", "rows": [row(50.0), row(30.0)]})
    assert case["goals"][0] == {
        "against": "best of torch",
        "target": 20,
        "beyond": 40,
        "reached": 30.0,
        "target_met": True,
        "beyond_met": False,
    }


def test_a_models_baseline_is_the_best_of_its_kind():
    def seconds(**medians):
        return {name: {"median_seconds": m, "minimum_seconds": m / 2} for name, m in medians.items()}

    measured = {
        **seconds(w1a1=1.0),
        "torch bf16": {"median_seconds": 8.0, "minimum_seconds": 6.0},
        "torch float32": {"median_seconds": 6.0, "minimum_seconds": 5.0},
        "llama.cpp Q1_0": {"median_seconds": 3.0, "minimum_seconds": 3.0},
    }
    best = judge_model(CASES["prefill-w1a1"], Goal("best of torch", 6, 8), {"seconds": measured})
    assert best == {"baseline": "torch float32", "of_medians": 6.0, "of_minima": 10.0}
    one = judge_model(CASES["decode-w1a1"], Goal("torch bf16"), {"seconds": measured})
    assert (one["baseline"], one["of_medians"]) == ("torch bf16", 8.0)
    assert judge_model(CASES["prefill-w1a1"], Goal("llama.cpp, its best"), {"seconds": measured})["of_medians"] == 3.0
    missing = judge_model(CASES["decode-w4a4"], Goal("llama.cpp Q4_0"), {"seconds": measured})
    assert missing == {"reason": "llama.cpp Q4_0 was not measured"}


# --- timing --------------------------------------------------------------------------------------------------------


def test_turns():
    order = []

    def sample(name):
        return lambda: order.append(name) or len(order)

    timings = take_turns({"a": sample("a"), "b": sample("b")}, 2)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert timings["a"].seconds == (4, 5)
    assert len(take_turns({"a": sample("a")}, 50, budget=0.0)["a"].seconds) == 5  # the least
    assert len(take_turns({"a": sample("a")}, 3, budget=0.0)["a"].seconds) == 3


@pytest.mark.parametrize(("memory", "expected"), [(WARM, 6), (PAST_CACHE, 5)])
def test_a_sample_walks_through_the_copies(monkeypatch, memory, expected):
    calls, clock = [], iter([0.0, 0.001, 10.0, 13.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    copies = [lambda n=n: calls.append(n) for n in range(3)]
    taken = sampler(copies, memory, seconds=0.003)
    assert taken() == 1.0  # three seconds, three calls
    assert calls == [0, 1, 2, 0, 1, 2][:expected]


def test_the_machine():
    assert last_level_cache() > 0
    assert copies_past_cache(10**12) == 2
    assert (copies_past_cache(1), copies_past_cache(1, most=5)) == (64, 5)
    assert thread_counts([1]) == [1]
    assert thread_counts([1, 10**6]) == sorted({1, thread_counts([10**6])[0]})
    before = torch.get_num_threads()
    with torch_threads(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == before


# --- correct first -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["w1a1", "w4a4-2:4", "w8a8", "w1a8", "w4a4-g32", "w3a16", "w1a8-g32-norot"])
def test_a_right_layer_passes(scheme):
    layer, x = _layer(scheme), torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    checks = check_layer(layer, x, {"layer": lambda: layer(x)})
    assert all(check["found"] <= check["allowed"] for check in checks.values())
    assert "layer: output, of its rms" in checks


@pytest.mark.parametrize("scheme", ["w1a1", "w4a16"])
def test_a_wrong_output_is_found(scheme):
    layer, x = _layer(scheme), torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    for wrong in (lambda y: y * 1.001, lambda y: y.index_fill(1, torch.tensor(7), float("nan"))):
        with pytest.raises(WrongResultError, match="engine: output"):
            check_layer(layer, x, {"layer": lambda: layer(x), "engine": lambda wrong=wrong: wrong(layer(x))})
    for wrong in (lambda y: y[:, 1:], lambda y: y.double()):
        with pytest.raises(WrongResultError, match="engine: the output is"):
            check_layer(layer, x, {"engine": lambda wrong=wrong: wrong(layer(x))})


def test_wrong_codes_of_the_input_are_found(monkeypatch):
    layer, x = _layer("w4a4"), torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    honest = PackedLinear.encode_input
    monkeypatch.setattr(PackedLinear, "encode_input", lambda self, x: honest(self, x.roll(1, 0)))
    with pytest.raises(WrongResultError, match="of the input"):
        check_layer(layer, x, {})


def test_a_wrong_case_has_no_speed(monkeypatch):
    monkeypatch.setattr(cpu_layers, "check_layer", lambda *_: (_ for _ in ()).throw(WrongResultError("output: 3")))
    told = []
    bench = Bench(Plan(("w1a1-one",), (1,), 1, quick=True), told.append, lambda name, case: told.append((name, case)))
    bench.run()
    case = bench.results["w1a1-one"]
    assert (case["status"], case["reason"], case["goals"][0]["reached"]) == ("wrong", "output: 3", None)
    assert one_line("w1a1-one", case) == "w1a1-one: wrong: output: 3"
    assert any("wrong: output: 3" in line for line in lines(bench.to_json()))


@pytest.mark.parametrize("name", ["w1a1-one", "w4a4-4:8-many", "w2a16-one"])
def test_a_measured_layer(name):
    found = measure_layer(CASES[name], QUICK, 2)
    warm, past = found["rows"]
    assert (warm["memory"], past["memory"]) == (WARM, PAST_CACHE)
    assert past["copies"]["layer"] > warm["copies"]["layer"] == 1
    for who, ratio in warm["speedup"].items():
        torchs = [warm["seconds"][t]["median_seconds"] for t in ("torch float32", "torch bf16")]
        assert ratio["of_medians"] == min(torchs) / warm["seconds"][who]["median_seconds"]
    assert found["tokens"] == (QUICK.many if name.endswith("many") else 1)
    assert found["weight_bytes"] == QUICK.width**2 * int(name[1]) // 8


# --- random models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme", ["w1a1-h8", "w1a8-g32-norot-h8", "w4a4-2:4-h4", "w4a4-4:8-h8", "w8a8-h8", "w3a16-h8"]
)
def test_a_packed_llama_of_random_codes(scheme):
    model = packed_llama(CONFIG, Scheme.parse(scheme))
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        logits = model(ids)
        assert logits.isfinite().all()
        assert 0.01 < float(logits.std()) < 10
        torch.testing.assert_close(fuse_(model)(ids), logits, rtol=0.1, atol=0.05)
    assert not any(type(module) is torch.nn.Linear for module in model.modules())


def test_bytes_of_models():
    blocks = CONFIG.non_embedding_parameters
    plain = model_bytes(float_llama(CONFIG, torch.float32))
    assert plain["bytes"] == 4 * (blocks + 2 * 96 * 128)
    assert plain["bytes_per_token"] == 4 * (blocks + 96 * 128 + 128)
    packed = model_bytes(packed_llama(CONFIG, Scheme.parse("w1a1-h8")))
    norms = 128 * (2 * CONFIG.num_hidden_layers + 1)
    rows = CONFIG.num_hidden_layers * (4 * 128 + 2 * CONFIG.intermediate_size + 128)
    assert packed["bytes"] == (blocks - norms) // 8 + 4 * norms + 4 * rows + 2 * 96 * (128 + 4)
    sparse = model_bytes(packed_llama(CONFIG, Scheme.parse("w4a4-2:4-h8")))
    dense = model_bytes(packed_llama(CONFIG, Scheme.parse("w4a4-h8")))
    assert sparse["bytes"] - dense["bytes"] == (blocks - norms) // 8  # the kept mask, as bits


def test_float_models_share_blocks_only_if_asked():
    lean, whole = float_llama(CONFIG, torch.bfloat16, distinct_blocks=1), float_llama(CONFIG, torch.bfloat16)
    assert model_bytes(lean) == model_bytes(whole)  # of the model that it stands for
    shared, own = lean.model.layers, whole.model.layers
    assert shared[0].mlp.up_proj.weight is shared[1].mlp.up_proj.weight
    assert own[0].mlp.up_proj.weight.data_ptr() != own[1].mlp.up_proj.weight.data_ptr()
    weight = random_weight((1500, 1000), torch.bfloat16, torch.Generator().manual_seed(0))
    assert float(weight[-1].float().std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("make", [lambda: Generating(packed_llama(CONFIG, Scheme.parse("w2a2-h8"))),
                                  lambda: PlainTorch(float_llama(CONFIG, torch.bfloat16)),
                                  lambda: PlainTorch(float_llama(CONFIG, torch.float32, 1))])  # fmt: skip
def test_models_decode_and_prefill(make):
    runner = make()
    assert runner.decode(3) > 0
    assert runner.prefill(20) > 0


# --- memory, ceilings, the picture ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "bits"), [("w4a4", 5), ("w1a1", 2)])
def test_memory_kept_for_the_backward(scheme, bits):
    found = measure_memory(scheme, 128, 16)
    assert found["bytes_per_token"]["float32"]["bytes"] == 4 * 128
    if found["backend"] == "torch":
        pytest.skip("the native engine is not built here")
    assert found["bits_per_element"]["codes_and_masks"] == bits
    assert found["ratio"] == 32 / bits
    assert found["bits_per_element"]["with_scales"] == bits + 32 / 128


def test_ceilings(monkeypatch):
    monkeypatch.setattr(cpu_ceilings, "_SECONDS", 1e-3)
    found = cpu_ceilings.measure_ceilings(2, QUICK)
    assert found["memory"] > 0
    assert found["cache"] > 0
    monkeypatch.setenv("CC", "no-such-compiler")
    found = cpu_ceilings.measure_ceilings(1, QUICK)
    assert found["how"] == "torch: no C compiler was found"
    assert found["one_bit"] is None
    assert found["float32"] > 0


def test_the_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(cpu_ceilings, "_SECONDS", 1e-3)
    bench = Bench(Plan(("w1a1-one", "w1a8-many"), (1,), 1, True, ceilings=True), lambda _: None, lambda *_: None)
    bench.run()
    result = bench.to_json()
    found = list(points(result, 1))
    assert {point[0] for point in found} == {"1 bit × 1 or 2", "8-bit activations", "torch, float32 and bf16"}
    assert len(found) == 2 * (1 + 2 + 1)
    w1a1 = next(point for point in found if point[1] == "w1a1")
    assert w1a1[3] == 256**2 / (256**2 / 8 + 4 * 512)
    draw_roofline(result, tmp_path / "roof.png")
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="--plot draws layers, and none was measured"):
        draw_roofline({**result, "cases": {}}, tmp_path / "none.png")
    with pytest.raises(ConfigError, match="ceilings"):
        draw_roofline({**result, "ceilings": []}, tmp_path / "none.png")
