"""The GPU benchmark on the interpreted kernels: every case runs, and every output is what the definition says."""

import json

import pytest
import torch

from bitquest.ops.backend import backend_report

CASES = {
    "prefill-w4a4": "triton",
    "w1a1-4096": "triton",
    "w2a2": "triton",
    "prefill-w8a8": "triton",
    "prefill-fp4": "triton",
    "sparse-w4a4": "triton",
    "decode-w4": "triton",
    "decode-w2": "triton",
    "decode-w1": "triton",
    "decode-w1a8": "triton",
    "decode-w2a8": "triton",
    "block-w4a4": "triton",
    "block-w1a1": "triton",
}


@pytest.fixture(autouse=True)
def _asked_anew():
    """What there is differs inside this folder and outside."""
    backend_report.cache_clear()
    yield
    backend_report.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_case_under_the_interpreter(case, capsys):
    from bitquest.benchmarks import gpu_worker

    words = ["--device", "cpu", "--backend", "triton", "--rounds", "1", "--tiny"]
    assert gpu_worker.main([case, *words]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    result = next(line["result"] for line in said if line.get("row") == case)
    assert (result["status"], result.get("reason")) == ("measured", None)
    assert {row["backend"] for row in result["rows"]} == {CASES[case]}


@pytest.mark.parametrize("scheme", ["w4a4", "w1a1"])
def test_a_small_model_layer_by_layer_under_the_interpreter(scheme):
    from bitquest.benchmarks import gpu_step
    from bitquest.benchmarks.gpu_context import Context
    from bitquest.benchmarks.gpu_table import TINY
    from bitquest.models import Llama, LlamaConfig

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16}
    plain = Llama(LlamaConfig(**sizes, **heads)).init_weights(0)
    windows = torch.randint(0, 32, (1, 10), generator=torch.Generator().manual_seed(0))
    context = Context(torch.device("cpu"), "triton", TINY, 1)
    checks = gpu_step._check(plain, scheme, windows, context)
    assert any("outputs of 7 layers" in name for name in checks)
