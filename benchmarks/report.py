"""Results as text: machine, one line a row while it runs, and the table in Markdown."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from benchmarks import kernels

Result = Mapping[str, Any]

MEGA = 1e6
NONE = "–"
MARKS = ("<!-- results -->", "<!-- /results -->")


def machine() -> dict[str, Any]:
    """What a reader must know to compare the numbers."""
    return kernels.machine() | {
        "cores": os.cpu_count(),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "load": f"{os.getloadavg()[0]:.2f} before the first row",
        **{name: version(name) for name in ("mpcserve", "onnx", "onnxruntime", "cryptography")},
    }


def seconds(value: float) -> str:
    """Three digits: "22.7 µs", "196 ms", "1.84 s"."""
    scale, unit = (1e6, "µs") if value < 1e-3 else (1e3, "ms") if value < 1 else (1, "s")
    return f"{digits(value * scale)} {unit}"


def megabytes(value: float | None) -> str:
    """Three digits of MB; a dash where nobody knows."""
    return NONE if value is None else digits(value / MEGA)


def digits(value: float) -> str:
    """Three of them, and never an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def times(value: float) -> str:
    """A ratio: 0.5×, 4.1×, 32×."""
    return f"{value:.1f}×" if value < 10 else f"{value:,.0f}×"


def line(row: Result) -> str:
    """One measured row, for whoever watches."""
    m = row["mpcserve"]
    (least, most), plain = m["spread"]["online"], m["plaintext_seconds"]
    empty = m["empty_pool"]["seconds"]["total"]
    return (
        f"online {seconds(m['seconds']['online'])} ({seconds(least)} to {seconds(most)}), "
        f"empty pool {seconds(empty)}, onnxruntime {seconds(plain)}; "
        f"{m['rounds']} rounds, {megabytes(row['plan']['online_bytes'])} MB online, "
        f"{megabytes(m['dealt_bytes'])} MB dealt; error {m['max_abs_error']:.2g}"
    )


def peer_line(measured: Result) -> str:
    """One peer's row."""
    if "problem" in measured:
        return str(measured["problem"])
    least, most = measured["spread"]
    return (
        f"{seconds(measured['seconds'])} ({seconds(least)} to {seconds(most)}), "
        f"{megabytes(measured['sent_bytes'])} MB, error {measured['max_abs_error']:.2g}"
    )


def markdown(results: Result) -> str:
    """The whole report."""
    parts = [_about(results)]
    if _served(results):
        parts += [_headline(results), _floors(results), _errors(results)]
    if problems := list(_problems(results)):
        parts.append("\n".join(f"* {p}" for p in problems))
    return "\n\n".join(parts)


def inserted(text: str, results: Result) -> str:
    """`text` with the report between `<!-- results -->` and `<!-- /results -->`."""
    before, after = text.index(MARKS[0]) + len(MARKS[0]), text.index(MARKS[1])
    return f"{text[:before]}\n{markdown(results)}\n{text[after:]}"


def _problems(results: Result) -> Iterator[str]:
    """What is missing from the tables, and why."""
    for peer in results["peers"].values():
        if peer["problem"]:
            yield f"{peer['title']}: {peer['problem']}"
    for row in results["rows"]:
        if "problem" in row:
            yield f"{row['title']}: not served: {row['problem']}"
        for name, measured in row.get("peers", {}).items():
            if "problem" in measured:
                yield f"{row['title']} on {results['peers'][name]['title']}: {measured['problem']}"


def _about(results: Result) -> str:
    m, speeds = results["machine"], results["speeds"]
    versions = ", ".join(
        f"{k} {m[k]}" for k in ("python", "numpy", "numba", "onnxruntime", "mpcserve")
    )
    return (
        f"{m['cpu']}, {m['cores']} cores, {m['memory']}, {m['system']}; {versions}; "
        f"commit {m['commit']}; network {results['network']}; median of {results['runs']} runs "
        f"(least to most); load {m['load']}. One core multiplies and adds "
        f"{speeds['products']['64'] / 1e9:.1f}·10⁹ 64-bit words and "
        f"{speeds['products']['32'] / 1e9:.1f}·10⁹ 32-bit words a second and passes "
        f"{speeds['wire'] / MEGA:.0f} MB/s through TLS."
    )


def _served(results: Result) -> list[Result]:
    return [row for row in results["rows"] if "mpcserve" in row]


def _headline(results: Result) -> str:
    peers = installed(results)
    head = [
        "model",
        "onnxruntime, 1 thread",
        "mpcserve online",
        "× onnxruntime",
        "pool empty",
        "MB online",
        "MB dealt",
        "rounds",
    ]
    for name in peers:
        title = results["peers"][name]["title"]
        head += [title, "÷ online", "÷ pool empty", "its MB"]
    return _table(head, [_headline_row(row, peers) for row in _served(results)])


def _headline_row(row: Result, peers: Sequence[str]) -> list[str]:
    m = row["mpcserve"]
    online, plain = m["seconds"]["online"], m["plaintext_seconds"]
    empty = m["empty_pool"]["seconds"]["total"]
    least, most = m["spread"]["online"]
    cells = [
        row["title"],
        seconds(plain),
        f"**{seconds(online)}** ({seconds(least)} to {seconds(most)})",
        times(online / plain),
        seconds(empty),
        megabytes(row["plan"]["online_bytes"]),
        megabytes(m["dealt_bytes"]),
        str(m["rounds"]),
    ]
    for name in peers:
        measured = row.get("peers", {}).get(name, {})
        if "seconds" not in measured:
            cells += [NONE] * 4
            continue
        cells += [
            seconds(measured["seconds"]),
            times(measured["seconds"] / online),
            times(measured["seconds"] / empty),
            megabytes(measured["sent_bytes"]),
        ]
    return cells


def _floors(results: Result) -> str:
    """Where the two floors are, and how far from their sum the online phase is."""
    head = [
        "model",
        "multiply-adds",
        "comparisons",
        "floor: products",
        "floor: wire",
        "online",
        "online / floors",
        "CPU of alice, bob, carol",
        "peak memory of a server",
    ]
    rows = []
    for row in _served(results):
        plan, m = row["plan"], row["mpcserve"]
        floors = plan["floors"]
        both = floors["products"] + floors["wire"]
        peak = max(m["peak_rss_bytes"].values())
        rows.append(
            [
                row["title"],
                f"{digits(sum(plan['products'].values()) / MEGA)} M",
                f"{digits(plan['comparisons'] / MEGA)} M",
                seconds(floors["products"]),
                seconds(floors["wire"]),
                seconds(m["seconds"]["online"]),
                times(m["seconds"]["online"] / both),
                ", ".join(seconds(m["cpu_seconds"][r]) for r in ("alice", "bob", "carol")),
                f"{peak / 1e9:.2f} GB",
            ]
        )
    return _table(head, rows)


def _errors(results: Result) -> str:
    """The largest difference of an output from onnxruntime's in float."""
    peers = installed(results)
    head = ["largest error", "mpcserve", *(results["peers"][name]["title"] for name in peers)]
    rows = []
    for row in _served(results):
        measured = [row["mpcserve"], *(row.get("peers", {}).get(name, {}) for name in peers)]
        errors = [m.get("max_abs_error") for m in measured]
        rows.append([row["title"], *(NONE if e is None else f"{e:.1g}" for e in errors)])
    return _table(head, rows)


def installed(results: Result) -> list[str]:
    """The peers that were measured."""
    return [name for name, peer in results["peers"].items() if not peer["problem"]]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
