"""The HTML of a report: one page with its style inside, readable in light and dark, on a screen and on paper.

Everything that comes from outside passes through `escape`; the page loads nothing and runs nothing.
"""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff\ud800-\udfff]")
_NUMBER = re.compile(r"[-+−±]?\d.*|–|")
_VERDICTS = {"yes": "good", "passed": "good", "no": "bad", "failed": "bad", "diverged": "bad"}


@dataclass(frozen=True)
class Table:
    """Column heads and rows of cells, all plain text; columns of numbers are set flush right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""

    def without(self, *columns: str) -> "Table":
        """The same table less these columns, where it has them."""
        kept = [number for number, column in enumerate(self.columns) if column not in columns]
        rows = tuple(tuple(row[number] for number in kept) for row in self.rows)
        return Table(tuple(self.columns[number] for number in kept), rows, self.title, self.note)


def printable(text: object) -> str:
    """Text with U+FFFD for what HTML and SVG have no place for: control characters and lone surrogates."""
    return _CONTROL.sub("\ufffd", str(text))


def escape(text: object) -> str:
    """Printable text for HTML, also inside quotes."""
    return html.escape(printable(text), quote=True)


def page(title: str, summary: str, sections: Sequence[str]) -> str:
    """The whole document. `sections` are HTML already; title and summary are text."""
    lede = f'<p class="lede">{escape(summary)}</p>' if summary else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{PAGE_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{escape(title)}</h1>{lede}</header>\n" + "\n".join(filter(None, sections)) + "\n</main>\n"
        "</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A section with a heading; '' if all its parts are empty."""
    inside = "\n".join(filter(None, parts))
    return f"<section><h2>{escape(title)}</h2>\n{inside}\n</section>" if inside else ""


def table(content: Table) -> str:
    """A table; the first column holds row heads."""
    numeric = [
        column > 0 and all(_NUMBER.fullmatch(row[column]) for row in content.rows)
        for column in range(len(content.columns))
    ]
    align = ['class="n"' if is_number else "" for is_number in numeric]
    head = "".join(f'<th scope="col" {a}>{escape(c)}</th>' for c, a in zip(content.columns, align, strict=True))
    body = ""
    for row in content.rows:
        cells = [f'<th scope="row">{escape(row[0])}</th>']
        for cell, a in zip(row[1:], align[1:], strict=True):
            verdict = _VERDICTS.get(cell)
            cells.append(f'<td {a or (f"""class="{verdict}" """ if verdict else "")}>{escape(cell)}</td>')
        body += f"<tr>{''.join(cells)}</tr>\n"
    caption = f"<h3>{escape(content.title)}</h3>" if content.title else ""
    note = f'<p class="note">{escape(content.note)}</p>' if content.note else ""
    return (
        f'{caption}<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>{note}'
    )


def figure(svg: str, caption: str) -> str:
    """A chart with its caption; '' without a chart. `svg` is HTML already."""
    if not svg:
        return ""
    return f'<figure><div class="scroll">{svg}</div><figcaption>{escape(caption)}</figcaption></figure>'


def sample(name: str, about: str, prompt: str, text: str) -> str:
    """A text that a model wrote: the prompt set apart from its continuation."""
    opening = f"<b>{escape(prompt)}</b>" if prompt else ""
    return (
        f'<article class="sample"><h3>{escape(name)} <small>{escape(about)}</small></h3>'
        f"<blockquote>{opening}{escape(text)}</blockquote></article>"
    )


def facts(title: str, values: Mapping[str, str]) -> str:
    """Keys and values in columns; '' if there are none."""
    if not values:
        return ""
    inside = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in values.items())
    return f"<h3>{escape(title)}</h3><dl>{inside}</dl>"


def commands(lines: Sequence[str]) -> str:
    """Commands to copy; '' if there are none."""
    return f"<pre><code>{escape(chr(10).join(lines))}</code></pre>" if lines else ""


