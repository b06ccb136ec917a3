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

# group of the help -> command -> the module that holds it, loaded when it is called; what it does
GROUPS: Final[dict[str, dict[str, tuple[str, str]]]] = {
    "Look": {
        "ls": ("ls", "List the workers, and whether each lives"),
        "show": ("look", "Show a worker: how it stands or ended, its last events"),
        "explain": ("look", "Tell why a worker counts as alive, dead or unknown"),
        "alive": ("look", "Tell by the exit code whether a worker lives"),
        "logs": ("logs", "Print what a worker wrote (its --log)"),
        "top": ("top", "Watch the living: processor, memory, last event"),
        "watch": ("follow", "Print changes as they happen, or run a program for each"),
    },
    "Ask the history": {
        "history": ("history", "Tell what happened, when, and who did it"),
        "timeline": ("timeline", "Draw which worker lived when; --html makes a page"),
        "stats": ("history", "Count lives, crashes, causes, restarts"),
        "diff": ("history", "Compare two states, by time or seq"),
        "export": ("history", "Write the history as JSON lines, CSV or CloudEvents"),
    },
    "Start and stop": {
        "start": ("workers", "Start a program as a worker in the background"),
        "run": ("workers", "Start a program as a worker and wait for its end"),
        "exec": ("workers", "Become a program, as a worker"),
        "stop": ("workers", "End workers, and record how each ended"),
        "observe": ("workers", "Record the deaths of workers as they happen"),
        "beat": ("workers", "Say that a worker is well, and what it does"),
    },
    "Change": {
        "register": ("change", "Put a running process on record"),
        "update": ("change", "Change a worker's state, labels or meta"),
        "remove": ("change", "Forget a worker; its process is left alone"),
        "cursor": ("follow", "List, set and remove positions of subscribers"),
        "import": ("change", "Take over an older registry.json"),
    },
    "Keep in order": {
        "compact": ("keep", "Collect the dead and fold the log: the command for cron"),
        "gc": ("keep", "Collect the dead only"),
        "verify": ("keep", "Check every line of the history"),
        "repair": ("keep", "Make a damaged store usable, losing nothing in silence"),
        "anchor": ("keep", "Print a proof of the history, to be kept elsewhere"),
        "backup": ("keep", "Copy the registry while it is in use"),
        "migrate": ("keep", "Move a registry, to or from etcd"),
    },
    "Set up": {
        "init": ("setup", "Make an empty registry"),
        "doctor": ("setup", "Check what crewlog depends on, and say what to do"),
        "schedule": ("setup", "Print the cron line or systemd units"),
        "completion": ("setup", "Print the completion of a shell"),
        "path": ("look", "Print where the registry is"),
        "mcp": ("mcp", "Answer agents (MCP), reading only"),
        "demo": ("demo", "Play it through with real processes and kill -9"),
        "help": ("setup", "Show the help of a command"),
    },
}
COMMANDS: Final = {name: module for group in GROUPS.values() for name, (module, _) in group.items()}
# What hands of docker, kubectl, systemctl and pm2 type.
ALIASES: Final = {
    "ps": "ls",
    "list": "ls",
    "get": "ls",
    "status": "show",
    "describe": "show",
    "inspect": "show",
    "info": "show",
    "events": "history",
    "rm": "remove",
}
_HINTS: Final = {
    "restart": "crewlog does not keep commands: `crewlog stop SID && crewlog start SID -- CMD…`",
    "kill": "To end a worker at once: `crewlog stop --signal KILL SID`",
    "delete": "To end a worker: `crewlog stop SID`; to only forget it: `crewlog remove SID`",
    "enable": "`crewlog schedule systemd-user` prints the units",
    "version": "`crewlog --version`",
    "prune": "`crewlog gc --keep 0` drops what has ended from the list; the history stays",
    "tail": "`crewlog logs -f SID` follows its output, `crewlog history -f` what happens",
}


class _Lazy(click.Group):
    """A group whose commands are imported only when they are called."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, _ctx: click.Context, name: str) -> click.Command | None:
        name = ALIASES.get(name, name)
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"crewlog_cli.commands.{COMMANDS[name]}")
        command: object = module.COMMANDS[name]
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; where there is none, say what there is."""
        word = args[0]
        if self.get_command(ctx, word) is None and not word.startswith("-"):
            ctx.fail(f"No such command {word!r}. {_hint(word)}")
        return super().resolve_command(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands by what they are for, one line each; then the options."""
        for title, commands in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl(
                    [(f"{name:<10}", summary) for name, (_, summary) in commands.items()]
                )
        click.Command.format_options(self, ctx, formatter)


def _hint(word: str) -> str:
    from difflib import get_close_matches  # noqa: PLC0415 (start-up)

    if word in _HINTS:
        return _HINTS[word]
    near = get_close_matches(word, [*COMMANDS, *ALIASES], n=3)
    return f"Did you mean {', '.join(near)}?" if near else "`crewlog --help` lists them"


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
    "  crewlog history web-1\n"
    "  crewlog compact -q        # from cron",
)
@shell.with_globals
@click.option("-V", "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version,
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
