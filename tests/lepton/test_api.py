"""Api, site file and body of a job, against the stand-in and without snakemake."""

import ast
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
import yaml

from snakemake_executor_plugin_lepton import _content
from snakemake_executor_plugin_lepton.api import Api, ApiError, Job, Refused
from snakemake_executor_plugin_lepton.site import Shape, Site, SiteError, command, job_name

from .project import SITE, SRC
from .standin import TOKEN, Standin

ROOT = SRC.parent


@pytest.fixture
def standin(tmp_path):
    standin = Standin(tmp_path / "standin")
    yield standin
    standin.close()


@pytest.fixture
def api(standin):
    return Api(standin.environment())


@pytest.fixture
def site(tmp_path):
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(SITE))
    return Site.read(tmp_path / "site.yaml")


def body(site, run="true"):
    return site.body(name="smk-test-1", shape="cpu.small", labels={"snakemake-output": "x"}, command=run)


def test_a_job_comes_to_life_is_listed_and_stopped(api, site):
    name = api.create(body(site, "sleep 60"))
    [listed] = api.jobs()
    assert listed.id == name and listed.labels == {"snakemake-output": "x"} and listed.alive
    api.stop(name)
    api.stop("never-was")
    assert api.get("never-was") is None


@pytest.mark.parametrize(
    ("state", "alive", "succeeded"),
    [
        ("Queueing", True, False), ("Running", True, False), ("Stopping", True, False), ("", True, False),
        ("A state of tomorrow", True, False), ("Completed", False, True), ("Failed", False, False),
        ("Stopped", False, False), ("Deleted", False, False), ("Archived", False, False),
    ],
)  # fmt: skip
def test_only_what_is_known_to_have_ended_counts_as_ended(state, alive, succeeded, standin, site):
    api = Api(standin.environment())
    name = api.create(body(site))
    standin.jobs[name].thread.join()
    standin.jobs[name].state = state
    job = api.get(name)
    assert (job.alive, job.succeeded) == (alive, succeeded)


@pytest.mark.parametrize("pages", [True, False])
def test_all_jobs_are_listed_whether_or_not_the_server_knows_pages(pages, api, monkeypatch):
    jobs = [{"metadata": {"id": f"job-{number}"}, "status": {"state": "Running"}} for number in range(3)]

    def answer(_, path):
        page = int(re.search("&page=([0-9]+)", path)[1])
        return {"jobs": jobs[page - 1 : page] if pages else jobs}

    monkeypatch.setattr(api, "_json", answer)
    assert [job.id for job in api.jobs()] == ["job-0", "job-1", "job-2"]


@pytest.mark.parametrize("fault", ["storm", "garbled", "mute", "refuse"])
def test_every_failure_is_one_error_without_the_token(fault, standin):
    setattr(standin, fault, 1)
    api = Api(standin.environment(), timeout_s=1)
    with pytest.raises(ApiError) as caught:
        api.jobs()
    assert not isinstance(caught.value, Refused)
    assert TOKEN not in str(caught.value) and "\n" not in str(caught.value)


def test_what_the_server_will_never_take_is_refused(api, site, standin):
    with pytest.raises(Refused, match="HTTP 400"):
        api.create({**body(site), "metadata": {"id": "Not A Name"}})
    with pytest.raises(Refused, match="the token stands in the job itself"):
        api.create(body(site, f"curl -H 'Authorization: Bearer {TOKEN}'"))
    assert len(standin.bodies()) == 1


def test_a_redirect_does_not_carry_the_token_away(standin):
    met = []

    class Thief(BaseHTTPRequestHandler):
        def do_GET(self):
            met.append(self.headers.get("Authorization"))
            self.send_response(302)
            self.send_header("Location", f"{standin.url}/jobs?page=2")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Thief)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    api = Api({**standin.environment(), "LEPTON_WORKSPACE_URL": f"http://127.0.0.1:{server.server_port}"})
    with pytest.raises(ApiError, match="302"):
        api.jobs()
    server.shutdown()
    server.server_close()
    assert len(met) == 1 and not standin.requests


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({}, "set LEPTON_WORKSPACE_ID and LEPTON_WORKSPACE_TOKEN"),
        ({"LEPTON_WORKSPACE_URL": "http://example.org/api"}, "must begin with https://"),
        ({"LEPTON_WORKSPACE_TOKEN": "two\nlines"}, "no token has"),
    ],
)
def test_an_environment_that_will_not_do_is_one_line(environ, said):
    whole = {"LEPTON_WORKSPACE_ID": "x", "LEPTON_WORKSPACE_TOKEN": TOKEN, **environ} if environ else {}
    with pytest.raises(ValueError, match=said):
        Api(whole)


def test_a_body_holds_what_the_site_file_says_and_secrets_by_name_only(site):
    spec = body(site)["spec"]
    assert spec["affinity"] == {"allowed_dedicated_node_groups": ["my-ng-abcd"]}
    assert spec["envs"] == [{"name": "HF_TOKEN", "value_from": {"secret_name_ref": "MY_HF"}}]
    assert spec["mounts"] == SITE["mounts"] and spec["max_failure_retry"] == 0


