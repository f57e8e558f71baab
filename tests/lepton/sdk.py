"""Run by the interpreter that has leptonai (not bitalloc's): its client against the stand-in, and posted bodies.

Reads posted bodies as JSON from stdin; exits non-zero at the first thing that the client does not take or cannot read.
"""

import json
import sys


def known(model, given, place="body"):
    """Every key that was posted is one of the client's own fields, with the value that was posted."""
    dumped = json.loads(model.model_dump_json(by_alias=True, exclude_unset=True))

    def compare(ours, theirs, place):
        if isinstance(ours, dict) and isinstance(theirs, dict):
            for key, value in ours.items():
                assert key in theirs, f"{place}.{key} is no field of leptonai"
                compare(value, theirs[key], f"{place}.{key}")
        elif isinstance(ours, list):
            for number, pair in enumerate(zip(ours, theirs, strict=True)):
                compare(*pair, f"{place}[{number}]")
        else:
            assert ours == theirs, f"{place}: {ours!r} became {theirs!r}"

    compare(given, dumped, place)


def main(token, url):
    from leptonai.api.v2.client import APIClient
    from leptonai.api.v2.job_validation import validate_job_create
    from leptonai.api.v2.types.job import LeptonJob, LeptonJobState

    bodies = json.load(sys.stdin)
    for body in bodies:
        job = LeptonJob(**body)
        validate_job_create(job)
        known(job, body)

    client = APIClient(workspace_id="standin", auth_token=token, url=url)
    there = client.job.list_all()
    assert len(there) == len(bodies)
    assert {job.status.state for job in there} == {LeptonJobState.Completed}
    assert all(job.metadata.labels.keys() == bodies[0]["metadata"]["labels"].keys() for job in there)

    sleeper = {
        **bodies[0],
        "spec": {**bodies[0]["spec"], "container": {"image": "x", "command": ["bash", "-c", "echo up; sleep 60"]}},
    }
    created = client.job.create(LeptonJob(**sleeper))
    assert created.status.state == LeptonJobState.Queueing and created.metadata.id_ != bodies[0]["metadata"]["id"]
    while client.job.get(created.metadata.id_).status.state != LeptonJobState.Running:
        pass
    [replica] = client.job.get_replicas(created)
    while "up" not in "".join(client.job.get_log(created, replica)):
        pass
    assert client.job.get_events(created) == []
    assert client.job.update(created.metadata.id_, {"spec": {"stopped": True}})
    while client.job.get(created).status.state != LeptonJobState.Stopped:
        pass
    assert client.job.delete(created.metadata.id_)
    assert len(client.job.list_all()) == len(bodies)
    print(f"{len(bodies)} bodies valid")


if __name__ == "__main__":
    main(*sys.argv[1:])
