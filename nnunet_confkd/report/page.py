"""The HTML of the report: one page that loads nothing from elsewhere, in light and dark, from phone to desktop.

Every text from outside passes :func:`text`, which escapes it: names of cases and classes come from strangers.
"""
from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from html import escape
from typing import NamedTuple

from nnunet_confkd.colours import BRANCH_COLOURS
from nnunet_confkd.report.pictures import INK, LINE, MUTED, Cell, Chart, cell_png, class_styles, svg

LIGHT = {"page": "#fbfbfa", "card": "#ffffff", "ink": INK, "muted": MUTED, "line": LINE, "mark": "#fff3d1",
         **BRANCH_COLOURS}
DARK = {"page": "#14171a", "card": "#1b1f23", "ink": "#e4e7ea", "muted": "#9ba6b0", "line": "#343b42",
        "mark": "#453714", "student": "#6fb3f2", "teacher": "#f2a25c", "given": "#bfa2e6"}

STYLE = """
:root { color-scheme: light dark; %LIGHT% }
@media (prefers-color-scheme: dark) { :root { %DARK% } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", "Noto Sans", "Liberation Sans", Arial, sans-serif; }
main, header, footer { max-width: 1180px; margin: 0 auto; padding: 0 clamp(16px, 4vw, 40px); }
header { padding-top: clamp(28px, 5vw, 56px); }
h1 { font-size: clamp(1.6rem, 1.1rem + 2.2vw, 2.5rem); line-height: 1.15; letter-spacing: -0.015em; margin: 0 0 .4em;
  max-width: 26em; text-wrap: balance; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; line-height: 1.25; letter-spacing: -0.01em; margin: 0 0 .5em; }
h3 { font-size: 1rem; margin: 1.8em 0 .5em; overflow-wrap: anywhere; }
p, li { max-width: 68ch; overflow-wrap: anywhere; }
p { margin: 0 0 1em; }
section { padding: 34px 0 10px; border-top: 1px solid var(--line); margin-top: 34px; }
.about, .note, .caption, figcaption, footer { color: var(--muted); }
.note, .caption, figcaption, footer { font-size: .875rem; line-height: 1.45; }
.about { margin-bottom: 1.6em; }
.notice { border-left: 4px solid var(--teacher); background: var(--mark); padding: .7em 1em;
  border-radius: 0 6px 6px 0; }
a { color: var(--student); }
nav { display: flex; flex-wrap: wrap; gap: .3em 1.4em; margin: 1.4em 0 0; font-size: .9375rem; }
nav a { text-underline-offset: .2em; padding: .2em 0; }
.facts { display: flex; flex-wrap: wrap; gap: 1px; margin: 1.6em 0 0; background: var(--line);
  border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
.facts div { flex: 1 1 150px; background: var(--card); padding: 14px 18px; }
.facts dt { color: var(--muted); font-size: .875rem; overflow-wrap: anywhere; }
.facts dt::first-letter { text-transform: uppercase; }
.facts dd { margin: 0; font-size: 1.5rem; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; }
.facts dd small { display: block; font-size: .875rem; font-weight: 400; color: var(--muted); line-height: 1.4; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: 28px 24px;
  align-items: start; margin: 1.2em 0; }
.charts.two { grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); }
.charts figure { margin: 0; min-width: 0; }
.charts h3 { margin: 0 0 .3em; font-size: .9375rem; }
.charts svg { display: block; width: 100%; height: auto; max-width: 460px; font-family: inherit; }
.box { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; background: var(--card); margin: 1.2em 0;
  -webkit-overflow-scrolling: touch; }
.box.tall { max-height: 28rem; overflow-y: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; line-height: 1.4;
  font-variant-numeric: tabular-nums; }
.caption { margin: 1.4em 0 0; }
.caption + .box { margin-top: .5em; }
th, td { padding: 8px 7px; text-align: right; white-space: nowrap; border-top: 1px solid var(--line);
  vertical-align: top; }
thead th { border-top: 0; color: var(--muted); font-weight: 600; background: var(--card); }
.tall thead th { position: sticky; top: 0; box-shadow: inset 0 -1px var(--line); }
th.words, td.words { text-align: left; }
td.wrap { white-space: normal; min-width: 16em; }
tbody th { text-align: left; font-weight: 600; position: sticky; left: 0; background: var(--card); }
tbody th small { display: block; font-weight: 400; font-size: .875rem; }
tr.changed th { background: var(--mark); }
td small { display: block; color: var(--muted); font-size: .8125rem; }
tr.changed { background: var(--mark); }
.student, .teacher, .given { white-space: nowrap; }
.key { display: inline-block; width: 2.1em; height: .8em; vertical-align: -.05em; margin-right: .45em;
  overflow: visible; }
details { margin: 1em 0; }
summary { cursor: pointer; color: var(--student); padding: .2em 0; }
summary:focus-visible, a:focus-visible, .box:focus-visible { outline: 2px solid var(--student); outline-offset: 2px; }
.case { margin: 0 0 2.2em; }
.case h3 { margin-bottom: .1em; }
.cells { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(46%, 150px), 1fr)); gap: 14px 12px;
  margin-top: .7em; }
.cells figure { margin: 0; min-width: 0; max-width: 260px; }
.cells img { display: block; width: 100%; height: auto; max-height: 340px; object-fit: contain; background: #000;
  border-radius: 4px; image-rendering: auto; }
.cells figcaption { margin-top: .35em; }
.legend { display: flex; flex-wrap: wrap; gap: .4em 1.4em; padding: 0; margin: 0 0 1.4em; list-style: none;
  font-size: .875rem; }
.legend li { display: flex; align-items: center; gap: .5em; min-width: 0; }
.legend svg, .legend i { flex: none; width: 34px; height: 16px; border-radius: 3px; background: #2b2b2b; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
  overflow-wrap: anywhere; }
.names { columns: 14em; font-size: .875rem; padding-left: 1.2em; margin: .5em 0; }
footer p { border-top: 1px solid var(--line); margin: 40px 0 0; padding: 18px 0 40px; max-width: none; }
@media (max-width: 600px) {
  th, td { padding: 7px 10px; }
  td.wrap { min-width: 11.5em; }
  tbody th { white-space: normal; min-width: 7.5em; }
}
@media print { details { display: block; } section { break-inside: avoid-page; } }
"""
# matplotlib's "magma" at 0, 0.25, 0.5, 0.75 and 1
ENTROPY_SCALE = "linear-gradient(90deg, #000004, #51127c, #b73779, #fc8961, #fcfdbf)"
DASH_ARRAYS = {"student": "", "teacher": "7 3", "given": "2 3"}


