"""The timeline: honest bars in the terminal; a page that a real browser shows and nobody abuses."""

import os
import random
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from browser import CHROMIUM, Browser
from commands import Cli
from crewlog.model.events import WorkerState
from crewlog.model.lives import Life
from crewlog.registry import Registry
from crewlog_cli import text
from crewlog_cli.pages import page
from crewlog_cli.pages.stories import Account
from crewlog_compactor import collect
from procs import Crew, kill, until

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


def lives(count: int, *, sid: str = "worker", version: str = "1.2") -> list[Life]:
    """Return lives of every kind, two to a sid."""
    ends = [WorkerState.EXITED, WorkerState.FAILED, WorkerState.LOST, WorkerState.RELEASED, None]
    results = []
    for number in range(count):
        end = ends[number % 5]
        began = NOW - timedelta(seconds=60 * (count - number))
        results.append(
            Life(
                sid=f"{sid}-{number // 2:05d}",
                generation=number % 2 + 1,
                pid=1000 + number,
                version=version,
                seq=number + 1,
                began_at=began,
                seen_at=NOW if end is None else began + timedelta(seconds=20),
                ended_at=None if end is None else began + timedelta(seconds=50),
                end=end,
                code=3 if end == WorkerState.FAILED else None,
                cause="no_process" if end == WorkerState.LOST else None,
            )
        )
    return results


def written(path: Path, sample: list[Life], **options: object) -> Path:
    """Write a page of these lives."""
    given = {"unknown": frozenset[int](), "now": NOW, "caption": "a test", **options}
    path.write_bytes(page.page(sample, **given))  # type: ignore[arg-type]
    return path


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """Start a browser, and end it."""
    started = Browser(tmp_path / "profile")
    yield started
    started.close()


COUNT = "document.getElementById('count').textContent"


def text_of(browser: Browser, ident: str) -> str:
    """Return the text of an element."""
    return str(browser.run(f"document.getElementById('{ident}').textContent"))


def put(browser: Browser, ident: str, value: str) -> None:
    """Choose or type a value."""
    event = "input" if ident == "filter" else "change"
    browser.run(
        f"(() => {{ const e = document.getElementById('{ident}'); e.value = {value!r}; "
        f"e.dispatchEvent(new Event('{event}')); }})()"
    )
    browser.frames()


def rows(browser: Browser) -> list[str]:
    """Return the titles of the rows, from the top."""
    answer: object = browser.run("timeline.rows()")
    assert isinstance(answer, list)
    return answer


def frame(browser: Browser) -> tuple[float, float, float, float]:
    """Return where the picture is: x, y, width, height."""
    answer: object = browser.run(
        "(() => { const r = document.getElementById('frame').getBoundingClientRect(); "
        "return [r.x, r.y, r.width, r.height]; })()"
    )
    assert isinstance(answer, list)
    x, y, width, height = answer
    return x, y, width, height


def stories(sample: list[Life]) -> dict[int, Account]:
    """Tell of each life: labels, owner, host, and what happened by whom."""
    every = {}
    for life in sample:
        accounts = Account(
            labels={"role": "web" if life.pid % 2 else "job", "n": str(life.pid)}, host="here",
            owner=f"pid {life.pid % 3}", meta={"try": 1}, tail="Traceback\nValueError: bad",
            evidence="source wait",
        )  # fmt: skip
        accounts.steps = [
            (life.began_at, 1, f"registered pid {life.pid}", "ann@deploy[1]"),
            (life.began_at + timedelta(seconds=5), 2, "ready", "ann@deploy[1]"),
            (life.began_at + timedelta(seconds=15), 4, "asked to stop: the deploy", "bob@cli[2]"),
        ]
        every[life.seq] = accounts
    return every


def by_hand(sample: list[Life], low: int, high: int) -> tuple[int, int]:
    """Count how many lived at once between two times (ms after the first), most and fewest."""
    first = min(int(life.began_at.timestamp() * 1000) for life in sample)
    spans = [
        (
            int(life.began_at.timestamp() * 1000) - first,
            int((life.ended_at or NOW).timestamp() * 1000) - first,
        )
        for life in sample
    ]
    moments = {low, *(t for span in spans for t in span if low <= t < high)}
    counts = [sum(a <= t < b or a == t == b for a, b in spans) for t in moments]
    after = [sum(a <= t < b for a, b in spans) for t in moments]
    return max(counts), min(after)


