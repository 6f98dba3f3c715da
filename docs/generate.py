"""Write the parts of the documentation that follow from the code and from measurements.

`python docs/generate.py`: between `<!-- name -->` and `<!-- /name -->` of a page stands what the
function of that name returns; a test checks that it is current.
"""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx import defs

from mpcserve.compiler.client_steps import MAKERS, MOVES
from mpcserve.compiler.ml.rewrite import rewriters
from mpcserve.compiler.registry import registry
from mpcserve.plan.ops import OPS, Cost

ROOT = Path(__file__).resolve().parent.parent

FAMILIES = {
    "linear": "linear layers",
    "elementwise": "elementwise",
    "activation": "smooth functions, as sums of waves in one round",
    "probability": "softmax",
    "attention": "attention",
    "recurrent": "recurrent layers",
    "normalization": "normalisation",
    "pooling": "pooling",
    "logic": "comparisons, logic, choices: secret bits",
    "rounding": "rounding, exact on the grid",
    "conversion": "casts",
    "trigonometry": "trigonometry",
    "reduction": "reductions",
    "cumulative": "running sums and products",
    "ordering": "order: secret indices",
    "loss": "losses",
    "shape": "shape, all local",
    "ml_trees": "trees of `ai.onnx.ml`",
    "ml_labels": "labels of `ai.onnx.ml`",
    "convolution": "convolutions",
    "indexing": "elements at indices",
    "resample": "resampling",
    "signal": "signals",
    "contraction": "sums of products",
}


def families() -> str:
    """The operators of each family in one line."""
    found: dict[str, set[str]] = defaultdict(set)
    for e in registry().entries:
        found[e.family].add(e.op)
    found["ml_rewritten"] = set(rewriters())
    names = {**FAMILIES, "ml_rewritten": "more of `ai.onnx.ml`"}
    order = [*names, *sorted(set(found) - set(names))]
    lines = [f"* **{names.get(f, f)}**: {', '.join(sorted(found[f]))}" for f in order if found[f]]
    return "\n".join(lines)


def operators() -> str:
    """One row per ONNX operator: what it does, what it costs."""
    rows = ["| operator | from opset | what it does, what it costs |", "|---|---|---|"]
    entries = registry().entries
    ml = {e.op for e in entries if e.domain}
    families = [*FAMILIES, *sorted({e.family for e in entries} - set(FAMILIES))]
    for family in families:
        rows.append(f"| **{FAMILIES.get(family, family)}** | | |")
        first: dict[str, tuple[int, str]] = {}
        for e in entries:
            if e.family == family and (e.op not in first or e.since < first[e.op][0]):
                first[e.op] = (e.since, e.summary)
        for op, (since, summary) in sorted(first.items()):
            text = summary.replace("|", "\\|")
            oldest = max(since, 7) if op not in ml else f"ml {since}"
            rows.append(f"| `{op}` | {oldest} | {text} |")
    rows.append("| **rewritten in standard operators, from `ai.onnx.ml`** | | |")
    for op, function in sorted(rewriters().items()):
        rows.append(f"| `{op}` | ml 1 | {(inspect.getdoc(function) or '').partition(chr(10))[0]} |")
    return "\n".join(rows)


def on_client() -> str:
    """Operators that the data owner's client computes on its own input."""
    rows = ["| operator | what the client does, and what must be disclosed for it |", "|---|---|"]
    for (op, _), function in sorted(MAKERS.items()):
        rows.append(f"| `{op}` | {' '.join((inspect.getdoc(function) or '').split())} |")
    moves = ", ".join(f"`{op}`" for op in sorted(MOVES))
    rows.append(f"| {moves} | Elements of text moved; numbers on their way to one of the above. |")
    return "\n".join(rows)


def costs() -> str:
    """Bytes of a thousand elements of each interactive instruction at typical widths."""
    n, m, ring = 1000, 22, 38
    product = {"ring": ring, "truncate": 16}
    sign = {"chunks": [5, 4, 4, 4, 4], "groups": [5]}
    lines: list[tuple[str, Cost]] = [
        ("linear layer + truncation, per output", OPS["matmul"].cost(n, m, product, 2)),
        ("comparison", OPS["sign"].cost(n, 1, sign, 1)),
        ("selection by a secret bit, result for the next layer", _cost("select", n, ring, m)),
        ("extension", _cost("extend", n, ring, m)),
    ]
    lines.append(("**linear + truncation + ReLU**", _sum([c for _, c in lines[:3]])))
    rows = [
        "| step | rounds | bytes each way, per element | bytes dealt, per element |",
        "|---|---|---|---|",
    ]
    for name, cost in lines:
        each, dealt = sum(cost.rounds) / n, cost.dealt / n
        rows.append(f"| {name} | {len(cost.rounds)} | {each:.2f} | {dealt:.2f} |")
    rows.append("| add, reshape, slice, mean, constants, average pooling | 0 | 0 | 0 |")
    return "\n".join(rows)


