"""A few cases of every reader; ``python -m visistage.tests.fuzz`` runs thousands."""

import pytest
from visistage.tests.fuzz.__main__ import run
from visistage.tests.fuzz.readers import READERS

CASES = 8
"""Cases of each reader; with this seed each has inputs that are good enough, and others."""


@pytest.mark.slow
def test_hostile_inputs_end_in_a_result_or_a_message():
    ends, findings, _ = run(CASES * len(READERS), seed=7)
    assert findings == []
    assert all(ends[reader]["message"] for reader in READERS)
    assert sum(bool(counts["result"]) for counts in ends.values()) > len(READERS) / 2


def test_a_finding_is_noticed(monkeypatch):
    from visistage.tests.fuzz import __main__ as fuzz
    from visistage.tests.fuzz import readers

    class Long(fuzz.VisistageError):
        def __str__(self):  # or it would be cut
            return "x" * 9999

    def planted(error):
        def fail():
            raise error

        return lambda rng, folder: ("planted", fail)

    monkeypatch.setitem(readers.READERS, "bug", planted(KeyError("x")))
    monkeypatch.setitem(readers.READERS, "long", planted(Long()))
    assert fuzz.check("bug", 0, 0, None)["end"] == "traceback"
    assert fuzz.check("long", 0, 0, None)["end"] == "long message"
