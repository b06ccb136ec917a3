"""Set up: doctor, schedule, completion."""

import os
import shlex
import sys
import unicodedata
from pathlib import Path
from shutil import which
from typing import Final, Literal, TypeAlias

import click
from click.shell_completion import get_completion_class

from crewlog import open as open_registry
from crewlog.errors import from_oserror
from crewlog.place import locate
from crewlog_cli import shell
from crewlog_cli.output import put
from crewlog_cli.shell import Shell, command
from crewlog_compactor.health import checks

Kind: TypeAlias = Literal["cron", "systemd-user", "systemd-system"]
_EVERY_MINUTES: Final = 5
_JITTER: Final = "30s"

# What would blind or hinder a collection is left out on purpose: PrivatePIDs and ProtectProc hide
# processes, PrivateUsers owners, PrivateTmp the sockets of workers.
_SERVICE: Final = """# {service}
[Unit]
Description=Compact the crewlog registry {about}

[Service]
Type=oneshot
{user}{environment}ExecStart={program} --dir {place} compact -q --jitter {jitter}
Nice=10
NoNewPrivileges=yes
{protect}"""
_OBSERVER: Final = """# {observer}
[Unit]
Description=Record the deaths of the workers of the crewlog registry {about} as they happen

[Service]
{user}{environment}ExecStart={program} --dir {place} observe --all -q
Restart=always
RestartSec=1s
NoNewPrivileges=yes
{protect}
[Install]
WantedBy={wanted}
"""
_TIMER: Final = """# {timer}
[Unit]
Description=Compact the crewlog registry {about} every {every} minutes

[Timer]
OnBootSec={every}min
OnUnitActiveSec={every}min
AccuracySec=30s

[Install]
WantedBy=timers.target
"""


def program() -> str:
    """Return the command as the system can call it, absolute."""
    beside = Path(sys.executable).parent / "crewlog"
    if beside.exists():
        return str(beside)
    return which("crewlog") or str(beside)


def units(kind: Kind, where: str, *, owner: int) -> dict[str, str]:
    """Return the files of a schedule by the names that they must have."""
    home = "~/.config/systemd/user" if kind == "systemd-user" else "/etc/systemd/system"
    names = {
        "service": f"{home}/crewlog-compact.service",
        "timer": f"{home}/crewlog-compact.timer",
        "observer": f"{home}/crewlog-observe.service",
    }
    values = {
        "place": _word(where),
        "about": where.replace("%", "%%"),
        "program": _word(program()),
        "jitter": _JITTER,
        "every": _EVERY_MINUTES,
        "wanted": "default.target" if kind == "systemd-user" else "multi-user.target",
        "user": f"User={owner}\n" if kind == "systemd-system" else "",
        # in a user's unit it would imply PrivateUsers, which hides what must be seen
        "protect": "ProtectSystem=full\n" if kind == "systemd-system" else "",
        "environment": "".join(
            f"Environment={_word(f'{name}={value}', command=False)}\n"
            for name, value in locate(where).environment().items()
        ),
        **names,
    }
    return {
        names["service"]: _SERVICE.format(**values),
        names["timer"]: _TIMER.format(**values),
        names["observer"]: _OBSERVER.format(**values),
    }


def _word(word: str, *, command: bool = True) -> str:
    """Quote a word for a unit. Source: systemd.syntax(7), systemd.service(5) "Command lines"."""
    text = word.replace("%", "%%")
    if command:
        text = text.replace("$", "$$")
    if shlex.quote(word) == word:
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def cron_line(where: str) -> str:
    """Return the line of a crontab; there, a percent sign would end the command."""
    words = [program(), "--dir", where, "compact", "-q", "--jitter", _JITTER]
    variables = [
        f"{name}={shlex.quote(value)}" for name, value in locate(where).environment().items()
    ]
    command = " ".join([*variables, shlex.join(words)])
    return f"*/{_EVERY_MINUTES} * * * * {command}".replace("%", "\\%")


