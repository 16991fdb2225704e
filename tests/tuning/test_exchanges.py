"""What ranks of a group tell each other: values in order, who is late or gone, and votes."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch.distributed as dist
from ranks import run_ranks

from moestro.errors import GroupError
from moestro.tuning.group import Group
from moestro.tuning.link import StoreLink


def test_an_exchange_gives_every_ranks_value_in_order() -> None:
    said = run_ranks(3, lambda link: [link.exchange("step", [link.rank, n]) for n in range(20)])
    assert said == [[[[0, n], [1, n], [2, n]] for n in range(20)]] * 3


def test_exchanges_leave_no_keys_behind() -> None:
    store = dist.HashStore()
    link = StoreLink(store, 0, 1)
    for n in range(50):
        link.exchange("step", n)
    assert store.num_keys() <= 4


def test_a_rank_that_comes_too_late_is_named_to_all_and_to_itself() -> None:
    waiting = threading.Barrier(2)
    gone = threading.Event()

    def body(link: StoreLink) -> None:
        if link.rank == 1:
            assert gone.wait(120)
        try:
            link.exchange("vote", 0)
        finally:
            if link.rank != 1 and waiting.wait(120) == 0:
                gone.set()  # both others have given up

    for error in run_ranks(3, body, timeout_s=1.0, wait_s=200):
        assert isinstance(error, GroupError)
        assert "rank 1 of 3 did not come to 'vote' within 1 s" in str(error)


def test_a_rank_that_leaves_is_not_waited_for() -> None:
    def body(link: StoreLink) -> Any:
        if link.rank == 0:
            link.leave("ValueError: bad")
            return None
        return link.exchange("vote", 0)

    started = time.monotonic()
    _, error = run_ranks(2, body, timeout_s=300.0)
    assert time.monotonic() - started < 100, "the one that left was waited for"
    assert isinstance(error, GroupError)
    assert "rank 0 left: ValueError: bad" in str(error)


def test_ranks_that_do_different_things_are_told_so() -> None:
    for error in run_ranks(2, lambda link: link.exchange(f"step {link.rank}", 0)):
        assert isinstance(error, GroupError)
        assert "step 0" in str(error)
        assert "step 1" in str(error)


def test_a_store_that_does_not_answer_is_an_error_of_the_group() -> None:
    class Gone:
        def set(self, key: str, value: str) -> None:
            raise RuntimeError("Connection reset by peer")

        compare_set = set

    with pytest.raises(GroupError, match=r"does not answer at 'vote'.*Connection reset"):
        StoreLink(Gone(), 0, 2).exchange("vote", 0)


def test_a_candidate_is_out_when_any_rank_objects_or_does_not_offer_it() -> None:
    fit = {0: ["a", "b", "c"], 1: ["c", "a", "d"]}
    why = {0: {}, 1: {"c": "failed"}}

    def body(link: StoreLink) -> Any:
        return Group(link).vote("v", [n for n in fit[link.rank] if n not in why[link.rank]], why[link.rank])

    for vote in run_ranks(2, body):
        assert vote.fit == ["a"]
        assert vote.against["c"] == "rank 1: failed"
        assert vote.against["b"] == "rank 1: does not offer it"