def _cost(op: str, size: int, width: int, reads: int) -> Cost:
    return OPS[op].cost(size, width, {"width": reads, "widths": [reads]}, 2)


def _sum(costs: list[Cost]) -> Cost:
    return Cost(sum((c.rounds for c in costs), ()), sum(c.dealt for c in costs))


Case = Mapping[str, Any]


def _recorded() -> list[Case]:
    """What ONNX's node tests came to, as `python -m tests.node_suite --record` wrote it."""
    cases: list[Case] = json.loads((ROOT / "tests" / "node_suite.json").read_text())
    return cases


def _tested() -> dict[str, list[Case]]:
    """Operator → its cases that are not left out."""
    by_op: dict[str, list[Case]] = defaultdict(list)
    for case in _recorded():
        if case["status"] != "excluded":
            by_op[case["op"]].append(case)
    return by_op


def direct() -> str:
    """Operators with a rule of their own."""
    entries: dict[str, list[Any]] = defaultdict(list)
    for e in registry().entries:
        entries[e.op].append(e)
    tested = _tested()
    return _table([_row(op, entries[op], tested.get(op, [])) for op in sorted(entries)])


def _without_rule() -> dict[str, list[Case]]:
    ruled = {e.op for e in registry().entries}
    return {op: cases for op, cases in sorted(_tested().items()) if op not in ruled}


def defined() -> str:
    """Operators that are compiled by their definition."""
    found = {op: c for op, c in _without_rule().items() if _is_secret(c) and op in _standard()}
    return _table([_row(op, [], cases) for op, cases in found.items()])


def constant() -> str:
    """Operators that only a compiler meets."""
    found = [op for op, cases in _without_rule().items() if not _is_secret(cases)]
    return ", ".join(f"`{op}`" for op in found)


def failing() -> str:
    """Cases that do not pass, and why."""
    lines = [f"* `{c['name']}`: {c['reason']}" for c in _recorded() if c["status"] == "failed"]
    return "\n".join(lines) or "None."


def _standard() -> set[str]:
    return {s.name for s in defs.get_all_schemas() if not s.domain.startswith("ai.onnx.ml")}


def _is_secret(cases: Sequence[Case]) -> bool:
    return any(c["group"] != "constant" for c in cases)


GROUPS = {
    "common": "the common operators' cases",
    "rare": "the rarer ones'",
    "constant": "those that no secret enters",
}


def passed() -> str:
    """How many cases pass."""
    cases = _recorded()
    parts = []
    for group in GROUPS:
        count = Counter(c["status"] for c in cases if c["group"] == group)
        parts.append(f"{count['passed']} of {count.total()} of {GROUPS[group]}")
    return "Today pass " + ", ".join(parts) + "."


def _table(rows: Sequence[str]) -> str:
    head = "| operator | opsets | refused | rounds | bytes | of | error | cases |"
    return "\n".join([head, "|---|---|---|---|---|---|---|---|", *rows])


def _row(op: str, entries: Sequence[Any], cases: Sequence[Case]) -> str:
    domain = entries[0].domain if entries else ""
    known = defs.get_schema(op, domain=domain) if defs.has(op, domain) else None
    since = min((e.since for e in entries), default=known.since_version if known else 1)
    opsets = f"ml {since} –" if domain else f"{max(since, 7)} –"
    taken = {name for e in entries for name in e.attributes}
    refused = sorted(set(known.attributes) - taken) if known is not None and entries else []
    passed = [c for c in cases if c["status"] == "passed"]
    cost = ["", "", ""]
    if passed:
        largest = max(passed, key=lambda c: (c.get("elements", 0), c["name"]))
        elements = largest.get("elements", 0)
        sent = largest.get("sent", 0) / max(elements, 1)
        cost = [str(largest.get("rounds", 0)), f"{sent:.1f}" if sent else "0", str(elements)]
    error = max((c.get("error", 0.0) for c in passed), default=0.0)
    note = ", ".join(f"`{name}`" for name in refused)
    tests = f"{len(passed)}/{len(cases)}" if cases else "–"
    cells = [f"`{op}`", opsets, note, *cost, f"{error:.1g}" if error else "0", tests]
    return "| " + " | ".join(cells) + " |"


def excluded() -> str:
    """Cases that are left out, by reason."""
    left: dict[str, list[str]] = defaultdict(list)
    for case in _recorded():
        if case["status"] == "excluded":
            left[case["reason"]].append(case["name"])
    lines = []
    for reason, names in sorted(left.items(), key=lambda item: (-len(item[1]), item[0])):
        listed = ", ".join(f"`{name}`" for name in names)
        lines.append(f"* **{reason}**, {len(names)} cases: {listed}")
    return "\n".join(lines)


def config() -> str:
    """The commented configuration file."""
    text = (ROOT / "configs" / "local.yaml").read_text()
    return f"```yaml\n{text.rstrip()}\n```"


