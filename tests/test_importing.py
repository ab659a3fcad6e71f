"""A program's imports: the collector rests meanwhile, is as it was afterwards, and does not look at them again."""

import gc
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


def test_what_was_made_is_not_gone_through_again() -> None:
    gc.unfreeze()
    with uncollected():
        made = [object]
    later = [object]
    looked_at = {id(each) for each in gc.get_objects()}
    assert id(made) not in looked_at
    assert id(later) in looked_at
