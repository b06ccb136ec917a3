"""Hold what every command shares: global options, output, the registry, and the way out."""

import errno
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import (
    TYPE_CHECKING,
    Concatenate,
    Final,
    Literal,
    NoReturn,
    ParamSpec,
    TypeVar,
    cast,
)

import click

from crewlog.errors import CrewlogError
from crewlog.model.limits import LOCK_WAIT_S
from crewlog_cli import output, text

if TYPE_CHECKING:
    from crewlog.model.events import Worker
    from crewlog.registry import Registry

P = ParamSpec("P")
R = TypeVar("R")

EXIT_NO: Final = 1
EXIT_USAGE: Final = 2
EXIT_BUG: Final = 70
EXIT_IO: Final = 74
EXIT_TIMEOUT: Final = 124
EXIT_NOT_RUN: Final = 126  # as env(1): there, but it cannot be run
EXIT_NOT_FOUND: Final = 127
EXIT_INTERRUPT: Final = 130
EXIT_PIPE: Final = 141
_PROMPT_WAIT_S: Final = 0.5  # a prompt is no place to wait for a server


@dataclass(slots=True)
class Shell:
    """What the global options ask for."""

    place: str | None = None
    json: bool = False
    quiet: bool = False
    verbose: bool = False
    utc: bool = False
    debug: bool = False
    no_pager: bool = False
    color: Literal["auto", "always", "never"] = "auto"
    own: tuple[str, ...] = ()  # the words before a "--"
    separated: bool = False  # there was one
    program_words: int = 0  # how many stand behind it
    wait_s: float = LOCK_WAIT_S  # for other writers, and for servers
    opened: "list[Registry]" = field(default_factory=list)

    # -- the registry -----------------------------------------------------------------------

    def registry(self) -> "Registry":
        """Open the registry, which need not exist yet."""
        from crewlog.place import locate  # noqa: PLC0415 (--version and --help open none)
        from crewlog.registry import Registry  # noqa: PLC0415 (as above)

        try:
            place = locate(self.place)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        if "$" in str(place) or str(self.place or "").startswith("~"):
            output.warn(f"crewlog: {place} holds a word that no shell has replaced ($ or ~)")
        reg = Registry(place, lock_timeout_s=self.wait_s, via="cli")
        self.opened.append(reg)
        return reg

    def existing(self) -> "Registry":
        """Open a registry that exists.

        Raises: StoreMissing (66): reading creates nothing.
        """
        reg = self.registry()
        reg.store()
        return reg

    def close(self) -> None:
        """Close what was opened."""
        for reg in self.opened:
            reg.close()

    # -- output -----------------------------------------------------------------------------

    def line(self, words: str, *, flush: bool = False) -> None:
        """Print one line of data for a person."""
        output.put(text.visible(words), flush=flush)

    def prose(self, words: str, *, indent: int = 0) -> None:
        """Print a sentence, on a terminal in lines of its width."""
        columns, line = output.columns(), text.visible(words)
        for row in text.wrapped(line, columns, indent=indent) if columns else [line]:
            output.put(row)

    def table(
        self,
        header: Iterable[text.Column | str],
        rows: Iterable[Iterable[str]],
        *,
        titles: bool = True,
        fit: bool = True,
    ) -> None:
        """Print a table, on a terminal to `fit` its width: columns go by their worth."""
        for row in self.laid_out(header, rows, titles=titles, fit=fit):
            output.put(row)

    def laid_out(
        self,
        header: Iterable[text.Column | str],
        rows: Iterable[Iterable[str]],
        *,
        titles: bool = True,
        fit: bool = True,
    ) -> list[str]:
        """Return a table's lines."""
        heads, columns = list(header), output.columns() if fit else 0
        if columns:  # a long name must not push away what is said of it
            heads = [
                text.Column("sid", shrinks_to=text.SID_COLUMNS) if head == "sid" else head
                for head in heads
            ]
        cells = [list(row) for row in rows]
        lines = text.table(heads, cells, columns=columns or None, titles=titles)
        return list(map(text.coloured, lines)) if self.colours() else lines

    def page(self, lines: Sequence[str]) -> None:
        """Print lines; on a terminal that they do not fit on, through a pager as git does."""
        able = output.columns() and os.environ.get("TERM") != "dumb" and not self.no_pager
        height = output.height() if able else 0
        if height and len(lines) >= height:
            from crewlog_cli import pager  # noqa: PLC0415 (start-up; few answers are so long)

            if pager.show(lines):
                return
        for line in lines:
            output.put(line)

    def colours(self) -> bool:
        """Say whether words that matter are coloured; colour says nothing that they do not.

        Source: no-color.org, force-color.org.
        """
        if self.color != "auto":
            return self.color == "always"
        if os.environ.get("NO_COLOR"):
            return False
        able = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        return bool(os.environ.get("FORCE_COLOR")) or able

    def document(self, fields: Mapping[str, object]) -> None:
        """Print one JSON object on one line, ASCII only, with its schema."""
        output.put(_dumped({"schema": 1, **fields}))

    def stream(self, fields: Mapping[str, object]) -> None:
        """Print one JSON object of a stream, flushed."""
        output.put(_dumped(fields), flush=True)

    def note(self, words: str) -> None:
        """Tell a person something that is not data."""
        if not self.quiet:
            output.tell(text.visible(self.advice(words)))

    def advice(self, words: str) -> str:
        """Put the --dir of this call into the commands that an advice names."""
        if self.place is None or not self.opened:
            return words
        import re  # noqa: PLC0415 (start-up; as json)
        import shlex  # noqa: PLC0415 (as above)

        named = f"crewlog -d {shlex.quote(self.place)} "
        return re.sub(r"\bcrewlog (?=[a-z])", lambda _: named, words)

    def when(self, moment: datetime) -> str:
        """Write a time for a table."""
        words = text.moment(moment, utc=self.utc)
        own = text.offset(moment, utc=self.utc)  # the clock may have been changed since
        return words if own == self.offset() else f"{words} {own}"

    def offset(self) -> str:
        """Write the offset that the table's times have."""
        return text.offset(datetime.now(UTC), utc=self.utc)


