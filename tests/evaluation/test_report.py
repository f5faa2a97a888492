"""Reports: what is read from run directories, the charts, and a page that stands alone whatever is written on it."""

import dataclasses
import json
import math
import re
import sys
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from bitquest.errors import CheckpointError, ConfigError, MissingExtraError
from bitquest.evaluation.figures import (
    _loss_range,
    _spread,
    loss_curves,
    place_labels,
    seed_spread,
    size_against_loss,
    smoothed,
)
from bitquest.evaluation.report import results_table, write_report
from bitquest.evaluation.report_page import Table
from bitquest.evaluation.runs import CurvePoint, RunSummary, read_run

HOSTILE = "\u4e2d<script>alert(1)</script> & \"quotes\" 'n' $x^{2}$ ]]> --> \x00\x1b[31m \ud800 Ünïcode"
SIZES = {"total_bytes": 2_500_000, "linear_bytes": 2_000_000, "embedding_bytes": 300_000, "head_bytes": 200_000}


def summary(name="W4A4", scheme="w4a4", final=2.0, **fields):
    curve = tuple(CurvePoint(step, final + 3 * math.exp(-step / 20)) for step in range(1, 101))
    return RunSummary(
        **{
            "name": name,
            "scheme": scheme,
            "steps": 100,
            "total_steps": 100,
            "train_curve": curve,
            "validation_curve": curve[19::20],
            "val_loss": final,
            "bits_per_byte": final / math.log(2),
            "packed_bytes": SIZES,
            "config": {"scheme": scheme, "optimizer": {"lr": 3e-3, "betas": (0.9, 0.95)}, "train": {"compile": False}},
        }
        | fields
    )


class Page(HTMLParser):
    """Collects what could load something, ids, balance of the tags and the text of a page."""

    VOID = frozenset({"meta", "br", "path", "use", "rect"})

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tags, self.attributes, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read_page(path):
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_holds_everything_and_loads_nothing(tmp_path):
    runs = [
        summary("unquantized", "none", 1.9, tokens_per_s=1234.4, verified=True),
        summary("W1A1", "w1a1", 2.2, verified=False, prompt="The state", sample=" of the Union\nis strong."),
    ]
    path = write_report(
        tmp_path / "new" / "report.html",
        "Three widths",
        runs,
        summary="One sentence.",
        tables=[Table(("pair", "verdict"), [("none ≤ w1a1", "passed")], title="Ordering", note="By seeds.")],
        baselines={"byte 3-gram": 3.1234},
        facts={"text": "addresses"},
        commands=["make demo", "bitquest generate 'x'"],
    )
    page = read_page(path)
    for part in [
        *["Three widths", "One sentence.", "unquantized", "1.9000", "2.7411", "2.50", "0.50", "1,234", "yes", "no"],
        *["byte 3-gram: 3.1234", "Ordering", "passed", "By seeds.", "The state", "of the Union\nis strong."],
        *["betas", "0.9, 0.95", "none, w1a1", "addresses", "make demo\nbitquest generate 'x'", "PyTorch"],
    ]:
        assert part in page.text, part
    assert page.tags.count("svg") == 2
    assert "script" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    for name, value in page.attributes:
        if name.endswith("href"):
            assert value.removeprefix("#") in page.ids
        assert name not in ("src", "srcset", "action", "data")
    whole = path.read_text(encoding="utf-8")
    assert "http" not in whole.replace("http-equiv", "")
    assert set(re.findall(r"url\(#([^)]+)\)", whole)) <= set(page.ids)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_colours_are_the_pages_and_every_one_is_defined_for_light_and_dark(tmp_path):
    runs = [summary(f"run {i}", "none" if i == 0 else "w1a1", 2 + i / 10, seed=s) for i in range(11) for s in (0, 1)]
    text = write_report(tmp_path / "r.html", "t", runs).read_text(encoding="utf-8")
    svg = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    used = set(re.findall(r"var\((--[\w-]+)\)", svg))
    assert {"--ink", "--muted", "--grid", "--series-0", "--series-8", "--sans"} <= used
    light, dark = text.split("@media (prefers-color-scheme: dark)")[:2]
    assert all(f"{name}:" in light for name in used)
    assert all(f"{name}:" in dark.split("* {")[0] for name in used - {"--sans"})
    assert not re.findall(r"(?:fill|stroke): ?#", svg)


