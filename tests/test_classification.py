"""Classification: scores, rows, batches of one length; from labelled texts to an artifact."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from runtime_models import llama as transformers_llama
from runtime_models import tokenizer

from gammac.classification import HELD_OUT, make_classifier, split_rows
from gammac.cli import main
from gammac.diagnostics import CompileError
from gammac.driver import resolve
from gammac.passes.training.labelled import by_length
from gammac.passes.training.trained import read_trained
from gammac.runtime.classify import LabelledText, class_scores, read_rows
from gammac.runtime.reference import TransformersSession
from gammac.runtime.session import open_session

SCORES = ("accuracy", "precision", "recall", "f1")
WORDS = {"animal": ("fox", "dog", "lazy", "quick", "犬"), "sport": ("Box", "jagen", "Viktor", "Zwölf", "棒")}


def rows(count: int = 96) -> list[dict[str, str]]:
    """Texts of several lengths whose words say the label."""
    random = np.random.default_rng(0)
    labels = [list(WORDS)[i % 2] for i in range(count)]
    return [
        {"text": " ".join(random.choice(WORDS[x], size=random.integers(2, 5))), "label": x} for x in labels
    ]


# ---- scores and rows ----------------------------------------------------------------------------


def test_scores_of_a_confusion_that_was_counted_by_hand() -> None:
    # class 0: 2 of 3 found, 2 of 3 right; class 1: 1 of 2 found, 1 of 3 right; class 2: 1 of 2, 1 of 1
    gold, predicted = [0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 0, 2, 1]
    found = class_scores(predicted, gold, 3)
    assert found.accuracy == pytest.approx(4 / 7)
    assert found.precision == pytest.approx((2 / 3 + 1 / 3 + 1) / 3)
    assert found.recall == pytest.approx((2 / 3 + 1 / 2 + 1 / 2) / 3)
    assert found.f1 == pytest.approx((2 / 3 + 2 / 5 + 2 / 3) / 3)
    assert class_scores([0, 0], [1, 1], 2).f1 == 0.0
    with pytest.raises(ValueError, match="1 predictions for 2"):
        class_scores([0], [0, 1], 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "no labelled text"), ('{"text": "a"}', "label"), ('{"text": " ", "label": 1}', "no text"),
     ('{"text": "a", "label": true}', "label is bool"), ("", "has no rows")],
)  # fmt: skip
def test_rows_that_are_none_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line)
    with pytest.raises(CompileError, match=message):
        read_rows(path)


def test_every_label_has_rows_on_both_sides_and_none_is_on_both() -> None:
    given = [LabelledText(f"{label} {i}", label) for label in "ab" for i in range(20)]
    split = split_rows(given)
    assert split.labels == ("a", "b") and len(split.held_out) == 6
    assert sorted((*split.used, *split.held_out), key=given.index) == given
    with pytest.raises(CompileError, match="has one row"):
        split_rows([*given, LabelledText("c", "c")])
    with pytest.raises(CompileError, match="all rows have the label"):
        split_rows(given[:20])


def test_a_pass_gives_each_text_once_in_batches_of_one_length() -> None:
    texts = [torch.full((2 + i % 3,), i) for i in range(20)]
    data = by_length(texts, [i % 2 for i in range(20)])
    for turn in range(2):
        batches = [data.batch(step + turn * 6, 4, 0) for step in range(6)]  # 7, 7 and 6 texts: 2 each
        seen = sorted(int(row[0]) for batch in batches for row in batch.tokens)
        assert seen == list(range(20))
        for batch in batches:
            assert batch.labels is not None
            assert batch.labels.tolist() == [int(row[0]) % 2 for row in batch.tokens]
    assert sorted(int(t[0]) for part in data.parts(3) for t in part.tokens) == list(range(20))


# ---- from texts to an artifact ------------------------------------------------------------------


def bert() -> transformers.PreTrainedModel:
    """An encoder that nobody trained."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    return transformers.BertModel(config)


@pytest.mark.parametrize("make", [transformers_llama, bert], ids=["decoder", "encoder"])
def test_an_artifact_says_the_classes_that_the_trained_model_does(tmp_path: Path, make: object) -> None:
    assert callable(make)
    make().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    text = tmp_path / "rows.jsonl"
    text.write_text("\n".join(json.dumps(row) for row in rows()))
    cache = ["--cache", str(tmp_path / "cache")]
    run = CliRunner().invoke
    done = run(main, [
        "finetune", str(tmp_path / "model"), "--task", "classification", "--text", str(text),
        "--tokens", "24000", "--batch", "8", "--rate", "3e-3", "--formats", "w4g32,w8g32", "--table-format",
        "w8g32", "--average-bits", "6", "--target", "cpu-x86", "-o", str(tmp_path / "out"), *cache,
    ])  # fmt: skip
    assert done.exit_code == 0, done.output
    figures = read_trained(tmp_path / "out").figures
    assert figures["held_out_examples"] == 12 and figures["held_out_accuracy"] > 0.9, figures
    assert figures["held_out_loss_quantized"] < figures["held_out_loss_before"] / 2
    artifact = str(tmp_path / "artifact")
    done = run(main, ["compile", str(tmp_path / "out"), "--target", "cpu-x86", "-o", artifact, *cache])
    assert done.exit_code == 0, done.output
    held_out = str(tmp_path / "out" / HELD_OUT)
    done = run(main, ["eval", artifact, "--text", held_out, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert {n: found[n] for n in SCORES} == {
        n: pytest.approx(figures[f"held_out_{n}"], rel=0.005) for n in SCORES
    }
    ids = np.arange(3, 23)[None]
    by_transformers = TransformersSession(tmp_path / "out").logits(ids)
    by_artifact = open_session(tmp_path / "artifact").logits(ids)
    assert by_artifact.shape == by_transformers.shape == (1, 2)
    # products take int8 in the artifact, which moves a class's probability by a few hundredths
    says, wanted = (torch.from_numpy(logits).softmax(-1) for logits in (by_artifact, by_transformers))
    assert float((says - wanted).abs().max()) < 0.05


def test_a_head_for_other_labels_is_refused_and_one_for_these_is_kept(tmp_path: Path) -> None:
    transformers_llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    made = make_classifier(resolve(str(tmp_path / "model")), ["a", "b"], 0, tmp_path)
    assert make_classifier(made, ["a", "b"], 1, tmp_path) is made
    with pytest.raises(CompileError, match="has the classes a, b; the text has a, c"):
        make_classifier(made, ["a", "c"], 0, tmp_path)
    again = make_classifier(resolve(str(tmp_path / "model")), ["a", "b"], 0, tmp_path / "elsewhere")
    assert (made.folder / "model.safetensors").read_bytes() == (
        again.folder / "model.safetensors"
    ).read_bytes()


def test_classification_without_labelled_texts_is_refused(tmp_path: Path) -> None:
    arguments = ["finetune", "tiny", "--task", "classification", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1 and "needs labelled texts" in done.output
