"""vLLM's experts on Moestro: a plugin of the entry point group `vllm.general_plugins`, see docs/vllm.md.

Installed beside vLLM it needs no call: vLLM runs `register()` in each of its processes. The rooms:
settings (the environment's words) · plugin (what is registered) · hooks (vLLM's method class -> ours, layer by
layer) · refusals (what is left to vLLM, and why) · kinds (one per checkpoint: where its tensors are) · method
(our method class) · repack (loaded parameters -> expert weights) · execute (a call) · tuning, ranks (one decision
for all that hold a layer) · log · served (a server's log, explained).

Importing this package imports neither vLLM nor torch.
"""

from __future__ import annotations


def register() -> None:
    """Put Moestro's method classes in vLLM's place; a second call changes nothing."""
    from moestro.integrations.vllm.plugin import install

    install()


__all__ = ["register"]
