"""A small mixture of experts that is really trained, on text at hand: what accuracy and recorded routing are measured on.

    python benchmarks/train_moe.py train DIR [--steps 800] [--minutes 4]   # again: goes on from DIR/state.pt
    python benchmarks/train_moe.py text DIR                                # held-out text -> DIR/held_out.txt
    python benchmarks/train_moe.py ship DIR/recording.npy DST.npy          # `moestro record`'s file, one byte an id

The model is Transformers' Qwen3MoeForCausalLM: 4 layers, H 256, 32 experts of I 128, top 4, with the load-balancing
loss of Switch Transformers (arXiv 2101.03961) at OLMoE's weight (0.01), AdamW, one cosine. Text: the standard
library of the Python that runs this (PSF licence) and the licences and copyright notes that Debian installs
(/usr/share/common-licenses, /usr/share/doc/*/copyright), in an order given by the hash of each text; of every 50 files
one is held out. Tokens: a byte-level BPE of 2048, trained on the same text. Weights (60 MB) are not kept in the
repository; seed, texts, versions and threads being equal, a run gives the same model however it is broken up.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCABULARY, SEQUENCE, BATCH = 2048, 256, 8
EXPERTS, TOP_K = 32, 4
LEARNING_RATE, WARM_UP, BALANCE = 2e-3, 40, 0.01
CORPUS_BYTES, HELD_OUT = 24_000_000, 50  # so much text; one file of so many is held out
EXCERPT = 4000  # characters of each held-out file in held_out.txt
END = "<|end|>"


def texts() -> tuple[list[str], list[str]]:
    """(trained on, held out): whole files, each text once, in the order of their hashes."""
    places = [*Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")]
    places = [p for p in places if "site-packages" not in p.parts]
    places += [p for p in Path("/usr/share/common-licenses").glob("*") if p.is_file()]
    places += [*Path("/usr/share/doc").glob("*/copyright")]
    found: dict[str, str] = {}
    for place in places:
        raw = place.read_bytes()
        try:
            found[hashlib.sha256(raw).hexdigest()] = raw.decode()
        except UnicodeDecodeError:
            continue  # test data of the decoder itself, in other encodings
    train: list[str] = []
    held: list[str] = []
    size = 0
    for digest, text in sorted(found.items()):
        if size > CORPUS_BYTES:
            break
        size += len(text)
        (held if int(digest, 16) % HELD_OUT == 0 else train).append(text)
    return train, held


def tokenizer_of(directory: Path, train: list[str]) -> PreTrainedTokenizerFast:
    """The directory's tokenizer, made from the first 6 MB of text when there is none."""
    if not (directory / "tokenizer.json").exists():
        made = ByteLevelBPETokenizer()
        some, size = [], 0
        for text in train:
            some.append(text)
            size += len(text)
            if size > 6_000_000:
                break
        made.train_from_iterator(some, vocab_size=VOCABULARY, special_tokens=[END], show_progress=False)
        fast = PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, eos_token=END)
        fast.save_pretrained(directory)
    return PreTrainedTokenizerFast.from_pretrained(directory)


