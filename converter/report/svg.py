"""Figures as SVG, without a plotting library: heat maps, columns and bars, for a file of their own or inside a page.

A figure is WIDTH units wide, about what a telephone shows: text keeps its size wherever it is shown, because a page
sets figures side by side instead of stretching them. Colours are CSS variables, so that light and dark are one file:
a magnitude is the ink's opacity on whatever background there is.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files

MARK = "<!-- bitwright: figures -->"
"""At the beginning of pictures that are a file of their own: they may be drawn again."""

WIDTH = 380
_LEFT, _RIGHT = 34, 8  # room for layer numbers; for the last label's overhang
_TITLE_HEIGHT, _NOTE_HEIGHT, _LABEL_HEIGHT = 24, 16, 16
_NOTE_CHARACTERS = 60  # of a line of notes
_WIDEST_COLUMN = 40.0
_OVERHANG = 14  # of the last label of an axis
# Fractions of a colour range that its legend shows.
_LEGEND_STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Cells of a heat map that get a tooltip each; beyond that the file would grow by megabytes.
_MOST_TOOLTIPS = 4096


@cache
def style_sheet(name: str) -> str:
    """One of the style sheets beside this module."""
    return files("bitwright.converter.report").joinpath(name).read_text("utf-8")


def short(value: float) -> str:
    """Three digits at most, as people write them: 0.0123, 4.5, 120, 3.4e-5."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = 0 if abs(value) >= 100 else 3 - (0 if value == 0 else math.floor(math.log10(abs(value))) + 1)
        text = f"{value:.{min(max(digits, 0), 5)}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


@dataclass(frozen=True)
class Figure:
    """title, description: for everybody, and for those who cannot see it. body: SVG elements; height in units."""

    title: str
    description: str
    body: str
    height: float

    def __html__(self) -> str:
        """What a template puts in the place of the figure."""
        return self.svg()

    def svg(self, attributes: str = "") -> str:
        """The figure as an element of a page that has the style sheet figure.css."""
        return (
            f'<svg class="figure" role="img" viewBox="0 0 {WIDTH} {_number(self.height)}"{attributes}'
            f' aria-label="{escape(self.title)}. {escape(self.description)}">'
            f"<desc>{escape(self.description)}</desc>{self.body}</svg>"
        )


@dataclass(frozen=True)
class Scale:
    """From values to opacities: linear from `low` to `high`, or in their logarithms."""

    low: float
    high: float
    logarithmic: bool = False
    text: Callable[[float], str] = short

    @classmethod
    def of(cls, values: Sequence[float], logarithmic: bool = False, text: Callable[[float], str] = short) -> "Scale":
        """The range of these values; a logarithmic one spans six decades at most, below which all is alike."""
        high = max(values, default=1.0)
        low = min(values, default=0.0)
        if logarithmic:
            high = high if high > 0 else 1.0
            low = max(min((v for v in values if v > 0), default=high), high * 1e-6)
        return cls(low, high, logarithmic, text)

    def fraction(self, value: float) -> float:
        """0 at `low`, 1 at `high`."""
        if self.high <= self.low:
            return 1.0
        if self.logarithmic:
            value = max(value, self.low)
            return min(1.0, math.log(value / self.low) / math.log(self.high / self.low))
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    def value(self, fraction: float) -> float:
        if self.logarithmic:
            return self.low * math.pow(self.high / self.low, fraction)
        return self.low + (self.high - self.low) * fraction

    def opacity(self, value: float) -> float:
        """Never quite nothing, so that a small value can be told from no value."""
        return 0.07 + 0.93 * self.fraction(value)


@dataclass(frozen=True)
class Grid:
    """Rows of cells, each row with its label; None for a cell that there is not.

    columns: their labels, as many of them as there is room for are written. column_groups: (label, columns it spans).
    marks, missing: (row, column) to ring, and to fill with the colour of what is wrong. tooltip: of (row, column).
    """

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float | None]]]
    column_groups: Sequence[tuple[str, int]] = ()
    marks: Sequence[tuple[int, int]] = ()
    missing: Sequence[tuple[int, int]] = ()
    tooltip: Callable[[int, int], str] | None = None


