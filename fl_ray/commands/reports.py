"""``fl-ray report``: reports again, from what runs left."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_ray.commands.output import default_output, print_table
from fl_ray.errors import OutputError, SettingError

if TYPE_CHECKING:
    from fl_ray.run_folder import RunFolder

__all__ = ["check_baseline", "report", "report_comparison", "run_folders"]


def report(options: Any, overrides: dict[str, Any]) -> int:
    """Make the reports of runs, comparisons or a study again."""
    from fl_ray.report.run_report import run_report
    from fl_ray.run_folder import new_folder

    paths = [Path(folder) for folder in options.folders]
    if len(paths) == 1 and (paths[0] / "study.yaml").exists():
        return _report_study(paths[0])
    folders = [folder for path in paths for folder in run_folders(path)]
    check_baseline(options.baseline, [(folder.summary() or {}).get("label", "") for folder in folders])
    for folder in folders:
        run_report(folder)
    if len(folders) == 1 and folders[0].path == paths[0]:
        print(f"report: {folders[0] / 'report.html'}")
        return 0
    if len(paths) == 1:
        return report_comparison(paths[0], folders, baseline=options.baseline)
    output = new_folder(Path(options.output)) if options.output else new_folder(default_output("report"))
    return report_comparison(output, folders, baseline=options.baseline)


def check_baseline(label: str | None, labels: Iterable[str]) -> None:
    """Refuse a ``--baseline`` that no run has as its label; None is none."""
    from fl_ray.registry import nearest

    known = sorted(set(labels))
    if label is not None and label not in known:
        raise SettingError(f"--baseline {label}: no run has this label.{nearest(label, known)}")


def _report_study(output: Path) -> int:
    from fl_ray.report.study_report import study_report
    from fl_ray.studies.settings import load_study

    print_table(*study_report(load_study(output / "study.yaml", {}), output))
    print(f"report: {output / 'report.html'}")
    return 0


def run_folders(path: Path) -> list[RunFolder]:
    """The runs in or below a folder; a comparison's in the order in which it names its labels."""
    from fl_ray.run_folder import RunFolder

    if (path / "config.yaml").exists():
        return [RunFolder(path)]
    found = [RunFolder(file.parent) for file in sorted(path.glob("runs/*/*/config.yaml"))]
    if not found:
        what = "neither a run's folder nor a comparison's" if path.is_dir() else "there is no such folder"
        raise OutputError(f"{path}: {what}; name one of fl-ray run or fl-ray compare")
    if (path / "comparison.yaml").exists():
        import yaml

        order = list(yaml.safe_load((path / "comparison.yaml").read_text(encoding="utf-8"))["runs"])
        labels = {folder.path: (folder.summary() or {}).get("label") for folder in found}
        found.sort(key=lambda folder: order.index(labels[folder.path]) if labels[folder.path] in order else len(order))
    return found


def report_comparison(
    output: Path, folders: list[RunFolder], shown: str | None = None, baseline: str | None = None
) -> int:
    """Write a comparison's table and report into ``output``, and say where they are for the user, in ``shown``."""
    from fl_ray.report.comparison_report import comparison_report

    table, legend = comparison_report(output, folders, baseline)
    print_table(*table)
    print(legend)
    place = (shown or str(output)).rstrip("/")
    print(f"table: {place}/comparison.csv\nfigures: {place}/figures\nreport: {place}/report.html")
    return 0
