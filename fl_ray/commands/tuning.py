"""``fl-ray tune``."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_ray.commands.output import default_output, print_config, print_table
from fl_ray.errors import PlacementError, SettingError

if TYPE_CHECKING:
    from fl_ray.studies.settings import Study

__all__ = ["tune"]


def tune(options: Any, overrides: dict[str, Any]) -> int:
    """Run a study, or go on with one."""
    from fl_ray.studies.settings import load_study

    if (options.study is None) == (options.resume is None):
        raise SettingError("fl-ray tune takes a study, or --resume DIR")
    if options.trials is not None and options.trials < 1:
        raise SettingError(f"--trials is {options.trials}, but it must be at least 1")
    if options.resume is not None and (overrides or options.output):
        given = f"--{min(overrides)}" if overrides else "--output"
        raise SettingError(f"--resume goes on with the study in {options.resume}; leave {given} out")
    if options.resume is None:
        study = load_study(Path(options.study), overrides, options.trials)
        if options.print_config:
            print_config(study.base())
            return 0
    from fl_ray.run_folder import at_work
    from fl_ray.storage import opened_output
    from fl_ray.studies.run_study import begin_study, resume_study

    wanted = options.resume or options.output or default_output(study.name)
    with opened_output(wanted) as opened:
        output = opened.resolve()  # Ray Tune takes no relative path, and trials may run elsewhere
        resumed = options.resume is not None
        with at_work(output):
            study = resume_study(output, options.trials) if resumed else begin_study(study, output)
            try:
                return _tune(study, output, str(wanted))
            except PlacementError:
                if not resumed:  # it does not fit, and has no trial: another study may have the folder
                    shutil.rmtree(output)
                raise


def _tune(study: Study, output: Path, shown: str) -> int:
    """Run a study in its folder, which the user knows as ``shown``."""
    from fl_ray.progress import Progress
    from fl_ray.report.study_report import study_report
    from fl_ray.studies.run_study import run_study
    from fl_ray.studies.tracking import end_study

    status = "FAILED"
    try:
        run_study(study, output, Progress())
        table = study_report(study, output)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        print(f"fl-ray: go on with fl-ray tune --resume {shown}", file=sys.stderr)
        raise
    finally:
        untold = end_study(study, output, status)
        if untold is not None:
            print(f"fl-ray: the study's end is not in MLflow: {untold}", file=sys.stderr)
    print_table(*table, f"{study.name}: {', '.join(study.metric)} by {study.algorithm.name}")
    print(f"report: {shown.rstrip('/')}/report.html")
    return 0
