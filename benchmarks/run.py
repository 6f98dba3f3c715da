"""The comparison: every row on mpcserve and onnxruntime, and on SPU and CrypTen where asked.

    python benchmarks/run.py [--only ROW ...] [--runs 5] [--peers] [--json FILE] [--plot FILE]

mpcserve runs as in production: three processes, TLS over loopback. The tables are printed as
Markdown; --json keeps every number with machine, versions and commit; --from makes tables and plot
of such a file again, without measuring. What docs/performance.md shows is written by

    python benchmarks/run.py --peers --json benchmarks/results.json
    python benchmarks/run.py --from benchmarks/results.json \
        --plot docs/performance.svg --into docs/performance.md
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import floors, measuring, report, svg
from benchmarks.peers import PEERS, Peer
from benchmarks.rows import ROWS, Row
from mpcserve.errors import ModelError


def main() -> None:
    """Parse, measure or read, print, write."""
    options = _options()
    results = json.loads(options.source.read_text()) if options.source else _measure(options)
    results = json.loads(json.dumps(results))  # keys are text, as in a file
    print("\n" + report.markdown(results))
    if options.into:
        options.into.write_text(report.inserted(options.into.read_text(), results))
    if options.plot:
        options.plot.write_text(svg.plot(results))


def _options() -> argparse.Namespace:
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(
        description="mpcserve, onnxruntime and, with --peers, SPU and CrypTen on the same models.",
        epilog=f"rows: {', '.join(names)}",
    )
    parser.add_argument("--only", nargs="+", choices=names, metavar="ROW", help="these rows")
    groups = sorted({row.group for row in ROWS})
    parser.add_argument("--group", choices=[*groups, "all"], default="table", help="default table")
    parser.add_argument("--runs", type=int, default=5, help="timed inferences (default 5)")
    parser.add_argument("--network", default="loopback", help="as of `mpcserve bench`")
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=list(PEERS),
        metavar="PEER",
        help=f"these peers too, by default all of {', '.join(PEERS)}; installed when needed",
    )
    parser.add_argument("--peer-runs", type=int, default=3, help="of a row on a peer (default 3)")
    parser.add_argument(
        "--peer-seconds", type=float, default=900, help="limit of a row on a peer (default 900)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them there, as SVG")
    parser.add_argument(
        "--into", type=Path, metavar="FILE", help="put the tables between its `results` marks"
    )
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="FILE", help="read results, measure nothing"
    )
    options = parser.parse_args()
    if min(options.runs, options.peer_runs) < 1:
        parser.error("--runs and --peer-runs must be at least 1")
    return options


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    """Row by row; what is known so far is written after each."""
    rows = [r for r in ROWS if options.group in (r.group, "all")]
    if options.only:
        rows = [r for r in ROWS if r.name in options.only]
    about = report.machine()
    for key, value in about.items():
        print(f"{key:12} {value}")
    speeds = floors.measure_speeds(options.runs)
    results: dict[str, Any] = {
        "machine": about,
        "runs": options.runs,
        "network": options.network,
        "speeds": asdict(speeds),
        "peers": {},
        "rows": [],
    }
    peers = [] if options.peers is None else options.peers or list(PEERS)
    ready = []
    for name in peers:
        problem = PEERS[name].install()
        results["peers"][name] = {"title": PEERS[name].title, "problem": problem}
        print(f"{name:12} {problem or 'installed'}")
        ready += [] if problem else [PEERS[name]]
    for row in rows:
        print(f"\n{row.name}: {row.title}", flush=True)
        results["rows"].append(_measure_row(row, options, speeds, ready))
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n")
    return results


def _measure_row(
    row: Row, options: argparse.Namespace, speeds: floors.Speeds, peers: list[Peer]
) -> dict[str, Any]:
    with measuring.scratch() as name:
        folder = Path(name)
        try:
            result = measuring.measure_row(row, folder, options.runs, options.network, speeds)
        except ModelError as e:
            print(f"  not served: {e}", flush=True)
            return {"row": row.name, "title": row.title, "group": row.group, "problem": str(e)}
        print(f"  {report.line(result)}", flush=True)
        result["peers"] = {}
        for peer in peers if row.group != "light" else []:
            measured = peer.measure(row, folder, options.peer_runs, options.peer_seconds)
            result["peers"][peer.name] = measured
            print(f"  {peer.name}: {report.peer_line(measured)}", flush=True)
    return result


if __name__ == "__main__":
    main()
