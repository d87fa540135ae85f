"""``fl-ray partition`` and ``list``: what there is to be run, and on what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fl_ray.commands.output import default_output, print_table

__all__ = ["list_components", "partition"]

MOST_SHOWN = 10_000  # clients that ``fl-ray partition`` counts


def partition(options: Any, overrides: dict[str, Any]) -> int:
    """Show who owns what, as a table and a figure."""
    import numpy as np

    from fl_ray.data.parts import prepare
    from fl_ray.data.statistics import emd, label_entropy
    from fl_ray.recipes import apply_overrides, load_recipe, make_config
    from fl_ray.report.figures import partition_figure, save_svg

    config = make_config(apply_overrides(load_recipe(options.recipe), overrides))
    data = prepare(config.data, config.seed)
    table = data.counts(np.arange(min(len(data.partition), MOST_SHOWN)))
    entropy, distance = label_entropy(table), emd(table)
    rows = [
        [str(client), str(counts.sum()), f"{entropy[client]:.2f}", f"{distance[client]:.2f}", *map(str, counts[:20])]
        for client, counts in enumerate(table[:100])
    ]
    total = table.sum(axis=0)
    rows.append(["all", str(total.sum()), f"{entropy.mean():.2f}", f"{distance.mean():.2f}", *map(str, total[:20])])
    columns = ["client", "samples", "entropy [bit]", "EMD", *data.source.classes[:20]]
    print_table(columns, rows, f"{config.data.name}, {config.data.partition.name}, seed {config.seed}")
    if len(table) > 100 or data.num_classes > 20:
        print("shown: the first 100 clients and 20 classes; the row 'all' has sums, and means of entropy and EMD")
    output = Path(options.output) if options.output else default_output(f"{config.name}-partition")
    output.mkdir(parents=True, exist_ok=True)
    save_svg(output, "partition", partition_figure(table, data.source.classes))
    print(f"figure: {output / 'figures' / 'partition.svg'}")
    return 0


def list_components(options: Any, overrides: dict[str, Any]) -> int:
    """Name all that is registered."""
    from fl_ray.registry import REGISTRY

    rows = [[kind, name, entry.summary] for kind, entries in REGISTRY.items() for name, entry in entries.items()]
    from rich.console import Console
    from rich.table import Table

    table = Table("kind", "name", "what it is", box=None)
    for row in rows:
        table.add_row(*row)
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)
    return 0
