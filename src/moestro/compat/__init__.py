"""Other tuners' names over ours: change one import, and operations written for them run on Moestro's tuner.

`flashinfer` is FlashInfer's `flashinfer.autotuner`, `trtllm` is TensorRT-LLM's `tensorrt_llm._torch.autotuner`.
What differs on purpose is listed in docs/migrate.md.
"""
