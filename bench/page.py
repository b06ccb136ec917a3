"""Write docs/performance.md and its plots from the figures of a run.

    python bench/run.py --out figures.jsonl && python bench/page.py figures.jsonl

With `--slow FILE` the figures of a second run, on a slow disk, come after those of the first; what
disk that was, `--slow-disk` says. The page says what was measured and with what; the words about it are in WORDS below.
"""

import argparse
import json
from html import escape
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
WIDTH, ROW, LEFT = 660, 26, 205

WORDS = {
    "P1": "One durable change at a time: the event kept and the worker's record updated. The floor is "
    "a bare write and fdatasync of the same bytes to a growing file. That crewlog can come near it, or "
    "pass it, is the redo's doing: its sync writes no file size.",
    "P1a": "A registration looks at the process, too, and its event holds who that is: it is twice as "
    "long as an update.",
    "P1c": "In memory: what is left is the processor's work. Of the time that it takes, the bare system calls "
    "are a third.",
    "P1b": "The same with many live workers, and behind a long history: the cost of a change grows with "
    "the change, not with the registry.",
    "P2": "The floor is eight processes that write and sync without any lock.",
    "P2b": "The same with 32 processes on the same processors.",
    "P3": "Threads and tasks of one process share commits.",
    "P4": "",
    "P5": "The floor parses the same bytes and builds nothing.",
    "P6": "One worker's events out of all, read through the log or the archive.",
    "P6b": "",
    "P11": "",
    "P7": "Fold, snapshot and archive beside a writer that makes a change every millisecond.",
    "P8": "`publish` from the write that makes a change visible, `call` from the call that makes it, sync "
    "included.",
    "P8b": "", "P8c": "", "P8d": "", "P8e": "", "P9": "", "P9b": "", "P9c": "", "P10": "",
    "P12": "The floor sends the same transaction with nothing around it, by http.client. One server on "
    "the same machine; several on several add a network's round trip.",
    "P12b": "", "P12c": "", "P12d": "",
}  # fmt: skip
PLOTTED = {"P1", "P2", "P2b", "P6"}


def bars(title: str, values: dict[str, float]) -> str:
    """Draw horizontal bars as SVG; the first one is ours."""
    most = max(values.values())
    height = ROW * len(values) + 34
    rows = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="8" y="20" font-weight="600">{escape(title)}</text>',
    ]
    for index, (name, value) in enumerate(values.items()):
        y = 34 + ROW * index
        length = (WIDTH - LEFT - 90) * value / most
        colour = "#1a6fb0" if name == "crewlog" else "#b9c4cd"
        rows += [
            f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{LEFT}" y="{y + 2}" width="{max(1.0, length):.1f}" height="16" fill="{colour}"/>',
            f'<text x="{LEFT + max(1.0, length) + 6:.1f}" y="{y + 14}">{number(value)}</text>',
        ]
    return "\n".join([*rows, "</svg>", ""])


def number(value: float) -> str:
    """Write a figure with as many digits as it deserves."""
    if value >= 1000:
        return f"{round(value, -1):,.0f}"
    return f"{value:.3g}"


def table(row: dict[str, object]) -> str:
    """Write a figure as a table."""
    median, ratio, p99 = row.get("median"), row.get("crewlog_to"), row.get("p99_ms")
    if not isinstance(median, dict) or not isinstance(ratio, dict):
        names = [name for name in row if name not in {"key", "figure"}]
        return "\n".join(["| | |", "|---|---|", *(f"| {n} | {row[n]} |" for n in names)])
    tails = p99 if isinstance(p99, dict) else {}
    head = "| | median | crewlog to it |" + (" p99, ms |" if tails else "")
    rows = [head, "|---|---|---|" + ("---|" if tails else "")]
    for name, value in median.items():
        cells = [name, number(value), "" if name == "crewlog" else f"{ratio[name]:.2f}"]
        rows.append("| " + " | ".join(cells + ([f"{tails[name]:.2f}"] if tails else [])) + " |")
    more = [f"{k.replace('_', ' ')}: {v}" for k, v in row.items()
            if k not in {"key", "figure", "median", "crewlog_to", "p99_ms", "slices"}]  # fmt: skip
    return "\n".join(rows + (["", "; ".join(more)] if more else []))


def page(
    rows: list[dict[str, object]], docs: Path, slow: list[dict[str, object]], disk: str
) -> str:
    """Write the whole page."""
    about = rows[0]
    parts = [
        "# Performance",
        "",
        "Written by `bench/page.py` from what `make bench` measured; do not edit.",
        "",
        f"{about['system']}, {about['processors']} processors, Python {about['python']}. Every contestant "
        "takes its turn in short slices of the same run; a figure is the median over the slices, a ratio "
        "the median of the ratios of each slice. An absolute figure of a shared machine says little; the "
        "ratio is the figure. All contestants have the same durability (a return means that the disk has "
        "it), the same atomicity (event and record together) and a payload of the same size.",
        "",
    ]
    for row in rows[1:]:
        key = str(row["key"])
        parts += [f"## {key}: {row['figure']}", ""]
        if WORDS.get(key):
            parts += [WORDS[key], ""]
        median = row.get("median")
        if key in PLOTTED and isinstance(median, dict):
            name = f"performance-{key.lower()}.svg"
            (docs / name).write_text(bars(str(row["figure"]), median))
            parts += [f"![{row['figure']}]({name})", ""]
        parts += [table(row), ""]
    if slow:
        parts += ["## On a slow disk", "", f"The same on {disk}.", ""]
        for row in slow[1:]:
            parts += [f"### {row['key']}: {row['figure']}", "", table(row), ""]
    said = docs / "performance-notes.md"
    return "\n".join(parts) + said.read_text()


def _rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    """Read the figures; write the page into docs/, or the directory that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figures", type=Path, help="what bench/run.py kept")
    parser.add_argument("docs", type=Path, nargs="?", default=DOCS, help="where the page goes")
    parser.add_argument("--slow", type=Path, default=None, help="figures of a slow disk")
    parser.add_argument("--slow-disk", default="a slow disk", help="what that is")
    asked = parser.parse_args()
    slow = [] if asked.slow is None else _rows(asked.slow)
    text = page(_rows(asked.figures), asked.docs, slow, asked.slow_disk)
    (asked.docs / "performance.md").write_text(text)


if __name__ == "__main__":
    main()
