"""A stand-in for Lepton's job API on loopback: runs each job's command here, and fails as it is told to.

It keeps what a workspace would not tell: when each job's processes ran, hence which two did the same work at once
(`doubles`) and what runs still (`running`). Job states and fields are those that leptonai 0.47.1 reads.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psutil

TOKEN = "secret-token-of-the-tests"
COUNTERS = {"storm", "garbled", "lost", "late", "mute"}
WORKSPACE = {
    "build_time": "now", "git_commit": "1.0.0", "workspace_name": "standin", "display_name": "standin",
    "workspace_tier": "basic", "workspace_state": "normal", "supported_shapes": {}, "workspace_disk_usage_bytes": 0,
    "workloads": dict.fromkeys(
        ("num_deployments", "num_jobs", "num_pods", "num_secrets", "num_image_pull_secrets"), 0
    ),
    "resource_quota": {kind: {"cpu": 1, "memory": 1, "accelerator_num": 1} for kind in ("limit", "used")},
}  # fmt: skip


class Job:
    def __init__(self, standin: "Standin", body: dict[str, Any]) -> None:
        self.standin, self.body, self.state = standin, body, "Queueing"
        self.id = f"{body['metadata']['id']}-{len(standin.jobs):04x}"
        self.created = self.began = self.over = 0.0
        self.created = time.time()
        self.log = standin.folder / f"{self.id}.log"
        self.process: subprocess.Popen | None = None
        self.beginning = threading.Lock()  # held from the last look at `state` until there is a process to kill
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        time.sleep(self.standin.queue_s)
        with self.beginning:
            if self.state != "Queueing":
                self.state = "Stopped"
                return
            self._begin()
            self.state = "Running"
        assert self.process
        code = self.process.wait()
        self._kill()  # a container does not outlive its first process
        self.over = time.monotonic()
        if self.state == "Running":
            self.state = "Completed" if code == 0 else "Failed"
        elif self.state == "Stopping":
            self.state = "Stopped"

    def _begin(self) -> None:
        spec = self.body["spec"]
        command = list(spec["container"]["command"])
        if self.standin.elsewhere:  # a mount that is not the head's
            command = [word.replace(self.standin.elsewhere, "/nowhere/at/all") for word in command]
        env = {name: value for name, value in os.environ.items() if not name.startswith(("LEPTON_", "PYTEST_"))}
        env |= {item["name"]: item.get("value") or "a secret" for item in spec["envs"]}
        self.began = time.monotonic()
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=env, cwd="/", start_new_session=True
            )

    def processes(self) -> list[int]:
        if self.process is None:
            return []
        found = []
        for pid in psutil.pids():
            with contextlib.suppress(OSError, psutil.Error):
                if os.getsid(pid) == self.process.pid and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    found.append(pid)
        return found

    def _kill(self) -> None:
        while pids := self.processes():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)

    def kill(self, state: str = "Failed") -> None:
        """From outside: a node that dies, a colleague who stops it."""
        with self.beginning:
            self.state = state
        self._kill()

    def stop(self) -> None:
        with self.beginning:
            if self.state not in ("Queueing", "Running"):
                return
            self.state = "Stopping"
        threading.Timer(self.standin.stop_s, self._kill).start()

    @property
    def labels(self) -> dict[str, str]:
        return self.body["metadata"].get("labels") or {}

    def answer(self) -> dict[str, Any]:
        return {
            "metadata": {**self.body["metadata"], "id": self.id, "name": self.body["metadata"]["id"],
                         "created_at": int(self.created * 1000), "created_by": "standin@example.org", "version": 1},
            "spec": self.body["spec"],
            "status": {"job_name": self.id, "state": self.state, "ready": 0, "active": int(self.state == "Running"),
                       "failed": int(self.state == "Failed"), "succeeded": int(self.state == "Completed"),
                       "creation_time": int(self.created), "completion_time": None, "job_history": []},
        }  # fmt: skip


class Standin:
    """The server. Faults are attributes: set them at any time, or for `after_hello`; counters count down to 0."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.jobs, self.requests = folder, {}, []
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = threading.Lock()
        self.after_hello: dict[str, Any] = {}  # faults from the first answer on, before snakemake has read it
        self.queue_s, self.stop_s, self.delay_s = 0.05, 0.1, 0.0
        self.storm, self.storm_status = 0, 503  # so many requests meet this
        self.garbled = 0  # so many answers are cut in the middle
        self.lost = 0  # so many creations take effect, and their answers are lost
        self.late = 0  # so many creations take effect `late_s` after the connection broke
        self.late_s = 1.0
        self.mute = 0  # so many requests get no answer at all while the client waits
        self.refuse = False  # 401 for everything
        self.reject = False  # 400 for every creation
        self.elsewhere = ""  # a folder that jobs do not find
        self.unlisted = False  # the listing forgets everything
        standin = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 60

            def log_message(self, *_: Any) -> None:
                pass

            def handle_any(self) -> None:
                with contextlib.suppress(ConnectionError):
                    standin.handle(self)

            do_GET = do_POST = do_PATCH = do_DELETE = handle_any

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/api/v2/workspaces/standin"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def set(self, **faults: Any) -> None:
        for name, value in faults.items():
            assert hasattr(self, name)
            setattr(self, name, value)

    def left(self, *faults: str) -> dict[str, int]:
        """Counters that are not at 0: a fault that did not happen proves nothing."""
        return {name: left for name in sorted(COUNTERS.intersection(faults)) if (left := getattr(self, name))}

    def environment(self) -> dict[str, str]:
        return {"LEPTON_WORKSPACE_ID": "standin", "LEPTON_WORKSPACE_TOKEN": TOKEN, "LEPTON_WORKSPACE_URL": self.url}

    def close(self) -> None:
        for job in list(self.jobs.values()):
            job.kill("Stopped")
        self.server.shutdown()
        self.server.server_close()

    # ---- what a workspace would not tell -------------------------------------------------------------
    def running(self) -> list[str]:
        """Jobs that have a process, or will have one."""
        return [job.id for job in list(self.jobs.values()) if job.state == "Queueing" or job.processes()]

    def states(self) -> list[str]:
        return [job.state for job in list(self.jobs.values())]

    def doubles(self) -> list[tuple[str, str]]:
        """Pairs of jobs for the same files whose processes ran at the same time."""
        ran = [job for job in list(self.jobs.values()) if job.began]
        now = time.monotonic()
        return [
            (one.id, other.id)
            for place, one in enumerate(ran)
            for other in ran[place + 1 :]
            if one.labels.get("snakemake-output") == other.labels.get("snakemake-output")
            and max(one.began, other.began) < min(one.over or now, other.over or now)
        ]

    def bodies(self) -> list[dict[str, Any]]:
        return [body for method, path, body in self.requests if method == "POST" and path.endswith("/jobs")]

    # ---- requests --------------------------------------------------------------------------------------
    def _fault(self, name: str) -> bool:
        with self.lock:
            left = getattr(self, name)
            if left:
                setattr(self, name, left - 1)
            return bool(left)

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        size = int(request.headers.get("Content-Length") or 0)
        body = json.loads(request.rfile.read(size)) if size else None
        place = urlsplit(request.path)
        path, query = re.sub("^/api/v2/workspaces/[^/]+", "", place.path), parse_qs(place.query)
        self.requests.append((request.command, path, body))
        time.sleep(self.delay_s)
        if self.refuse or request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(request, 401, {"message": f"no access with {request.headers.get('Authorization')}"})
        if self._fault("storm"):
            return self._answer(request, self.storm_status, {"message": "injected"})
        if self._fault("mute"):
            time.sleep(5)
            request.close_connection = True
            return None
        creation = request.command == "POST" and path == "/jobs"
        if creation and self._fault("late"):
            request.close_connection = True
            threading.Timer(self.late_s, self.create, [body]).start()
            return None
        status, answer = self._route(request.command, path, query, body)
        if creation and self._fault("lost"):
            request.close_connection = True
            return None
        cut = self._fault("garbled")
        with self.lock:
            faults, self.after_hello = self.after_hello, {}
        self.set(**faults)
        return self._answer(request, status, answer, cut=cut)

    def create(self, body: dict[str, Any]) -> Job:
        with self.lock:
            job = Job(self, body)
            self.jobs[job.id] = job
        return job

    def _route(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        fixed = {"": WORKSPACE, "/workspace": WORKSPACE, "/tokens": [], "/dedicated-node-groups": []}
        if method == "GET" and path in fixed:
            return 200, fixed[path]
        if path == "/jobs" and method == "POST":
            if self.reject or not re.fullmatch(r"[a-z][a-z0-9-]{0,35}", body["metadata"]["id"]):
                return 400, {"message": "bad name or no such shape"}
            return 201, self.create(body).answer()
        if path == "/jobs":
            page, count = int(query.get("page", ["1"])[0]), int(query.get("page_size", ["500"])[0])
            jobs = [] if self.unlisted else [job.answer() for job in list(self.jobs.values())]
            return 200, {"jobs": jobs[(page - 1) * count : page * count], "total": len(jobs)}
        match = re.fullmatch("/jobs/([^/]+)(/.*)?", path)
        if not match or match[1] not in self.jobs:
            return 404, {"message": f"no {path}"}
        job, rest = self.jobs[match[1]], match[2] or ""
        if not rest and method == "PATCH":
            job.stop()
        if not rest and method == "DELETE":
            job.kill("Deleted")
            del self.jobs[job.id]
            return 200, {}
        if not rest:
            return 200, job.answer()
        replica = {"id": f"{job.id}-0", "metadata": {"id": f"{job.id}-0"}, "status": {}}
        if rest.startswith("/replicas/"):
            return 200, job.log.read_text() if job.log.exists() else ""
        return 200, [replica] if rest == "/replicas" else []

    def _answer(self, request: BaseHTTPRequestHandler, status: int, answer: Any, *, cut: bool = False) -> None:
        data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        data = data[: len(data) // 2] if cut else data
        request.send_response(status)
        request.send_header("Content-Length", str(len(data)))
        request.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
        request.end_headers()
        request.wfile.write(data)
