"""The table of scale: exponents, and cells that fail."""

import pytest

from benchmarks import scale


def test_an_exponent_is_the_slope_between_the_two_largest_sizes_that_were_done():
    rows = [{"cell": "rows", "size": n, "seconds": s} for n, s in ((10, 5.0), (100, 6.0), (1000, 60.0))]
    failed = [{"cell": "rows", "size": 10**4, "failed": "MemoryError"}, {"cell": "sites", "size": 1, "seconds": 1.0}]
    assert scale.exponents([*rows, *failed]) == {"rows": pytest.approx(1.0)}


def test_a_cell_that_takes_too_long_is_a_row_with_the_reason():
    assert scale.measured("rows", 10, timeout=0.001) == {"cell": "rows", "size": 10, "failed": "over 0 s"}
