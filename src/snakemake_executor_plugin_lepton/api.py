"""Lepton's REST API: the six requests that an executor needs, with the standard library.

The token goes into one header and nowhere else: not into messages, not to another host after a redirect, not over plain
http to another machine.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

GATEWAY = "https://gateway.dgxc-lepton.nvidia.com/api/v2/workspaces/"
LOG_BYTES, LOG_SECONDS = 65_536, 10.0

SUCCEEDED = {"Completed"}
FAILED = {"Failed", "Stopped", "Deleted"}
ENDING = {"Stopping", "Deleting", "Terminating"}  # its process may still run, and still write


class ApiError(Exception):
    """No usable answer: whether the request took effect is not known. Worth trying again."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Refused(ApiError):  # noqa: N818 - an answer, and a clear one
    """The server understood and said no: nothing took effect, and asking again will not help."""


@dataclass(frozen=True)
class Job:
    """What the server says about a job. `state` is empty where it does not say."""

    id: str
    labels: Mapping[str, str]
    state: str
    succeeded: bool

    @property
    def alive(self) -> bool:
        """Whether it runs, will run or is on its way out: anything that is not known to have ended counts."""
        return self.state not in SUCCEEDED | FAILED | {"Archived"}

    @property
    def ending(self) -> bool:
        return self.state in ENDING


def _job(answer: Any) -> Job:
    try:
        metadata, status = answer["metadata"], answer.get("status") or {}
        state = str(status.get("state") or "")
        succeeded = state in SUCCEEDED or (state == "Archived" and bool(status.get("succeeded")))
        return Job(str(metadata["id"]), dict(metadata.get("labels") or {}), state, succeeded)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ApiError("malformed answer: no job in it") from None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would take the token along to wherever an answer points."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Api:
    """`LEPTON_WORKSPACE_ID`, `_TOKEN` and, for another gateway, `_URL` of the environment say where and who.

    Raises `ValueError` with one line when they are missing or would send the token in clear.
    """

    def __init__(self, environ: Mapping[str, str], timeout_s: float = 30.0) -> None:
        workspace = environ.get("LEPTON_WORKSPACE_ID", "")
        self._token, self.timeout_s = environ.get("LEPTON_WORKSPACE_TOKEN", "").strip(), timeout_s
        if not (workspace and self._token):
            raise ValueError("set LEPTON_WORKSPACE_ID and LEPTON_WORKSPACE_TOKEN in the environment")
        if not re.fullmatch(r"[\x21-\x7e]+", self._token):
            raise ValueError("LEPTON_WORKSPACE_TOKEN holds characters that no token has; copy it again")
        self.url = (environ.get("LEPTON_WORKSPACE_URL") or GATEWAY + workspace).rstrip("/")
        place = urlsplit(self.url)
        if place.scheme != "https" and place.hostname not in ("127.0.0.1", "localhost", "::1"):
            raise ValueError(
                f"LEPTON_WORKSPACE_URL must begin with https://, not {place.scheme}://: it carries the token"
            )
        self._origin = f"{place.scheme}://{place.netloc}"
        self._open = urllib.request.build_opener(_NoRedirect).open

    def jobs(self) -> list[Job]:
        """All jobs of the workspace that the server has not archived, whosever they are: compare labels here."""
        found: dict[str, Job] = {}
        page = 1
        while True:
            answer = self._json("GET", f"/jobs?job_query_mode=alive_only&page={page}&page_size=500")
            items = answer.get("jobs") if isinstance(answer, dict) else answer
            if not isinstance(items, list):
                raise ApiError("malformed answer: no list of jobs")
            jobs = {job.id: job for job in map(_job, items)}
            if jobs.keys() <= found.keys():  # an empty page, or a server that knows no pages
                return list(found.values())
            found |= jobs
            page += 1

    def get(self, job_id: str) -> Job | None:
        """The job, archived ones included, or None when there is no such job."""
        try:
            return _job(self._json("GET", f"/jobs/{quote(job_id)}?job_query_mode=alive_and_archive"))
        except Refused as error:
            if error.status == http.client.NOT_FOUND:
                return None
            raise

    def create(self, body: Mapping[str, Any]) -> str:
        """Create a job; returns the name that the server gave it."""
        if self._token in json.dumps(body):
            raise Refused("the token stands in the job itself; name it in `secrets:` of the site file instead")
        return _job(self._json("POST", "/jobs", body)).id

    def stop(self, job_id: str) -> None:
        """Ask for the end of a job; one that is gone has ended."""
        try:
            self._json("PATCH", f"/jobs/{quote(job_id)}", {"spec": {"stopped": True}})
        except Refused as error:
            if error.status != http.client.NOT_FOUND:
                raise

    def log(self, job_id: str) -> str:
        """What the job's container printed (the last 64 KiB of what came within ten seconds), or nothing."""
        data, end = b"", time.monotonic() + LOG_SECONDS
        try:
            for replica in self._json("GET", f"/jobs/{quote(job_id)}/replicas?job_query_mode=alive_and_archive"):
                place = f"/jobs/{quote(job_id)}/replicas/{quote(replica['metadata']['id'])}/log"
                with self._request("GET", place) as response, contextlib.suppress(OSError, http.client.HTTPException):
                    while time.monotonic() < end and (chunk := response.read1(LOG_BYTES)):
                        data = (data + chunk)[-LOG_BYTES:]
        except (ApiError, AttributeError, KeyError, TypeError):
            pass  # it was only to say more about a failure
        return self._clean(data.decode(errors="replace"))

    def _json(self, method: str, path: str, body: Any = None) -> Any:
        with self._request(method, path, body) as response:
            try:
                return json.loads(response.read() or b"{}")
            except (OSError, http.client.HTTPException) as error:
                raise ApiError(f"{method} {path.partition('?')[0]}: {error!r}") from None
            except ValueError:
                raise ApiError(f"{method} {path.partition('?')[0]}: malformed answer, no JSON") from None

    def _request(self, method: str, path: str, body: Any = None) -> http.client.HTTPResponse:
        what = f"{method} {path.partition('?')[0]}"
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json", "Origin": self._origin}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            return self._open(request, timeout=self.timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                said = ""
                with contextlib.suppress(OSError, http.client.HTTPException):
                    said = self._clean(error.read(500).decode(errors="replace"))
            if error.code in (401, 403):
                raise ApiError(f"{what}: HTTP {error.code}, the token is refused", error.code) from None
            kind = Refused if error.code in (400, 404, 405, 413, 422) else ApiError
            raise kind(f"{what}: HTTP {error.code} {said}".strip(), error.code) from None
        except (OSError, http.client.HTTPException) as error:
            raise ApiError(f"{what}: {self._clean(str(getattr(error, 'reason', error)) or repr(error))}") from None

    def _clean(self, text: str) -> str:
        return text.replace(self._token, "[token]")