@needs_chromium
def test_page_renders_filters_and_asks_for_nothing(tmp_path: Path, browser: Browser) -> None:
    """No console message, no request but itself; the filter narrows picture and table."""
    sample = lives(2000)
    path = written(tmp_path / "page.html", sample, unknown=frozenset({4}), stories=stories(sample))
    assert path.stat().st_size <= 250 * 1024
    assert browser.open(path) < 5000
    assert "1000 of 1000 workers, 2000 of 2000 lives" in text_of(browser, "count")
    drawn = "document.getElementById('lives').toDataURL().length"
    whole = browser.run(drawn)
    browser.run("document.getElementById('filter').focus()")
    browser.type("worker-0001")
    until(lambda: "10 of 1000 workers, 20 of 2000 lives" in text_of(browser, "count"))
    until(lambda: browser.run("document.getElementById('rows').children.length") == 20)
    assert browser.run(drawn) != whole
    browser.run("document.querySelectorAll('#kinds input')[2].click()")
    until(lambda: "10 of 1000 workers, 16 of 2000 lives" in text_of(browser, "count"))
    assert browser.complaints == []
    assert browser.requests == [path.as_uri()]


@needs_chromium
@pytest.mark.parametrize("width", [390, 700, 1400])
def test_count_of_the_living_is_exact_at_every_width(
    tmp_path: Path, browser: Browser, width: int
) -> None:
    """Against a count by hand: the most of the view, and the most and fewest of each column."""
    chance = random.Random(width)
    sample = []
    for number in range(300):
        began = NOW - timedelta(milliseconds=chance.randrange(1_000_000))
        length = timedelta(milliseconds=chance.choice([0, 1, 5, 40, 20_000]))
        sample.append(
            Life(
                sid=f"w-{number}", generation=1, pid=1, version="", seq=number + 1, began_at=began,
                seen_at=min(NOW, began + length), ended_at=min(NOW, began + length),
                end=WorkerState.EXITED, code=0,
            )
        )  # fmt: skip
    sample.sort(key=lambda life: life.began_at)
    browser.resize(width, 900)
    browser.open(written(tmp_path / "page.html", sample))
    first = min(int(life.began_at.timestamp() * 1000) for life in sample)
    span = int(NOW.timestamp() * 1000) - first
    peak = by_hand(sample, 0, span)[0]
    assert browser.run("document.getElementById('crowd').dataset.peak") == str(peak)
    low, columns, each = span // 3, 40, 1000
    counted: object = browser.run(f"timeline.living({low}, {low + columns * each}, {columns})")
    assert isinstance(counted, dict)
    for column in range(columns - 1):  # the last one's end belongs to the view, too
        begin = low + column * each
        most, least = by_hand(sample, begin, begin + each)
        assert (counted["most"][column], counted["least"][column]) == (most, least), column


@needs_chromium
def test_jobs_one_after_the_other_are_never_two(tmp_path: Path, browser: Browser) -> None:
    """3,000 of them, idle half of the time: at most 1, at least 0, at any zoom."""
    sample = [
        Life(
            sid=f"job-{n}", generation=1, pid=1, version="", seq=n + 1, code=0,
            end=WorkerState.EXITED,
            began_at=NOW - timedelta(seconds=6000 - 2 * n),
            seen_at=NOW - timedelta(seconds=6000 - 2 * n - 1),
            ended_at=NOW - timedelta(seconds=6000 - 2 * n - (1 if n % 2 else 2)),
        )
        for n in range(3000)
    ]  # fmt: skip
    browser.open(written(tmp_path / "page.html", sample))
    for _ in range(4):
        assert browser.run("document.getElementById('crowd').dataset.peak") == "1"
        assert browser.run("document.getElementById('crowd').dataset.least") == "0"
        browser.press("w")
        browser.frames()
    assert "at most 1 at once" in text_of(browser, "count")


@needs_chromium
def test_page_opens_on_what_matters_and_sorts(tmp_path: Path, browser: Browser) -> None:
    """The living first, then who ended last; by start, end, id, lifetime, crashes."""
    sample = lives(40)
    browser.open(written(tmp_path / "page.html", sample))
    living = {life.sid for life in sample if life.end is None}
    assert set(rows(browser)[: len(living)]) == living
    put(browser, "sort", "start")
    assert rows(browser)[0] == "worker-00000"
    put(browser, "sort", "id")
    assert rows(browser) == sorted(life.sid for life in sample[::2])
    put(browser, "sort", "crashes")
    crashed = {life.sid for life in sample if life.crashed}
    assert rows(browser)[0] in crashed
    for choice in ("end", "lifetime"):
        put(browser, "sort", choice)
        assert len(rows(browser)) == 20