def _dumped(fields: Mapping[str, object]) -> str:
    """Write JSON in ASCII, which no terminal takes for anything else."""
    import json  # noqa: PLC0415 (start-up; most want a table)

    return json.dumps(fields, separators=(",", ":"))


def confirmed(question: str, what: str) -> bool:
    """Ask a person before what cannot be taken back; without a terminal it needs --yes."""
    if sys.stdin is None or not sys.stdin.isatty():
        message = f"{what}: without a terminal it needs --yes"
        raise click.UsageError(message)
    return click.confirm(question, err=True)


# -- options --------------------------------------------------------------------------------

_GLOBAL: Final = (
    click.option(
        "-d",
        "--dir",
        "place",
        metavar="PLACE",
        help="The registry: directory or URL; else CREWLOG_DIR.",
    ),
    click.option("--json", "json_", is_flag=True, help="Print JSON instead of text."),
    click.option("-q", "--quiet", is_flag=True, help="Print no notes; errors stay."),
    click.option("-v", "--verbose", is_flag=True, help="Print more notes."),
    click.option(
        "--color", type=click.Choice(["auto", "always", "never"]), help="Colour words that matter."
    ),
    click.option("--utc", is_flag=True, help="Show times in UTC instead of local time."),
    click.option("--no-pager", is_flag=True, help="Print long output without a pager."),
    click.option("--debug", is_flag=True, help="Show a traceback with an error."),
)


def take_globals(shell: Shell, values: dict[str, object]) -> None:
    """Move the global options out of a command's values and into the shell."""
    place = values.pop("place")
    if isinstance(place, str):
        shell.place = place
    shell.json |= values.pop("json_") is True
    shell.quiet |= values.pop("quiet") is True
    shell.verbose |= values.pop("verbose") is True
    shell.utc |= values.pop("utc") is True
    shell.debug |= values.pop("debug") is True
    shell.no_pager |= values.pop("no_pager") is True
    color = values.pop("color")
    if color in {"auto", "always", "never"}:
        shell.color = color


def complete_sid(ctx: click.Context, _param: click.Parameter, begun: str) -> list[str]:
    """Name the sids that begin so, or that a glob means, for a shell's completion."""
    from crewlog.model.choice import matcher  # noqa: PLC0415 (start-up)

    means = matcher((begun,))
    sids = (worker.sid for worker in _listed(ctx))
    return [sid for sid in sids if sid.startswith(begun) or means(sid)]


def complete_label(ctx: click.Context, _param: click.Parameter, begun: str) -> list[str]:
    """Name the labels that begin so, for a shell's completion."""
    labels = {f"{key}={value}" for worker in _listed(ctx) for key, value in worker.labels.items()}
    return sorted(label for label in labels if label.startswith(begun))


def _listed(ctx: click.Context) -> "list[Worker]":
    before = {} if ctx.parent is None else ctx.parent.params
    place = ctx.params.get("place") or before.get("place")
    shell = Shell(place=place, wait_s=_PROMPT_WAIT_S)
    try:
        return shell.registry().workers(all=True)
    except (CrewlogError, click.UsageError):  # a prompt is no place for an error
        return []
    finally:
        shell.close()