def test_hostile_text_stays_text_wherever_it_stands(tmp_path):
    run = summary(
        HOSTILE, HOSTILE, prompt=HOSTILE, sample=HOSTILE, config={HOSTILE: {HOSTILE: HOSTILE}, "list": [HOSTILE]}
    )
    other = dataclasses.replace(run, seed=1, config={HOSTILE: {HOSTILE: "other"}})
    path = write_report(
        tmp_path / "r.html",
        HOSTILE,
        [run, other, summary("plain", "none")],
        summary=HOSTILE,
        tables=[Table((HOSTILE, "b"), [(HOSTILE, HOSTILE)], title=HOSTILE, note=HOSTILE)],
        baselines={HOSTILE: 2.0},
        facts={HOSTILE: HOSTILE},
        commands=[HOSTILE],
    )
    page = read_page(path)
    assert "script" not in page.tags
    assert page.text.count("<script>alert(1)</script>") > 15
    assert "$x^{2}$" in page.text
    assert not re.search(r"[\x00-\x08\x0e-\x1f]", path.read_text(encoding="utf-8"))
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_what_is_not_known_is_left_out(tmp_path):
    bare = RunSummary(name="bare", scheme="w1a1")
    page = read_page(write_report(tmp_path / "r.html", "t", [bare]))
    for absent in ("Training", "Size against loss", "Text the models wrote", "tokens/s", "MB packed", "verified"):
        assert absent not in page.text
    page = read_page(write_report(tmp_path / "r.html", "t", []))
    assert "Environment" in page.text
    assert "Results" not in page.text


def test_results_table_columns_follow_what_is_there():
    table = results_table([summary(), summary("W1A1", "w1a1", packed_bytes={"total_bytes": 10**6}, val_loss=None)])
    assert table.columns == ("run", "scheme", "validation loss", "bits per byte", "MB packed", "embedding + head, MB")
    assert table.rows[1] == ("W1A1", "w1a1", "–", "2.8854", "1.00", "–")
    table = results_table([summary("w4a4", seed=0), summary("w4a4", seed=1, steps=40, diverged=True)])
    assert table.columns[:3] == ("run", "seed", "steps")
    assert [row[2] for row in table.rows] == ["100 of 100", "diverged"]


def test_charts_label_lines_where_they_end_and_are_absent_without_numbers():
    runs = [summary("W4A4", final=2.0), summary("W1A1", "w1a1", final=2.3)]
    assert ">W4A4  2.020<" in loss_curves(runs)
    assert ">W1A1<" in size_against_loss(runs)
    assert loss_curves([RunSummary("a", "none")]) == ""
    assert size_against_loss(runs[:1]) == ""
    assert "byte 3-gram" in size_against_loss(runs[:1], {"byte 3-gram": 3.0})
    assert seed_spread(runs) == ""
    assert ">W4A4<" in seed_spread([*runs, summary("W4A4", final=2.1, seed=1)])
    one = summary(train_curve=(CurvePoint(1, 5.0),), validation_curve=())
    assert "5.000" in loss_curves([one])
    assert "W" * 27 + "…" in loss_curves([summary("W" * 40)])


def test_runs_that_diverged_or_stopped_early_neither_stretch_nor_break_the_curves():
    wild = tuple(CurvePoint(step, 10.0**step) for step in range(1, 30))
    diverged = summary("W1A1", "w1a1", train_curve=wild, validation_curve=(), val_loss=None, diverged=True)
    short = summary("W2A2", "w2a2", validation_curve=(CurvePoint(7, 3.0),))
    svg = loss_curves([summary("W4A4"), diverged, short, dataclasses.replace(short, validation_curve=())])
    assert ">W1A1  diverged<" in svg
    assert ">W2A2  3.000<" in svg
    assert ">100<" in svg
    assert "1e" not in "".join(re.findall(r"<text.*?</text>", svg))
    assert "diverged" in loss_curves([diverged])
    one_of_two = loss_curves([summary("W1A1", "w1a1", final=2.5), diverged])
    assert ">W1A1  2.520<" in one_of_two


def test_the_loss_axis_leaves_out_the_first_steps():
    run = summary(final=2.0)
    low, high = _loss_range([run], 100)
    assert low < 2.0 < run.train_curve[15].loss < high < run.train_curve[5].loss


