"""docs/benchmarks.md and its plots, and the README's table, from the result files: `python -m bench.report`.

Every file in bench/results that bench.records wrote takes part, under the kind of the machine that measured it: results
of different machines never share a table. Each section names the command, the commit and the versions behind it, lists
what is above 1.05, and the report ends with the figures that are missing.

--readme writes the table between the README's markers from cpu-overhead.json; --check writes nothing and ends with exit
code 1 where the README, the report or a plot is not what the result files give.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from . import curve_cost, growth, layers, overhead, plots, records
from . import report_tables as tables
from .cost_fit import table as cost_table
from .records import RESULTS, Record
from .report_missing import NAMES, missing

ROOT = RESULTS.parents[1]
REPORT = "docs/benchmarks.md"
PLOTS = "docs/benchmarks"
README_SOURCE = "cpu-overhead.json"
BEGIN = "<!-- overhead: begin (python -m bench.report --readme) -->"
END = "<!-- overhead: end -->"
MODULES = {
    "overhead": "bench.overhead", "growth": "bench.growth", "curve-cost": "bench.curve_cost", "layers": "bench.layers",
    "cost-model": "bench.fit_cost_model",
}
TITLES = {
    "overhead": "Training steps", "growth": "Growth", "curve-cost": "The cost of a curve", "layers": "Layers",
    "cost-model": "The cost model of fold and epilogue",
}
VERSIONS = ("torch", "triton", "python", "mrvae_kernels")


class Found(NamedTuple):
    """The result files of a folder: records by the file's name, and the names of files of another format."""

    records: dict[str, Record]
    others: list[str]


def read_all(folder: Path = RESULTS) -> Found:
    """All records in the folder."""
    found: dict[str, Record] = {}
    others = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = records.read(path)
        except ValueError:
            others.append(path.name)
            continue
        found[path.name] = record
    return Found({n: r for n, r in found.items() if r.what in TITLES},
                 others + [n for n, r in found.items() if r.what not in TITLES])


def command(record: Record) -> str:
    """The command that made a file."""
    return " ".join(["python -m", MODULES[record.what], *record.command])


def source(name: str, record: Record) -> str:
    """Which file a section is made from, and how that came about."""
    versions = ", ".join(f"{key} {record.machine[key]}" for key in VERSIONS if record.machine.get(key))
    core = "with" if record.machine.get("extension") else "**without**"
    commit = str(record.machine.get("commit"))
    changed = " (**and changes that were not committed**)" if commit.endswith("-dirty") else ""
    return (
        f"`{name}`, {record.machine.get('date')}, commit {commit}{changed}, {versions}, {core} the compiled core; "
        f"reproduce with `{command(record)}`."
    )


# ---- the README ------------------------------------------------------------------------------------------------------


def readme_block(record: Record) -> str:
    """What stands between the markers: the table, the command, and what lost."""
    lost = [line for line in tables.losing(record.results) if " float32" in line]
    return "\n".join([
        "", tables.overhead(record.results, tables.README_COLUMNS), "",
        f"{tables.explained(tables.README_COLUMNS)} Peak memory is that of eager steps.", "",
        f"Measured on {record.kind}: {source(README_SOURCE, record)}",
        *_losing_sentence(len(lost)), "",
    ])


def _losing_sentence(count: int) -> list[str]:
    if not count:
        return [f"None of our ratios is above {tables.LOSING:.2f}."]
    return [
        f"{count} of our ratios {'is' if count == 1 else 'are'} above {tables.LOSING:.2f}; [the report]({REPORT}) "
        "lists them by name."
    ]


