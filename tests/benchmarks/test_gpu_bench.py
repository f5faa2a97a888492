"""The GPU benchmark: its table, its worker, and the process that watches the worker."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bitquest.benchmarks import gpu, gpu_step, gpu_worker
from bitquest.benchmarks.gpu import Bench, Plan, add_floors, judged
from bitquest.benchmarks.gpu_check import WrongResultError
from bitquest.benchmarks.gpu_context import Context, describe_device
from bitquest.benchmarks.gpu_report import lines, main, one_line
from bitquest.benchmarks.gpu_table import JOBS, ROWS, TINY, Job, Sizes
from bitquest.benchmarks.gpu_timing import Burst, alternate_bursts, compare, prepare
from bitquest.errors import ConfigError

CPU = torch.device("cpu")


def test_every_row_has_a_job_and_every_job_a_function():
    assert sorted(row for job in JOBS for row in job.rows) == sorted(["floors", *ROWS])
    assert {job.kind for job in JOBS} == set(gpu_worker.KINDS)
    assert len({job.rows for job in JOBS}) == len(JOBS)
    for row in ROWS.values():
        assert row.target is not None
        assert row.beyond > row.target


def test_sizes_are_those_of_the_table():
    assert Sizes().tokens >= 8192
    assert set(Sizes().prefill) == {(4096, 4096), (4096, 11008), (11008, 4096)}
    assert Sizes().decode == (8192, 28672)
    assert (Sizes().block_width, Sizes().block_tokens, Sizes().preset) == (2048, 32768, "430M")


# --- the worker ------------------------------------------------------------------------------------------------------


@pytest.fixture
def worker(capsys):
    """worker(row names…): what it said, as objects."""

    def run(*rows):
        code = gpu_worker.main([*rows, "--device", "cpu", "--backend", "torch", "--rounds", "1", "--tiny"])
        return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def test_a_worker_says_what_it_begins_finds_and_ends(worker):
    code, said = worker("w1a1-4096", "decode-w2")
    assert code == 0
    assert said[0]["device"]["torch"] == torch.__version__
    assert [next(iter(line)) for line in said[1:]] == ["begin", "row", "end"] * 2
    assert [line["row"] for line in said if "row" in line] == ["w1a1-4096", "decode-w2"]
    for line in said:
        if "row" in line:
            assert line["result"]["status"] == "measured"
            assert [row["memory"] for row in line["result"]["rows"]] == ["past the L2", "L2-warm", "eager"]
            for row in line["result"]["rows"]:
                ours = row["ours"]
                assert ours["speedup_of_medians"] == pytest.approx(
                    row["bf16"]["median_seconds"] / ours["median_seconds"]
                )
                assert row["copies"] > 1 or row["memory"] != "past the L2"


@pytest.mark.parametrize("row", ["block-w1a1", "step-bf16", "sparse-w4a4", "prefill-fp4"])
def test_every_kind_runs_on_a_cpu(worker, row):
    code, said = worker(row)
    assert code == 0
    results = {line["row"]: line["result"] for line in said if "row" in line}
    assert {result["status"] for result in results.values()} == {"measured"}
    assert row in results
    assert all(check["found"] <= check["allowed"] for check in results[row]["checks"].values() if "found" in check)


def test_a_step_that_does_not_compile_has_no_ratio_that_counts(worker, monkeypatch):
    def refused(*_, **__):
        def compiled(*_):
            raise torch._dynamo.exc.TorchDynamoException("a graph break\nmore")

        return compiled

    monkeypatch.setattr(gpu_step, "is_compiled", lambda _: True)
    monkeypatch.setattr(torch, "compile", refused)
    _, said = worker("step-bf16")
    results = {line["row"]: line["result"] for line in said if "row" in line}
    assert list(results) == ["step-bf16", "step-paper"]
    for row, result in results.items():
        assert (result["status"], result["reason"]) == ("failed", "torch.compile: a graph break")
        assert result["rows"][0]["memory"] == "uncompiled"
        assert "target_met" not in judged(row, result)
        assert one_line(row, judged(row, result)) == f"{row}: failed: torch.compile: a graph break"


def test_floors_stand_alone(worker, monkeypatch):
    monkeypatch.setattr(torch, "_int_mm", lambda *_: 1 / 0)
    _, said = worker("floors")
    found = [line["result"]["floors"] for line in said if "row" in line][-1]
    assert found["copy"]["value"] > 0
    assert found["torch._int_mm, 128³"]["value"] is None
    assert "ZeroDivisionError" in found["torch._int_mm, 128³"]["reason"]
    assert "CUDA" in found["b1 product alone by wgmma, 128³"]["reason"]
    assert found["mask and rotate back 48×128 bf16"]["value"] > 0


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (WrongResultError("output: 3, and at most 1"), "wrong", "output: 3"),
        (ConfigError("no such kernel"), "not measured", "no such kernel"),
        (RuntimeError("CUDA out of memory\nmore"), "failed", "RuntimeError: CUDA out of memory"),
    ],
)
def test_one_job_that_fails_leaves_the_others(worker, monkeypatch, error, status, reason):
    def broken(*_):
        raise error

    monkeypatch.setitem(gpu_worker.KINDS, "square", broken)
    code, said = worker("w1a1-8192", "decode-w4")
    results = {line["row"]: line["result"] for line in said if "row" in line}
    assert code == 0
    assert results["w1a1-8192"]["status"] == status
    assert results["w1a1-8192"]["reason"].startswith(reason)
    assert "rows" not in results["w1a1-8192"]
    assert results["decode-w4"]["status"] == "measured"


def test_a_lost_device_ends_the_worker(worker, monkeypatch):
    def lost(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(gpu_worker.KINDS, "square", lost)
    monkeypatch.setattr(gpu_worker, "_device_answers", lambda _: False)
    code, said = worker("w1a1-8192", "decode-w4")
    assert code == 3
    assert said[-1] == {"end": ["w1a1-8192"]}


# --- watching it -----------------------------------------------------------------------------------------------------

A, B, C = (Job("square", (name,), limit=2.0) for name in ("w1a1-8192", "w1a1-4096", "w2a2"))
_SAY = "import json, sys, time\ndef say(**f): print(json.dumps(f), flush=True)\nsay(device={'gpu': 'x'})\n"
_FINE = "say(begin=[n]); say(row=n, result={'status': 'measured', 'rows': []}); say(end=[n])\n"


@pytest.fixture
def watched(monkeypatch):
    """watched({row: Python of its turn}, budget): the results of a bench whose workers run that."""

    def run(turns, budget=60.0, jobs=(A, B, C)):
        monkeypatch.setattr(gpu, "JOBS", jobs)
        monkeypatch.setattr(gpu, "_SHORTEST", 0.2)

        def command(self, left):
            body = _SAY + "".join(f"n = {job.rows[0]!r}\n{turns.get(job.rows[0], _FINE)}" for job in left)
            return [sys.executable, "-c", body]

        monkeypatch.setattr(Plan, "command", command)
        bench = Bench(Plan(budget=budget), lambda *_: None)
        bench.run()
        return bench

    return run


def test_a_hanging_kernel_costs_its_own_row(watched):
    began = time.monotonic()
    bench = watched({"w1a1-4096": "say(begin=[n]); time.sleep(60)\n"})
    assert time.monotonic() - began < 20
    assert bench.device == {"gpu": "x"}
    assert {row: result["status"] for row, result in bench.results.items()} == {
        "w1a1-8192": "measured",
        "w1a1-4096": "failed",
        "w2a2": "measured",
    }
    assert bench.results["w1a1-4096"]["reason"] == "no answer within 2 s"


@pytest.mark.parametrize("turn", ["say(begin=[n]); sys.exit(7)\n", f"{_FINE}; sys.exit(3)\n".replace("\n;", ";")])
def test_a_worker_that_ends_is_replaced(watched, turn):
    bench = watched({"w1a1-8192": turn})
    assert [bench.results[row]["status"] for row in ("w1a1-4096", "w2a2")] == ["measured"] * 2
    if "7" in turn:
        assert bench.results["w1a1-8192"]["reason"] == "the measuring process ended with 7"


def test_a_worker_that_never_starts(watched):
    bench = watched({"w1a1-8192": "sys.exit(1)\n", "w1a1-4096": "sys.exit(1)\n"})
    assert "did not start" in bench.results["w1a1-8192"]["reason"]
    assert bench.results["w2a2"]["status"] == "measured"


def test_children_that_hold_the_pipe_open_hold_nothing_up(watched):
    child = "import subprocess; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    began = time.monotonic()
    bench = watched({"w1a1-8192": f"say(begin=[n]); {child}; sys.exit(7)\n"}, jobs=(A, B))
    assert time.monotonic() - began < 15
    assert bench.results["w1a1-8192"]["reason"] == "the measuring process ended with 7"
    assert bench.results["w1a1-4096"]["status"] == "measured"


def test_a_worker_ends_with_the_one_who_started_it(tmp_path):
    code = (
        "import subprocess, sys, os, signal\n"
        "from bitquest.benchmarks.gpu import Worker\n"
        "body = 'import os, time; from bitquest.benchmarks.gpu_worker import end_with_parent, say; '"
        "'end_with_parent(); say(pid=os.getpid()); time.sleep(60)'\n"
        "import time\n"
        "worker = Worker([sys.executable, '-c', body])\n"
        "print(worker.next(time.monotonic() + 50)['pid'], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pid, until = int(done.stdout), time.monotonic() + 10
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if (Path(f"/proc/{pid}/stat").read_text().split()[2:3] or ["Z"])[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("it outlived its parent")


def test_the_budget_skips_what_it_does_not_reach(watched):
    bench = watched({"w1a1-4096": "say(begin=[n]); time.sleep(60)\n"}, budget=1.5)
    assert bench.results["w1a1-8192"]["status"] == "measured"
    assert (bench.results["w1a1-4096"]["status"], bench.results["w2a2"]["status"]) == ("not measured",) * 2
    assert bench.results["w2a2"]["reason"] == "the budget of 1.5 s ended before"
    assert 1 < bench.seconds < 10


def test_what_was_said_before_the_end_stays(watched):
    two = Job("step", ("step-bf16", "step-paper"), limit=1.0)
    turn = "say(begin=['step-bf16', 'step-paper']); say(row=n, result={'status': 'measured'}); time.sleep(60)\n"
    bench = watched({"step-bf16": turn}, jobs=(two, A))
    assert [bench.results[row]["status"] for row in ("step-bf16", "step-paper")] == ["measured", "failed"]
    assert list(bench.to_json()["cases"]) == ["w1a1-8192", "step-bf16", "step-paper"]


def test_jobs_by_name():
    assert [job.rows for job in Plan(only=("step-paper", "floors")).jobs()] == [
        ("floors",),
        ("step-bf16", "step-paper"),
    ]
    assert len(Plan().jobs()) == len(JOBS)
    with pytest.raises(ConfigError, match="there is no case 'w9a9'; there are floors, prefill-w4a4"):
        Plan(only=("w9a9",)).jobs()


# --- what is made of it ----------------------------------------------------------------------------------------------


def _measured(*ratios, memory="past the L2"):
    def times(ratio):
        return {"median_seconds": 1e-4 / ratio, "speedup_of_medians": ratio, "speedup_of_minima": ratio + 0.01}

    rows = [
        {"shape": f"shape {n}", "memory": memory, "bf16": times(1.0), "ours": times(ratio)}
        for n, ratio in enumerate(ratios)
    ]
    return {"status": "measured", "rows": rows}


def test_the_slowest_shape_decides():
    found = judged("prefill-w4a4", _measured(2.0, 1.7, 1.9))
    assert (found["slowest"], found["target_met"], found["beyond_met"]) == (1.7, True, False)
    assert judged("prefill-w4a4", _measured(2.0, 1.6))["target_met"] is False
    warm = judged("prefill-w4a4", _measured(2.0, memory="L2-warm"))
    assert "target_met" not in warm
    assert "target_met" not in judged("prefill-w4a4", _measured(2.0), real=False)
    assert "target_met" not in judged("prefill-w4a4", {"status": "wrong", "reason": "x"})


def test_what_the_hardware_allows():
    floors = {
        "copy": {"value": 1000.0, "unit": "GB/s"},
        "torch._int_mm, 8192³": {"value": 100.0, "unit": "TOP/s"},
        "Triton s8 product alone, 8192³": {"value": 200.0, "unit": "TOP/s"},
        "b1 product alone by mma, 8192³": {"value": 2000.0, "unit": "TOP/s"},
        "b1 product alone by wgmma, 8192³": {"value": None, "unit": "TOP/s"},
    }

    def share(row, tokens, operations, moved):
        result = _measured(1.0)  # 100 µs
        result["rows"][0] |= {"operations": operations, "bytes": moved, "tokens": tokens}
        add_floors(row, result, floors)
        return result["rows"][0]["share_of_floor"]

    assert share("prefill-w4a4", 64, 1e10, 1e6) == pytest.approx(0.5)  # 50 µs at the best s8 rate
    assert share("w1a1-8192", 64, 1e11, 1e6) == pytest.approx(0.5)  # 50 µs at the b1 rate
    assert share("prefill-w4a4", 64, 1e9, 8e7) == pytest.approx(0.8)  # 80 µs at the bandwidth
    assert share("decode-w4", 1, 1e12, 2e7) == pytest.approx(0.2)  # bytes alone count for one token
    bare = _measured(1.0)
    add_floors("block-w4a4", bare, floors)
    assert "share_of_floor" not in bare["rows"][0]


def test_the_report(tmp_path, capsys):
    cases = {
        "prefill-w4a4": judged("prefill-w4a4", _measured(2.0, 1.7)),
        "w1a1-8192": judged("w1a1-8192", {"status": "wrong", "reason": "output: 3"}),
        "w2a2": judged("w2a2", {"status": "not measured", "reason": "the budget ended"}),
    }
    floors = {"copy": {"value": 4321.0, "unit": "GB/s"}, "b1": {"value": None, "unit": "TOP/s", "reason": "no GPU"}}
    result = {"device": {"gpu": "G"}, "floors": floors, "cases": cases, "seconds": 1, "budget_seconds": 2}
    text = "\n".join(lines(result))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    by_shape = {row[1]: row for row in rows}
    assert by_shape["shape 0"][2:] == ["100 µs", "50 µs", "2.00×", "2.01×", "", "", "1.65×", "1.85×", "beyond"]
    assert by_shape["shape 1"][-1] == "yes"
    assert by_shape["wrong: output: 3"][4] == ""
    assert by_shape["not measured: the budget ended"][0] == "w2a2"
    assert by_shape["4321"][0] == "copy"
    assert by_shape["not measured"][3] == "no GPU"
    assert one_line("x", cases["prefill-w4a4"]) == "x: 2.00×, 1.70× the speed of torch.matmul bf16"
    assert one_line("x", cases["w2a2"]) == "x: not measured: the budget ended"
    path = tmp_path / "r.json"
    path.write_text(json.dumps(result))
    assert main([str(path)]) == 0
    assert capsys.readouterr().out == text + "\n"
    assert main([str(tmp_path / "none.json")]) == 1


# --- timing ----------------------------------------------------------------------------------------------------------


def test_candidates_take_turns_and_the_first_round_does_not_count():
    turns = []
    bursts = {name: Burst(lambda name=name: turns.append(name), 2, False) for name in ("a", "b")}
    timings = alternate_bursts(bursts, 3, CPU)
    assert turns == ["a", "b", "b", "a"] * 2
    assert [len(timing.seconds) for timing in timings.values()] == [3, 3]


def test_every_copy_is_used_and_a_call_is_what_is_timed():
    used = []
    burst = prepare([lambda: used.append(0), lambda: used.append(1)], CPU)
    assert (burst.calls, burst.graph, used) == (2, False, [0, 1] * 2)
    found = compare({"bf16": [lambda: time.sleep(0.02)], "ours": [lambda: time.sleep(0.002)] * 2}, "bf16", 2, CPU)
    assert found["ours"]["speedup_of_medians"] > 3
    assert found["bf16"]["speedup_of_medians"] == 1
    assert found["ours"]["calls_a_sample"] == 2


def test_what_a_device_is():
    fields = describe_device(CPU)
    assert (fields["gpu"], fields["torch"]) == (None, torch.__version__)
    assert {"driver", "triton", "cuda"} <= set(fields)
    assert Context(CPU, "torch", TINY, 1).l2_bytes > 0
