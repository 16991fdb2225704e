"""Writes docs/models.md: every MoE class of the installed Transformers, tiny and random, on Moestro.

    python benchmarks/model_table.py [--only NAME] [--out docs/models.md]

For each experts class that goes through the experts interface: its module with random weights against Transformers'
eager one (float32 and bf16), and after quantize_experts against the dequantised weights. For each causal language
model that has one, or text model: greedy tokens in float32 equal to eager's. What is refused stands there with the
refusal's text.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import inspect
import logging
import pkgutil
import re
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_configs import KEYWORDS, OWN, K, configs
from transformers import PreTrainedModel, models

import moestro.integrations.transformers as mt
from moestro.formats import get
from moestro.integrations.transformers.modules import experts_modules, from_matrices, matrices

MOST = 30_000_000  # parameters of a model that is made
N = 9  # tokens


def experts_classes() -> Iterator[tuple[str, type]]:
    """(model folder, class) of every experts module of Transformers' interface."""
    for info in pkgutil.iter_modules(models.__path__):
        try:
            module = importlib.import_module(f"transformers.models.{info.name}.modeling_{info.name}")
        except Exception:  # a folder without a model, or one whose dependency is not here
            continue
        if "use_experts_implementation" not in Path(str(module.__file__)).read_text():
            continue
        for name, cls in vars(module).items():
            own = inspect.isclass(cls) and cls.__module__ == module.__name__
            if own and getattr(getattr(cls, "forward", None), "__wrapped__", None) and "Experts" in name:
                yield info.name, cls


def is_small(cls: type, config: Any, **keywords: int) -> bool:
    """Whether the module is tiny; looked at without its memory, as some parts may keep their own sizes."""
    with torch.device("meta"):
        return sum(p.numel() for p in cls(config, **keywords).parameters()) < MOST


def module_of(folder: str, cls: type) -> Any:
    """An instance with random weights, of sizes that are ours where the config lets them be."""
    errors = []
    for config in configs(folder):
        try:
            if not is_small(cls, config, **KEYWORDS.get(cls.__name__, {})):
                continue
            module = cls(config, **KEYWORDS.get(cls.__name__, {}))
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
            continue
        torch.manual_seed(0)
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.fill_(1.0) if "norm" in name else p.normal_(0, 0.2)
        return module.eval()
    raise RuntimeError(f"cannot be made: {errors[:1]}")


def run(module: Any, implementation: str, dtype: torch.dtype) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    up = module.gate_up_proj if module.has_gate else module.up_proj
    hidden = up.shape[1] if module.is_transposed else up.shape[2]
    x = torch.randn(N, hidden, generator=g).to(dtype)
    ids = torch.stack([torch.randperm(module.num_experts, generator=g)[:K] for _ in range(N)])
    weights = torch.rand(N, K, generator=g).to(dtype)
    module.config._experts_implementation = implementation
    with torch.no_grad():
        return module(x, ids, weights).float()


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


def median_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The median token's. In bf16 a router may take other experts for one: it is far away then, in any implementation."""
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).median())


def quantised_error(module: Any) -> float:
    """After quantize_experts, against the values that it keeps."""
    dense, packed = copy.deepcopy(module), copy.deepcopy(module)
    values = (get("nvfp4").quantize(t.data).dequantize() for t in matrices(dense))
    for name, value in from_matrices(dense, *values).items():
        dense._parameters[name].data.copy_(value)
    mt.quantize_experts(packed, "nvfp4")
    up = next(iter(dense.parameters()))
    del up
    theirs = run(dense, "eager", torch.float32)
    g = torch.Generator().manual_seed(1)
    w = dense.gate_up_proj if dense.has_gate else dense.up_proj
    x = torch.randn(N, w.shape[1] if dense.is_transposed else w.shape[2], generator=g)
    ids = torch.stack([torch.randperm(dense.num_experts, generator=g)[:K] for _ in range(N)])
    weights = torch.rand(N, K, generator=g)
    packed.config._experts_implementation = "moestro"
    with torch.no_grad():
        return error(packed(x, ids, weights).float(), theirs)


