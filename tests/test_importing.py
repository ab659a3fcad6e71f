"""A program's imports: the collector rests meanwhile, is as it was afterwards, and does not look at them again."""

import gc
import sys
from collections.abc import Iterator

import pytest

from fedwsa.importing import uncollected


@pytest.fixture(autouse=True)
def _thawed_afterwards() -> Iterator[None]:
    yield
    gc.enable()
    gc.unfreeze()


def test_the_collector_rests_in_the_block_alone() -> None:
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_an_import_that_fails_does_not_leave_the_collector_off() -> None:
    with pytest.raises(ImportError), uncollected():
        raise ImportError("no such module")
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with uncollected():
        pass
    assert not gc.isenabled()


def looked_at(*objects: object) -> list[bool]:
    found = {id(each) for each in gc.get_objects()}
    return [id(each) in found for each in objects]


def test_what_a_start_made_is_not_gone_through_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    with uncollected():
        made = [object]
    later = [object]
    assert looked_at(made, later) == [False, True]


def test_what_is_there_later_may_be_garbage_and_is_not_kept() -> None:
    gc.collect()
    with uncollected():
        made = [object]
    assert looked_at(made) == [True]
