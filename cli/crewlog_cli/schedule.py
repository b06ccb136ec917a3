"""Print what lets the system run `crewlog compact`: a cron line, or systemd units."""

import os
import shlex
import sys
import unicodedata
from pathlib import Path
from shutil import which
from typing import Final, Literal, TypeAlias

import click

from crewlog.errors import from_oserror
from crewlog_cli.shell import Shell, command, put

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
    }
    values = {
        "place": _word(where),
        "about": where.replace("%", "%%"),
        "program": _word(program()),
        "jitter": _JITTER,
        "every": _EVERY_MINUTES,
        "user": f"User={owner}\n" if kind == "systemd-system" else "",
        # in a user's unit it would imply PrivateUsers, which hides what must be seen
        "protect": "ProtectSystem=full\n" if kind == "systemd-system" else "",
        "environment": "".join(
            f"Environment={_word(f'{name}={value}', command=False)}\n"
            for name, value in _environment(where).items()
        ),
        **names,
    }
    return {
        names["service"]: _SERVICE.format(**values),
        names["timer"]: _TIMER.format(**values),
    }


def _word(word: str, *, command: bool = True) -> str:
    """Quote a word for a unit. Source: systemd.syntax(7), systemd.service(5) "Command lines"."""
    told = word.replace("%", "%%")
    if command:
        told = told.replace("$", "$$")
    if shlex.quote(word) == word:
        return told
    escaped = told.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def cron_line(where: str) -> str:
    """Return the line of a crontab; there, a percent sign would end the command."""
    words = [program(), "--dir", where, "compact", "-q", "--jitter", _JITTER]
    told = [f"{name}={shlex.quote(value)}" for name, value in _environment(where).items()]
    command = " ".join([*told, shlex.join(words)])
    return f"*/{_EVERY_MINUTES} * * * * {command}".replace("%", "\\%")


def _environment(where: str) -> dict[str, str]:
    """Return what a job must be told to reach a cluster; a password only by its file."""
    if not where.startswith("etcd"):
        return {}
    from crewlog.etcd import address  # noqa: PLC0415 (few need it)

    known = address.environment()
    names = (address.USER, address.PASSWORD_FILE, address.CA, address.CERT, address.KEY)
    return {name: known[name] for name in names if known.get(name)}


@command(
    "schedule",
    examples="""(crontab -l; crewlog schedule cron) | crontab -
crewlog schedule systemd-user
crewlog schedule systemd-system --dir /var/lib/crewlog""",
)
@click.argument("kind", type=click.Choice(["cron", "systemd-user", "systemd-system"]))
def schedule(sh: Shell, *, kind: Kind) -> None:
    """Print a cron line, or systemd units, that compact this registry, with its real paths."""
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
    sh.note(f"Write each part to the file it names, then: systemctl{scope} daemon-reload && "
            f"systemctl{scope} enable --now crewlog-compact.timer")  # fmt: skip


def _owner(where: str) -> int:
    """Return whose registry a directory is; of one that is not there yet, or no directory: ours."""
    try:
        return os.stat(where).st_uid
    except FileNotFoundError:
        return os.geteuid()
    except PermissionError as error:
        raise from_oserror(error, "cannot look at the registry", where=where) from error


COMMANDS: Final = {"schedule": schedule}
