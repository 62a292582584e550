"""A few of the networks that the doctor's rules were not made on; docs/guide/doctor.md has the count of many."""

from __future__ import annotations

import pytest

pytest.importorskip("sklearn", reason="the data come from scikit-learn")

from ward import cumulative, dropout_called, examine, healthy_in_order, healthy_on_test_data, streams


@pytest.mark.parametrize(("make", "seed"), [(streams, 203), (cumulative, 204), (dropout_called, 201)])
def test_the_planted_cause_comes_first(make, seed):
    diagnosis, codes, _ = examine(make, seed)
    assert diagnosis.findings[0].code in codes


@pytest.mark.parametrize(("make", "seed"), [(healthy_in_order, 204), (healthy_on_test_data, 201)])
def test_nothing_above_a_note(make, seed):
    diagnosis, codes, _ = examine(make, seed)
    assert codes == set()
    assert diagnosis.healthy, str(diagnosis)