def with_block(text: str, block: str) -> str:
    """The text with the block between its markers. ValueError where they are not there, once each and in order."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"README.md: expected one line {BEGIN!r} and, after it, one line {END!r}")
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


# ---- the report ------------------------------------------------------------------------------------------------------


def report(found: Found) -> str:
    """The whole of docs/benchmarks.md."""
    kinds = dict.fromkeys(record.kind for record in found.records.values())
    lines = [
        "# Benchmarks", "",
        "Made from the result files in `bench/results/` by `python -m bench.report`; do not edit. A ratio is the time "
        "of a training step (forward, loss, backward, fused Adam) over the ungated network's in the same mode, numbers "
        "and process, variants interleaved: the median of the rounds' ratios with its 95 % bootstrap interval. "
        "`listing1` is the MR-VAE paper's Listing 1 and `plain-fold` folding in plain PyTorch. "
        "Results of different machines are never mixed; `make bench-check` compares a machine with itself.",
    ]
    for kind in kinds:
        mine = {name: record for name, record in found.records.items() if record.kind == kind}
        lines += ["", f"## {kind}"]
        for what in TITLES:
            for name, record in mine.items():
                if record.what == what:
                    lines += ["", f"### {TITLES[what]}", "", source(name, record), "", *SECTIONS[what](name, record)]
    lines += ["", "## What is missing", "", *_missing(found)]
    if found.others:
        names = ", ".join(f"`{name}`" for name in found.others)
        lines += ["", f"Not part of this report, being of other formats: {names}."]
    return "\n".join(lines) + "\n"


def _picture(name: str, title: str) -> list[str]:
    return [f"![{title}]({Path(PLOTS).name}/{Path(name).stem}.png)", ""]


def _list(lines: Sequence[str], empty: str) -> list[str]:
    return [f"- {line}" for line in lines] or [empty]


def _overhead(name: str, record: Record) -> list[str]:
    results = record.results
    lines = [*_picture(name, "Train step over the ungated network's"), tables.means(results, record.machine["device"])]
    for numbers in dict.fromkeys(numbers for _, numbers in tables.modes(results)):
        columns = tables.all_columns(results, numbers)
        lines += ["", f"#### Every network, {numbers}", "", tables.explained(columns), "",
                  tables.overhead(results, columns, numbers)]
    lines += ["", f"#### Above {tables.LOSING:.2f}", "", *_list(tables.losing(results), "None of our ratios.")]
    for title, table in (
        (f"Peak memory; the bound is {tables.MEMORY:.2f} plus the gates", tables.memory(results)),
        ("Parameters, kernels, host time", tables.counts(results)),
        ("Inference of a baked network", tables.inference(results)),
        ("Kernels a step launches, by hidden layers", overhead.by_depth(results)),
    ):
        if table:
            lines += ["", f"#### {title}", "", table]
    for title, found in (
        ("Parameters beside Table 1 of the paper", overhead.beside_table_1(results)),
        ("Refused a time", overhead.refused(results)),
        ("Left out", [f"{overhead.label(e)}: {e['left_out']}" for e in results if e.get("left_out")]),
    ):
        if found:
            lines += ["", f"#### {title}", "", *_list(found, "")]
    return lines


def _growth(name: str, record: Record) -> list[str]:
    return [*_picture(name, "Ratio along depth, width, batch and image size"), growth.table(record.results)]


def _curve_cost(name: str, record: Record) -> list[str]:
    return [*_picture(name, "Time and objective of one run and of ten"), *map(curve_cost.summary, record.results)]


def _layers(name: str, record: Record) -> list[str]:
    results = record.results
    wrong = [f"{e['layer']} {e['dtype']} {name}: {why}" for e in results for name, why in e.get("wrong", {}).items()]
    lacking = layers.lacking(results)
    return [
        f"{layers.INCLUDED} Geometric means are over the layers that a variant ran.", "",
        *([f"The file is from before there was {', '.join(f'`{name}`' for name in lacking)}.", ""] if lacking else []),
        layers.table(results), "", f"#### Even the fastest of ours above {tables.LOSING:.2f}", "",
        *_list(tables.losing_layers(results), "None."),
        *(["", "#### Wrong, and without a time", "", *_list(wrong, "")] if wrong else []),
    ]


def _cost_model(name: str, record: Record) -> list[str]:
    return [cost_table([entry for entry in record.results if "fit" in entry])]


SECTIONS = {
    "overhead": _overhead, "growth": _growth, "curve-cost": _curve_cost, "layers": _layers, "cost-model": _cost_model,
}


def _missing(found: Found) -> list[str]:
    lines = []
    for device, title in NAMES.items():
        mine = [record for record in found.records.values() if record.machine.get("device") == device]
        for kind in dict.fromkeys(record.kind for record in mine) or [None]:
            lacking = missing([record for record in mine if record.kind == kind], device)
            label = f"{title}: none measured" if kind is None else f"{title}, {kind}"
            lines += [f"{label}. " + ("Missing:" if lacking else "Nothing is missing."), "",
                      *(f"- {line}" for line in lacking), *([""] if lacking else [])]
    return lines[:-1] if lines and not lines[-1] else lines


def draw(found: Found, folder: Path) -> None:
    """Every record's plot, where it is not the one that is there."""
    for path, _, record in _plots(found, folder):
        if plots.drawn_from(path) == plots.digest(record.results):
            continue
        title = f"{record.kind}, commit {record.machine.get('commit')}"
        if record.what == "overhead":
            timed = [entry for entry in record.results if entry.get("ratio")]
            plots.rows(
                timed, path, lambda e: f"{e['case']}, {e['batch']}", lambda e: f"{e['mode']} {e['numbers']}",
                ("ungated", "plain"), f"Step time over the ungated network's; {title}", record.results,
            )
        elif record.what == "growth":
            plots.growth(record.results, path, f"Train step over the ungated network's; {title}")
        else:
            plots.curve_cost(record.results, path, title)


