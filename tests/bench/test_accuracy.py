"""What each format costs: the figures are those of the plain arithmetic, and what does not run says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.bench import accuracy
from moestro.bench.accuracy import FORMATS, INPUTS, LayerRow, layer_rows, relative
from moestro.bench.models import MoeShape
from moestro.routing import Uniform

Rows = dict[tuple[str, str], LayerRow]


@pytest.fixture(scope="module")
def rows() -> Rows:
    shape = MoeShape("mid", 128, 64, 8, 2)
    found = layer_rows(shape, FORMATS, INPUTS, Uniform(), tokens=33, backend="portable")
    return {(row.format, row.input_format): row for row in found}


def test_every_format_of_weights_meets_every_format_of_activations(rows: Rows) -> None:
    assert set(rows) == {(format, given) for format in FORMATS for given in INPUTS}
    assert [row.reason for row in rows.values() if row.reason] == []
    assert {row.backend for row in rows.values()} == {"portable"}


@pytest.mark.parametrize("format", FORMATS)
def test_errors_are_of_the_size_that_the_arithmetic_gives(rows: Rows, format: str) -> None:
    """bf16 keeps 8 bits, so 0.4 % at most; e4m3 2.6 % an operand; int8 per 32 1 %; e2m1 with a scale per 16 9 %."""
    limits = {"none": (5e-4, 8e-3), "int8": (6e-3, 2e-2), "fp8": (2e-2, 6e-2), "nvfp4": (8e-2, 2e-1)}
    for given, (low, high) in limits.items():
        row = rows[format, given]
        assert row.error is not None
        assert row.own is not None
        assert low < row.error < high, (format, given)
        assert row.own < 8e-3, "the kernels add no more than bf16 does"
        assert row.own <= row.error * 1.05


def test_what_weights_cost_does_not_depend_on_activations(rows: Rows) -> None:
    order = []
    for format in FORMATS:
        (cost,) = {rows[format, given].weights for given in INPUTS}
        assert cost is not None
        order.append(cost)
    bf16, nvfp4, mxfp4, mxfp8, fp8_block = order
    assert bf16 == 0
    assert 0.02 < mxfp8 < 0.06 < nvfp4 < mxfp4 < 0.25
    assert 0.02 < fp8_block < 0.06


def test_what_cannot_run_is_a_row_with_its_reason() -> None:
    shape = MoeShape("odd", 48, 40, 4, 2)
    (row,) = layer_rows(shape, ["mxfp4"], ["none"], Uniform(), tokens=3)
    assert row.error is None
    assert "32" in row.reason


def test_the_relative_error_of_nothing_is_its_own_norm() -> None:
    assert relative(torch.tensor([3.0, 4.0]), torch.zeros(2)) == 5.0


# --- a model ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture of experts with a tokenizer of characters, trained to count for a few steps."""
    transformers = pytest.importorskip("transformers", minversion="5.7")
    tokenizers = pytest.importorskip("tokenizers")
    made = tmp_path_factory.mktemp("model")
    letters = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz ?")}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="?"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="?")
    fast.save_pretrained(made)
    config = transformers.Qwen3MoeConfig(
        vocab_size=len(letters), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.Qwen3MoeForCausalLM(config)
    ids = fast(text(), return_tensors="pt")["input_ids"][:, :200]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(made)
    (made / "held_out.txt").write_text(text())
    return made


def text() -> str:
    return "the quick brown fox jumps over the lazy dog " * 12


def test_a_models_next_token_is_compared_with_itself_in_float32(folder: Path) -> None:
    from moestro.bench import model_accuracy

    known = model_accuracy.open_model(folder, folder / "held_out.txt")
    assert known.to_json()["tokens"] == sum(b.shape[1] - 1 for b in known.batches)
    found = list(model_accuracy.model_rows(known, ["bf16", "nvfp4"], ["none", "nvfp4"]))
    rows = {(row.format, row.input_format): row for row in found}
    assert [row.reason for row in found] == [""] * 4
    exact, four_bits, both = rows["bf16", "none"], rows["nvfp4", "none"], rows["nvfp4", "nvfp4"]
    for row in found:
        assert row.perplexity is not None
        assert row.kl is not None
        assert row.perplexity == pytest.approx(known.perplexity, rel=0.25)
        assert row.kl >= 0
        assert 0.5 < (row.top_1 or 0) <= 1
    assert (exact.kl or 0) < (four_bits.kl or 0) < (both.kl or 0)
    assert (exact.kl or 1) < 2e-3
    assert (four_bits.bytes or 0) < 0.35 * (exact.bytes or 0)


def test_the_reference_is_the_plain_perplexity(folder: Path) -> None:
    import transformers

    from moestro.bench import model_accuracy

    known = model_accuracy.open_model(folder, folder / "held_out.txt")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, tokens = 0.0, 0
    for ids in known.batches:
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss
        total += float(loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert known.perplexity == pytest.approx(torch.tensor(total / tokens).exp().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [("no config", "must be a folder with a config.json"), ("quantised", "must hold dense weights")],
)
def test_a_folder_that_holds_no_dense_checkpoint_is_refused(tmp_path: Path, change: str, said: str) -> None:
    pytest.importorskip("transformers")
    from moestro.bench import model_accuracy
    from moestro.errors import FormatError

    if change == "quantised":
        (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "modelopt"}}')
    with pytest.raises(FormatError, match=said):
        model_accuracy.open_model(tmp_path, tmp_path / "t.txt")


def test_results_say_where_and_when() -> None:
    made = accuracy.new_result(
        "moestro bench --accuracy", "cpu", MoeShape("mid", 128, 64, 8, 2), {"tokens": 4}
    )
    data = made.to_json()
    assert data["schema"] == "moestro.accuracy/1"
    assert data["problem"]["num_experts"] == 8
    assert data["environment"]["torch"]
