"""What commands print, and where they write by default."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fl_ray.config import RunConfig

__all__ = ["default_output", "print_config", "print_configs", "print_table"]


def default_output(name: str) -> Path:
    """A folder that nobody else takes."""
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def print_table(columns: list[str], rows: list[list[str]], title: str | None = None) -> None:
    """A table on standard output; the first column is text, the others numbers."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if number == 0 else "right")  # no markup: [s] is a unit
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width to keep to
        console = Console(width=max(console.width, 40 + sum(max(len(column), 14) for column in columns)))
    console.print(table)


def print_config(config: RunConfig) -> None:
    """The resolved recipe as YAML."""
    import yaml

    from fl_ray.recipes import to_dict

    print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")


def print_configs(configs: Mapping[str, RunConfig]) -> None:
    """Several resolved recipes, each under its label."""
    for label, config in configs.items():
        print(f"# {label}")
        print_config(config)
