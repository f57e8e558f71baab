"""Snakemake executor for batch jobs of DGX Cloud Lepton: `snakemake --executor lepton --lepton-site site.yaml`.

What it holds to: a run that has ended leaves no job of its folder behind, and no two jobs write the same files at once.
Jobs bear three labels: the folder of the workflow, the files that they write, and a digest of code, parameters and
inputs. A head that was killed and started again takes over what still runs under equal labels, and before it submits
anew it ends what writes the same files from other code. Labels are compared here; how the server filters is no matter.
"""

import asyncio
import hashlib
import os
import re
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional
from uuid import uuid4

from snakemake_interface_common.exceptions import WorkflowError
from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor
from snakemake_interface_executor_plugins.settings import CommonSettings, ExecutorSettingsBase

if TYPE_CHECKING:  # snakemake imports every plugin at every start
    from .api import Job

FOLDER, OUTPUT, DIGEST = "snakemake-folder", "snakemake-output", "snakemake-digest"
SUBMITTERS = 8  # requests at once
GATEWAY_ERRORS = {404, 405}  # of a creation: the way to the server is broken, not the job
WAITING = {"", "Queueing", "Awaiting", "PendingRetry", "Starting"}  # for a place, an image: not paid by the minute yet


@dataclass
class ExecutorSettings(ExecutorSettingsBase):
    site: Optional[Path] = field(  # noqa: UP045 - snakemake takes it apart, and takes no string
        default=None,
        metadata={"help": "YAML file of the workspace: image, shapes, mounts, secrets by name", "required": True},
    )


common_settings = CommonSettings(
    non_local_exec=True,
    implies_no_shared_fs=False,
    job_deploy_sources=False,
    pass_default_storage_provider_args=True,
    pass_default_resources_args=True,
    pass_envvar_declarations_to_cmd=False,  # snakemake would write their values into what is submitted
    auto_deploy_default_storage_provider=False,
    init_seconds_before_status_checks=1,
)