def full_size() -> str:
    """Networks of full size, one row each."""
    rows = [
        "| model | exporter | input | parameters | largest error | of spread | top-1 | rounds | "
        "MB online | MB dealt | s | s in float | s compiling | GB |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    family = ""
    for r in sorted(_measured("zoo"), key=lambda r: (r["family"], r["model"], r["exporter"])):
        if r["size"] != "full":
            continue
        if r["family"] != family:
            family = r["family"]
            rows.append(f"| **{family}** | | | | | | | | | | | | | |")
        rows.append(_full_row(r))
    return "\n".join(rows)


def _full_row(r: Mapping[str, Any]) -> str:
    if r["reason"]:
        return f"| {r['model']} | {r['exporter']} | {r['input']} | | {r['reason']}" + " |" * 10
    cells = [
        r["model"],
        r["exporter"],
        r["input"],
        f"{r['parameters']:,}",
        f"{r['max_abs_error']:.2g}",
        f"{r['spread']:.2g}",
        "" if r["agreement"] is None else f"{100 * r['agreement']:.2f} %",
        r["rounds"],
        f"{r['online_mb']:.1f}",
        f"{r['dealt_mb']:.1f}",
        f"{r['seconds']:.2f}",
        f"{r['onnxruntime_seconds']:.3f}",
        f"{r['compile_seconds']:.1f}",
        f"{r['memory_gb']:.1f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def transformers() -> str:
    """Transformers of full size on three real servers, one row each."""
    rows = [
        "| model | exporter | input | parameters | largest error | of spread | top-1 | inputs | "
        "rounds | MB online | MB dealt | s online | CPU s | s compiling | GB compiling | "
        "GB of alice, bob, carol |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for r in sorted(_measured("transformers"), key=lambda r: (r["parameters"], r["exporter"])):
        cells = [
            r["model"],
            r["exporter"],
            r["input"],
            f"{r['parameters']:,}",
            f"{r['max_abs_error']:.2g}",
            f"{r['spread']:.2g}",
            f"{100 * r['agreement']:.2f} %",
            r["inputs"],
            r["rounds"],
            f"{r['online_mb']:.1f}",
            f"{r['dealt_mb']:.1f}",
            f"{r['online_seconds']:.2f}",
            f"{r['seconds']:.2f}",
            f"{r['compile_seconds']:.1f}",
            f"{r['memory_gb']:.1f}",
            ", ".join(f"{gb:.1f}" for gb in r["servers_gb"]),
        ]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def small() -> str:
    """Small networks by both exporters, side by side."""
    rows = [
        "| model | parameters | exporter | largest error | of spread | top-1 | rounds | "
        "MB online |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for r in sorted(_measured("zoo"), key=lambda r: (r["model"], r["exporter"])):
        if r["size"] != "tiny":
            continue
        if r["reason"]:
            rows.append(f"| {r['model']} | | {r['exporter']} | {r['reason']} | | | | |")
            continue
        agreed = "" if r["agreement"] is None else f"{100 * r['agreement']:.2f} %"
        rows.append(
            f"| {r['model']} | {r['parameters']:,} | {r['exporter']} | {r['max_abs_error']:.2g} | "
            f"{r['spread']:.2g} | {agreed} | {r['rounds']} | {r['online_mb']:.3f} |"
        )
    return "\n".join(rows)


def tabular() -> str:
    """Classical models of tables, one row each."""
    rows = [
        "| model | data | parameters | largest error | agreement | rounds | MB online | MB dealt | "
        "s |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    family = ""
    for r in _measured("tabular"):
        if r["family"] != family:
            family = r["family"]
            rows.append(f"| **{family}** | | | | | | | | |")
        rows.append(
            f"| {r['model']} | {r['dataset']} | {r['parameters']:,} | {r['max_abs_error']:.2g} | "
            f"{100 * r['agreement']:.2f} % | {r['rounds']} | {r['online_mb']:.4f} | "
            f"{r['dealt_mb']:.4f} | {r['seconds']:.4f} |"
        )
    return "\n".join(rows)


def _measured(name: str) -> list[dict[str, Any]]:
    """Lines of docs/models/NAME.json; none before the first measurement."""
    path = ROOT / "docs" / "models" / f"{name}.json"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


BLOCKS: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "README.md": {"operators": families, "passed": passed, "costs": costs, "config": config},
    "docs/models.md": {
        "full-size": full_size,
        "transformers": transformers,
        "small": small,
        "tabular": tabular,
    },
    "docs/operators.md": {
        "summaries": operators,
        "on-client": on_client,
        "passed": passed,
        "direct": direct,
        "defined": defined,
        "constant": constant,
        "failing": failing,
        "excluded": excluded,
    },
}
"""Page → its blocks."""


def filled(page: str) -> str:
    """The page with every block's content replaced by what the code says today."""
    text = (ROOT / page).read_text()
    for name, make in BLOCKS[page].items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        assert pattern.search(text), f"{page} has no block {name}: {inspect.getdoc(make)}"
        content = make()
        text = pattern.sub(lambda m, c=content: f"{m[1]}{c}\n{m[2]}", text)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    for page in BLOCKS:
        (ROOT / page).write_text(filled(page))