@needs_chromium
def test_rows_and_counts_are_those_of_the_view(tmp_path: Path, browser: Browser) -> None:
    """Rows with nothing in view are not there."""
    sample = lives(200)
    browser.open(written(tmp_path / "page.html", [life for life in sample if life.end is not None]))
    for _ in range(5):
        browser.press("w")
    browser.frames()
    shown = rows(browser)
    view: object = browser.run("[timeline.state.low, timeline.state.high]")
    assert isinstance(view, list)
    assert 0 < len(shown) < 12
    first = sample[0].began_at
    inside = {
        life.sid
        for life in sample
        if life.ended_at is not None
        and (life.began_at - first).total_seconds() * 1000 <= view[1]
        and (life.ended_at - first).total_seconds() * 1000 >= view[0]
    }
    assert set(shown) == inside
    assert f"In view: {len(inside)} of" in text_of(browser, "count")


@needs_chromium
def test_groups_open_and_filters_know_labels_and_words(tmp_path: Path, browser: Browser) -> None:
    """By label, id prefix, owner, host; k=v, crashed, and code 1 is not code 137."""
    sample = lives(60)
    for number, life in enumerate(life for life in sample if life.end == WorkerState.FAILED):
        life.code = 137 if number % 2 else 1
    browser.open(written(tmp_path / "page.html", sample, stories=stories(sample)))
    put(browser, "group", "label:role")
    assert set(rows(browser)) == {"role=web", "role=job"}
    x, y, *_ = frame(browser)
    browser.click(x + 20, y + 22 + 9)
    browser.frames()
    assert len(rows(browser)) > 20, "the first group has opened"
    for group, titles in (
        ("prefix", {"worker…"}), ("host", {"here"}), ("owner", {"pid 0", "pid 1", "pid 2"}),
    ):  # fmt: skip
        put(browser, "group", group)
        assert set(rows(browser)) == titles
    put(browser, "group", "none")
    cases: tuple[tuple[str, Callable[[Life], object]], ...] = (
        ("role=web", lambda life: life.pid % 2), ("n=1001", lambda life: life.pid == 1001),
        ("crashed", lambda life: life.end == WorkerState.FAILED),
        ("lost", lambda life: life.end == WorkerState.LOST),
        ("code 1", lambda life: life.code == 1), ("code 137", lambda life: life.code == 137),
        ("crashed role=web", lambda life: life.end == WorkerState.FAILED and life.pid % 2),
        ("worker-00003", lambda life: life.sid == "worker-00003"),
    )  # fmt: skip
    for words, wanted in cases:
        put(browser, "filter", words)
        assert browser.run("timeline.view()") == len([life for life in sample if wanted(life)]), (
            words
        )


@needs_chromium
def test_click_pins_a_life_with_its_story(tmp_path: Path, browser: Browser) -> None:
    """Events, who, why, evidence, meta, last lines; it stays until Esc lets go."""
    sample = lives(20)
    path = written(tmp_path / "page.html", sample, stories=stories(sample))
    browser.resize(1400, 900)
    browser.open(path)
    until(lambda: browser.run("document.documentElement.dataset.whole") == "yes")
    browser.frames()
    x, y, *_ = frame(browser)
    at: object = browser.run("timeline.at(19)")
    assert isinstance(at, list)
    left, top, wide, high, _ = at
    spot = (x + left + wide / 2, y + top + high / 2)
    browser.mouse("mouseMoved", *spot)
    assert "worker-00009, pid 1019" in text_of(browser, "tip")
    browser.click(*spot)
    browser.mouse("mouseMoved", x + 5, y + 5)
    browser.frames()
    assert browser.run("document.getElementById('tip').hidden") is True
    assert text_of(browser, "who") == "worker-00009"
    assert "labels: n=1019 role=web" in text_of(browser, "facts")
    assert "owner: pid 2" in text_of(browser, "facts")
    steps = text_of(browser, "steps")
    assert "registered pid 1019  by ann@deploy[1]" in steps
    assert "asked to stop: the deploy  by bob@cli[2]" in steps
    assert text_of(browser, "more") == (
        'meta: {"try": 1}\nevidence: source wait\nlast lines of its output:\n'
        "Traceback\nValueError: bad"
    )
    browser.press("Escape")
    assert browser.run("document.getElementById('pane').hidden") is True


