"""``fl-ray audit``: what a run gives away of its clients' images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fl_ray.commands.output import default_output, print_config, print_table
from fl_ray.errors import SettingError

__all__ = ["audit"]


def audit(options: Any, overrides: dict[str, Any]) -> int:
    """Attack what left the clients of a finished run."""
    if overrides:
        raise SettingError(f"audit takes the settings of the run; leave --{min(overrides)} out")
    for name, least in (("shadows", 0), ("inversion_steps", 0), ("images_per_class", 1)):
        if getattr(options, name) < least:
            raise SettingError(f"--{name} is {getattr(options, name)}, but it must be at least {least}")
    from fl_ray.audit.run_audit import audit_run
    from fl_ray.finished_run import FinishedRun
    from fl_ray.progress import Progress
    from fl_ray.report.audit_report import write_audit
    from fl_ray.run_folder import filled_folder

    run, progress = FinishedRun.open(Path(options.folder)), Progress()
    if options.print_config:
        print_config(run.config)
        return 0
    output = Path(options.output) if options.output else default_output(f"{run.config.name}-audit")
    try:
        with filled_folder(output):
            found = audit_run(run, options.shadows, options.inversion_steps, options.images_per_class, progress)
            print_table(*write_audit(found, output), f"audit of {options.folder}")
            run.log(found.numbers(), [output / "audit.json", output / "audit.html"], progress)
    finally:
        progress.stop()
    print(f"numbers: {output / 'audit.json'}\nreport: {output / 'audit.html'}")
    return 0
