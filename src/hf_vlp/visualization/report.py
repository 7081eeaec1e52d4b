"""A small report of one run: a folder with `index.html` and its PNG files, readable without a network.

It takes plain data (numbers, strings, PIL images, names of PNG files) and knows no model.
"""

from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root {
  color-scheme: light dark;
  --ink: #1c2024; --soft: #5d656e; --page: #fbfbfa; --card: #fff; --line: #dfe2e6;
  --score: #1e88e5; --rest: #e8eaed;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e8ea; --soft: #9aa2ab; --page: #15181b; --card: #1d2125; --line: #343a40; --rest: #31373d;
  }
}
body {
  margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.5rem 4rem;
  background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif;
}
h1 { margin: 0 0 .3rem; font-size: 1.7rem; } h2 { margin: 2.6rem 0 .8rem; font-size: 1.15rem; }
p { max-width: 46rem; } .soft, th, figcaption, dt { color: var(--soft); }
table { width: 100%; border-collapse: collapse; background: var(--card); border: 1px solid var(--line); }
th, td { padding: .5rem .9rem; text-align: left; border-top: 1px solid var(--line); }
th { font-weight: 600; font-size: .85rem; border-top: 0; }
.number { text-align: right; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.bar { position: relative; width: 9rem; height: .55rem; border-radius: .3rem; background: var(--rest); }
.bar i { position: absolute; inset: 0 auto 0 0; border-radius: .3rem; background: var(--score); }
.bar b { position: absolute; top: -.25rem; bottom: -.25rem; width: 2px; background: var(--ink); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.5rem; margin: 0; } dd { margin: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: 1.2rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); padding: .7rem; }
figure.wide { grid-column: 1 / -1; } img { display: block; width: 100%; height: auto; }
figcaption { margin-top: .5rem; font-size: .85rem; }
</style>
</head>
<body>
<h1>$title</h1>
<p>$summary</p>
<h2>Scores</h2>
<table>
<tr>
<th>what</th><th class="number">score</th><th class="number">baseline</th><th></th><th>the baseline is</th>
</tr>
$scores
</table>
<p class="soft">The bar is the score between 0 and 1, the mark on it the baseline.</p>
$figures
<h2>Settings</h2>
<dl>
$settings
</dl>
</body>
</html>
""")


@dataclass(frozen=True)
class Score:
    """One figure in 0..1 beside what it must be held against."""

    name: str
    value: float
    baseline: float
    baseline_name: str


@dataclass(frozen=True)
class Figure:
    """A PNG that lies in the report's folder, and its caption; `wide` figures take a whole row."""

    file_name: str
    caption: str
    wide: bool = False


def write_report(
    folder: str | Path,
    title: str,
    summary: str,
    scores: list[Score],
    sections: dict[str, list[Figure]],
    settings: dict[str, object],
) -> Path:
    """Write `index.html` into `folder` and return its path.

    sections: heading -> its figures. Raises ValueError when a figure's PNG is not in `folder`.
    """
    folder = Path(folder)
    for figure in (figure for figures in sections.values() for figure in figures):
        if not (folder / figure.file_name).is_file():
            raise ValueError(
                f"figure {figure.file_name!r} is not in {folder}: save the PNG there before the report"
            )
    page = PAGE.substitute(
        title=escape(title),
        summary=escape(summary),
        scores="\n".join(map(_score_row, scores)),
        figures="\n".join(_section(heading, figures) for heading, figures in sections.items()),
        settings="\n".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in settings.items()),
    )
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def _score_row(score: Score) -> str:
    return (
        f'<tr><td>{escape(score.name)}</td><td class="number">{score.value:.3f}</td>'
        f'<td class="number">{score.baseline:.3f}</td><td><div class="bar">'
        f'<i style="width: {100 * score.value:.1f}%"></i><b style="left: {100 * score.baseline:.1f}%"></b>'
        f'</div></td><td class="soft">{escape(score.baseline_name)}</td></tr>'
    )


def _section(heading: str, figures: list[Figure]) -> str:
    cards = "\n".join(
        f'<figure{" class=wide" if figure.wide else ""}><img src="{escape(figure.file_name)}" '
        f'alt="{escape(figure.caption)}"><figcaption>{escape(figure.caption)}</figcaption></figure>'
        for figure in figures
    )
    return f'<h2>{escape(heading)}</h2>\n<div class="figures">\n{cards}\n</div>'