@needs_chromium
def test_hands_zoom_pan_and_brush(tmp_path: Path, browser: Browser) -> None:
    """Wheel at the pointer, drag to pan, brush on the overview, double click for all."""
    browser.resize(1400, 900)
    browser.open(written(tmp_path / "page.html", lives(400)))
    x, y, width, _ = frame(browser)

    def view() -> tuple[float, float]:
        answer: object = browser.run("[timeline.state.low, timeline.state.high]")
        assert isinstance(answer, list)
        return answer[0], answer[1]

    whole = view()
    left = min(280, max(110, width * 0.2))
    share = 0.75
    pointer = x + left + share * (width - left - 15)
    for _ in range(10):
        browser.mouse("mouseWheel", pointer, y + 90, deltaX=0, deltaY=-50)
    browser.frames()
    low, high = view()
    assert high - low < (whole[1] - whole[0]) / 4
    under = low + share * (high - low)
    assert abs(under - share * whole[1]) < (high - low) * 0.02, "the time at the pointer stays"
    browser.drag((x + 900, y + 90), (x + 700, y + 90))
    browser.frames()
    moved = view()
    per = (high - low) / (width - left - 15)
    assert abs(moved[0] - low - 200 * per) < 3 * per
    browser.mouse("mouseWheel", pointer, y + 90, deltaX=0, deltaY=40, modifiers=8)  # Shift
    browser.frames()
    assert view()[0] > moved[0]
    crowd: object = browser.run(
        "(() => { const r = document.getElementById('crowd').getBoundingClientRect(); "
        "return [r.x, r.y]; })()"
    )
    assert isinstance(crowd, list)
    before = view()
    browser.drag((crowd[0] + 500, crowd[1] + 50), (crowd[0] + 700, crowd[1] + 50))
    browser.frames()
    brushed = view()
    assert before[0] < brushed[0] < brushed[1] < before[1]
    for count in (1, 2):
        browser.click(crowd[0] + 500, crowd[1] + 50, count)
    browser.frames()
    assert view() == whole
    browser.mouse("mouseWheel", pointer, y + 90, deltaX=0, deltaY=-50, modifiers=2)  # a pinch
    browser.frames()
    assert view()[1] - view()[0] < whole[1]
    assert browser.complaints == []


@needs_chromium
def test_link_says_what_is_shown(tmp_path: Path, browser: Browser) -> None:
    """View, filter, group, sort and choice are in the fragment, and come back with it."""
    sample = lives(60)
    path = written(tmp_path / "page.html", sample, stories=stories(sample))
    browser.open(path)
    put(browser, "group", "label:role")
    put(browser, "sort", "id")
    put(browser, "filter", "role=web")
    for key in ("ArrowDown", "Enter", "ArrowDown", "ArrowDown", "w"):
        browser.press(key)
    until(lambda: "view=" in str(browser.run("location.hash")))
    until(lambda: "life=" in str(browser.run("location.hash")))
    shared = path.as_uri() + str(browser.run("location.hash"))
    shown, who = rows(browser), text_of(browser, "who")
    view = browser.run("[Math.round(timeline.state.low), Math.round(timeline.state.high)]")
    browser.call("Page.navigate", url="about:blank")
    browser.open(path, url=shared)
    assert (rows(browser), text_of(browser, "who")) == (shown, who)
    now: object = browser.run("[Math.round(timeline.state.low), Math.round(timeline.state.high)]")
    assert now == view
    assert browser.run("document.getElementById('filter').value") == "role=web"


@needs_chromium
def test_table_is_sorted_and_linked_both_ways(tmp_path: Path, browser: Browser) -> None:
    """A heading sorts, again the other way; a row chooses its life, a chosen life marks its row."""
    browser.open(written(tmp_path / "page.html", lives(40)))
    until(lambda: browser.run("document.getElementById('rows').children.length") == 40)
    pid = "document.querySelector('#rows td:nth-child(2)').textContent"
    heads = "document.querySelectorAll('#heads button')"
    browser.run(f"{heads}[1].click()")
    assert browser.run(pid) == "1000"
    browser.run(f"{heads}[1].click()")
    assert browser.run(pid) == "1039"
    browser.run("document.querySelector('#rows tr:nth-child(3)').click()")
    assert "pid 1037" in text_of(browser, "facts")
    browser.press("Home")
    until(lambda: browser.run("document.querySelectorAll('#rows .chosen').length") == 1)
    assert str(browser.run("document.querySelector('#rows .chosen td').textContent")) == text_of(
        browser, "who"
    )