def _plots(found: Found, folder: Path) -> list[tuple[Path, str, Record]]:
    return [
        (folder / f"{Path(name).stem}.png", name, record) for name, record in found.records.items()
        if record.what in ("overhead", "growth", "curve-cost")
    ]


# ---- the command -----------------------------------------------------------------------------------------------------


def texts(found: Found, root: Path) -> Mapping[Path, str]:
    """What the report and the README should hold. ValueError without the README's result file or markers."""
    source = found.records.get(README_SOURCE)
    if source is None:
        raise ValueError(f"{README_SOURCE} is not among the result files that could be read; measure it: make bench")
    readme = root / "README.md"
    return {root / REPORT: report(found), readme: with_block(readme.read_text(), readme_block(source))}


def stale(found: Found, root: Path) -> list[str]:
    """A line for each text or plot that is not what the result files give."""
    lines = []
    for path, text in texts(found, root).items():
        if not path.exists() or path.read_text() != text:
            lines.append(f"{path.relative_to(root)} is not what the result files give")
    wanted = _plots(found, root / PLOTS)
    for path, name, record in wanted:
        if plots.drawn_from(path) != plots.digest(record.results):
            lines.append(f"{path.relative_to(root)} was not drawn from {name}")
    spare = {*(root / PLOTS).glob("*.png")} - {path for path, _, _ in wanted}
    return lines + [f"{path.relative_to(root)} belongs to no result file" for path in sorted(spare)]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder with README.md and docs/")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--readme", action="store_true", help="write the README's table only")
    what.add_argument("--check", action="store_true", help="write nothing; exit code 1 where something is out of date")
    options = parser.parse_args(arguments)
    found, root = read_all(options.results), options.root
    try:
        if options.check:
            wrong = stale(found, root)
            print(*wrong, sep="\n", end="\n" if wrong else "")
            print("run: python -m bench.report && python -m bench.report --readme" if wrong else "all up to date")
            return 1 if wrong else 0
        if options.readme:
            path = root / "README.md"
            path.write_text(texts(found, root)[path])
        else:
            path = root / REPORT
            draw(found, root / PLOTS)
            path.write_text(report(found))
        print(f"written: {path}")
    except (OSError, ValueError) as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
