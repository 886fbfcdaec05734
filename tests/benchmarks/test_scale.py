"""The table of scale: exponents, and cells that fail."""

import json

import pytest

from benchmarks import scale


def test_an_exponent_is_the_slope_between_the_two_largest_sizes_that_were_done():
    rows = [{"cell": "rows", "size": n, "seconds": s} for n, s in ((10, 5.0), (100, 6.0), (1000, 60.0))]
    failed = [{"cell": "rows", "size": 10**4, "failed": "MemoryError"}, {"cell": "sites", "size": 1, "seconds": 1.0}]
    assert scale.exponents([*rows, *failed]) == {"rows": pytest.approx(1.0)}


def test_a_cell_that_takes_too_long_is_a_row_with_the_reason():
    found = scale.measured("rows", 10, timeout=0.001)
    assert found.pop("load") >= 0
    assert found == {"cell": "rows", "size": 10, "failed": "over 0 s"}


def test_cells_that_are_there_stay_and_those_that_failed_are_tried_again(tmp_path, monkeypatch):
    out = tmp_path / "scale.json"
    there = [{"cell": "sites", "size": 10, "seconds": 1.0}, {"cell": "rows", "size": 1000, "failed": "killed"}]
    out.write_text(json.dumps({"rows": there}))
    monkeypatch.setattr(scale, "measured", lambda cell, size, timeout: {"cell": cell, "size": size, "seconds": 2.0})
    scale.main(["--only", "rows", "sites", "--most", "1000", "--out", str(out)])
    found = {(row["cell"], row["size"]): row["seconds"] for row in json.loads(out.read_text())["rows"]}
    own = {key: seconds for key, seconds in found.items() if "NumPyro" not in key[0]}
    assert own == {("rows", 1000): 2.0, ("sites", 10): 1.0, ("sites", 100): 2.0, ("sites", 500): 2.0}
