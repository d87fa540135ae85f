"""What ``fl-ray audit`` leaves: audit.json, audit.md, a figure and a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fl_ray.audit.membership import Attack
from fl_ray.audit.run_audit import GLOBAL, Audit, ModelAudit
from fl_ray.report import page as html
from fl_ray.report.comparison_report import markdown_table
from fl_ray.report.figures import new_figure, save_svg
from fl_ray.run_folder import write_json

__all__ = ["audit_table", "write_audit"]

_ATTACKS = ("loss threshold", "shadow models")
_NOTE = (
    "AUC: the probability that the attack scores an image of the model's training above one of the same classes (and, "
    "where there are several, the same domains) that it never saw; 0.5 is guessing; ± its standard error. TPR: "
    "training images found where 1 % of the others are taken for such. Closer: the share of images drawn out of the "
    "classifier that lie nearer to the client's training images than to as many test images; 0.5 is by chance. "
    "Recognised: the share of inverted images that the other clients' classifiers take for the class they were made "
    "for. The shadow models learn from the run's public images."
)


def audit_table(found: Audit) -> tuple[list[str], list[list[str]]]:
    """Columns and cells, a row for each model."""
    columns = ["model", "images"]
    for name in _ATTACKS:
        columns += [f"{name}: AUC", "TPR at 1 %"]
    inverted = any(model.inverted is not None or model.recognised is not None for model in found.models)
    guided = any(model.guided is not None for model in found.models)
    columns += ["inverted: closer", "recognised [%]"] if inverted else []
    columns += ["guided: closer"] if guided else []
    return columns, [_row(model, inverted, guided) for model in found.models]


def _row(model: ModelAudit, inverted: bool, guided: bool) -> list[str]:
    made = [attack for attack in model.attacks.values() if isinstance(attack, Attack)]
    cells = [model.name, f"{made[0].members} + {made[0].others}" if made else "–"]
    for name in _ATTACKS:
        attack = model.attacks[name]
        if isinstance(attack, Attack):
            cells += [f"{attack.auc:.3f} ± {attack.auc_error:.3f}", f"{attack.tpr:.3f}"]
        else:
            cells += ["–", "–"]
    if inverted:
        cells.append("–" if model.inverted is None else f"{model.inverted.closer:.2f}")
        cells.append("–" if model.recognised is None else f"{100 * model.recognised:.0f}")
    if guided:
        cells.append("–" if model.guided is None else f"{model.guided.closer:.2f}")
    return cells


def write_audit(found: Audit, output: Path) -> tuple[list[str], list[list[str]]]:
    """Everything into the folder ``output``; the table."""
    table = audit_table(found)
    reasons = [
        [model.name, name, attack]
        for model in found.models
        for name, attack in model.attacks.items()
        if isinstance(attack, str)
    ]
    write_json(output / "audit.json", {"name": found.run.config.name, "models": [_content(m) for m in found.models]})
    (output / "audit.md").write_text(f"{markdown_table(*table)}\n{_NOTE}\n", encoding="utf-8")
    drawn = save_svg(output, "membership", membership_figure(found.models))
    sections = [
        html.section("Models", html.table(*table), f'<p class="note">{_NOTE}</p>'),
        html.section("Membership", html.figure(drawn, "True against false positives; dashed: guessing.")),
    ]
    if reasons:
        sections.append(html.section("Not attacked", html.table(["model", "attack", "why"], reasons)))
    config = found.run.config
    lead = f"{config.method.name} on {config.data.name}, seed {config.seed}"
    (output / "audit.html").write_text(html.page(f"Audit: {config.name}", lead, sections), encoding="utf-8")
    return table


def _content(model: ModelAudit) -> dict[str, Any]:
    return {
        "name": model.name,
        "attacks": {
            name: attack if isinstance(attack, str) else {k: v for k, v in asdict(attack).items() if k != "curve"}
            for name, attack in model.attacks.items()
        },
        "inverted": None if model.inverted is None else asdict(model.inverted),
        "recognised": model.recognised,
        "guided": None if model.guided is None else asdict(model.guided),
    }


def membership_figure(models: Sequence[ModelAudit]) -> Figure:
    """True- against false-positive rates on logarithmic axes, an axis for each attack."""
    figure, axes = new_figure(9, 3.6, len(_ATTACKS))
    for axis, name in zip(axes, _ATTACKS, strict=True):
        for model in models:
            attack = model.attacks[name]
            if isinstance(attack, Attack):
                style = {"color": "black", "linewidth": 2} if model.name == GLOBAL else {"alpha": 0.7}
                axis.step(*attack.curve.T, where="post", label=model.name, **style)
        grid = np.geomspace(1e-3, 1, 50)
        axis.plot(grid, grid, "--", color="0.6")
        axis.set(xscale="log", yscale="log", xlim=(1e-3, 1), ylim=(1e-3, 1))
        axis.set_xlabel("others taken for members")
        axis.set_ylabel("members found")
        axis.set_title(name)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    return figure