@needs_chromium
def test_marks_that_would_lie_on_each_other_are_counted(tmp_path: Path, browser: Browser) -> None:
    """Four crashes in a row are no blob."""
    sample = [
        Life(
            sid="w", generation=n + 1, pid=n + 1, version="", seq=n + 1, code=1,
            began_at=NOW - timedelta(seconds=9000 - n),
            seen_at=NOW - timedelta(seconds=9000 - n - 1),
            ended_at=NOW - timedelta(seconds=9000 - n - 1), end=WorkerState.FAILED,
        )
        for n in range(4)
    ]  # fmt: skip
    browser.open(written(tmp_path / "page.html", sample))
    assert browser.run("timeline.badges()") == [["w", 4]]
    assert browser.run("document.getElementById('crowd').dataset.crashes") == "4"


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_phone_reads_and_chooses(tmp_path: Path, dark: bool) -> None:
    """Nothing is wider than it; after a tap the story is in view; two ticks at least."""
    browser = Browser(tmp_path / "profile", dark=dark)
    try:
        browser.resize(390, 844, phone=True)
        sample = lives(25)
        browser.open(written(tmp_path / "page.html", sample, stories=stories(sample)))
        assert browser.run("document.documentElement.scrollWidth") == 390
        x, y, _, _ = frame(browser)
        at: object = browser.run("timeline.at(24)")
        assert isinstance(at, list)
        browser.tap(x + at[0] + at[2] / 2, y + at[1] + 20)
        until(lambda: browser.run("document.getElementById('pane').hidden") is False)
        browser.frames()
        seen: object = browser.run(
            "(() => { const r = document.getElementById('pane').getBoundingClientRect(); "
            "return [r.top, r.bottom, innerHeight]; })()"
        )
        assert isinstance(seen, list)
        assert 0 <= seen[0] < seen[1] <= seen[2] + 1
        assert browser.complaints == []
    finally:
        browser.close()


@needs_chromium
def test_twenty_thousand_lives_pan_without_a_stutter(tmp_path: Path, browser: Browser) -> None:
    """Ready within a second on a quiet machine; the script of a frame stays short."""
    sample = lives(20_000)
    browser.resize(1400, 900)
    assert browser.open(written(tmp_path / "page.html", sample)) < 5000
    x, y, *_ = frame(browser)
    browser.press("w")
    browser.frames()
    browser.run("timeline.took.length = 0")
    browser.drag((x + 700, y + 90), (x + 1000, y + 90), steps=60)
    browser.frames()
    took: object = browser.run("timeline.took")
    assert isinstance(took, list)
    assert len(took) > 10
    assert sorted(took)[int(len(took) * 0.95)] < 50, "16 ms is asked for where nothing else runs"


@needs_chromium
def test_page_is_used_by_keyboard(tmp_path: Path, browser: Browser) -> None:
    """Arrow keys choose a life and tell of it; w, s, plus, minus zoom; ? lists them; / filters."""
    browser.open(written(tmp_path / "page.html", lives(40)))
    browser.run("document.getElementById('sort').value = 'start'")
    put(browser, "sort", "start")
    browser.press("ArrowDown")
    assert text_of(browser, "who") == "worker-00000"
    assert "pid 1000, version 1.2" in text_of(browser, "facts")
    browser.press("ArrowDown")
    browser.press("ArrowDown")
    assert "died between" in text_of(browser, "facts"), "of a loss nobody knows the moment"
    for key in ("+", "-", "w", "s", "a", "d", "f", "0", "ArrowLeft", "End"):
        browser.press(key)
    assert text_of(browser, "who") == "worker-00019"
    browser.press("?")
    assert browser.run("document.getElementById('help').open") is True
    assert "zoom in" in text_of(browser, "keylist")
    browser.run("document.getElementById('help').close()")
    browser.press("/")
    assert browser.run("document.activeElement.id") == "filter"
    assert browser.complaints == []


def one(sid: str, begin: float, end: float | None = None, **more: object) -> Life:
    """Return a life from so many seconds before now to so many; None: it goes on."""
    ended = None if end is None else NOW - timedelta(seconds=end)
    return Life(
        **{
            "sid": sid, "generation": 1, "pid": 1, "version": "", "seq": round(begin * 1000) + 1,
            "began_at": NOW - timedelta(seconds=begin), "seen_at": ended or NOW, "ended_at": ended,
            "end": None if end is None else WorkerState.EXITED, "code": None if end is None else 0,
            **more,
        }  # type: ignore[arg-type]
    )  # fmt: skip


@needs_chromium
def test_who_begins_this_very_moment_lives_beside_the_others(
    tmp_path: Path, browser: Browser
) -> None:
    """Who goes on does not end with the page; a clock that was ahead is still in it."""
    browser.open(written(tmp_path / "page.html", [one("a", 100), one("b", 50), one("c", 0)]))
    assert "3 still living, 0 crashed or lost, at most 3 at once" in text_of(browser, "count")
    browser.open(written(tmp_path / "page.html", [one("a", 100, 50), one("ahead", -30)]))
    assert "2 of 2 lives" in text_of(browser, "count")