class Executor(RemoteExecutor):
    def __post_init__(self) -> None:
        from .api import Api
        from .site import Site

        self.folder = Path.cwd().resolve()
        try:
            self.site = Site.read(Path(self.workflow.executor_settings.site))
            self.api = Api(os.environ, self.site.timeout_s)
        except ValueError as error:
            raise WorkflowError(f"lepton: {error}") from None
        self.nonce = self._write_probe()
        self.label = _digest(str(self.folder), self.nonce)  # other volumes are mounted at this path too
        self.submitted: dict[str, SubmittedJobInfo] = {}  # by id, until ended; active_jobs is empty during a check
        self.guard, self.looking = threading.Lock(), threading.Lock()
        self.seen: tuple[float, list[Job]] = (-1.0, [])  # when the last listing began, and its jobs of this folder
        self.doubt = 0.0  # until then a creation without an answer may still take effect
        self.ending, self.ended = threading.Event(), False
        self.silent = self.unshared = ""  # why the API does not answer; why no job can do its work
        self.seconds: Counter[str] = Counter()  # shape -> of jobs that have ended
        self.pool = ThreadPoolExecutor(SUBMITTERS, thread_name_prefix="lepton")
        self._greet()
        self.interrupted, self.terminated = 0.0, threading.Event()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._interrupt)

    def _write_probe(self) -> str:
        """A file that jobs look for. It stays as it is, so jobs of a head that was killed find it too."""
        self.probe, self.logs = (self.folder / ".snakemake/lepton" / name for name in ("probe", "logs"))
        self.logs.mkdir(parents=True, exist_ok=True)
        if not self.probe.exists():
            temporary = self.probe.with_name(f".probe.{uuid4().hex}")
            temporary.write_text(uuid4().hex)
            temporary.replace(self.probe)
        return self.probe.read_text()

    def _greet(self) -> None:
        """Find out what still runs here; without an answer there is no start."""
        from .api import ApiError, Refused

        end = time.monotonic() + self.site.stop_s
        while True:
            try:
                alive = [job for job in self._look(time.monotonic()) if job.alive]
                break
            except ApiError as error:
                if isinstance(error, Refused) or error.status in (401, 403) or time.monotonic() > end:
                    raise WorkflowError(f"lepton: {error}; nothing was submitted") from None
            time.sleep(min(self.site.pause_s, 10))
        if alive:
            names = ", ".join(job.id for job in alive)
            self.logger.info(f"lepton: {len(alive)} jobs of an earlier run of this folder are alive: {names}")

    def _interrupt(self, *_: Any) -> None:
        """Ctrl-C ends the run once; pressed again it must not keep the jobs from being stopped."""
        now = time.monotonic()
        if not self.ended and (self.ending.is_set() or now < self.interrupted + 5):
            self.logger.info("lepton: jobs are being stopped; please wait")
        else:
            self.interrupted = now
            raise KeyboardInterrupt

    def run_jobs(self, jobs: list[Any]) -> None:
        if signal.getsignal(signal.SIGTERM) == self.workflow.scheduler.exit_gracefully:
            # snakemake 9.27 takes a lock there that the thread it interrupts may hold, and then waits for ever
            signal.signal(signal.SIGTERM, lambda *_: self.terminated.set())
            threading.Thread(target=self._terminate, daemon=True).start()
        super().run_jobs(jobs)

    def _terminate(self) -> None:
        self.terminated.wait()
        self.workflow.scheduler.exit_gracefully()

    # ---- what the server knows -----------------------------------------------------------------------
    def _look(self, since: float) -> list["Job"]:
        """Jobs of this folder as listed no earlier than `since`. Raises `ApiError`, and says so once an outage."""
        from .api import ApiError

        with self.looking:
            if self.seen[0] < since:
                began = time.monotonic()
                try:
                    jobs = [job for job in self.api.jobs() if job.labels.get(FOLDER) == self.label]
                except ApiError as error:
                    if not self.silent:
                        self.logger.warning(f"lepton: {error}; jobs that run go on, trying again")
                    self.silent = str(error)
                    raise
                if self.silent:
                    self.logger.warning("lepton: the API answers again")
                    self.silent = ""
                self.seen = (began, jobs)
            return self.seen[1]

    # ---- submission ----------------------------------------------------------------------------------
    def run_job(self, job: Any) -> None:
        from .site import SiteError

        info = SubmittedJobInfo(job, aux={"missing": 0})
        try:
            body, log = self._body(job)
        except (SiteError, OSError, TypeError, ValueError) as error:
            self.report_job_error(info, msg=f"lepton: {error}. ")
            return
        info.aux |= {"shape": body["spec"]["resource_shape"], "began": None}
        info.aux |= {"log": log, "size": log.stat().st_size if log.exists() else 0}
        # a thread, so that Ctrl-C never cuts off a request that may have created a job
        self.pool.submit(self._submit, info, body, 0.0 if job.attempt == 1 else time.monotonic())

    def _body(self, job: Any) -> tuple[dict[str, Any], Path]:
        from .site import command, job_name

        resources, rule = job.resources, job.groupid if job.is_group() else job.rule.name
        gpu, mem_mb = (int(resources.get(name) or 0) for name in ("gpu", "mem_mb"))
        shape = resources.get("lepton_shape") or self.site.shape(gpu=gpu, mem_mb=mem_mb)
        name = job_name(rule, job.jobid)
        parts = list(job) if job.is_group() else [job]
        labels = {
            FOLDER: self.label,
            OUTPUT: _digest(*(str(path) for part in parts for path in part.output), *([] if job.output else [rule])),
            DIGEST: _digest(self.site.image, *(piece for part in parts for piece in _content(part))),
        }
        log = self.logs / f"{rule}-{labels[OUTPUT]}.log"  # the same for every attempt and every head
        line = command(
            folder=self.folder,
            probe=self.probe,
            nonce=self.nonce,
            log=log,
            runtime_min=resources.get("runtime"),
            run=self.format_job_exec(job),
        )
        return self.site.body(name=name, shape=shape, labels=labels, command=line), log

    def _submit(self, info: SubmittedJobInfo, body: dict[str, Any], since: float) -> None:
        """Take over the job that does this work already, or create one; goes on until the API has answered."""
        from .api import ApiError, Refused

        labels = body["metadata"]["labels"]
        try:
            while not self.ending.is_set():
                if self.unshared:
                    return self._failed(info, self.unshared)
                creating = False
                try:
                    alive = [job for job in self._look(since) if job.alive and job.labels.get(OUTPUT) == labels[OUTPUT]]
                    same = [job for job in alive if job.labels.get(DIGEST) == labels[DIGEST] and not job.ending]
                    if not same and alive:  # from other code, or on its way out: first it has to be gone
                        for job in alive:
                            if not job.ending:
                                self.api.stop(job.id)
                                self.logger.info(f"lepton: {job.id} does this work with other code; stopping it")
                        since = self._pause()
                    elif not same and time.monotonic() < self.doubt:
                        since = self._pause()
                    else:
                        creating = not same
                        self._track(info, same[0].id if same else self.api.create(body), taken_over=bool(same))
                        return
                except ApiError as error:
                    if creating and isinstance(error, Refused) and error.status not in GATEWAY_ERRORS:
                        return self._failed(info, str(error))
                    if creating:
                        self.doubt = time.monotonic() + self.site.settle_s
                        self.logger.warning(f"lepton: {error}; looking whether the job was created")
                    since = self._pause()
        except Exception as error:  # noqa: BLE001 - a thread's error would be lost, and the job with it
            self._failed(info, repr(error))

    def _pause(self) -> float:
        self.ending.wait(self.site.pause_s)
        return time.monotonic()

    def _track(self, info: SubmittedJobInfo, job_id: str, *, taken_over: bool) -> None:
        info.external_jobid = job_id
        if taken_over:
            info.aux["size"] = -1  # it may have begun long ago
        with self.guard:
            self.submitted[job_id] = info
        what = "taken over from an earlier run" if taken_over else f"submitted, log {info.aux['log']}"
        self.logger.info(f"lepton: job {info.job.jobid} is {job_id}, {what}")
        self.report_job_submission(info)

    def _failed(self, info: SubmittedJobInfo, why: str) -> None:
        self.report_job_error(info, msg=f"lepton: {why}. ")

    # ---- status --------------------------------------------------------------------------------------
    async def check_active_jobs(self, active_jobs: list[SubmittedJobInfo]) -> Any:
        """One listing a round. Whatever goes wrong here, no job is given up: an exception would end the workflow."""
        from .api import ApiError

        try:
            listed = {job.id: job for job in self._look(time.monotonic())}
            self._stop_doubles(listed)
        except ApiError:
            listed = None
        except Exception as error:  # noqa: BLE001 - see above
            self.logger.error(f"lepton: {error!r}")
            listed = None
        for info in active_jobs:
            try:
                runs = listed is None or self._runs(info, listed.get(info.external_jobid))
            except ApiError:
                runs = True
            except Exception as error:  # noqa: BLE001 - see above
                self.logger.error(f"lepton: {info.external_jobid}: {error!r}")
                runs = True
            if runs:
                yield info

    async def sleep(self) -> None:
        """As long as between two status checks, or until the end has come."""
        end = time.monotonic() + self.next_seconds_between_status_checks
        while self.wait and (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 1))

    def _stop_doubles(self, listed: dict[str, "Job"]) -> None:
        """A creation that took effect after it was given up has made a second job for the same files."""
        with self.guard:
            ours = dict(self.submitted)
        outputs = {listed[job_id].labels.get(OUTPUT) for job_id in ours if job_id in listed and listed[job_id].alive}
        for job in listed.values():
            if job.id not in ours and job.alive and not job.ending and job.labels.get(OUTPUT) in outputs:
                self.logger.warning(f"lepton: {job.id} does what another job does; stopping it")
                self.api.stop(job.id)

    def _runs(self, info: SubmittedJobInfo, job: "Job | None") -> bool:
        """Whether the job goes on; what has ended is reported."""
        job = job or self.api.get(info.external_jobid)
        if job is None:
            info.aux["missing"] += 1
            if info.aux["missing"] < 2:  # a server may know a new job a moment later
                return True
        elif job.alive:
            info.aux["missing"] = 0
            if info.aux["began"] is None and job.state not in WAITING:
                info.aux["began"] = time.monotonic()
            return True
        with self.guard:
            self.submitted.pop(info.external_jobid, None)
        if info.aux["began"] is not None:
            self.seconds[info.aux["shape"]] += time.monotonic() - info.aux["began"]
        if job and job.succeeded:
            self.report_job_success(info)
        else:
            self._failed(info, self._why(info, job))
        return False

    def _why(self, info: SubmittedJobInfo, job: "Job | None") -> str:
        from .site import UNSHARED

        ended = f"{info.external_jobid} ended as {job.state}" if job else f"{info.external_jobid} is gone"
        log = info.aux["log"]
        if log.exists() and log.stat().st_size > info.aux["size"]:
            return f"{ended}, see {log}"
        said = self.api.log(info.external_jobid).strip().splitlines()
        if any(UNSHARED in line for line in said):
            self.unshared = (
                f"in the job's container {self.folder} is not the folder of the head; mount one shared file system "
                "at the same path in both (`mounts:` of the site file)"
            )
            return self.unshared
        return f"{ended} before its first line in {self.folder}: {said[-1] if said else 'it printed nothing'}"

    # ---- the end -------------------------------------------------------------------------------------
    def cancel_jobs(self, active_jobs: list[SubmittedJobInfo]) -> None:
        self._end()

    def shutdown(self) -> None:
        self._end()
        super().shutdown()
        self._tell_cost()

    def _tell_cost(self) -> None:
        """What the jobs that ended under this head took, to within a status check; nothing is priced at zero."""
        from .site import SiteError

        for shape, seconds in sorted(self.seconds.items()):
            self.logger.info(f"lepton: {seconds / 3600:.2f} h on {shape}")
        if self.seconds:
            try:
                self.logger.info(f"lepton: {self.site.cost(self.seconds):.2f} USD by the prices of the site file")
            except SiteError as error:
                self.logger.info(f"lepton: cost unknown: {error}")

    def _end(self) -> None:
        """Stop every job of this folder that is alive, known or not, and see that the server has understood."""
        from .api import ApiError

        if self.ended:
            return
        self.ending.set()
        self.pool.shutdown(wait=True, cancel_futures=True)  # a request on its way comes home
        end = time.monotonic() + self.site.stop_s
        while True:
            try:
                alive = self._alive()
                left, to_stop = [job.id for job in alive], [job.id for job in alive if not job.ending]
                if not to_stop and time.monotonic() > self.doubt:
                    break
            except ApiError as error:
                self.silent = str(error)
                with self.guard:
                    left = to_stop = list(self.submitted)
            with ThreadPoolExecutor(SUBMITTERS) as pool:
                list(pool.map(self._stop, to_stop))
            if time.monotonic() > end:
                self.logger.error(
                    f"lepton: {self.silent or 'jobs do not stop'}; they may still run: {', '.join(left) or 'unknown'}. "
                    "Stop them (`lep job stop --id ...`), or run the same command again to take them over"
                )
                break
            time.sleep(min(self.site.pause_s, 2))
        self.ended = True

    def _stop(self, job_id: str) -> None:
        from .api import ApiError

        try:
            self.api.stop(job_id)
        except ApiError as error:  # the next look tells, and asks again
            self.silent = str(error)

    def _alive(self) -> list["Job"]:
        """Jobs of this folder that are alive, whether the server lists them or not."""
        listed = {job.id: job for job in self._look(time.monotonic())}
        with self.guard:
            unlisted = [job_id for job_id in self.submitted if job_id not in listed]
        return [job for job in (*listed.values(), *map(self.api.get, unlisted)) if job and job.alive]


def _digest(*parts: str) -> str:
    """24 hexadecimal digits: a label's value may have 63 characters."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _content(job: Any) -> list[str]:
    """What decides what a job writes: rule, wildcards, code, parameters, and its inputs by size and time."""
    rule, inputs = job.rule, []
    for path in map(Path, job.input):
        stat = path.stat() if path.exists() else None
        inputs.append(f"{path} {stat.st_size} {stat.st_mtime_ns}" if stat else str(path))
    parameters = [repr(sorted(value, key=str) if isinstance(value, set) else value) for value in job.non_derived_params]
    code = [job.shellcmd or "", rule.run_func_src or ""]
    for script in filter(None, (rule.script, rule.notebook, rule.wrapper)):
        source = Path(re.sub("^file://", "", str(rule.basedir.join(str(script)).get_path_or_uri(secret_free=False))))
        code += [str(script), source.read_text(errors="replace") if source.is_file() else ""]
    return [rule.name, repr(sorted(job.wildcards_dict.items())), *code, *parameters, *inputs]
