"""A look at a trained run: its table, its charts as SVG, PNG and CSV, its page, and looks in a comparison's report."""

import csv
import io
import json
import re
import struct
import sys

import pytest

from bitquest.errors import CheckpointError, ConfigError, DataError, MissingExtraError
from bitquest.evaluation.charts import Chart, write_charts
from bitquest.evaluation.diagnose import blocks_table, diagnose, write_diagnosis
from bitquest.evaluation.diagnose_charts import alignment_chart, diagnostic_charts, layers_chart, series_chart, style_of
from bitquest.evaluation.report import write_report
from bitquest.evaluation.runs import RunSummary, read_run
from bitquest.export import save
from bitquest.nn import Scheme
from bitquest.numerics import Learned, PerTensor, Quantizer, StraightThrough
from bitquest.training import TrainConfig, load_run, open_tokens, prepare, train
from bitquest.training.look import look_at

HOSTILE = '<script>alert(1)</script> & "q" $x^{2}$ \x1b'
STYLES = {"A": ("#010101", "o"), "B": ("#010200", "s")}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished W2A2 run of two blocks that looked at itself at steps 0, 4 and 6."""
    folder = tmp_path_factory.mktemp("looking")
    (folder / "text.txt").write_text("the state of the union is strong and the people are one.\n" * 200)
    prepare([folder / "text.txt"], "byte", folder / "data", val_fraction=0.2)
    fields = {
        "scheme": "w2a2",
        "model": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2,
        },
        "data": {"path": str(folder / "data"), "context": 32},
        "optimizer": {"lr": 1e-2},
        "train": {"steps": 6, "batch_size": 2},
        "evaluate": {"every": 0, "batches": 1},
        "checkpoint": {"every": 4},
        "diagnose": {"every": 4, "sequences": 3},
    }  # fmt: skip
    train(TrainConfig.from_dict(fields), folder / "run")
    return folder / "run"


def record(cosines, step=10, **changes):
    """A look at blocks with these cosines; every weight and input of two of its layers alike."""
    entry = {"elements": 8, "masked": 0.1, "expected_masked": 0.05, "error": 0.2, "excess": 1.5, "kurtosis": 0.3}
    layers = [f"model.layers.{i}.{name}" for i in range(len(cosines)) for name in ("self_attn.q_proj", "mlp.up_proj")]
    made = {
        "kind": "diagnose",
        "step": step,
        "loss": 3.0,
        "unquantized_loss": 2.9,
        "blocks": [{"output": value, "weights": value} for value in cosines],
        "weights": {name: entry | {"alignment": 0.9, "flipped": 0.1} for name in layers},
        "inputs": {layers[0]: entry},
        "alignment_bottom": cosines[0],
        "masked_weights": 0.1,
    }
    return made | changes


def rows_of(chart):
    return list(csv.DictReader(io.StringIO(chart.csv())))


# --- a look at a run -------------------------------------------------------------------------------------------------


def test_it_is_the_look_at_the_runs_own_held_out_text(run):
    made = diagnose(run, sequences=3)
    loaded = load_run(run)
    windows = next(iter(open_tokens(loaded.config.data.path, "val").windows(32, 3)))
    look = look_at(loaded.model, windows)
    assert (made.step, made.scheme, made.sequences, made.context) == (6, "w2a2", 3, 32)
    assert [block["output"] for block in made.look["blocks"]] == pytest.approx(
        [b.output for b in look.blocks], rel=1e-5
    )
    name = "model.layers.1.mlp.down_proj"
    for part in ("weights", "inputs"):
        for figure in ("masked", "error", "excess", "kurtosis"):
            assert made.look[part][name][figure] == pytest.approx(getattr(getattr(look, part)[name], figure), rel=1e-5)
    assert [entry["step"] for entry in made.series] == [0, 4, 6]
    # the run's own last look was at the same model, on the same tokens
    last = made.series[-1]
    for mine, its in zip(made.look["blocks"], last["blocks"], strict=True):
        assert mine == pytest.approx(its, abs=1e-4)  # training may run on integers
    assert made.look["masked_weights"] == last["masked_weights"]
    json.dumps(made.to_json(), allow_nan=False)


def test_a_checkpoint_may_be_named_in_two_ways(run):
    one, other = diagnose(run, step=4, sequences=2), diagnose(run / "checkpoints" / "step-4", sequences=2)
    assert one == other
    assert one.step == 4
    with pytest.raises(CheckpointError, match=r"is the checkpoint of step 4; leave out --step 6"):
        diagnose(run / "checkpoints" / "step-4", step=6)
    with pytest.raises(CheckpointError, match="not a run directory"):
        diagnose(run.parent)


def test_other_schemes_quantize_the_same_weights(run):
    mine, none, other = (diagnose(run, scheme=s, sequences=2) for s in (None, "none", "w8a8"))
    assert none.look["loss"] == pytest.approx(mine.look["unquantized_loss"], rel=1e-5)
    assert other.look["unquantized_loss"] == pytest.approx(mine.look["unquantized_loss"], rel=1e-5)
    assert other.look["alignment_bottom"] > 0.999 > mine.look["alignment_bottom"]
    assert [block["output"] for block in none.look["blocks"]] == [1.0, 1.0]
    assert other.series == ()
    learned = Quantizer(granularity=PerTensor(), scale=Learned(), estimator=StraightThrough())
    fitted = diagnose(run, scheme=str(Scheme(activation=learned)), sequences=2)
    assert fitted.look["inputs"]["model.layers.0.self_attn.k_proj"]["error"] < 0.05
    with pytest.raises(ConfigError, match="unknown scheme"):
        diagnose(run, scheme="w2a")


def test_backends_show_the_same(run):
    slow, fast = diagnose(run, sequences=2), diagnose(run, sequences=2, backend="auto")
    assert fast.look["alignment_bottom"] == pytest.approx(slow.look["alignment_bottom"], abs=0.01)
    assert fast.look["weights"] != {}


def test_what_cannot_be_looked_at(run, tmp_path):
    with pytest.raises(ConfigError, match="0 sequences are none"):
        diagnose(run, sequences=0)
    with pytest.raises(DataError) as caught:
        diagnose(run, data=tmp_path)
    assert "--data" not in str(caught.value)
    (tmp_path / "text.txt").write_text("other words " * 500)
    prepare([tmp_path / "text.txt"], "bpe:300", tmp_path / "other", val_fraction=0.2)
    with pytest.raises(DataError, match="prepared with another tokenizer"):
        diagnose(run, data=tmp_path / "other")
    loaded = load_run(run)
    save(loaded.model, tmp_path / "packed", loaded.tokenizer)
    with pytest.raises(CheckpointError, match="this is a packed model"):
        diagnose(tmp_path / "packed")


def test_data_that_moved_can_be_named(run):
    data, moved = run.parent / "data", run.parent / "moved"
    expected = diagnose(run, sequences=2)
    data.rename(moved)
    try:
        with pytest.raises(DataError, match=r"where it moved, name it with --data"):
            diagnose(run, sequences=2)
        assert diagnose(run, sequences=2, data=moved) == expected
    finally:
        moved.rename(data)


def test_the_table_goes_from_the_top_down(run):
    made = diagnose(run, sequences=2)
    table = blocks_table(made)
    assert [row[0] for row in table.rows] == ["2", "1"]
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert row["cosine ∂L/∂h"] == format(made.look["blocks"][1]["output"], ".4f")
    entries = [e for name, e in made.look["weights"].items() if name.startswith("model.layers.1.")]
    elements = sum(e["elements"] for e in entries)
    assert row["masked W"] == format(sum(e["masked"] * e["elements"] for e in entries) / elements, ".3%")
    assert row["error W"] == format(sum(e["excess"] * e["elements"] for e in entries) / elements, ".3f")
    assert set(blocks_table(diagnose(run, scheme="none", sequences=1)).columns) == {
        "block",
        "cosine ∂L/∂h",
        "cosine ∂L/∂W",
    }


def test_the_page_stands_alone_beside_its_pictures_and_numbers(run, tmp_path):
    made = diagnose(run, sequences=2)
    written = write_diagnosis(made, tmp_path / "a" / "b", "bitquest diagnose <run>")
    names = ["report.html", *(f"{name}.{end}" for name in ("alignment", "layers", "series") for end in ("png", "csv"))]
    assert [path.name for path in written] == names
    page = written[0].read_text(encoding="utf-8")
    assert page.count("<svg ") == 3
    assert "bitquest diagnose &lt;run&gt;" in page
    assert "http" not in page.replace("http-equiv", "")
    assert len(re.findall(r'\bid="([^"]+)"', page)) == len(set(re.findall(r'\bid="([^"]+)"', page)))
    assert not re.search(r"#0[12]0[12]", page)  # a stand-in colour that no style defines
    layers = list(csv.DictReader((tmp_path / "a" / "b" / "layers.csv").read_text().splitlines()))
    assert len(layers) == 14 + 8
    assert float(layers[0]["excess"]) == made.look["weights"]["model.layers.0.self_attn.q_proj"]["excess"]
    for path in written:
        if path.suffix == ".png":
            assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# --- charts ----------------------------------------------------------------------------------------------------------


def test_alignment_is_the_mean_of_seeds():
    chart = alignment_chart({"A": [record([0.2, 0.9]), record([0.4, 0.9])], "B": [record([0.5, None])]}, STYLES)
    assert [(row["run"], row["block"], row["output"]) for row in rows_of(chart)] == [
        ("A", "1", str((0.2 + 0.4) / 2)),
        ("A", "2", "0.9"),
        ("B", "1", "0.5"),
        ("B", "2", ""),
    ]
    assert ", after step 10" in chart.caption
    assert alignment_chart({"A": [record([None])]}, STYLES) is None


def test_series_are_drawn_where_all_seeds_have_looked():
    one = [record([0.5], 0), record([0.6], 10), record([0.7], 20, masked_weights=None)]
    other = [record([0.7], 0), record([0.8], 10)]
    chart = series_chart({"A": [one, other]}, STYLES)
    assert chart.columns == ("run", "number", "step", "alignment_bottom", "masked_weights")
    assert [row["step"] for row in rows_of(chart)] == ["0", "10", "20", "0", "10"]
    assert rows_of(chart)[2]["masked_weights"] == ""
    assert series_chart({"A": [[record([0.5])]]}, STYLES) is None


def test_layers_show_what_is_quantized():
    chart = layers_chart(record([0.5, 0.6, 0.7]))
    rows = rows_of(chart)
    assert [row["operand"] for row in rows] == ["weights"] * 6 + ["inputs"]
    assert rows[1]["layer"] == "model.layers.0.mlp.up_proj"
    assert "returned" not in chart.columns
    assert layers_chart(record([0.5], weights={"model.layers.0.mlp.up_proj": {"alignment": 1.0}}, inputs={})) is None


def test_many_names_blocks_and_hostile_ones_fit():
    """Nothing is drawn outside the picture: every text lies inside the SVG's view."""
    cosines = [0.5 + 0.02 * i for i in range(20)]
    names = [HOSTILE, *(f"a rather long name of arm {i}" for i in range(8))]
    runs = [
        RunSummary(name, "w1a1", looks=(record(cosines, 0), record(cosines, 5, alignment_bottom=0.1 * i)))
        for i, name in enumerate(names)
    ]
    for chart in [*diagnostic_charts(runs), layers_chart(record(cosines))]:
        width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', chart.svg).groups())
        for x, y in re.findall(r"translate\(([-\d.]+) ([-\d.]+)\)", chart.svg):
            assert 0 <= float(x) <= width
            assert 0 <= float(y) <= height
        assert "<script" not in chart.svg
        wide, high = struct.unpack(">II", chart.png[16:24])
        assert (wide, high) == (1376, pytest.approx(height / 72 * 160, abs=1))