@command(
    "schedule",
    examples="""(crontab -l; crewlog schedule cron) | crontab -
crewlog schedule systemd-user
crewlog schedule systemd-system --dir /var/lib/crewlog""",
)
@click.argument("kind", type=click.Choice(["cron", "systemd-user", "systemd-system"]))
def schedule(sh: Shell, *, kind: Kind) -> None:
    """Print a cron line, or systemd units, that compact this registry, with its real paths.

    The units also run `crewlog observe --all`, which records deaths as they happen; with cron a
    death whose starter is gone too is recorded by the next compaction.
    """
    where = sh.registry().where
    if any(unicodedata.category(letter) == "Cc" for letter in where):
        message = f"{where!r} holds a control character, which neither a crontab nor a unit can"
        raise click.UsageError(message)
    if where.startswith("etcd") and "CREWLOG_ETCD_PASSWORD" in os.environ:
        sh.note("A password is not written down: give it by CREWLOG_ETCD_PASSWORD_FILE")
    if not where.startswith("etcd") and not os.path.exists(where):
        sh.note(f"There is no registry at {where} yet: until there is one, each run ends with 66")
    if kind == "cron":
        if sh.json:
            sh.document({"cron": cron_line(where)})
        else:
            put(cron_line(where))
        return
    made = units(kind, where, owner=_owner(where))
    if sh.json:
        sh.document({"units": made})
        return
    put("\n".join(made.values()).rstrip())
    scope = " --user" if kind == "systemd-user" else ""
    sh.note(
        f"Write each part to the file it names, then: systemctl{scope} daemon-reload && "
        f"systemctl{scope} enable --now crewlog-compact.timer crewlog-observe.service"
    )


def _owner(where: str) -> int:
    """Return whose registry a directory is; of one that is not there yet, or no directory: ours."""
    try:
        return os.stat(where).st_uid
    except FileNotFoundError:
        return os.geteuid()
    except PermissionError as error:
        raise from_oserror(error, "cannot look at the registry", where=where) from error


SHELLS: Final = ("bash", "zsh", "fish")
_HOW: Final = {
    "bash": 'Put this into ~/.bashrc: eval "$(crewlog completion bash)"',
    "zsh": 'Put this into ~/.zshrc: eval "$(crewlog completion zsh)"',
    "fish": "Run: crewlog completion fish > ~/.config/fish/completions/crewlog.fish",
}


@command(
    "init",
    examples="""crewlog init
crewlog -d /var/lib/crewlog init && crewlog -d /var/lib/crewlog schedule cron""",
)
def init(sh: Shell) -> None:
    """Make an empty registry where there is none: for cron and watchers before the first worker."""
    reg = sh.registry()
    fresh = not reg.exists
    open_registry(sh.place, create=True).close()
    if sh.json:
        sh.document({"path": reg.where, "created": fresh})
        return
    sh.line(reg.where)
    sh.note("an empty registry was made" if fresh else "there was a registry already")


@command("help", examples="crewlog help\ncrewlog help history")
@click.argument("name", metavar="[CMD]", required=False)
def help_(_sh: Shell, *, name: str | None) -> None:
    """Show the help of a command, or of all."""
    from crewlog_cli.main import crewlog  # noqa: PLC0415 (it holds this command)

    above = click.get_current_context().find_root()
    if name is None:
        put(above.get_help())
        return
    _, named, _ = crewlog.resolve_command(above, [name])
    if named is not None:
        put(named.get_help(click.Context(named, info_name=named.name, parent=above)))


@command(
    "completion",
    examples="""eval "$(crewlog completion bash)"
crewlog completion fish > ~/.config/fish/completions/crewlog.fish""",
)
@click.argument("name", metavar="SHELL", type=click.Choice(SHELLS))
def completion(sh: Shell, *, name: str) -> None:
    """Print what makes a shell complete commands, options and sids."""
    from crewlog_cli.main import crewlog  # noqa: PLC0415 (it holds this command)

    kind = get_completion_class(name)
    if kind is None:
        message = f"no completion for {name}"
        raise click.UsageError(message)
    script = kind(crewlog, {}, "crewlog", "_CREWLOG_COMPLETE").source()
    if sh.json:
        sh.document({"shell": name, "script": script})
        return
    put(script)
    sh.note(_HOW[name])


@command(
    "doctor",
    examples="""crewlog doctor
crewlog doctor --json | jq -r '.checks[] | select(.status != "ok") | .remedy'""",
)
def doctor(sh: Shell) -> None:
    """Look at what crewlog depends on, and say what to do; 1 if something must be done."""
    results = list(checks(sh.registry()))
    bad = [check for check in results if check.status == "fail"]
    if sh.json:
        rows = [
            {"name": c.name, "status": c.status, "found": c.found, "remedy": sh.advice(c.remedy)}
            for c in results
        ]
        sh.document({"ok": not bad, "checks": rows})
    else:
        rows_ = [[c.status, c.name, c.found] for c in results]
        sh.table(["status", "check", "found"], rows_)
        for check in results:
            if check.remedy:
                sh.note(f"{check.name}: {check.remedy}")
    if bad:
        raise SystemExit(shell.EXIT_NO)


COMMANDS: Final[dict[str, click.Command]] = {
    "init": init,
    "help": help_,
    "schedule": schedule,
    "completion": completion,
    "doctor": doctor,
}
