"""The comparison drawn as one SVG: seconds and bytes of every row, on logarithmic axes.

Bars begin at the left edge of an axis whose first tick is no zero: the numbers beside them count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10
from typing import Any

from benchmarks.report import installed, megabytes, seconds

Result = Mapping[str, Any]

LABELS, PLOT, GAP, MARGIN = 200, 330, 100, 16
BAR, SPACE, HEAD, FOOT = 11, 12, 64, 30
STYLE = "font-family='system-ui, sans-serif' font-size"
COLOURS = {
    "onnxruntime": "#9aa0a6",
    "online": "#1b7f5c",
    "empty": "#7cc4a4",
    "spu": "#d9822b",
    "crypten": "#8b5fbf",
}
INK, PALE = "#24292f", "#d0d7de"


@dataclass(frozen=True, slots=True)
class Bar:
    """One number of one series; None where there is none to draw."""

    series: str
    value: float | None


def plot(results: Result) -> str:
    """Two panels side by side with a common list of rows."""
    rows = [row for row in results["rows"] if "mpcserve" in row]
    peers = installed(results)
    times = [_time_bars(row, peers) for row in rows]
    sizes = [_size_bars(row, peers) for row in rows]
    names = {"onnxruntime": "onnxruntime, 1 thread, in the clear", **_names(results, peers)}
    band = BAR * max(map(len, times), default=1) + SPACE
    height = HEAD + band * len(rows) + FOOT + 20
    width = MARGIN + LABELS + 2 * (PLOT + GAP)
    body = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' "
        f"viewBox='0 0 {width} {height}'>",
        f"<rect width='{width}' height='{height}' fill='white'/>",
        *_legend(names),
    ]
    for k, row in enumerate(rows):
        y = HEAD + band * k + (band - SPACE) / 2 + 4
        body.append(_text(MARGIN + LABELS - 10, y, row["title"], anchor="end"))
    left = MARGIN + LABELS
    body += _panel(left, "seconds", times, band, seconds)
    body += _panel(left + PLOT + GAP, "MB sent by all servers", sizes, band, megabytes)
    m = results["machine"]
    about = f"{m['cpu']}, {m['cores']} cores, network {results['network']}, commit {m['commit']}"
    body.append(_text(MARGIN, height - 8, about, size=10))
    return "\n".join([*body, "</svg>"]) + "\n"


def _names(results: Result, peers: Sequence[str]) -> dict[str, str]:
    ours = {"online": "mpcserve, online", "empty": "mpcserve, pool empty"}
    return ours | {name: results["peers"][name]["title"] for name in peers}


def _time_bars(row: Result, peers: Sequence[str]) -> list[Bar]:
    m = row["mpcserve"]
    return [
        Bar("onnxruntime", m["plaintext_seconds"]),
        Bar("online", m["seconds"]["online"]),
        Bar("empty", m["empty_pool"]["seconds"]["total"]),
        *(Bar(name, row.get("peers", {}).get(name, {}).get("seconds")) for name in peers),
    ]


def _size_bars(row: Result, peers: Sequence[str]) -> list[Bar]:
    online, dealt = row["plan"]["online_bytes"], row["mpcserve"]["dealt_bytes"]
    return [
        Bar("onnxruntime", None),
        Bar("online", online or None),
        Bar("empty", online + dealt or None),
        *(Bar(name, row.get("peers", {}).get(name, {}).get("sent_bytes")) for name in peers),
    ]


def _legend(names: Mapping[str, str]) -> Iterator[str]:
    x = MARGIN
    for series, name in names.items():
        yield f"<rect x='{x}' y='14' width='11' height='11' fill='{COLOURS[series]}'/>"
        yield _text(x + 16, 24, name)
        x += 40 + int(6.6 * len(name))


def _panel(
    left: int, title: str, rows: Sequence[Sequence[Bar]], band: int, label: Callable[[float], str]
) -> Iterator[str]:
    """Bars of all rows over decades of a logarithmic axis."""
    values = [b.value for bars in rows for b in bars if b.value]
    if not values:
        return
    first, last = floor(log10(min(values)) - 0.1), ceil(log10(max(values)))
    bottom = HEAD + band * len(rows) - SPACE / 2
    yield _text(left, HEAD - 12, title, weight="bold")
    for decade in range(first, last + 1):
        x = left + PLOT * (decade - first) / (last - first)
        yield (
            f"<line x1='{x:.1f}' y1='{HEAD - 4}' x2='{x:.1f}' y2='{bottom:.1f}' stroke='{PALE}'/>"
        )
        yield _text(x, bottom + 14, _tick(label(10.0**decade)), anchor="middle", size=10)
    for k, bars in enumerate(rows):
        for place, bar in enumerate(bars):
            if not bar.value:
                continue
            length = PLOT * (log10(bar.value) - first) / (last - first)
            y = HEAD + band * k + BAR * place
            yield (
                f"<rect x='{left}' y='{y}' width='{length:.1f}' height='{BAR - 2}' "
                f"fill='{COLOURS[bar.series]}'/>"
            )
            yield _text(left + length + 4, y + BAR - 3, label(bar.value), size=9)


def _tick(label: str) -> str:
    """ "10.0 ms" → "10 ms": a tick is exact."""
    number, *unit = label.split()
    return " ".join([number.rstrip("0").rstrip(".") if "." in number else number, *unit])


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, weight: str = "normal"
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' {STYLE}='{size}' font-weight='{weight}' "
        f"text-anchor='{anchor}' fill='{INK}'>{escape(text)}</text>"
    )