LIMIT_S = 120  # for one folder's models
SAME = 1e-4  # of float32 logits; without experts they are at least a hundred times as far away


def whole_models(folder: str, cls: type) -> Iterator[Any]:
    """Tiny models of the folder that hold experts of this class: causal language models first, then text models."""
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    classes = [
        c
        for c in vars(module).values()
        if inspect.isclass(c) and c.__module__ == module.__name__ and issubclass(c, PreTrainedModel)
    ]
    ends = ("ForCausalLM", "TextModel", "Model")
    for end in ends:
        for made in [c for c in classes if c.__name__.endswith(end) and "PreTrained" not in c.__name__]:
            for config in configs(folder):
                for name, value in OWN.get(folder, {}).items():
                    with contextlib.suppress(Exception):
                        setattr(config, name, value)
                try:
                    if not is_small(made, config):
                        LAST.setdefault(folder, f"{made.__name__} is too large to make")
                        continue
                    torch.manual_seed(0)
                    model = made(config).eval()
                    if any(isinstance(m, cls) for _, m in experts_modules(model)):
                        randomise(model)
                        run_model(model, "eager", 1)
                        yield model
                except TimeoutError:
                    raise
                except Exception as error:
                    LAST.setdefault(folder, f"{made.__name__}: {type(error).__name__} {str(error)[:100]}")


def randomise(model: Any) -> None:
    """Experts large enough that their results decide the tokens; Transformers' own initial ones hardly move a logit."""
    for _, module in experts_modules(model):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.2)


LAST: dict[str, str] = {}  # why the last model of a folder could not be made