# Series colours: Okabe and Ito's, which stay distinct under the common colour-vision deficiencies; darkened for white
# paper, lightened for dark screens, so that every label keeps a contrast of 3:1 or more.
PAGE_STYLE = """
:root {
  --paper: #ffffff; --ink: #1b1d21; --muted: #5d636d; --grid: #dfe2e7; --panel: #f5f6f8; --good: #00704f;
  --bad: #b03a00;
  --series-0: #0068a8; --series-1: #c75100; --series-2: #00845f; --series-3: #a8487f; --series-4: #9a6a00;
  --series-5: #2f8fc4; --series-6: #6c4fb3; --series-7: #7d4a2a; --series-8: #5c7a12;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "DejaVu Sans", sans-serif;
  --serif: Charter, "Bitstream Charter", "Iowan Old Style", Georgia, "Noto Serif", "DejaVu Serif", serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  color-scheme: light dark;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171b; --ink: #e9ebee; --muted: #9aa1ac; --grid: #2d3138; --panel: #1d2025; --good: #45c79e;
    --bad: #ff8f5a;
    --series-0: #56b4e9; --series-1: #ff8f4a; --series-2: #2cc998; --series-3: #e79cc9; --series-4: #edb030;
    --series-5: #9fd0f3; --series-6: #b6a0f2; --series-7: #d0a07c; --series-8: #b5d456;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 var(--sans); }
main { max-width: 60rem; margin: 0 auto; padding: 3.5rem 1.5rem 5rem; }
header { border-bottom: 2px solid var(--ink); padding-bottom: 1.25rem; margin-bottom: 2.25rem; }
h1 { font-size: 2.1rem; line-height: 1.15; letter-spacing: -0.02em; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; letter-spacing: -0.01em; margin: 3rem 0 1rem; }
h3 { font-size: 0.95rem; margin: 1.75rem 0 0.5rem; }
h3 small { font-weight: 400; color: var(--muted); font-size: 1em; margin-left: 0.4em; }
.lede { font: 1.15rem/1.5 var(--serif); color: var(--muted); margin: 0.75rem 0 0; max-width: 44rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.5rem 0.9rem 0.5rem 0; border-bottom: 1px solid var(--grid); white-space: nowrap; }
thead th { color: var(--muted); font-weight: 500; vertical-align: bottom; white-space: normal; min-width: 4.5rem; }
tbody th { font-weight: 600; }
th.n, td.n { text-align: right; padding: 0.5rem 0 0.5rem 0.9rem; }
.n + :not(.n) { padding-left: 1.75rem; }
td.good { color: var(--good); font-weight: 600; }
td.bad { color: var(--bad); font-weight: 600; }
.note, figcaption { color: var(--muted); font-size: 0.88rem; margin: 0.6rem 0 0; max-width: 46rem; }
figure { margin: 0 0 2.5rem; }
figure svg { display: block; width: 100%; min-width: 36rem; height: auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
.sample { margin: 0 0 2rem; }
blockquote { margin: 0; padding: 1.25rem 1.5rem; background: var(--panel); border-radius: 0.4rem;
  font: 1.06rem/1.65 var(--serif); white-space: pre-wrap; overflow-wrap: anywhere; }
blockquote b { color: var(--series-0); font-weight: 600; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 0 2.5rem; margin: 0;
  font-size: 0.9rem; }
dl div { display: flex; justify-content: space-between; gap: 1rem; border-bottom: 1px solid var(--grid);
  padding: 0.3rem 0; }
dt { color: var(--muted); white-space: nowrap; }
dd { margin: 0; text-align: right; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
pre { margin: 0; padding: 1rem 1.25rem; background: var(--panel); border-radius: 0.4rem; overflow-x: auto;
  font: 0.88rem/1.6 var(--mono); }
@media print { main { max-width: none; padding: 0; } section, figure, .sample { break-inside: avoid; } }
"""