def with_globals(command: Callable[P, R]) -> Callable[P, R]:
    """Give a command the global options; they stand before or after the subcommand."""
    for option in reversed(_GLOBAL):
        command = option(command)
    return command


def command(
    name: str, *, examples: str
) -> Callable[[Callable[Concatenate[Shell, P], None]], click.Command]:
    """Make a function a command: global options, the shell first, examples in --help."""

    def wrap(function: Callable[Concatenate[Shell, P], None]) -> click.Command:
        def run(**values: object) -> None:
            shell = cast("Shell", click.get_current_context().obj)
            take_globals(shell, values)
            _listen(shell)
            try:
                function(shell, **values)  # type: ignore[call-arg,arg-type] # click made them of the options
                output.flush()
            except CrewlogError as error:
                fail(shell, error)
            except output.OutputFailedError as error:
                raise SystemExit(output_failed(shell, error)) from error
            except KeyboardInterrupt as error:
                output.lose_stdout()
                raise SystemExit(EXIT_INTERRUPT) from error
            finally:
                shell.close()

        run.__doc__ = function.__doc__
        run.__name__ = function.__name__
        # click keeps the options that decorate a function on the function itself
        vars(run)["__click_params__"] = getattr(function, "__click_params__", [])
        epilog = "\b\nExamples:\n" + "\n".join(f"  {row}" for row in examples.strip().splitlines())
        settings: dict[str, object] = {"help_option_names": ["-h", "--help"]}
        made = click.command(name, cls=Command, epilog=epilog, context_settings=settings)
        return made(with_globals(run))

    return wrap


class Command(click.Command):
    """A command whose help names its own options; the global ones are one line at the end."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options."""
        names = {"place", "json_", "quiet", "verbose", "color", "utc", "debug", "no_pager"}
        rows = [
            row
            for param in self.get_params(ctx)
            if isinstance(param, click.Option)
            and param.name not in names
            and (row := param.get_help_record(ctx)) is not None
        ]
        with formatter.section("Options"):
            formatter.write_dl(rows)
        formatter.write(_EVERYWHERE)


_EVERYWHERE: Final = (
    "\nEverywhere: -d, --dir PLACE (or CREWLOG_DIR), --json, -q, -v, --utc, --no-pager,\n"
    "--color WHEN, --debug; `crewlog --help` says more.\n"
)


class _Notes(logging.Handler):
    """Show the library's warnings, and with --verbose all it says, as notes."""

    def __init__(self, shell: Shell) -> None:
        super().__init__(logging.DEBUG if shell.verbose else logging.WARNING)
        self._shell = shell

    def emit(self, record: logging.LogRecord) -> None:
        self._shell.note(f"crewlog: {record.getMessage()}")


def _listen(shell: Shell) -> None:
    logger = logging.getLogger("crewlog")
    for handler in [h for h in logger.handlers if isinstance(h, _Notes)]:
        logger.removeHandler(handler)
    logger.addHandler(_Notes(shell))
    logger.setLevel(logging.DEBUG)


# -- the way out ----------------------------------------------------------------------------


def complain(shell: Shell, *, code: str, exit_code: int, what: str, where: str, hint: str) -> None:
    """Write an error: three lines for a person, or one JSON object."""
    hint = shell.advice(hint)
    if shell.json:
        message = what + (f": {where}" if where else "")
        body = {"code": code, "exit": exit_code, "message": message, "hint": hint}
        output.tell(_dumped({"error": body}))
        return
    for row in (f"crewlog: {what}", f"  {where}", f"  {hint}"):
        if row.strip():
            output.tell(text.visible(row))


def fail(shell: Shell, error: CrewlogError) -> NoReturn:
    """End with what the error says: what; where and why; what to do next."""
    if shell.debug:
        raise error
    complain_of(shell, error)
    raise SystemExit(error.exit_code)


def complain_of(shell: Shell, error: CrewlogError) -> None:
    """Write what an error says."""
    where = ": ".join(part for part in (error.where, error.why) if part)
    complain(
        shell,
        code=error.code,
        exit_code=error.exit_code,
        what=error.what,
        where=where,
        hint=error.remedy,
    )


def output_failed(shell: Shell, error: OSError) -> int:
    """Say that stdout cannot be written; return the exit code."""
    output.lose_stdout()
    if error.errno == errno.EPIPE:
        return EXIT_PIPE
    complain(
        shell,
        code="output_failed",
        exit_code=EXIT_IO,
        what="cannot write the output",
        where=error.strerror or str(error),
        hint="Make room or write elsewhere; a change that was asked for is made (crewlog history)",
    )
    return EXIT_IO
