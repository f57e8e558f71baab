"""Tables: what departs from a schema is refused on the way in and on the way out."""

import numpy as np
import pandas as pd
import pytest

from bitalloc import tables
from bitalloc.errors import BitallocError


def law(**columns):
    row = {"form": "additive", "scope": "pooled", "statistic": "beta", "value": 2.0, "lo": 1.9, "hi": 2.1, "n": 28}
    return pd.DataFrame([row | columns])


def test_round_trip_keeps_values_and_verdicts(tmp_path):
    path = tmp_path / "law.parquet"
    tables.LAW.write(law(lo=np.nan), path, verdicts=[{"gate": "sweep", "go": True}])
    read = tables.LAW.read(path)
    assert read["value"].item() == 2.0
    assert np.isnan(read["lo"].item())
    assert tables.verdicts(path) == [{"gate": "sweep", "go": True}]


def test_equal_frames_make_equal_bytes(tmp_path):
    for name in "ab":
        tables.LAW.write(law(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (law().drop(columns="n"), "'n'"),
        (law(extra=1), "'extra'"),
        (law(form=None), "form"),
        (law(n=2.5), "law"),
        (pd.concat([law(), law(value=3.0)]), "share one key"),
    ],
)
def test_a_departing_frame_is_refused_and_nothing_is_written(tmp_path, frame, words):
    with pytest.raises(BitallocError, match=words):
        tables.LAW.write(frame, tmp_path / "law.parquet")
    assert not list(tmp_path.iterdir())


def test_a_corrupted_a_foreign_and_an_absent_file_are_refused(tmp_path):
    path = tmp_path / "law.parquet"
    tables.LAW.write(law(), path)
    with pytest.raises(BitallocError, match="is not a gates table"):
        tables.GATES.read(path)
    path.write_bytes(path.read_bytes()[:-20])
    for bad in (path, tmp_path / "absent"):
        with pytest.raises(BitallocError, match="delete it and rerun") as error:
            tables.LAW.read(bad)
        assert "\n" not in str(error.value)


def test_every_table_documents_every_column_and_has_a_key():
    for name, table in tables.TABLES.items():
        columns = set(table.names)
        assert table.name == name
        assert set(table.key) <= columns
        assert all(column.doc for column in table.columns)


def test_parts_become_one_table_with_shared_rows_once(tmp_path):
    parts = [law(), law(scope="mlp")], [law(), law(scope="attention")]
    for name, frames in zip("ab", parts, strict=True):
        tables.LAW.write(pd.concat(frames), tmp_path / name, verdicts=[{"gate": name}])
    tables.LAW.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "whole")
    assert tables.LAW.read(tmp_path / "whole")["scope"].tolist() == ["pooled", "mlp", "attention"]
    assert tables.verdicts(tmp_path / "whole") == [{"gate": "a"}]
