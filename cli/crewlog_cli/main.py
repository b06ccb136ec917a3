"""Run `crewlog`: find the command, and turn every ending into its exit code."""

import errno
import importlib
import sys
from typing import Final

import click

from crewlog import __version__
from crewlog.errors import CrewlogError, from_oserror
from crewlog_cli import output, shell
from crewlog_cli.shell import Shell

# command -> the module that holds it, loaded when it is called
COMMANDS: Final = {
    "ls": "look",
    "show": "look",
    "alive": "look",
    "history": "history",
    "stats": "history",
    "diff": "history",
    "timeline": "timeline",
    "top": "top",
    "export": "history",
    "path": "look",
    "watch": "follow",
    "cursor": "follow",
    "register": "change",
    "update": "change",
    "remove": "change",
    "import": "change",
    "logs": "logs",
    "exec": "workers",
    "run": "workers",
    "start": "workers",
    "gc": "keep",
    "compact": "keep",
    "verify": "keep",
    "repair": "keep",
    "anchor": "keep",
    "backup": "keep",
    "migrate": "keep",
    "stop": "workers",
    "beat": "workers",
    "observe": "workers",
    "explain": "look",
    "doctor": "setup",
    "schedule": "setup",
    "completion": "setup",
    "demo": "demo",
}


class _Lazy(click.Group):
    """A group whose commands are imported only when they are called."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, _ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"crewlog_cli.commands.{COMMANDS[name]}")
        found: object = module.COMMANDS[name]
        assert isinstance(found, click.Command)
        return found


def _version(ctx: click.Context, _param: click.Parameter, asked: bool) -> None:  # noqa: FBT001 (click's)
    if not asked or ctx.resilient_parsing:
        return
    sh: Shell = ctx.obj
    if sh.json:
        sh.document({"version": __version__})
    else:
        sh.line(f"crewlog {__version__}")
    ctx.exit()


@click.group(
    cls=_Lazy,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="\b\nExamples:\n"
    "  crewlog run web-1 -- python -m http.server 8000\n"
    "  crewlog ls\n"
    "  crewlog history --sid web-1\n"
    "  crewlog compact -q        # from cron",
)
@shell.with_globals
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version,
              help="Show the version and exit.")  # fmt: skip
def crewlog(**values: object) -> None:
    """Remember worker processes: who lives, who ended, and who did it."""
    shell.take_globals(click.get_current_context().obj, values)


def run(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    own = words[: words.index("--")] if "--" in words else words
    sh = Shell(json="--json" in own)  # known even where the rest cannot be parsed
    sh.own, sh.separated = tuple(own), "--" in words
    sh.program_words = max(0, len(words) - len(own) - 1)
    output.prepare()
    try:
        crewlog.main(args=arguments, prog_name="crewlog", obj=sh, standalone_mode=False)
        output.flush()
    except (SystemExit, click.exceptions.Exit, KeyboardInterrupt, click.Abort) as error:
        return _asked(error)
    except click.UsageError as error:
        return _misused(sh, error)
    except OSError as error:
        if isinstance(error, output.OutputFailedError) or error.errno in output.STREAM_ERRORS:
            return shell.output_failed(sh, error)
        return _refused(sh, error) if error.errno in _REFUSALS else _bug(sh, error)
    except Exception as error:  # noqa: BLE001 (the last boundary: no traceback reaches a user)
        return _bug(sh, error)
    return 0


def _asked(error: BaseException) -> int:
    """Return the exit code of an ending that somebody asked for."""
    match error:
        case SystemExit() if type(sys.stdout).__name__.endswith("PacifyFlushWrapper"):
            return shell.EXIT_PIPE  # click put that in place of a pipe that is closed
        case SystemExit(code=int(code)) | click.exceptions.Exit(exit_code=code):
            return code
        case SystemExit():
            return shell.EXIT_BUG
        case _:
            output.lose_stdout()
            return shell.EXIT_INTERRUPT


def _misused(sh: Shell, error: click.UsageError) -> int:
    """Say what is wrong with the command line; without any words, show what there is."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError) and not sh.json:
        output.warn_rows(error.format_message())
        return shell.EXIT_USAGE
    context = error.ctx.command_path if error.ctx is not None else "crewlog"
    shell.complain(
        sh,
        code="usage",
        exit_code=shell.EXIT_USAGE,
        what=" ".join(error.format_message().split()),
        where="",
        hint=f"See `{context} --help`",
    )
    return shell.EXIT_USAGE


# What the system refuses for a reason of its own, wherever that meets us.
_REFUSALS: Final = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENOMEM),
        *(errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EACCES, errno.EPERM),
        *(errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR),
    }
)


def _refused(sh: Shell, error: OSError) -> int:
    """Say what the system refused: its surroundings are no fault of crewlog."""
    known = from_oserror(error, "the system refused", where=str(error.filename or ""))
    shell.complain(
        sh,
        code=known.code,
        exit_code=known.exit_code,
        what=known.what,
        where=known.where + (f": {known.why}" if known.where else known.why),
        hint=known.remedy,
    )
    return known.exit_code


def _bug(sh: Shell, error: Exception) -> int:
    if sh.debug:
        import traceback  # noqa: PLC0415 (start-up; hardly anybody needs it)

        traceback.print_exc()
    if isinstance(error, CrewlogError):
        return error.exit_code
    shell.complain(
        sh,
        code="bug",
        exit_code=shell.EXIT_BUG,
        what=f"unexpected {type(error).__name__}",
        where=str(error),
        hint="This is a fault of crewlog; run again with --debug and report it",
    )
    return shell.EXIT_BUG


def main() -> None:
    """Be the console script."""
    code = run()
    try:
        output.flush()
    except output.OutputFailedError as error:
        code = shell.output_failed(Shell(), error)
    raise SystemExit(code)