def test_labels_of_a_crowd_of_marks_touch_neither_marks_nor_each_other():
    points = [(100 + 12 * (i % 3), 100 + 11 * (i // 3), f"W{i}A{i}") for i in range(9)]
    boxes = [(x - 5, y - 5, x + 5, y + 5) for x, y, _ in points[::4]]
    places = place_labels(points[::4])
    for (x, y, label), (dx, dy, side) in zip(points[::4], places, strict=True):
        width = 0.1 * 72 * 0.85 * len(label)
        left = x + dx - (width if side == "right" else 0)
        box = (left, y + dy - 6, left + width, y + dy + 6)
        for other in boxes:
            assert box[2] <= other[0] or other[2] <= box[0] or box[3] <= other[1] or other[3] <= box[1]
        boxes.append(box)
    assert place_labels([(0, 0, "a"), (200, 0, "b")]) == [(10, 0, "left"), (10, 0, "left")]
    assert len(set(place_labels([(0, 0, "a")] * 5))) == 5


def test_labels_are_moved_apart_and_no_further_than_needed():
    assert _spread([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert _spread([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    moved = _spread([0.1, 0.11, 0.12, 0.3, 0.31], 0.05)
    assert all(b - a >= 0.05 - 1e-9 for a, b in pairwise(moved))
    assert sum(moved) == pytest.approx(0.94)


def test_smoothing_keeps_ends_steps_and_straight_lines():
    line = [CurvePoint(step, 5 - step / 100) for step in range(200)]
    assert [p.step for p in smoothed(line)] == list(range(200))
    assert [p.loss for p in smoothed(line)][:196] == pytest.approx([p.loss for p in line][:196])
    assert smoothed(line)[-1].loss == pytest.approx(line[-1].loss, abs=0.021)
    zigzag = [CurvePoint(step, step % 2) for step in range(200)]
    assert max(abs(p.loss - 0.5) for p in smoothed(zigzag)[20:]) < 0.11
    assert smoothed([]) == []


def test_matplotlib_missing_is_said_with_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"bitquest\[science\]"):
        write_report(tmp_path / "r.html", "t", [summary()])
    assert list(tmp_path.iterdir()) == []


CONFIG = 'scheme = "w4a4"\nseed = 7\n[model]\npreset = "1M"\n[data]\npath = "data"\n[train]\nsteps = 20\n'
METRICS = [
    {"kind": "train", "step": 1, "loss": 5.5, "tokens": 256, "tokens_per_s": 100.0, "seconds": 2.0},
    {"kind": "train", "step": 10, "loss": 3.5, "tokens": 2560, "tokens_per_s": 100.0, "seconds": 16.0},
    {"kind": "evaluate", "step": 10, "loss": 3.6, "bits_per_byte": 5.2},
]


def write_run(folder, lines=METRICS, tail=""):
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(CONFIG)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return folder


def test_reading_an_unfinished_run(tmp_path):
    run = read_run(write_run(tmp_path / "run", tail='{"kind": "tra'), name="four", packed_bytes=SIZES, verified=True)
    assert (run.name, run.scheme, run.seed, run.steps, run.total_steps, run.finished) == ("four", "w4a4", 7, 10, 20, 0)
    assert run.train_curve == (CurvePoint(1, 5.5), CurvePoint(10, 3.5))
    assert run.validation_curve == (CurvePoint(10, 3.6),)
    assert (run.val_loss, run.bits_per_byte, run.seconds, run.train_tokens_per_s) == (3.6, 5.2, 16.0, 160.0)
    assert (run.packed_mb, run.verified, run.config["model"]["preset"]) == (2.5, True, "1M")


def test_reading_a_run_that_has_just_begun(tmp_path):
    write_run(tmp_path / "run", [])
    for _ in range(2):
        run = read_run(tmp_path / "run")
        assert (run.name, run.steps, run.val_loss, run.train_curve, run.finished) == ("w4a4", 0, None, (), False)
        (tmp_path / "run" / "metrics.jsonl").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("line", "change", "says"),
    [
        (1, {"loss": "low"}, "line 2: loss is 'low', not a number"),
        (1, {"loss": math.nan}, "line 2: loss is nan"),
        (1, {"loss": True}, "line 2: loss is True"),
        (1, {"step": 1}, "line 2: step 1 comes after"),
        (1, {"seconds": None}, "line 2: seconds is None"),
        (2, {"bits_per_byte": None}, "line 3: bits_per_byte is None"),
        (1, {"step": "x"}, "line 2: not a metrics record"),
    ],
)
def test_malformed_metrics_are_refused_with_file_and_line(tmp_path, line, change, says):
    lines = [dict(record) for record in METRICS]
    lines[line] |= change
    with pytest.raises(CheckpointError, match=says) as caught:
        read_run(write_run(tmp_path / "run", lines))
    assert "metrics.jsonl" in str(caught.value)


def test_records_of_other_kinds_are_no_losses(tmp_path):
    look = {"kind": "diagnose", "step": 1, "loss": None}
    others = [{"kind": "weather", "step": 0}, look, {"step": 3}]
    run = read_run(write_run(tmp_path / "run", [*METRICS, *others]))
    plain = read_run(write_run(tmp_path / "plain", METRICS))
    assert run.looks == (look,)
    assert (run.train_curve, run.validation_curve, run.steps) == (
        plain.train_curve,
        plain.validation_curve,
        plain.steps,
    )


def test_folders_that_are_no_runs(tmp_path):
    with pytest.raises(CheckpointError, match="not a run directory"):
        read_run(tmp_path)
    write_run(tmp_path / "run")
    (tmp_path / "run" / "config.toml").write_text("[train]\nstepz = 3\n")
    with pytest.raises(ConfigError, match="stepz"):
        read_run(tmp_path / "run")