@needs_chromium
def test_bar_of_years_ends_where_it_ends_at_any_zoom(tmp_path: Path, browser: Browser) -> None:
    """A canvas counts in 32 bits: a year is wide at ten milliseconds."""
    browser.resize(1400, 900)
    path = written(tmp_path / "page.html", [one("a", 5 * 365 * 86400, 30), one("b", 60, 0.5)])
    end = int((NOW - timedelta(seconds=30)).timestamp() * 1000)
    browser.open(path, url=f"{path.as_uri()}#view={end - 10}-{end + 10}")
    browser.frames()
    _, _, width, _ = frame(browser)
    left = min(280, max(110, width * 0.2))
    row = rows(browser).index("a")
    seen: object = browser.run(
        "(() => { const c = document.getElementById('lives'); "
        f"const p = c.getContext('2d').getImageData(0, {22 + row * 18 + 9}, c.width, 1).data; "
        "let last = -1; for (let x = 0; x < c.width; x++) "
        "if (p[4 * x + 2] > p[4 * x] + 60) last = x; return last; })()"
    )
    middle = left + (width - left - 15) / 2
    assert isinstance(seen, int)
    assert abs(seen - middle) < 6


@needs_chromium
def test_pointer_means_the_bar_that_it_is_on(tmp_path: Path, browser: Browser) -> None:
    """Of two that follow each other the second, from its first pixel on."""
    sample = [one("j", 600, 300), one("j", 300, 0.001, generation=2, pid=2)]
    browser.resize(1400, 900)
    browser.open(written(tmp_path / "page.html", sample))
    x, y, *_ = frame(browser)
    at: object = browser.run("timeline.at(1)")
    assert isinstance(at, list)
    browser.mouse("mouseMoved", x + at[0] + 3, y + at[1] + 9)
    assert "pid 2" in text_of(browser, "tip")


@needs_chromium
@pytest.mark.parametrize(
    "fragment",
    ["sort=__proto__", "group=constructor", "sort=toString", "view=99999999999999999-1",
     "view=NaN-NaN", "open=[1", "open=7", "life=x", "life=1:w-0&filter=zzz",
     "without=nothing,,", "%E0%A4%A"],
)  # fmt: skip
def test_broken_links_show_the_page(tmp_path: Path, browser: Browser, fragment: str) -> None:
    """What is no choice is passed over."""
    path = written(tmp_path / "page.html", lives(10))
    browser.open(path, url=f"{path.as_uri()}#{fragment}")
    assert browser.run("document.getElementById('group').value") == "none"
    assert browser.run("document.getElementById('sort').value") == "recent"
    assert browser.run("document.getElementById('pane').hidden") is True
    assert browser.run("timeline.view()") == (0 if "zzz" in fragment else 10)
    assert browser.complaints == []


@needs_chromium
def test_link_put_into_an_open_page_is_followed(tmp_path: Path, browser: Browser) -> None:
    """The choices show what it says, and what it does not say is as at first."""
    sample = lives(40)
    browser.open(written(tmp_path / "page.html", sample))
    put(browser, "group", "prefix")
    browser.press("w")
    browser.run("location.hash = 'filter=worker-0001&sort=id&without=failed'")
    until(lambda: browser.run("document.getElementById('filter').value") == "worker-0001")
    assert browser.run("document.getElementById('sort').value") == "id"
    assert browser.run("document.getElementById('group').value") == "none"
    assert browser.run("document.querySelectorAll('#kinds input')[2].checked") is False
    wanted = [w for w in sample if w.sid.startswith("worker-0001") and w.end != WorkerState.FAILED]
    until(lambda: browser.run("timeline.view()") == len(wanted))


@needs_chromium
def test_more_of_the_table_stays_when_a_row_is_chosen(tmp_path: Path, browser: Browser) -> None:
    """Nothing jumps, and the pane comes into view."""
    browser.resize(1400, 900)
    browser.open(written(tmp_path / "page.html", lives(300)))
    count = "document.getElementById('rows').children.length"
    until(lambda: browser.run(count) == 200)
    browser.run("document.getElementById('rest').click()")
    browser.run("document.querySelector('#rows tr:nth-child(250)').click()")
    begin = time.monotonic()
    until(lambda: time.monotonic() > begin + 0.4)
    assert browser.run(count) == 300
    assert browser.run("document.querySelectorAll('#rows .chosen').length") == 1
    top = browser.run("document.getElementById('pane').getBoundingClientRect().top")
    assert isinstance(top, int | float)
    assert -50 < top < 900


