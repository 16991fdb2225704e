"""What a collective of Peers leaves behind: nothing that threads of gloo hold, which could abort a process that ends."""

from __future__ import annotations

import threading
import time

import parallel_cases as cases
import torch
from gloo_ranks import Ranks

from moestro.parallel.peers import _let_go


def test_gloo_holds_no_rows_of_a_collective_that_has_returned(ranks: Ranks) -> None:
    for held in ranks.run(cases.rows_held_after_collectives, 300):
        assert held == 0


def test_rows_are_waited_for_until_others_have_let_them_go() -> None:
    rows = torch.ones(3, requires_grad=True)
    holders = [(rows * rows).sum()]  # its graph has saved rows, as gloo's work has them: outside Python

    def let_go() -> None:
        time.sleep(0.05)
        holders.clear()

    threading.Thread(target=let_go).start()
    _let_go(rows)
    assert not holders
