"""docs/method.md has the numbers that the code uses, and the sections that its comments cite."""

import re
from pathlib import Path

import pytest

import bitquest as bq
from bitquest.models import PRESETS


@pytest.fixture
def rows(pages):
    """Cells of the page's tables, by first cell."""
    lines = pages["docs/method.md"].read_text(encoding="utf-8").splitlines()
    tables = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {cells[0]: cells[1:] for cells in tables}


def _grid(name, exact):
    if name == "ternary":
        return bq.CodebookGrid("ternary", bq.TERNARY.levels, exact)
    return bq.UniformGrid(int(name), exact)


@pytest.mark.parametrize("name", [*map(str, range(1, 9)), "ternary"])
def test_multipliers(rows, name):
    paper, exact = map(float, rows[name])
    assert _grid(name, False).clip_multiplier == pytest.approx(paper, abs=1e-10)
    assert _grid(name, True).clip_multiplier == pytest.approx(exact, abs=1e-8)


def test_the_multiplier_of_fp4(rows):
    assert 6 * float(re.fullmatch(r"6 · ([0-9.]+)", rows["FP4"][0])[1]) == pytest.approx(bq.FP4.clip_multiplier)


def test_presets(rows):
    columns = zip(*(map(int, rows[what]) for what in ("layers", "width", "heads")), strict=True)
    assert dict(zip(rows["preset"], columns, strict=True)) == PRESETS


def test_sections_that_the_code_cites(pages):
    sections = re.findall(r"^## (.+)$", pages["docs/method.md"].read_text(encoding="utf-8"), re.MULTILINE)
    source = Path(bq.__file__).parent
    cited = {
        title for file in source.rglob("*.py") for title in re.findall(r'METHOD, "([^"]+)"', file.read_text("utf-8"))
    }
    assert cited
    assert cited <= set(sections)