@needs_chromium
def test_keys_walk_over_groups_and_stop_at_the_limit(tmp_path: Path, browser: Browser) -> None:
    """Down and Enter open the second group; End is the last; w at the limit moves nothing."""
    sample = [one(f"{group}-{n}", 100 + n, 50 + n) for group in "abc" for n in range(3)]
    browser.open(written(tmp_path / "page.html", sorted(sample, key=lambda w: w.began_at)))
    put(browser, "group", "prefix")
    put(browser, "sort", "id")
    for key in ("ArrowDown", "ArrowDown", "Enter", "ArrowDown"):
        browser.press(key)
    browser.frames()
    assert text_of(browser, "who") == "b-0"
    assert len(rows(browser)) == 6
    browser.press("End")
    browser.press("Enter")
    browser.frames()
    assert len(rows(browser)) == 9, "the last group has opened"
    for _ in range(40):
        browser.press("w")
    before = browser.run("[timeline.state.low, timeline.state.high]")
    browser.press("w")
    assert browser.run("[timeline.state.low, timeline.state.high]") == before


@needs_chromium
def test_filter_takes_values_with_spaces(tmp_path: Path, browser: Browser) -> None:
    """In quotes, in either place."""
    sample = lives(10)
    every = stories(sample)
    every[3].labels["Role"] = "Web Two"
    browser.open(written(tmp_path / "page.html", sample, stories=every))
    for words in ('role="web two"', '"role=web two"', '"web two"'):
        put(browser, "filter", words)
        assert browser.run("timeline.view()") == 1, words


@needs_chromium
def test_two_fingers_zoom(tmp_path: Path, browser: Browser) -> None:
    """The moment between them stays."""
    browser.resize(390, 844, phone=True)
    browser.open(written(tmp_path / "page.html", lives(100)))
    x, y, width, _ = frame(browser)

    def touch(kind: str, *points: float) -> None:
        browser.call(
            "Input.dispatchTouchEvent", type=kind,
            touchPoints=[{"x": p, "y": y + 80, "id": n} for n, p in enumerate(points)],
        )  # fmt: skip

    middle = x + width / 2
    before: object = browser.run("timeline.state.high - timeline.state.low")
    touch("touchStart", middle - 30)
    touch("touchStart", middle - 30, middle + 30)
    for wide in (50, 80, 120):
        touch("touchMove", middle - wide, middle + wide)
    touch("touchEnd")
    browser.frames()
    after: object = browser.run("timeline.state.high - timeline.state.low")
    assert isinstance(before, int | float)
    assert isinstance(after, int | float)
    assert 0.15 < after / before < 0.5


@needs_chromium
def test_paper_has_ink_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    """Also of a dark screen; no blank sheets."""
    browser = Browser(tmp_path / "profile", dark=True)
    try:
        browser.open(written(tmp_path / "page.html", lives(600)))
        put(browser, "group", "none")
        until(lambda: browser.run("document.getElementById('rows').children.length") == 200)
        browser.call("Emulation.setEmulatedMedia", media="print")
        browser.run("window.dispatchEvent(new Event('beforeprint'))")
        words = text_of(browser, "cut")
        assert "400 more of the table" in words
        assert browser.run("getComputedStyle(document.getElementById('space')).display") == "none"
        darkest: object = browser.run(
            "(() => { const c = document.getElementById('lives'); const p = "
            "c.getContext('2d').getImageData(0, 22, 100, 200).data; let least = 255; "
            "for (let i = 0; i < p.length; i += 4) if (p[i + 3] > 200) "
            "least = Math.min(least, p[i] + p[i + 1] + p[i + 2]); return least; })()"
        )
        assert isinstance(darkest, int)
        assert darkest < 120, "names are dark on paper"
    finally:
        browser.close()


_HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>&amp;\u202e\x1b"
)