def test_pictures_have_the_colours_of_the_page():
    from matplotlib.image import imread

    chart = alignment_chart({"A": [record([0.2, 0.9])], "B": [record([0.5, 0.6])]}, STYLES)
    pixels = imread(io.BytesIO(chart.png))[..., :3].reshape(-1, 3)
    colours = {tuple(round(float(part) * 255) for part in pixel) for pixel in pixels}
    assert {(255, 255, 255), (0x1B, 0x1D, 0x21), (0x00, 0x68, 0xA8)} <= colours  # paper, ink and the first series


def test_what_is_not_there_is_an_empty_cell(tmp_path):
    chart = Chart("c", "<svg/>", b"png", "", ("a", "b"), [("x,y", None), (1.5, True)])
    assert chart.csv() == 'a,b\n"x,y",\n1.5,True\n'
    assert [path.name for path in write_charts([chart], tmp_path / "new")] == ["c.png", "c.csv"]


# --- in the report of a comparison -----------------------------------------------------------------------------------


def test_a_report_shows_looks_if_there_are_any(run, tmp_path):
    with_looks = read_run(run, name="W2A2")
    write_report(tmp_path / "report.html", "Looks", [with_looks, RunSummary("other", "none")])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h2>Diagnostics</h2>" in page
    assert sorted(path.name for path in (tmp_path / "diagnostics").iterdir()) == [
        "alignment.csv",
        "alignment.png",
        "series.csv",
        "series.png",
    ]
    write_report(tmp_path / "plain" / "report.html", "None", [RunSummary("other", "none")])
    assert "Diagnostics" not in (tmp_path / "plain" / "report.html").read_text(encoding="utf-8")
    assert not (tmp_path / "plain" / "diagnostics").exists()


def test_without_matplotlib_nothing_is_written(run, tmp_path, monkeypatch):
    made = diagnose(run, sequences=1)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match="pip install 'bitquest"):
        write_diagnosis(made, tmp_path / "out", "")
    assert not (tmp_path / "out").exists()


def test_runs_without_looks_have_no_charts():
    assert diagnostic_charts([RunSummary("a", "none")]) == []
    assert style_of("none") != style_of("w1a1")