def heat_map(
    title: str, description: str, grid: Grid, scale: Scale, *, notes: Sequence[str] = (), legend: str = ""
) -> Figure:
    """The cells of the grid, darker for more. notes: lines below. legend: what the values are."""
    columns, rows = grid.columns, grid.rows
    row_height = min(14.0, max(4.0, 400 / len(rows)))
    width = (WIDTH - _LEFT - _RIGHT) / len(columns)
    top = _TITLE_HEIGHT + (_LABEL_HEIGHT if grid.column_groups else 0) + _LABEL_HEIGHT
    parts = [_title(title)]
    at = 0
    for label, span in grid.column_groups:
        middle = _LEFT + (at + span / 2) * width
        parts.append(_text(middle, _TITLE_HEIGHT + 11, label, anchor="middle"))
        parts.append(_line(_LEFT + at * width + 2, _TITLE_HEIGHT + 15, _LEFT + (at + span) * width - 2))
        at += span
    every = max(1, math.ceil(len(columns) * max(7.0 * max(map(len, columns)), 20) / (WIDTH - _LEFT - _RIGHT)))
    for j in range(0, len(columns), every):
        parts.append(_text(_LEFT + (j + 0.5) * width, top - 4, columns[j], anchor="middle"))
    rows_apart = next(step for step in (1, 2, 5, 10, 20, 50, 100) if step * row_height >= 13 and len(rows) / step <= 20)
    tooltips = grid.tooltip if len(rows) * len(columns) <= _MOST_TOOLTIPS else None
    gap = 0.8 if width > 8 else 0.0
    for i, (label, values) in enumerate(rows):
        y = top + i * row_height
        if i % rows_apart == 0:
            parts.append(_text(_LEFT - 6, y + row_height / 2 + 4, label, anchor="end"))
        for j, value in enumerate(values):
            box = _box(_LEFT + j * width, y, width - gap, row_height - gap / 2)
            if (i, j) in grid.missing:
                look = ' class="missing"'
            elif value is None:
                look = ' class="empty"'
            else:
                look = f' class="cell" fill-opacity="{scale.opacity(value):.2f}"'
            parts.append(f"<rect{box}{look}{_tip(tooltips, i, j)}")
    for i, j in dict.fromkeys(grid.marks):
        x, y = _LEFT + (j + 0.5) * width - gap / 2, top + (i + 0.5) * row_height
        parts.append(
            f'<circle cx="{_number(x)}" cy="{_number(y)}" r="{_number(max(5, row_height / 2))}" class="mark"/>'
        )
    bottom = top + len(rows) * row_height + 8
    bottom = _legend(parts, scale, legend, bottom)
    return Figure(title, description, "".join(parts) + _notes(notes, bottom), bottom + _notes_height(notes))


def columns_chart(
    title: str,
    description: str,
    values: Sequence[float],
    *,
    text: Callable[[float], str],
    axis: str = "layer",
    notes: Sequence[str] = (),
    logarithmic: bool = False,
) -> Figure:
    """A column for each value, from zero; or from the decade below the smallest, on a logarithmic axis."""
    height, top = 110.0, _TITLE_HEIGHT + 10
    ticks = _decades(values) if logarithmic else _ticks(max(values, default=0.0))
    low, high = ticks[0], ticks[-1]

    def share(value: float) -> float:
        if logarithmic:
            return math.log(max(value, low) / low) / math.log(high / low)
        return value / high

    left = 12 + 6.2 * max(len(text(tick)) for tick in ticks)
    width = min(_WIDEST_COLUMN, (WIDTH - left - _RIGHT) / max(1, len(values)))
    parts = [_title(title)]
    for tick in ticks:
        y = top + height * (1 - share(tick))
        parts += [_line(left, y, WIDTH - _RIGHT), _text(left - 6, y + 4, text(tick), anchor="end")]
    every = max(1, math.ceil(22 / width))
    for i, value in enumerate(values):
        tall = height * share(value)
        box = _box(left + i * width + 0.5, top + height - tall, max(width - 1, 0.8), tall)
        parts.append(f'<rect{box} class="column"><title>{axis} {i}: {escape(text(value))}</title></rect>')
        if i % every == 0:
            parts.append(_text(left + (i + 0.5) * width, top + height + 14, str(i), anchor="middle"))
    bottom = top + height + 32
    parts.append(_text(left + (WIDTH - left - _RIGHT) / 2, bottom - 4, axis, anchor="middle"))
    return Figure(title, description, "".join(parts) + _notes(notes, bottom + 6), bottom + 6 + _notes_height(notes))


