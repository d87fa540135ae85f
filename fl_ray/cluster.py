"""Jobs on a Ray cluster: packed here, run there, followed from here."""

from __future__ import annotations

import asyncio
import logging
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fl_ray.config import TrackingConfig
from fl_ray.errors import FlRayError, PlacementError, SettingError
from fl_ray.recipes import apply_overrides, load_recipe, make_config
from fl_ray.storage import is_address
from fl_ray.version import __version__

__all__ = ["ENDED", "Jobs", "entrypoint"]

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_EXCLUDED = [".git", ".venv", "venv", "runs", "mlruns", "mlflow.db", "__pycache__", ".pytest_cache", ".ruff_cache"]
_PACKAGES = ("fl_ray", "generators", "lightning_modules", "tuning")
_AGENT_S = 90
_TALKATIVE = (  # they tell of every package that they upload
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_MARK = "fl_ray"  # a job's metadata, by which ours are known


def entrypoint(
    file: Path, seeds: Sequence[int], output: str, overrides: Mapping[str, Any]
) -> tuple[str, TrackingConfig]:
    """The command that the cluster runs (``tune`` for a study, ``compare`` where there are seeds, else ``run``), and
    where it logs.

    Raises:
        SettingError: the file does not lie in or below the working folder, which is what is packed; the output would
            go with the job; or the settings are not those of a recipe or study.
    """
    if not is_address(output) and not Path(output).is_absolute():
        raise SettingError(
            f"--output {output}: a job's own folder goes when the job ends; give the whole path of a folder that all "
            "nodes see, or an address as s3://bucket/run"
        )
    if output.startswith("memory:"):
        raise SettingError(
            f"--output {output}: memory is the job's own, and goes when it ends; give a folder that all nodes see, or "
            "an address as s3://bucket/run"
        )
    here = Path.cwd().resolve()
    if not file.resolve().is_relative_to(here):
        raise SettingError(f"{file}: it lies outside of the working folder {here}, which is what the job gets")
    content = load_recipe(file)
    study = "recipe" in content
    if study and seeds:
        raise SettingError("--seeds: a study has seeds of its own")
    if study:
        from fl_ray.studies.settings import load_study

        tracking = load_study(file, overrides).base().tracking
    else:
        tracking = make_config(apply_overrides(content, overrides)).tracking
    command = "tune" if study else "compare" if seeds else "run"
    words = ["python", "-m", "fl_ray", command, file.resolve().relative_to(here).as_posix(), "--output", output]
    if seeds:
        words += ["--seeds", *map(str, seeds)]
    words += ["--ray.address", "auto"]
    for name, value in overrides.items():
        words += [f"--{name}", _as_yaml(value)]
    return shlex.join(words), tracking


def _as_yaml(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()


class Jobs:
    """The jobs of a cluster, by the address of its dashboard.

    Raises:
        PlacementError: nothing answers there, or the token is missing or wrong.
    """

    def __init__(self, address: str) -> None:
        try:
            from ray.job_submission import JobSubmissionClient
        except ImportError as error:
            raise PlacementError(
                f"jobs need Ray's client: pip install '.[cluster]' in fl_ray's checkout ({error})"
            ) from error
        for module in _TALKATIVE:
            logging.getLogger(module).setLevel(logging.WARNING)
        self.address = address
        self._client = self._ask(lambda: JobSubmissionClient(address))

    def _ask(self, question: Callable[[], Any], job: str | None = None) -> Any:
        """What the head answers; ``job``: that it is about."""
        from ray.exceptions import AuthenticationError

        try:
            return question()
        except AuthenticationError as error:
            raise PlacementError(
                f"--address {self.address}: the cluster wants its token; put it into RAY_AUTH_TOKEN, a file named by "
                "RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token (the head has it there; `ray get-auth-token` prints it). "
                "RAY_AUTH_MODE=disabled is for a cluster without"
            ) from error
        except ConnectionError as error:
            raise PlacementError(
                f"--address {self.address}: no Ray dashboard answers there; it is the head's, as http://HEAD:8265 "
                "(its machine needs ray[default])"
            ) from error
        except RuntimeError as error:
            if "status code 404" in str(error) and job is not None:
                raise FlRayError(f"no job {job} at {self.address}; fl-ray jobs lists them") from error
            raise FlRayError(f"--address {self.address}: {str(error).splitlines()[0]}") from error

    def submit(
        self, command: str, name: str, requirements: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> str:
        """Pack the working folder and fl_ray's own packages, and begin the job; its id.

        Args:
            requirements: of pip, for nodes that lack packages.
            environment: more variables of the job, as FL_RAY_DATA.
        """
        root = Path(__file__).parent.parent
        packed: dict[str, Any] = {
            "working_dir": str(Path.cwd()),
            "py_modules": [str(root / package) for package in _PACKAGES],
            "excludes": _EXCLUDED,
            "env_vars": {"PYTHONUNBUFFERED": "1", **(environment or {})},
        }
        if requirements is not None:
            packed["pip"] = str(requirements)
        metadata = {_MARK: __version__, "name": name}
        give_up = time.monotonic() + _AGENT_S
        while True:
            try:
                return self._ask(
                    lambda: self._client.submit_job(entrypoint=command, runtime_env=packed, metadata=metadata)
                )
            except FlRayError as error:
                if "No available agent" not in str(error) or time.monotonic() > give_up:
                    raise
            time.sleep(1)  # the head answers before its own agent is up

    def ours(self) -> list[dict[str, Any]]:
        """Our jobs, the newest first: id, name, status, when it began (ms), command."""
        jobs = [job for job in self._ask(self._client.list_jobs) if _MARK in (job.metadata or {}) and job.submission_id]
        jobs.sort(key=lambda job: -(job.start_time or 0))
        return [
            {
                "id": job.submission_id,
                "name": job.metadata.get("name", ""),
                "status": str(job.status.value),
                "command": job.entrypoint,
                "began": job.start_time,
            }
            for job in jobs
        ]

    def status(self, job: str) -> str:
        """``PENDING``, ``RUNNING``, or one of ENDED."""
        return str(self._ask(lambda: self._client.get_job_status(job), job).value)

    def exit_code(self, job: str) -> int:
        """What the job's command returned; 1 where that is not known."""
        found = self._ask(lambda: self._client.get_job_info(job), job)
        code = getattr(found, "driver_exit_code", None)
        if code is not None:
            return int(code)
        return 0 if str(found.status.value) == "SUCCEEDED" else 1

    def stop(self, job: str) -> bool:
        """End a job; whether it was running."""
        return bool(self._ask(lambda: self._client.stop_job(job), job))

    def logs(self, job: str) -> str:
        """Everything that the job has said."""
        return str(self._ask(lambda: self._client.get_job_logs(job), job))

    def follow(self, job: str) -> Iterator[str]:
        """What the job says, until it ends."""
        lines = self._client.tail_job_logs(job)

        async def following() -> str | None:
            return await anext(lines, None)

        with asyncio.Runner() as runner:  # Ctrl-C ends what it awaits; nothing is left half read
            while (text := self._ask(lambda: runner.run(following()))) is not None:
                yield text
