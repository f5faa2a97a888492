"""Runs at once in processes of their own: the same results as one by one, deaths that are told, left-over processes."""

import json
import signal
import sys
from contextlib import suppress

import pytest
from compare_cases import MODEL_AND_DATA, THREE_STEPS, prepare_words

from bitquest.evaluation import compare_workers
from bitquest.evaluation.compare import compare, jobs_of
from bitquest.evaluation.compare_file import load_comparison
from bitquest.evaluation.compare_plan import Run
from bitquest.evaluation.compare_runs import is_held
from bitquest.evaluation.compare_workers import Pool
from bitquest.training.runs import claimed

CONFIG = (
    MODEL_AND_DATA
    + THREE_STEPS
    + """
[compare]
schemes = ["none", "w1a1"]
seeds = [0]
jobs = 2
"""
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    data = prepare_words(tmp_path_factory.mktemp("text"))
    path = data.parent / "small.toml"
    path.write_text(CONFIG.format(data=data))
    return path


@pytest.fixture
def command(monkeypatch):
    """Let workers run a line of Python instead of training."""

    def use(code):
        monkeypatch.setattr(compare_workers, "COMMAND", (sys.executable, "-c", code))

    return use


def test_at_once_comes_to_the_same_as_one_by_one(tmp_path, config):
    options = {"overrides": ["optimizer.clip=0"], "schemes": "w1a1", "rates": "1e-2,1e30"}
    together = compare(load_comparison(config, **options), tmp_path / "together")
    assert together.finished
    apart = compare(load_comparison(config, **options, jobs=1), tmp_path / "apart")
    facts = [[(run.key, run.status, run.val_loss) for run in result.runs] for result in (together, apart)]
    assert facts[0] == facts[1]
    assert [run.status for run in together.runs] == ["finished", "diverged"]
    assert len(list((tmp_path / "together" / "logs").iterdir())) == 2


def test_a_worker_that_fails_is_told_of_and_the_others_go_on(tmp_path, config, command):
    code = "import os, sys; sys.stdin.read(); print('noise'); sys.exit('error: no room in ' + sys.argv[1])"
    command(code)
    plan = load_comparison(config, seeds="0,1")
    told = []

    class Display:
        def on_failure(self, run, message):
            told.append((run, message))

        def __getattr__(self, name):
            return lambda *values: None

    out = tmp_path / "out"
    result = compare(plan, out, display=Display())
    assert not result.finished
    assert {run for run, _ in told} == set(plan.first_runs())
    assert result.failures["none, seed 1"] == (
        f"its process failed (exit code 1): no room in {out}/runs/none-seed1. "
        f"All it said is in {out}/logs/none-seed1.log"
    )
    assert (out / "logs" / "none-seed1.log").read_text().splitlines()[0] == "noise"
    assert json.loads((out / "results.json").read_text() if (out / "results.json").exists() else "{}") == {}
    command("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    killed = compare(plan, out).failures["w1a1, seed 0"]
    assert killed.startswith("its process was killed by SIGKILL: perhaps the system was out of memory")
    command("pass")
    assert "its process ended before the last step" in compare(plan, out).failures["w1a1, seed 0"]


def test_a_run_that_left_something_unreadable_does_not_stop_the_others(tmp_path, config, command):
    command(
        "import pathlib, sys; run = pathlib.Path(sys.argv[1]); run.mkdir(parents=True); "
        "(run / 'config.toml').write_text(sys.stdin.read()); (run / 'metrics.jsonl').write_text('no record\\n')"
    )
    failures = compare(load_comparison(config), tmp_path / "out").failures
    assert len(failures) == 2
    assert all("metrics.jsonl, line 1: not a metrics record" in failure for failure in failures.values())


def test_threads_are_shared_out(tmp_path, config, monkeypatch, command):
    command("import os, sys; sys.exit(os.environ.get('OMP_NUM_THREADS', 'none'))")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    free = load_comparison(config, ["train.threads=0"])
    assert ": 4. All" in compare(free, tmp_path / "a").failures["none, seed 0"]
    fixed = load_comparison(config)  # train.threads = 1 says it already
    assert ": none. All" in compare(fixed, tmp_path / "b").failures["none, seed 0"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # so does the shell
    assert ": 3. All" in compare(free, tmp_path / "c").failures["none, seed 0"]


def test_a_run_that_another_process_holds_is_waited_for(tmp_path, config, command):
    command("import sys; sys.exit('started')")
    plan, out = load_comparison(config, schemes="none"), tmp_path / "out"
    folder = out / "runs" / "none-seed0"
    assert not is_held(folder)
    with claimed(folder):
        assert is_held(folder)
        (out / "compare.toml").write_text(plan.to_toml())
        asked = iter([False] * 4 + [True] * 9)
        stopped = compare(plan, out, should_stop=lambda: next(asked))
        assert (stopped.finished, stopped.failures) == (False, {})
    assert not is_held(folder)
    assert "started" in compare(plan, out).failures["none, seed 0"]


def test_told_to_stop_workers_are_waited_for(tmp_path, config, command):
    command(
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "open(sys.argv[1] + '.ready', 'w').close()\ntime.sleep(60)"
    )
    plan, out = load_comparison(config), tmp_path / "out"
    (out / "runs").mkdir(parents=True)
    (out / "compare.toml").write_text(plan.to_toml())
    ready = [out / "runs" / f"{arm}-seed0.ready" for arm in ("none", "w1a1")]
    result = compare(plan, out, should_stop=lambda: all(path.exists() for path in ready))
    assert (result.finished, result.failures) == (False, {})
    # one that cannot listen yet is ended by the signal: that is no failure either
    command("import sys, time; open(sys.argv[1] + '.deaf', 'w').close(); time.sleep(60)")
    deaf = [path.with_suffix(".deaf") for path in ready]
    assert compare(plan, out, should_stop=lambda: all(path.exists() for path in deaf)).failures == {}


def test_an_error_kills_the_workers(tmp_path, config, command):
    command("import time; time.sleep(60)")
    pool = Pool(load_comparison(config), tmp_path, 2)
    with suppress(KeyboardInterrupt), pool:
        pool.start(Run("none", 0))
        process = pool.workers[0].process
        raise KeyboardInterrupt
    assert process.returncode == -signal.SIGKILL


def test_how_many_at_once(config, monkeypatch, tmp_path):
    assert jobs_of(load_comparison(config)) == 2
    config.write_text(config.read_text().replace("jobs = 2\n", ""))
    plan = load_comparison(config)
    assert jobs_of(plan) == 1
    import torch

    monkeypatch.setattr("bitquest.evaluation.compare.choose_device", lambda _: torch.device("cuda"))
    assert jobs_of(plan) is None
    # on a card: one alone until it shows what it takes, then as many as there is room for, at most one per core
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(3)), raising=False)
    free = [10_000]
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (free[0] * 2**20, 0))
    pool = Pool(plan, tmp_path, None)
    assert pool.has_room()

    class Fake:
        record = None

        def latest(self):
            return self.record

    worker = Fake()
    pool.workers.append(worker)
    assert not pool.has_room()
    worker.record = {"step": 2, "memory_mb": 7000.0}
    assert pool.has_room()
    free[0] = 9000
    assert not pool.has_room()
    free[0] = 10_000
    pool.workers += [worker, worker]
    assert not pool.has_room()