def bars(
    title: str,
    description: str,
    rows: Sequence[tuple[str, float, str]],
    *,
    highlighted: int | None = None,
    notes: Sequence[str] = (),
) -> Figure:
    """A bar for each (label, value, text), from zero; one of them stands out."""
    height, top = 19.0, _TITLE_HEIGHT + 4.0
    left = 14 + 6.6 * max((len(label) for label, _, _ in rows), default=0)
    right = 14 + 6.4 * max((len(text) for _, _, text in rows), default=0)
    longest = max((value for _, value, _ in rows), default=1.0) or 1.0
    parts = [_title(title)]
    for i, (label, value, text) in enumerate(rows):
        y, kind = top + i * height, "column" if i == highlighted else "muted"
        long = (WIDTH - left - right) * value / longest
        strong = "strong" if i == highlighted else ""
        parts += [
            _text(left - 8, y + 13, label, anchor="end", kind=strong),
            f'<rect{_box(left, y + 3, long, height - 6)} class="{kind}"/>',
            _text(left + long + 6, y + 13, text, kind=strong),
        ]
    bottom = top + len(rows) * height + 6
    return Figure(title, description, "".join(parts) + _notes(notes, bottom), bottom + _notes_height(notes))


def stacked_bars(
    title: str,
    description: str,
    rows: Sequence[tuple[str, Sequence[tuple[str, float]]]],
    *,
    text: Callable[[float], str],
    notes: Sequence[str] = (),
) -> Figure:
    """A bar for each (label, parts), cut into its (name, value) parts; the names, which the rows share, stand below."""
    height, top, left, right = 26.0, _TITLE_HEIGHT + 4.0, 64.0, 70.0
    names = list(dict.fromkeys(name for _, parts in rows for name, _ in parts))
    longest = max((sum(value for _, value in parts) for _, parts in rows), default=1.0) or 1.0
    pieces = [_title(title)]
    for i, (label, parts) in enumerate(rows):
        y, x = top + i * height, left
        pieces.append(_text(left - 8, y + 16, label, anchor="end"))
        for name, value in parts:
            wide = (WIDTH - left - right) * value / longest
            tip = f"<title>{escape(label)}: {escape(name)} {escape(text(value))}</title>"
            pieces.append(f"<rect{_box(x, y + 3, wide, height - 8)}{_look(names.index(name), len(names))}>{tip}</rect>")
            x += wide
        pieces.append(_text(x + 6, y + 16, text(sum(value for _, value in parts))))
    bottom, x = top + len(rows) * height + 10, 2.0
    for i, name in enumerate(names):
        wide = 22 + 6.2 * len(name)
        if x + wide > WIDTH:
            x, bottom = 2.0, bottom + 17
        pieces += [f"<rect{_box(x, bottom, 11, 11)}{_look(i, len(names))}/>", _text(x + 15, bottom + 10, name)]
        x += wide + 8
    bottom += 22
    return Figure(title, description, "".join(pieces) + _notes(notes, bottom), bottom + _notes_height(notes))


@dataclass(frozen=True)
class Curve:
    """points: (x, y), in order of x. dashed: less is known of it."""

    label: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


