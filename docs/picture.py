"""Draw picture.svg from the real demo: what a terminal shows, and the timeline beside it.

Run: python docs/picture.py
"""

import re
import subprocess
import sys
from datetime import datetime
from html import escape
from pathlib import Path

import crewlog
from crewlog.model.lives import Life

WIDTH, HEIGHT, ROW = 1180, 400, 18
SPLIT = 700
COLOURS = {"alive": "#2b7a4b", "ended": "#8a8f98", "crashed": "#c2410c"}


def demo() -> tuple[list[str], Path]:
    """Run the demo; return what it printed, and its registry."""
    command = [sys.executable, "-c", "from crewlog_cli.entry import main; main()", "demo", "--keep"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    place = re.search(r"--dir (\S+)", done.stdout)
    if place is None:
        raise SystemExit("the demo names no registry")
    return done.stdout.splitlines(), Path(place[1])


def text(x: int, y: int, words: str, *, fill: str = "#d6d9de", size: int = 13) -> str:
    """Return one line of monospaced text."""
    return (
        f'<text x="{x}" y="{y}" fill="{fill}" font-size="{size}" xml:space="preserve">'
        f"{escape(words)}</text>"
    )


def terminal(rows: list[str]) -> list[str]:
    """Draw the parts of the demo that say most."""
    shown = [row for row in rows if re.match(r"\d\. |   ok  |SEQ|\d+ +20", row)]
    drawn = []
    for index, row in enumerate(shown[:20]):
        fill = "#8fd19e" if row.startswith("   ok") else "#d6d9de"
        drawn.append(text(20, 48 + index * ROW, row[:80], fill=fill))
    return drawn


def kind(life: Life) -> str:
    """Name how a life is drawn."""
    if life.ended_at is None:
        return "alive"
    return "crashed" if life.crashed else "ended"


def timeline(lives: list[Life]) -> list[str]:
    """Draw a bar a life, from its registration to its end or to the last proof of life."""
    began = min(life.began_at for life in lives)
    over = max(life.ended_at or life.seen_at for life in lives)
    over += (over - began) / 4  # the living go on
    span = max((over - began).total_seconds(), 1e-6)
    left, right = SPLIT + 90, WIDTH - 40

    def at(when: datetime) -> float:
        return left + (when - began).total_seconds() / span * (right - left)

    drawn = [text(SPLIT + 20, 48, "who lived when, and how each ended", fill="#4b5563", size=14)]
    for index, life in enumerate(lives):
        y = 84 + index * 44
        x, end = at(life.began_at), max(at(life.ended_at or over), at(life.began_at) + 6)
        drawn.append(text(SPLIT + 20, y + 16, life.sid, fill="#1f2937"))
        drawn.append(
            f'<rect x="{x:.1f}" y="{y}" width="{end - x:.1f}" height="22" rx="3" '
            f'fill="{COLOURS[kind(life)]}"/>'
        )
        word = {"alive": "alive", "crashed": f"signal {life.signal}", "ended": "ended"}[kind(life)]
        drawn.append(text(int(x) + 8, y + 16, word, fill="#ffffff", size=12))
    return drawn


def main() -> None:
    """Write docs/picture.svg."""
    rows, place = demo()
    with crewlog.open(place) as reg:
        lives = reg.lives()
        for worker in reg.workers():
            reg.stop(worker.sid, reason="the picture is drawn", grace_s=1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="ui-monospace, DejaVu Sans Mono, Menlo, monospace" role="img">',
        "<title>A terminal and the timeline of the same workers</title>",
        f'<rect width="{SPLIT}" height="{HEIGHT}" rx="8" fill="#1e2229"/>',
        f'<rect x="{SPLIT + 8}" width="{WIDTH - SPLIT - 8}" height="{HEIGHT}" rx="8" '
        'fill="#f6f7f9" stroke="#d1d5db"/>',
        text(20, 26, "$ crewlog demo", fill="#9aa4b2"),
        *terminal(rows),
        *timeline(lives),
        "</svg>",
    ]
    (Path(__file__).parent / "picture.svg").write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
