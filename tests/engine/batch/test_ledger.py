import sqlite3

import pytest

from engine.batch import ledger as module
from engine.batch.ledger import Ledger
from engine.batch.request import Origin
from engine.errors import InputError


def test_a_line_is_answered_once():
    ledger = Ledger()
    assert ledger.request_id(3) is None
    assert ledger.add_answered(Origin(3, "req_a", "x"))
    assert not ledger.add_answered(Origin(3, "req_b", "y"))
    assert ledger.request_id(3) == "req_a"


def test_the_first_line_has_a_custom_id():
    ledger = Ledger()
    assert ledger.claim("a", 1) == 1
    assert ledger.claim("b", 2) == 2
    assert ledger.claim("a", 5) == 1


def test_answered_lines_claim_in_the_files_order():
    """Line 9 was refused for line 3's custom_id, and a run was killed before line 3 had its result."""
    ledger = Ledger()
    for origin in (Origin(9, "req_a", "a"), Origin(2, "req_b", "b"), Origin(4, "req_c", None)):
        ledger.add_answered(origin)
    assert ledger.claim_again(2)
    assert ledger.claim("a", 3) == 3
    assert ledger.claim("b", 3) == 2
    assert ledger.claim_again(4)
    assert not ledger.claim_again(8)
    assert ledger.claim_again(9)
    assert ledger.claim("a", 10) == 3


def test_no_room_for_its_file(monkeypatch):
    ledger = Ledger()
    ledger._database.execute("PRAGMA max_page_count = 10")
    with pytest.raises(InputError, match=r"temporary files \(database or disk is full\); make room there, or set SQL"):
        for line in range(10**4):
            ledger.claim(str(line), line)

    def cannot_open(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("unable to open database file")

    monkeypatch.setattr(module.sqlite3, "connect", cannot_open)
    with pytest.raises(InputError, match="unable to open database file"):
        Ledger()