def curves_chart(
    title: str, description: str, curves: Sequence[Curve], *, axis: str, notes: Sequence[str] = ()
) -> Figure:
    """Lines over a logarithmic axis, from zero; each is named below, in the order of its right end."""
    height, top, left = 150.0, _TITLE_HEIGHT + 8, 40.0
    xs = sorted({x for curve in curves for x, _ in curve.points})
    ticks = _ticks(max((y for curve in curves for _, y in curve.points), default=0.0))
    low, span = math.log(xs[0]), math.log(xs[-1] / xs[0]) or 1.0

    def place(x: float, y: float) -> str:
        across = left + (WIDTH - left - _RIGHT - _OVERHANG) * (math.log(x) - low) / span
        return f"{_number(across)},{_number(top + height * (1 - y / ticks[-1]))}"

    parts = [_title(title)]
    for tick in ticks:
        y = top + height * (1 - tick / ticks[-1])
        parts += [_line(left, y, WIDTH - _RIGHT), _text(left - 6, y + 4, short(tick), anchor="end")]
    for x in xs:
        parts.append(_text(float(place(x, 0).split(",")[0]), top + height + 14, _thousands(x), anchor="middle"))
    parts.append(_text(left + (WIDTH - left) / 2, top + height + 29, axis, anchor="middle"))
    bottom = top + height + 40
    for i, curve in enumerate(curves):
        dash = ' stroke-dasharray="4 3"' if curve.dashed else ""
        points = " ".join(place(*point) for point in curve.points)
        look = f' class="line" stroke-opacity="{1 - 0.75 * i / max(1, len(curves)):.2f}"{dash}'
        parts.append(f'<polyline points="{points}"{look}><title>{escape(curve.label)}</title></polyline>')
        y = bottom + i * 16 + 6
        parts += [f'<polyline points="2,{_number(y)} 30,{_number(y)}"{look}/>', _text(36, y + 4, curve.label)]
    bottom += len(curves) * 16 + 8
    return Figure(title, description, "".join(parts) + _notes(notes, bottom), bottom + _notes_height(notes))


def roofline_chart(
    title: str,
    description: str,
    points: Sequence[tuple[str, float]],
    bandwidth: float,
    rate: float,
    notes: Sequence[str] = (),
) -> Figure:
    """The roof of a device, bandwidth (bytes a second) up to its ridge and rate (operations a second) beyond it, and on
    it operators by (name, operations a byte), named below in the order of their intensity."""
    height, top, left = 150.0, _TITLE_HEIGHT + 8, 52.0
    ridge = rate / bandwidth
    xs = _decades([ridge * 3, *(max(intensity, 0.1) for _, intensity in points)])
    ys = _decades([xs[0] * bandwidth, rate])

    def place(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / xs[0]) / math.log(xs[-1] / xs[0])
        up = math.log(max(y, ys[0]) / ys[0]) / math.log(ys[-1] / ys[0])
        return left + (WIDTH - left - _RIGHT - _OVERHANG) * across, top + height * (1 - up)

    parts = [_title(title)]
    for y in ys:
        at = place(xs[0], y)[1]
        parts += [_line(left, at, WIDTH - _RIGHT), _text(left - 6, at + 4, _operations(y), anchor="end")]
    parts += [_text(place(x, ys[0])[0], top + height + 14, short(x), anchor="middle") for x in xs]
    parts.append(_text(left + (WIDTH - left) / 2, top + height + 29, "operations a byte", anchor="middle"))
    roof = [place(xs[0], xs[0] * bandwidth), place(ridge, rate), place(xs[-1], rate)]
    parts.append('<polyline class="line" points="' + " ".join(f"{_number(x)},{_number(y)}" for x, y in roof) + '"/>')
    bottom = top + height + 40
    for i, (name, intensity) in enumerate(sorted(points, key=lambda point: point[1])):
        x, y = place(max(intensity, xs[0]), min(rate, max(intensity, xs[0]) * bandwidth))
        tip = f"<title>{escape(name)}: {short(intensity)} operations a byte</title>"
        parts.append(f'<circle cx="{_number(x)}" cy="{_number(y)}" r="4" class="mark">{tip}</circle>')
        column, line = i % 2, i // 2
        parts.append(_text(2 + column * WIDTH / 2, bottom + line * 16 + 8, f"{short(intensity)}  {name}"))
    bottom += (len(points) + 1) // 2 * 16 + 8
    return Figure(title, description, "".join(parts) + _notes(notes, bottom), bottom + _notes_height(notes))


def _look(i: int, n: int) -> str:
    """Of the i-th of n parts: the accent, fainter and fainter, and the last one in grey."""
    return ' class="muted"' if i == n - 1 and n > 1 else f' class="column" fill-opacity="{1 - 0.8 * i / n:.2f}"'


