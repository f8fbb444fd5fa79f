"""Options that limit what an artifact takes: more spellings of budgets, and what is best within them."""

from collections.abc import Mapping
from typing import Any, Final

import click

from gammac.cli.options import Command

CONTEXT: Final = 512

OPTIONS: Final = (
    click.option("--max-latency", help="12ms/token: predicted time of a decoded token."),
    click.option("--max-prefill", help="0.5s@512: predicted time of a prefill of 512 tokens."),
    click.option(
        "--max-memory",
        help=f"200MB: predicted peak memory, the cache at --context ({CONTEXT} if it is not given) included.",
    ),
    click.option("--max-energy", help="0.5mJ/token: predicted energy of a decoded token."),
    click.option("--max-loss", help="Predicted loss: the sum of the scores, in the strategy's unit."),
    click.option(
        "--objective",
        default="quality",
        show_default=True,
        help="What is best within the limits: quality, latency or energy; the last two want --max-loss.",
    ),
)


def limit_options(command: Command) -> Command:
    """Adds OPTIONS to a command, in their order."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def limits_of(options: Mapping[str, Any]) -> list[str]:
    """Budgets in the spelling that `gammac.budget` reads."""
    context = options["context"] or CONTEXT
    # option -> what may be left out behind its value
    left_out = {
        "max_latency": "/token", "max_prefill": f"@{CONTEXT}", "max_memory": f"@{context}",
        "max_energy": "/token", "max_loss": "loss",
    }  # fmt: skip
    return [_complete(options[name], end) for name, end in left_out.items() if options[name]]


def _complete(text: str, end: str) -> str:
    return text if end[0] in text or text.endswith(end) else text + end
