"""The reader of machine code finds what it must find, in loops too."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import inflight

PRODUCT = "HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0"
OTHER = "HGMMA.64x16x16.F32.BF16 R40, R8, gdesc[UR8], R40, gsb0"
DECODE = "HMUL2.BF16_V2 R6, R12, R13"


def listing(*instructions: str) -> dict[int, inflight.Instruction]:
    return inflight.parse("\n".join(f"/*{16 * i:04x}*/ {text} ;" for i, text in enumerate(instructions)))


@pytest.mark.parametrize(
    ("between", "found"),
    [
        ([], 1),  # nothing waits
        (["WARPGROUP.DEPBAR.LE gsb0, 0x0"], 0),
        (["WARPGROUP.DEPBAR.LE gsb0, 0x1"], 1),  # leaves the only one running
        ([OTHER, "WARPGROUP.DEPBAR.LE gsb0, 0x1"], 0),  # a newer one may run on
        ([OTHER, "WARPGROUP.DEPBAR.LE gsb0, 0x2"], 1),
    ],
)
def test_a_register_is_free_once_its_product_is_retired(between: list[str], found: int) -> None:
    assert len(inflight.overwritten(listing(PRODUCT, *between, DECODE, "EXIT"))) == found


def test_loops_are_followed_and_wide_writes_are_seen() -> None:
    loop = (DECODE, PRODUCT, "@P0 BRA 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "EXIT")
    assert inflight.overwritten(listing(*loop)) == [f"{PRODUCT} runs while: {DECODE}"]
    assert len(inflight.overwritten(listing(PRODUCT, "LDS.128 R4, [R9]", "EXIT"))) == 1
    assert inflight.overwritten(listing(PRODUCT, "STG.E.128 desc[UR4][R2.64], R4", "EXIT")) == []


def test_a_product_that_is_always_waited_for_does_not_run_on() -> None:
    waits = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    assert not inflight.runs_on(listing(PRODUCT, waits, OTHER, waits))
    assert inflight.runs_on(listing(PRODUCT, OTHER, "WARPGROUP.DEPBAR.LE gsb0, 0x1"))