def tokens_of(directory: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(trained on, held out): ids of all texts, END after each; kept in the directory."""
    files = directory / "train.npy", directory / "held_out.npy"
    if not all(file.exists() for file in files):
        parts = texts()
        tokenizer = tokenizer_of(directory, parts[0])
        end = tokenizer.convert_tokens_to_ids(END)
        for file, part in zip(files, parts, strict=True):
            ids = [i for text in part for i in (*tokenizer._tokenizer.encode(text).ids, end)]
            np.save(file, np.array(ids, dtype=np.uint16))
    train, held = (torch.from_numpy(np.load(file).astype(np.int64)) for file in files)
    return train, held


def new_model(seed: int) -> Qwen3MoeForCausalLM:
    """The untrained model."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        output_router_logits=False,
        router_aux_loss_coef=BALANCE,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")  # a step takes a fifth of "eager"'s time on a CPU
    return model


def batch_at(tokens: torch.Tensor, step: int, seed: int) -> torch.Tensor:
    """ids [BATCH, SEQUENCE] of this step, at places that seed and step say."""
    starts = np.random.default_rng((seed, step)).integers(len(tokens) - SEQUENCE, size=BATCH)
    return torch.stack([tokens[start : start + SEQUENCE] for start in starts])


def train(directory: Path, steps: int, minutes: float, seed: int) -> None:
    """Train up to `steps`, at most for so many minutes; the model and its state are in the directory afterwards."""
    directory.mkdir(parents=True, exist_ok=True)
    tokens, held = tokens_of(directory)
    model = new_model(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, (0.9, 0.95), weight_decay=0.1, fused=True
    )
    state, at = directory / "state.pt", 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        at = saved["step"]
    print(f"{len(tokens)} tokens to train on, {len(held)} held out; from step {at} of {steps}", flush=True)
    started = time.monotonic()
    while at < steps and time.monotonic() - started < 60 * minutes:
        fraction = min(1.0, (at + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * at / steps))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * max(fraction, 0.02)
        ids = batch_at(tokens, at, seed)
        out = model(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        at += 1
        if at % 50 == 0 or at == steps:
            spent = time.monotonic() - started
            loss, balance = float(out.loss.detach()), float(out.aux_loss.detach())
            print(
                f"step {at} loss {loss - BALANCE * balance:.3f} balance {balance:.3f} {spent:.0f} s",
                flush=True,
            )
    part = directory / "state.part"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": at}, part)
    part.replace(state)
    model.save_pretrained(directory)
    print(json.dumps({"step": at, **held_out(model, held)}), flush=True)


@torch.no_grad()
def held_out(model: Qwen3MoeForCausalLM, held: torch.Tensor, sequences: int = 64) -> dict[str, float]:
    """Perplexity a token on held-out text, and how its experts are loaded: most over mean, effective share of E."""
    starts = np.linspace(0, len(held) - SEQUENCE, sequences).astype(np.int64)  # over all of it
    used = torch.stack([held[start : start + SEQUENCE] for start in starts])
    losses, counts = [], None
    for ids in used.split(16):
        out = model(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False)
        losses.append(float(out.loss - BALANCE * out.aux_loss))
        chosen = torch.stack(
            [r.topk(TOP_K, dim=-1).indices for r in out.router_logits]
        )  # [layers, tokens, K]
        seen = torch.stack([torch.bincount(layer.flatten(), minlength=EXPERTS) for layer in chosen]).float()
        counts = seen if counts is None else counts + seen
    share = counts / counts.sum(-1, keepdim=True)
    return {
        "perplexity": round(math.exp(sum(losses) / len(losses)), 3),
        "most_over_mean": round(float(share.max(-1).values.mean()) * EXPERTS, 2),
        "effective_experts": round(float((1 / share.square().sum(-1)).mean()) / EXPERTS, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    learn = commands.add_parser("train")
    learn.add_argument("directory", type=Path)
    learn.add_argument("--steps", type=int, default=800)
    learn.add_argument("--minutes", type=float, default=math.inf)
    learn.add_argument("--seed", type=int, default=0)
    text = commands.add_parser("text")
    text.add_argument("directory", type=Path)
    ship = commands.add_parser("ship")
    ship.add_argument("source", type=Path)
    ship.add_argument("target", type=Path)
    given = parser.parse_args()
    if given.command == "train":
        train(given.directory, given.steps, given.minutes, given.seed)
    elif given.command == "text":
        (given.directory / "held_out.txt").write_text("\n".join(text[:EXCERPT] for text in texts()[1]))
    else:
        ids = np.load(given.source)
        np.save(given.target, ids.astype(np.uint8 if ids.max() < 256 else np.uint16))


if __name__ == "__main__":
    main()
