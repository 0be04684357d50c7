"""Train-step time and peak memory, gated over ungated: `python -m bench.overhead`.

All variants of one network and batch run interleaved in one process; a figure is the median of the rounds' ratios to
the ungated network (compiled variants: to the compiled ungated network), with a 95 % bootstrap interval.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import mrvae_kernels
from mrvae_kernels import ops

from .timing import interleave, keep_memory, peak_memory, ratio
from .variants import training_step

CASES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "linear": ("linear", (1, 28, 28), {}),
    "mlp": ("mlp", (1, 28, 28), {}),
    "cnn-small": ("cnn", (1, 28, 28), {"channels": (32, 64), "norm": "none"}),
    "cnn": ("cnn", (1, 28, 28), {}),
}
"""Name -> network, data shape, options. "cnn" is the paper's, "mlp" 784-300-16, "cnn-small" two stages without norms.
"""

EAGER = ("ungated", "gated", "per-sample", "listing1", "plain-fold")
COMPILED = ("ungated", "gated", "listing1")


def measure(case: str, batch: int, rounds: int, compiled: bool) -> dict[str, Any]:
    """Raw seconds, ratios and peak bytes of every variant for one network and batch."""
    network, shape, options = CASES[case]
    steps = {name: training_step(name, network, shape, batch, **options) for name in EAGER}
    if compiled:
        steps |= {f"{name} compiled": training_step(name, network, shape, batch, True, **options) for name in COMPILED}
    times = interleave(steps, rounds)
    # weights and both moments of Adam, float32; the gradients are in the peak
    resident = {name: 4 * sum(p.numel() for p in step.model.parameters()) * 3 for name, step in steps.items()}  # type: ignore[attr-defined]
    peaks = {name: resident[name] + peak_memory(step) for name, step in steps.items() if "compiled" not in name}
    baseline = {name: "ungated compiled" if "compiled" in name else "ungated" for name in steps}
    return {
        "case": case, "batch": batch, "threads": torch.get_num_threads(), "seconds": times,
        "ratio": {name: ratio(times, name, baseline[name])._asdict() for name in steps},
        "peak_bytes": peaks,
    }


def machine() -> dict[str, Any]:
    """What a result depends on: commit, versions, device."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True, text=True, cwd=Path(__file__).parent, check=False,
    ).stdout.strip()
    model = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "commit": commit or "unknown", "date": datetime.date.today().isoformat(),
        "mrvae_kernels": mrvae_kernels.__version__, "extension": ops.EXTENSION, "torch": torch.__version__,
        "python": platform.python_version(), "cpu": model or platform.processor(), "cores": os.cpu_count(),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: ratios to the ungated step, one row a network and batch."""
    columns = [*EAGER[1:], *(f"{name} compiled" for name in COMPILED[1:])]
    lines = ["| network | batch | " + " | ".join(columns) + " | peak memory, gated |"]
    lines.append("|---" * (len(columns) + 3) + "|")
    for result in results:
        cells = []
        for name in columns:
            value = result["ratio"].get(name)
            cells.append("" if value is None else f"{value['median']:.3f} ({value['low']:.3f} to {value['high']:.3f})")
        memory = result["peak_bytes"]["gated"] / result["peak_bytes"]["ungated"]
        lines.append(f"| {result['case']} | {result['batch']} | " + " | ".join(cells) + f" | {memory:.3f} |")
    return "\n".join(lines)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--batch", nargs="+", type=int, default=[16, 128])
    parser.add_argument(
        "--rounds", type=int, default=40, help="rounds a case; the large CNN gets a quarter (default 40)"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--out", type=Path, help="write a JSON result file there")
    parser.add_argument("--table", type=Path, help="print the Markdown table of a result file and stop")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())["results"]))
        return 0
    keep_memory()
    results = []
    for case in options.cases:
        for batch in options.batch:
            rounds = max(options.rounds // 4, 3) if case == "cnn" else options.rounds
            results.append(measure(case, batch, rounds, not options.no_compile))
            print(table(results[-1:]), flush=True)
    print("\n" + table(results))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"machine": machine(), "results": results}))
        print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
