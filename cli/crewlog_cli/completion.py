"""Complete commands, options and sids in a shell."""

from typing import Final

import click
from click.shell_completion import get_completion_class

from crewlog_cli.shell import Shell, command, put

SHELLS: Final = ("bash", "zsh", "fish")
_HOW: Final = {
    "bash": 'Put this into ~/.bashrc: eval "$(crewlog completion bash)"',
    "zsh": 'Put this into ~/.zshrc: eval "$(crewlog completion zsh)"',
    "fish": "Run: crewlog completion fish > ~/.config/fish/completions/crewlog.fish",
}


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


COMMANDS: Final = {"completion": completion}