def inputs(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Qwen3-Omni's talker is fed embeddings: given tokens it looks for an embedding under a name that it has not."""
    if hasattr(model, "codec_embedding"):
        return {"inputs_embeds": model.codec_embedding(tokens)}
    return {"input_ids": tokens}


def in_bf16(model: Any) -> Any:
    """The model in bf16 as from_pretrained(dtype=torch.bfloat16) makes it: some have parts that stay in float32."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        half = type(model)(copy.deepcopy(model.config)).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    kept = re.compile("|".join(half._keep_in_fp32_modules_strict) or "$.")
    for name, parameter in half.named_parameters():
        if kept.search(name):
            parameter.data = parameter.data.float()
    half.load_state_dict(model.state_dict())
    return half


def run_model(model: Any, implementation: str, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(greedy tokens after a prompt of 8, logits of the last step); a text model's head is its embedding."""
    model.set_experts_implementation(implementation)
    tokens = torch.arange(1, 9)[None]
    for _ in range(steps):
        with torch.no_grad():
            result = model(**inputs(model, tokens), use_cache=False)
            logits = getattr(result, "logits", None)
            if logits is None:
                logits = result.last_hidden_state @ model.get_input_embeddings().weight.T.to(model.dtype)
        known = model.get_input_embeddings().weight.shape[0]  # Inkling2's head is wider
        tokens = torch.cat([tokens, logits[:, -1:, :known].argmax(-1)], dim=1)
    return tokens, logits.float()


def greedy(folder: str, cls: type) -> list[str]:
    """Greedy tokens in float32 against eager's, logits in bf16, eager's, and greedy tokens of NVFP4 experts."""
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(LIMIT_S)
    try:
        return _greedy(folder, cls)
    except TimeoutError:
        return [f"not made: takes over {LIMIT_S} s", "", "", ""]
    finally:
        signal.alarm(0)


def _too_long(*_: Any) -> None:
    raise TimeoutError


def _greedy(folder: str, cls: type) -> list[str]:
    for model in whole_models(folder, cls):
        try:
            (tokens, last), (ours, our_last) = run_model(model, "eager", 8), run_model(model, "moestro", 8)
            same = torch.equal(tokens, ours) and error(our_last, last) < SAME
            truth = run_model(model, "eager", 1)[1]
            weight = error(run_model(without_experts(model), "eager", 1)[1], truth)
            exact = "equal" if same else "**differ**"
            if weight < 100 * SAME:
                exact = f"**says nothing**: without experts logits are {weight:.1e} away"
            half = in_bf16(model)
            ours_off, theirs_off = (
                median_error(run_model(half, name, 1)[1], truth) for name in ("moestro", "eager")
            )
            named = f"{exact} ({type(model).__name__})"
            return [named, f"{ours_off:.1e}", f"{theirs_off:.1e}", quantised_greedy(model)]
        except mt.BackendError as refused:
            return [f"refused: {str(refused)[:140]}", "", "", ""]
        except (RuntimeError, IndexError, TypeError) as broken:
            return [f"**broke**: {type(broken).__name__} {str(broken)[:120]}", "", "", ""]
    return [f"not made: {LAST.get(folder, 'no model')[:120]}", "", "", ""]


def without_experts(model: Any) -> Any:
    """A copy whose experts give zero."""
    bare = copy.deepcopy(model)
    for _, module in experts_modules(bare):
        for parameter in module.parameters():
            torch.nn.init.zeros_(parameter)
    return bare


def quantised_greedy(model: Any) -> str:
    """Tokens after quantize_experts against those of the model whose experts are the dequantised values."""
    dense = copy.deepcopy(model)
    for _, module in experts_modules(dense):
        values = [get("nvfp4").quantize(t.data).dequantize() for t in matrices(module)]
        for name, value in from_matrices(module, *values).items():
            module._parameters[name].data.copy_(value)
    truth, _ = run_model(dense, "eager", 8)
    mt.quantize_experts(model, "nvfp4")
    return "equal" if torch.equal(truth, run_model(model, "moestro", 8)[0]) else "**differ**"


def row(folder: str, cls: type) -> list[str]:
    try:
        module = module_of(folder, cls)
    except Exception as failed:
        return [folder, cls.__name__, str(failed)[:90], "", "", *greedy(folder, cls)]
    try:
        truth = run(module, "eager", torch.float32)
        exact = f"{error(run(module, 'moestro', torch.float32), truth):.1e}"
        quantised = f"{quantised_error(module):.1e}"
        half = module.to(torch.bfloat16)
        rough = f"{error(run(half, 'moestro', torch.bfloat16), run(half, 'eager', torch.bfloat16)):.1e}"
    except Exception as refused:
        return [folder, cls.__name__, f"refused: {str(refused)[:140]}", "", "", *greedy(folder, cls)]
    return [folder, cls.__name__, exact, rough, quantised, *greedy(folder, cls)]


HEAD = """# Models

Every experts class that Transformers {version} runs through its experts interface, made tiny with random weights,
by `python benchmarks/model_table.py`. Errors are relative, of the module's result against Transformers' eager
experts: in float32, in bf16, and of NVFP4 experts (`quantize_experts`) against their dequantised values. Greedy: 8
tokens in float32 of a whole model whose experts are large enough to matter against eager's, and their logits within 1e-4
(a text model without a head uses its embedding); its logits in bf16 and those of eager, each against eager's in
float32 and of the median token (a rounding may send a token to another expert), as after
`from_pretrained(dtype=torch.bfloat16)`; and 8 tokens after `quantize_experts` against those of the model whose experts
hold the dequantised values. Zaya with such weights is far from float32 in bf16, whatever runs its experts.

| model | class | float32 | bf16 | NVFP4 | greedy | logits bf16 | eager's | greedy NVFP4 |
|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only")
    parser.add_argument("--out", type=Path, default=Path("docs/models.md"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    mt.register()
    rows = []
    for folder, cls in experts_classes():
        if options.only in (None, folder):
            rows.append(row(folder, cls))
            print(" | ".join(rows[-1]), flush=True)
    fine = sum(r[2][:1].isdigit() for r in rows)
    equal = sum(r[5].startswith("equal") and r[8] == "equal" for r in rows)
    lines = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in r)} |" for r in rows)
    tail = (
        f"\n\n{fine} of {len(rows)} classes run; whole models of {equal} generate eager's tokens, "
        "and the dequantised model's in NVFP4.\n"
    )
    if options.only is None:
        options.out.write_text(HEAD.format(version=transformers.__version__) + lines + tail)


if __name__ == "__main__":
    main()
