"""Every page of the documentation works as it stands: its commands, its Python, the files it writes."""

import math
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bitquest as bq
from bitquest.training import TrainConfig, prepare, train

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ["README.md", "CHANGELOG.md", *sorted(f"docs/{p.relative_to(DOCS).as_posix()}" for p in DOCS.rglob("*.md"))]


@pytest.fixture(scope="session")
def real_text() -> str:
    """A few hundred kB of what people wrote: sources of Python's standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    names = ("argparse", "datetime", "inspect", "pathlib", "subprocess", "tarfile", "typing")
    return "\n".join((library / f"{name}.py").read_text(encoding="utf-8") for name in names)


def _prepared(text: str) -> dict[str, Any]:
    prepare(["text.txt"], "byte", "data/text", val_fraction=0.05)
    return {}


def _more_text(text: str) -> dict[str, Any]:
    Path("more").mkdir()
    Path("more/notes.txt").write_text(text[: len(text) // 10], encoding="utf-8")
    return {}


def _finished_run(text: str) -> dict[str, Any]:
    """runs/w1a1, held-out.txt, and a model of one's own with the class that makes another."""

    class MyModule(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))

    _prepared(text)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    fields = {
        "model": {**shape, "num_attention_heads": 2, "num_key_value_heads": 2},
        "data": {"path": "data/text", "context": 64},
        "train": {"steps": 40, "batch_size": 4},
        "evaluate": {"every": 0, "batches": 1},
    }
    train(TrainConfig.from_dict(fields), "runs/w1a1")
    Path("held-out.txt").write_text(text[:20_000], encoding="utf-8")
    return {"model": bq.quantize_(MyModule(), "w4a4"), "MyModule": MyModule}


def _packed_run(text: str) -> dict[str, Any]:
    names = _finished_run(text)
    from bitquest.export import save
    from bitquest.training import load_run

    run = load_run("runs/w1a1")
    save(run.model, "packed/w1a1", run.tokenizer)
    return names


def _scaling_runs(text: str) -> dict[str, Any]:
    """runs.csv: what the published law says of the paper's sizes, a little off."""
    from bitquest.evaluation.scaling_law import EFFICIENCY, PUBLISHED

    rows = ["parameters,tokens,scheme,loss"]
    for number, (name, eff) in enumerate(EFFICIENCY.items()):
        for n in (30_482_560, 102_777_856, 822_151_168):
            for ratio in (24.3, 49.2, 97.3):
                loss = PUBLISHED.loss(n, n * ratio, eff) * (1 + 0.003 * math.sin(n + ratio + number))
                rows.append(f"{n},{n * ratio:.0f},{name},{loss:.4f}")
    Path("runs.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return {}


# What a page takes for granted, beside text.txt.
ASSUMED = {
    "docs/howto/backends.md": _packed_run,
    "docs/howto/compare.md": _prepared,
    "docs/howto/data.md": _more_text,
    "docs/howto/evaluate.md": _packed_run,
    "docs/howto/diagnose.md": _prepared,
    "docs/howto/generate.md": _packed_run,
    "docs/howto/gpu-benchmarks.md": _prepared,
    "docs/howto/pack.md": _finished_run,
    "docs/howto/scaling.md": _scaling_runs,
    "docs/howto/recipes.md": _prepared,
    "docs/howto/rivals.md": _prepared,
}


@pytest.mark.parametrize("name", PAGES)
def test_page(name, pages, run_page, real_text):
    Path("text.txt").write_text(real_text, encoding="utf-8")
    names = ASSUMED[name](real_text) if name in ASSUMED else {}
    torch.manual_seed(0)
    run_page(pages[name], names)


def test_assumptions_are_about_pages_that_exist():
    assert set(ASSUMED) <= set(PAGES)


def test_few_blocks_are_left_out(pages):
    left_out = [
        f"{name}: {line}"
        for name, page in pages.items()
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.startswith("<!-- not run")
    ]
    assert len(left_out) <= 4, left_out
