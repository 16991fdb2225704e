"""The public names: all there, each imported when first used."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest
import torch
from moe_cases import make_weights

import moestro
from moestro import FusedMoE, Workspace, errors
from moestro.moe import workspace


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
    """A buffer for each call in flight; none is made inside a capture."""

    def test_a_buffer_that_came_back_is_taken_again_and_grows(self) -> None:
        workspace = Workspace("cpu")
        assert workspace.nbytes == 0
        large = workspace.take(100)
        other = workspace.take(10)  # while the first is in use
        assert other.data_ptr() != large.data_ptr()
        workspace.give(other)
        workspace.give(large)
        assert workspace.nbytes == 110
        assert workspace.take(50) is large
        assert workspace.take(200).numel() == 200  # instead of the one of 10

    def test_layers_share_a_workspace_by_default_which_goes_with_the_last(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            workspace, "_shared", weakref.WeakValueDictionary()
        )  # other tests' layers may live on
        layers = [FusedMoE(make_weights(seed=seed), 2) for seed in range(2)]
        held = weakref.ref(layers[0].workspace)
        assert layers[1].workspace is held()
        del layers
        gc.collect()
        assert held() is None

    def test_an_allocation_inside_a_capture_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As on a GPU, whose captures use the buffer that was reserved, again and again."""
        workspace = Workspace("cpu")
        monkeypatch.setattr(workspace, "_stream", lambda: 7)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        workspace.reserve(100)
        buffer = workspace.take(100)
        assert workspace.take(70) is buffer
        workspace.give(buffer)
        assert workspace.take(100) is buffer
        with pytest.raises(
            errors.BackendError, match="workspace must have 101 bytes before a CUDA graph capture, got 100"
        ):
            workspace.take(101)

    def test_each_stream_has_buffers_of_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One stream's work may still run in a buffer that was given back: another's must not take it."""
        workspace, stream = Workspace("cpu"), 0
        monkeypatch.setattr(workspace, "_stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        first = workspace.take(100)
        workspace.give(first)
        stream = 1
        second = workspace.take(100)
        assert second is not first
        workspace.give(second)
        stream = 0
        assert workspace.take(100) is first
