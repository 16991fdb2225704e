"""The public names: all there, each imported when first used."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import moestro
from moestro import Workspace, errors


def test_every_public_name_is_there() -> None:
    for name in moestro.__all__:
        assert getattr(moestro, name) is not None
    assert set(moestro.__all__) <= set(dir(moestro))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"moestro.*'fused_mo'"):
        moestro.fused_mo  # noqa: B018


def test_importing_moestro_does_not_import_torch() -> None:
    code = (
        "import sys, moestro; assert 'torch' not in sys.modules; "
        "moestro.routing; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class TestWorkspace:
    """Grows outside a capture, and never inside one."""

    def test_grows_and_never_shrinks(self) -> None:
        workspace = Workspace("cpu")
        assert workspace.nbytes == 0
        large = workspace.at_least(100)
        assert workspace.at_least(10) is large
        assert workspace.at_least(200).numel() == workspace.nbytes == 200

    def test_an_allocation_inside_a_capture_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        workspace = Workspace("cpu")
        workspace.at_least(100)
        workspace.device = torch.device("cuda")  # there need be none: it must not get that far
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        workspace.at_least(100)
        with pytest.raises(
            errors.BackendError, match="workspace must have 101 bytes before a CUDA graph capture"
        ):
            workspace.at_least(101)