@needs_chromium
@pytest.mark.parametrize("large", [20_000, 0])
def test_hostile_names_are_inert(
    tmp_path: Path, browser: Browser, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a sid, a version or a cause says, it is shown as text; the page stays whole."""
    monkeypatch.setattr(page, "_LARGE", large)  # from there on the data stand there unpacked
    sample = lives(10, sid=_HOSTILE, version=_HOSTILE)
    for life in sample:
        life.cause = _HOSTILE
    every = stories(sample)
    for one in every.values():
        one.labels[_HOSTILE] = _HOSTILE
        one.tail = one.evidence = one.host = one.owner = _HOSTILE
        one.steps.append((NOW, 0, text.visible(_HOSTILE), text.visible(_HOSTILE)))
    path = written(tmp_path / "page.html", sample, caption=_HOSTILE, stories=every)
    browser.open(path)
    until(lambda: browser.run("document.documentElement.dataset.whole") == "yes")
    until(lambda: browser.run("document.querySelector('#rows td') !== null") is True)
    browser.press("ArrowDown")
    assert "</script>" in text_of(browser, "steps")
    assert browser.run("document.querySelectorAll('#steps *').length") == 4
    assert browser.run("document.title") == "crewlog timeline"
    assert browser.run("document.scripts.length") == 3
    assert browser.run("document.images.length") == 0
    shown = str(browser.run("document.querySelector('#rows td').textContent"))
    assert shown.startswith("</script><script>")
    assert "\\u202e" in shown
    assert "\\x1b" in shown
    assert browser.complaints == []
    assert browser.requests == [path.as_uri()]


@needs_chromium
def test_policy_stops_a_script_that_is_not_ours(tmp_path: Path, browser: Browser) -> None:
    """The control: a page with one more script or one more request is caught."""
    path = written(tmp_path / "page.html", lives(4))
    more = "<script>document.title='owned'</script><img src='http://127.0.0.1:9/x.png'>"
    path.write_text(path.read_text().replace("<header>", more + "<header>"))
    browser.open(path)
    assert browser.run("document.title") == "crewlog timeline"
    assert browser.complaints, "the policy complains"


@needs_chromium
def test_page_of_a_hundred_thousand_lives_is_usable(tmp_path: Path, browser: Browser) -> None:
    """It draws what is in sight, and filters while one types."""
    assert browser.open(written(tmp_path / "page.html", lives(100_000))) < 15_000
    browser.run("document.getElementById('filter').focus()")
    browser.type("worker-49999")
    assert str(browser.run("document.getElementById('count').textContent")).startswith(
        "In view: 1 of 50000"
    )
    assert browser.complaints == []


def test_page_without_a_browser(cli: Cli, reg: Registry, tmp_path: Path) -> None:
    """Owner-only, whole or not at all; a wrong place is a usage error; an empty history a page."""
    reg.register("a", pid=os.getpid())
    reg.remove("a", reason="done")
    path = tmp_path / "page.html"
    done = cli("timeline", "--html", path)
    assert done.stdout == ""
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text().count("<script") == 3
    cli("timeline", "--html", tmp_path / "nowhere" / "page.html", code=2)
    cli("timeline", "--html", tmp_path, code=2)
    assert cli.json("timeline", "--html", path)["lives"] == 1


def test_terminal_tells_how_each_ended(cli: Cli, reg: Registry, crew: Crew) -> None:
    """Alive, orderly, crashed, lost: each has its mark, and a loss its hatching."""
    dead = crew.sleeper()
    reg.register("lost", pid=dead.pid)
    kill(dead)
    reg.register("alive", pid=os.getpid())
    for sid, code in (("done", 0), ("crashed", 3)):
        reg.register(sid, pid=os.getpid())
        reg.exited(sid, code=code)
    rows = {row.split()[0]: row for row in cli("timeline").stdout.splitlines()[1:]}
    assert rows["alive"].endswith(">")
    assert rows["done"].rstrip("█ ").endswith("|")
    assert rows["crashed"].endswith("x")
    assert rows["lost"].endswith("?")
    assert "░" in rows["lost"]
    assert "░" not in rows["alive"]
    answer = cli.json("timeline")["lives"]
    assert isinstance(answer, list)
    assert {life["sid"]: life["end"] for life in answer} == {
        "lost": "lost", "alive": None, "done": "exited", "crashed": "failed",
    }  # fmt: skip


def test_life_that_goes_on_is_not_taken_for_one_that_was_pruned(
    cli: Cli, reg: Registry, crew: Crew
) -> None:
    """Both are the first of their sid as far as the state can tell."""
    first = crew.sleeper()
    reg.register("a", pid=first.pid)
    kill(first)
    for _ in range(2):
        collect(reg, keep=timedelta(0))
    worker = reg.register("a", pid=crew.sleeper().pid)
    lives = cli.json("timeline")["lives"]
    assert isinstance(lives, list)
    old, new = lives
    assert (old["end"], new["end"], new["seq"]) == ("lost", None, worker.registered_seq)
    assert old["seen_at"] < new["began_at"] < new["seen_at"]


def test_terminal_shows_a_part(cli: Cli, reg: Registry) -> None:
    """By sid, by time, and the newest N; nothing at all is said, not drawn."""
    for number in range(5):
        reg.register(f"w{number}", pid=os.getpid())
    assert len(cli("timeline", "-n", 2).stdout.splitlines()) == 3
    assert cli("timeline", "--sid", "w3").stdout.splitlines()[1].startswith("w3")
    assert cli("timeline", "--until", "1h").stdout == ""
