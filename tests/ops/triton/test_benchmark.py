"""The GPU benchmark on the interpreted kernels: every case runs, and every output is what the definition says."""

import json

import pytest

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
    "step-bf16": "triton",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_case_under_the_interpreter(case, capsys):
    from bitquest.benchmarks import gpu_worker

    backend_report.cache_clear()  # asked perhaps before the interpreter was chosen
    words = ["--device", "cpu", "--backend", "triton", "--rounds", "1", "--tiny"]
    assert gpu_worker.main([case, *words]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    result = next(line["result"] for line in said if line.get("row") == case)
    assert (result["status"], result.get("reason")) == ("measured", None)
    assert {row["backend"] for row in result["rows"]} == {CASES[case]}