def test_jobs_are_placed_by_gpus_and_memory(site):
    assert site.shape(gpu=2, mem_mb=10**6) == "gpu.2xa100-80gb"
    with pytest.raises(SiteError, match=r"no shape in the site file has 1 GPUs and 64,000 MB; add one"):
        site.shape(gpu=1, mem_mb=64_000)


@pytest.mark.parametrize(
    "rule", ["a", "sweep_sensitivity", "0_UPPER__case", "x" * 80, "a-very_long-rule_name-by-lepton"]
)
@pytest.mark.parametrize("number", [0, 8_399, "0f8fad5b-d9cb-469f-a165-70867728950e"])
def test_names_are_such_as_lepton_takes(rule, number):
    assert re.fullmatch("[a-z][a-z0-9-]{0,34}[a-z0-9]", job_name(rule, number))


def test_a_price_needs_its_source_and_its_day_and_none_is_no_zero(site):
    priced = Shape("gpu.a10", 1, usd_per_hour=2.0, source="https://example.org/prices", dated="2026-11-21")
    assert Site("image", (priced,)).cost({"gpu.a10": 1800.0}) == 1.0
    with pytest.raises(SiteError, match=r"no price of gpu.a10 in the site file"):
        site.cost({"gpu.a10": 1800.0})


@pytest.mark.parametrize(
    ("site", "said"),
    [
        ({"imgae": "x"}, "unknown key 'imgae'; did you mean 'image'?"),
        ({"shapes": []}, "shapes is missing; fill it in"),
        ({"shapes": [{"name": "gpu.a10", "gpus": 1}]}, "a value is of the wrong kind"),
        ({"mounts": [{"path": "/proj"}]}, "a value is of the wrong kind"),
        ({"pause_s": -1}, "a value is of the wrong kind"),
        ({"mounts": "node-nfs:x"}, "a value is of the wrong kind"),
    ],
)
def test_a_fault_in_the_site_file_is_one_line(site, said, tmp_path):
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({**SITE, **site}))
    with pytest.raises(SiteError) as caught:
        Site.read(tmp_path / "site.yaml")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_site_file_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "site.yaml").write_text("image: [")
    for name, said in (("site.yaml", "cannot read the site file"), ("none.yaml", "No such file")):
        with pytest.raises(SiteError, match=said):
            Site.read(tmp_path / name)


def test_a_price_without_a_source_is_refused(tmp_path):
    shapes = [{"name": "gpu.a10", "gpu": 1, "usd_per_hour": 1.5}]
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({**SITE, "shapes": shapes}))
    with pytest.raises(SiteError, match=r"gpu.a10 has a price without source and date"):
        Site.read(tmp_path / "site.yaml")


@pytest.mark.parametrize(("runtime_min", "run", "status"), [(None, "echo 'it runs'", 0), (0.005, "sleep 60", 124)])
def test_a_job_runs_in_its_folder_and_no_longer_than_it_may(runtime_min, run, status, tmp_path):
    (tmp_path / "probe").write_text("nonce")
    place = {"folder": tmp_path, "probe": tmp_path / "probe", "log": tmp_path / "log"}
    line = command(**place, nonce="nonce", runtime_min=runtime_min, run=run)
    assert subprocess.run(["bash", "-c", line], check=False).returncode == status
    assert (tmp_path / "log").read_text() == ("it runs\n" if status == 0 else "")


def test_the_profile_and_its_site_file_are_of_the_right_form():
    profile = yaml.safe_load((ROOT / "profiles/lepton/config.yaml").read_text())
    site = Site.read(ROOT / "profiles/lepton" / profile["lepton-site"])
    assert site.shape(gpu=0, mem_mb=32_000) and site.shape(gpu=1, mem_mb=32_000)
    assert all(shape.usd_per_hour is None for shape in site.shapes)  # none is published: nobody may take one from here


def test_what_a_job_writes_is_told_by_code_parameters_and_inputs(tmp_path):
    script, data = tmp_path / "script.py", tmp_path / "data"
    script.write_text("1")
    data.write_text("1")
    place = SimpleNamespace(join=lambda name: SimpleNamespace(get_path_or_uri=lambda secret_free: tmp_path / name))
    rule = SimpleNamespace(
        name="rule", run_func_src=None, script="script.py", notebook=None, wrapper=None, basedir=place
    )
    job = SimpleNamespace(
        rule=rule, input=[str(data)], shellcmd=None, wildcards_dict={"n": "1"}, non_derived_params=[{"b", "a"}, 1]
    )
    before = _content(job)
    assert _content(job) == before and "{" not in before[-3]  # sets have no order that two heads agree on
    for change in (
        lambda: script.write_text("2"), lambda: data.write_text("22"), lambda: job.non_derived_params.append(2),
        lambda: job.wildcards_dict.update(n="2"),
    ):  # fmt: skip
        change()
        assert _content(job) != before
        before = _content(job)


def test_the_plugin_stands_alone():
    """It can be published by itself: its own pyproject names all that it imports."""
    package = SRC / "snakemake_executor_plugin_lepton"
    names = set()
    for path in package.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.partition(".")[0])
    foreign = names - set(sys.stdlib_module_names)
    assert foreign == {"snakemake_interface_common", "snakemake_interface_executor_plugins", "yaml"}
    assert Job("a", {}, "Running", False).alive