class Fact(NamedTuple):
    """A figure at the top of the page: its name, its value, and more about it. All are plain texts."""
    name: str
    value: str
    more: str


class Section(NamedTuple):
    """A section of the page: an identifier for links, a title (plain text), and its content (HTML)."""
    identifier: str
    title: str
    html: str


def text(value) -> str:
    """Return any value as text that is safe in HTML, also in attributes."""
    return escape(str(value), quote=True)


def typeset(number: str) -> str:
    """Return the text of a number with real minus signs and with spaces that do not break."""
    return number.replace("-", "\u2212").replace(" ", "\u00a0")


def date_text(time: datetime) -> str:
    """Return a date and time with its time zone."""
    return f"{time.astimezone():%Y-%m-%d %H:%M %Z}"


def page(title: str, lead: str, facts: Iterable[Fact], sections: Iterable[Section], footer: str) -> str:
    """Return the whole page.

    Args:
        title: The title, plain text.
        lead: What stands below the title, HTML.
        facts: The figures below it.
        sections: The sections.
        footer: The last line, HTML.
    """
    sections = list(sections)
    style = STYLE
    for name, colours in (("%LIGHT%", LIGHT), ("%DARK%", DARK)):
        style = style.replace(name, " ".join(f"--{key}: {value};" for key, value in colours.items()))
    tiles = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}<small>{text(more)}</small></dd></div>"
                    for name, value, more in facts)
    links = "".join(f'<a href="#{identifier}">{text(name)}</a>' for identifier, name, _ in sections)
    bodies = "\n".join(f'<section id="{identifier}"><h2>{text(name)}</h2>\n{body}\n</section>'
                       for identifier, name, body in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{text(title)}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{text(title)}</h1>
{lead}
{f'<dl class="facts">{tiles}</dl>' if tiles else ''}
<nav aria-label="Sections">{links}</nav>
</header>
<main>
{bodies}
</main>
<footer>{footer}</footer>
</body>
</html>
"""


def paragraph(content: str, style: str = "") -> str:
    """Return a paragraph. content: plain text. style: a CSS class."""
    return f"<p{_attribute('class', style)}>{text(content)}</p>"


def title(content: str) -> str:
    """Return the title of a part of a section. content: plain text."""
    return f"<h3>{text(content)}</h3>"


def table(head: list[str], rows: Iterable[list], caption: str = "", words: int = 1, marked: Iterable[int] = (),
          tall: bool = False, wrap: int | None = None) -> str:
    """Return a table that scrolls inside its box.

    Args:
        head: The titles of the columns.
        rows: Lists of cells. A cell is a plain text, `(value, small print)`, or an :class:`Html`.
        caption: A caption, plain text.
        words: How many columns from the left hold words.
        marked: The numbers of the rows to highlight.
        tall: Whether a long table scrolls up and down as well.
        wrap: The column whose text may wrap.
    """
    marked = set(marked)

    def cell(column: int, value, tag: str = "td", scope: str = "") -> str:
        if isinstance(value, tuple):
            value, small = value
            content = f"{text(value)}<small>{text(small)}</small>"
        else:
            content = value if isinstance(value, Html) else text(value)
        classes = " ".join(["words"] * (column < words or column == wrap) + ["wrap"] * (column == wrap))
        return f"<{tag}{_attribute('scope', scope)}{_attribute('class', classes)}>{content}</{tag}>"

    top = "".join(cell(i, name, "th", "col") for i, name in enumerate(head))
    body = "\n".join(
        f"<tr{_attribute('class', 'changed' if i in marked else '')}>{cell(0, row[0], 'th', 'row')}"
        + "".join(cell(j, value) for j, value in enumerate(row[1:], 1)) + "</tr>" for i, row in enumerate(rows))
    above = f'<p class="caption">{text(caption)}</p>' if caption else ""
    label = text(caption or head[0])
    return (f'{above}<div class="box{" tall" if tall else ""}" tabindex="0" role="region" aria-label="{label}">'
            f"<table><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>")


def _attribute(name: str, value: str) -> str:
    return f' {name}="{value}"' if value else ""


class Html(str):
    """A string that is already HTML."""


def branch_key(branch: str, label: str) -> Html:
    """Return a branch's name with its line and marker, as the charts draw them."""
    shapes = {"student": '<circle cx="17" cy="6" r="3.5"/>', "teacher": '<rect x="13.5" y="2.5" width="7" height="7"/>',
              "given": '<path d="M17 1.5l4 8h-8z"/>'}
    colour, dashes = f"var(--{branch})", DASH_ARRAYS[branch]
    return Html(f'<span class="{branch}"><svg class="key" viewBox="0 0 34 12" aria-hidden="true" fill="{colour}" '
                f'stroke="{colour}"><path d="M0 6H34" stroke-width="2" stroke-dasharray="{dashes}"/>'
                f"{shapes[branch]}</svg>{text(label)}</span>")


def charts(group: str, items: list[Chart], wide: bool = False) -> str:
    """Return charts side by side. group: a name that makes their identifiers unique within the page."""
    figures = "\n".join(f"<figure><h3>{text(chart.title)}</h3>{svg(chart, f'{group}{i}')}</figure>"
                        for i, chart in enumerate(items))
    return f'<div class="charts{" two" if wide else ""}">{figures}</div>'


def class_legend(classes: list[str], seen: set[str], weak: bool, entropy: bool = True) -> str:
    """Return the legend of the pictures.

    Args:
        classes: All classes, which decide the styles.
        seen: Those that are in a picture. The legend names no others.
        weak: Whether the pictures show partial annotations.
        entropy: Whether they show entropy.
    """
    items = []
    for name, (colour, dashes) in class_styles(classes).items():
        if name not in seen:
            continue
        dash = "" if dashes == "-" else " ".join(f"{2 * d:g}" for d in dashes[1])
        items.append(f'<li><svg viewBox="0 0 34 16" aria-hidden="true"><path d="M3 8H31" stroke="{colour}" '
                     f'stroke-width="3" stroke-dasharray="{dash}"/></svg>{text(name)}</li>')
    if weak:
        items.append('<li><svg viewBox="0 0 34 16" aria-hidden="true"><path d="M3 8H31" stroke="#fff" '
                     'stroke-width="1.5"/></svg>'
                     "annotated as background; what has no outline is not annotated</li>")
    if entropy:
        items.append(f'<li><i style="background:{ENTROPY_SCALE}"></i>entropy, from 0 (sure) to 1 (the highest possible '
                     "value)</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def case_row(title: str, note: str, cells: list[Cell]) -> str:
    """Return the pictures of a case, each with its caption."""
    figures = "".join(f'<figure><img src="{cell_png(cell)}" alt="{text(cell.alt)}">'
                      f"<figcaption>{text(cell.title)}</figcaption></figure>" for cell in cells)
    return f'<div class="case"><h3>{text(title)}</h3>{paragraph(note, "note")}<div class="cells">{figures}</div></div>'


def folded(summary: str, content: str) -> str:
    """Return content that is shown on demand. summary: plain text. content: HTML."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def names(items: Iterable[str]) -> str:
    """Return a list of names in columns. items: plain texts."""
    return f'<ul class="names">{"".join(f"<li>{text(item)}</li>" for item in items)}</ul>'