def _thousands(value: float) -> str:
    return f"{value / 1024:g}K" if value >= 1024 else f"{value:g}"


def _operations(value: float) -> str:
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if value >= size:
            return f"{value / size:g} {prefix}"
    return short(value)


def svg_file(figures: Sequence[Figure]) -> str:
    """A file of its own: the figures one below the other, on the background that goes with the reader's colours."""
    height = sum(figure.height + 24 for figure in figures) + 24
    parts, y = [], 24.0
    for figure in figures:
        place = f' x="16" y="{_number(y)}" width="{WIDTH}" height="{_number(figure.height)}"'
        parts.append(figure.svg(place).replace('class="figure"', ""))
        y += figure.height + 24
    title = "; ".join(figure.title for figure in figures)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="figure" viewBox="0 0 {WIDTH + 32} {_number(height)}">'
        f"{MARK}<title>{escape(title)}</title><style>{style_sheet('figure.css')}</style>"
        f'<rect width="100%" height="100%" style="fill: var(--card)"/>{"".join(parts)}</svg>\n'
    )


def _title(title: str) -> str:
    return _text(2, 14, title, kind="title")


def _text(x: float, y: float, text: str, *, anchor: str = "", kind: str = "") -> str:
    anchored = f' text-anchor="{anchor}"' if anchor else ""
    classed = f' class="{kind}"' if kind else ""
    return f'<text x="{_number(x)}" y="{_number(y)}"{anchored}{classed}>{escape(text)}</text>'


def _line(x1: float, y: float, x2: float) -> str:
    return f'<line x1="{_number(x1)}" y1="{_number(y)}" x2="{_number(x2)}" y2="{_number(y)}" class="rule"/>'


def _box(x: float, y: float, width: float, height: float) -> str:
    return f' x="{_number(x)}" y="{_number(y)}" width="{_number(width)}" height="{_number(height)}"'


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _tip(tooltip: Callable[[int, int], str] | None, i: int, j: int) -> str:
    return "/>" if tooltip is None else f"><title>{escape(tooltip(i, j))}</title></rect>"


def _legend(parts: list[str], scale: Scale, legend: str, y: float) -> float:
    """Swatches with the values they stand for; returns where the figure goes on."""
    shown = _LEGEND_STEPS if scale.high > scale.low else _LEGEND_STEPS[-1:]
    for i, fraction in enumerate(shown):
        value = scale.value(fraction)
        x = _LEFT + i * 66
        swatch = _box(x, y + 2, 12, 10)
        parts.append(f'<rect{swatch} class="cell" fill-opacity="{scale.opacity(value):.2f}"/>')
        parts.append(_text(x + 16, y + 11, scale.text(value)))
    if legend:
        parts.append(_text(_LEFT, y + 28, legend))
    return y + (36 if legend else 20)


def _notes(notes: Sequence[str], y: float) -> str:
    lines = [line for note in notes for line in _wrapped(note)]
    return "".join(_text(2, y + 12 + i * _NOTE_HEIGHT, line) for i, line in enumerate(lines))


def _notes_height(notes: Sequence[str]) -> float:
    return _NOTE_HEIGHT * sum(len(_wrapped(note)) for note in notes) + 6


def _wrapped(note: str) -> list[str]:
    import textwrap

    return textwrap.wrap(note, _NOTE_CHARACTERS) or [""]


def _ticks(highest: float) -> list[float]:
    """Zero and two to five round steps, the last of which is not below the highest value."""
    if highest <= 0:
        return [0.0, 1.0]
    raw = highest / 4
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    return [i * step for i in range(math.ceil(highest / step * 0.999) + 1)]


def _decades(values: Sequence[float]) -> list[float]:
    """Powers of ten around the values; the smallest six decades below the largest at most."""
    positive = [value for value in values if value > 0] or [1.0]
    high = math.ceil(math.log10(max(positive)) + 1e-9)
    low = max(math.floor(math.log10(min(positive)) - 1e-9), high - 6)
    return [10.0**exponent for exponent in range(min(low, high - 1), high + 1)]
