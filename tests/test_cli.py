"""The command line, as a user types it: the main job on the embedded model, and every user's mistake."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from gammac.cli import main
from gammac.ir import parse, to_text
from gammac.models_zoo.fetch import fetch

TINY = fetch("tiny")
QUICK = ["--calibration-windows", "8", "--calibration-length", "128"]

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def gammac(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Run:
    """Run the command line; no exception but an exit may come out of it."""
    monkeypatch.setenv("GAMMAC_CACHE", str(cache))

    def run(*arguments: object) -> Result:
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Path]:
    """`tiny` at 3 bits, with its dumps."""
    folder = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GAMMAC_CACHE", str(cache))
        arguments = ["compile", "tiny", "--budget", "3", "-o", str(folder / "tiny"), *QUICK]
        result = CliRunner().invoke(main, [*arguments, "--dump-ir", str(folder / "ir"), "--timings"])
    assert result.exit_code == 0, result.output
    assert "payload 3.000 bits" in result.output and "next: gammac run" in result.output
    assert "activations in int8: KL 0.0" in result.output
    yield folder / "tiny"


def fails(result: Result, *said: str) -> None:
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    for text in said:
        assert text in result.stderr, result.stderr


# ---- the main job -------------------------------------------------------------------------------


def test_everything_that_helps_few_bits_together(gammac: Run, tmp_path: Path) -> None:
    """Rotated, guided, learnt: the artifact that comes of it is checked against the original, and runs."""
    said = gammac(
        "compile", "tiny", "--rotate", "--guided", "--learn-rounding", "--strategy", "fisher{windows=4}",
        "--refine", "--budget", 2.5, "-o", tmp_path / "out", "--dump-ir", tmp_path / "ir", *QUICK,
    )  # fmt: skip
    assert said.exit_code == 0, said.output
    assert "2 weights stay f32: rotation, rotation-back" in said.output
    module = parse((tmp_path / "out" / "module.gir").read_text())
    rounding = module.attrs["rounding"]
    assert isinstance(rounding, dict) and rounding["after"] < rounding["before"]
    names = [path.stem.partition("-")[2] for path in sorted((tmp_path / "ir").iterdir())]
    assert names.index("rotate") < names.index("collect_guided_grams") < names.index("learn_rounding")
    text = gammac("run", tmp_path / "out", "--prompt", "The history of", "--max-new-tokens", 8)
    assert text.exit_code == 0 and text.stdout.strip()


def test_weights_and_activations_of_eight_bits(gammac: Run, tmp_path: Path) -> None:
    said = gammac(
        "compile", "tiny", "--smooth-quant", "--activations", "a8", "--quantizer", "rtn",
        "--strategy", "uniform", "-o", tmp_path / "out", *QUICK,
    )  # fmt: skip
    assert said.exit_code == 0, said.output
    assert "payload 8.000 bits" in said.output and "read activations of 8 bits" in said.output
    module = parse((tmp_path / "out" / "module.gir").read_text())
    rounded = [op for op in module.functions["decode"].ops if op.name == "fake_quantize"]
    assert len(rounded) == 20 and all(op.attrs == {"bits": 8} for op in rounded)
    formats = {w.attrs["stored"] for w in module.weights.values() if w.attrs.get("role") == "block"}
    assert formats == {"w8channel-sym"}
    text = gammac("run", tmp_path / "out", "--prompt", "The history of", "--max-new-tokens", 8)
    assert text.exit_code == 0 and text.stdout.strip()


def test_awq_from_the_command_line(gammac: Run, tmp_path: Path) -> None:
    said = gammac(
        "compile", "tiny", "--quantizer", "awq", "--formats", "w3g64", "--strategy", "uniform",
        "-o", tmp_path / "out", "--dump-ir", tmp_path / "ir", *QUICK,
    )  # fmt: skip
    assert said.exit_code == 0, said.output
    (dump,) = (tmp_path / "ir").glob("*-awq.gir")
    weights = parse(dump.read_text()).weights
    scaled = [w.attrs["awq"] for w in weights.values() if "awq" in w.attrs]
    assert len(scaled) == 30 and any(one["alpha"] > 0 for one in scaled)  # type: ignore[index,operator,call-overload]
    clips = {n.split(".")[-2] for n, w in weights.items() if w.attrs.get("clip") == "none"}
    assert clips == {"q_proj", "k_proj"}
    estimate = gammac("compile", "tiny", "--quantizer", "awq", "--smooth-quant", "--dry-run", "-o", "x")
    assert estimate.exit_code == 0, estimate.output


def test_the_artifact_keeps_its_promises(artifact: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["payload_bits"] <= 3.0
    assert manifest["model"] == "tiny" and manifest["budgets"] == ["3"]
    assert str(Path.home()) not in (artifact / "manifest.json").read_text()
    module = parse((artifact / "module.gir").read_text())
    assert set(module.functions) == {"decode"}
    # what the weights take on disk is what the manifest says, within 2 %
    floats = sum(w.type.numel() * 4 for w in module.weights.values() if "stored" not in w.attrs)
    blocks = [w for w in module.weights.values() if w.attrs.get("role") == "block"]
    table = next(w for w in module.weights.values() if w.attrs.get("role") == "table")
    expected = sum(w.type.numel() for w in blocks) * manifest["true_bits"] / 8
    expected += table.type.numel() * (8 + 24 / 64) / 8 + floats
    found = (artifact / "model.onnx.data").stat().st_size
    assert found == pytest.approx(expected, rel=0.02)


def test_bench_beside_peers(gammac: Run, artifact: Path, tmp_path: Path) -> None:
    fails(gammac("bench", artifact, "--vs", tmp_path, "--threads", 1), "nothing that can be compared with")
    fails(gammac("bench", artifact, "--vs", "llama.ccp", "--threads", 1), "no peer 'llama.ccp'")
    twin = tmp_path / "twin"
    shutil.copytree(artifact, twin)
    found = json.loads(
        gammac("bench", artifact, "--vs", twin, "--rounds", 1, "--threads", 1, "--json").stdout
    )
    assert list(found) == [artifact.name, str(twin)]
    assert found[str(twin)]["size ratio"] == 1.0
    size, rate = found[str(twin)]["size MB"], found[str(twin)]["decode tokens/s"]
    assert found[str(twin)]["GB/s"] == pytest.approx(size * rate / 1e3)
    assert found[str(twin)]["decode ratio"] == pytest.approx(
        found[artifact.name]["decode tokens/s"] / found[str(twin)]["decode tokens/s"]
    )


def test_run_generates_text(gammac: Run, artifact: Path) -> None:
    first, again = (
        gammac("run", artifact, "--prompt", "The history of", "--max-new-tokens", 12, "--threads", 1)
        for _ in range(2)
    )
    assert first.exit_code == 0 and len(first.stdout.strip()) > 10
    assert first.stdout == again.stdout


def test_eval_compares_with_the_original(gammac: Run, artifact: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((Path(TINY).parent / "calibration.txt").read_text()[:20_000])
    result = gammac("eval", artifact, "--text", text, "--windows", 2, "--reference", "tiny", "--json")
    found = json.loads(result.stdout)
    assert found["tokens"] == 2 * 1023
    assert found["ppl reference"] < found["ppl"] < 1.5 * found["ppl reference"]
    assert 0 < found["kl"] < 0.5 and found["top1 agreement"] > 0.7


def test_every_pass_left_a_dump_that_can_be_resumed(gammac: Run, artifact: Path, tmp_path: Path) -> None:
    dumps = sorted((artifact.parent / "ir").glob("*.gir"))
    assert [p.stem.split("-", 1)[1] for p in dumps] == [
        "fold_constants", "raise_patterns", "insert_kv_cache", "keep_precision", "collect_grams",
        "candidates", "gamma", "allocate", "refine", "quantize", "legalize_onnx",
    ]  # fmt: skip
    for path in dumps:
        assert to_text(parse(path.read_text(), str(path))) == path.read_text()
    out = tmp_path / "again.gir"
    for first, passes, last in (6, "allocate{budget=3}", 7), (8, "quantize,legalize_onnx", -1):
        result = gammac("opt", dumps[first], "-p", passes, "-o", out)
        assert result.exit_code == 0, result.output
        again, before = (parse(p.read_text()).weights for p in (out, dumps[last]))
        assert {n: w.digest for n, w in again.items()} == {n: w.digest for n, w in before.items()}
        assert {n: w.attrs.get("format") for n, w in again.items()} == {
            n: w.attrs.get("format") for n, w in before.items()
        }


def test_diff_shows_what_a_pass_changed(gammac: Run, artifact: Path) -> None:
    dumps = sorted((artifact.parent / "ir").glob("*.gir"))
    changed = gammac("diff", dumps[6], dumps[7])
    assert changed.exit_code == 1
    assert "format =" in changed.stdout and "@@ func" not in changed.stdout
    same = gammac("diff", dumps[0], dumps[0])
    assert same.exit_code == 0 and same.stdout == ""


def test_inspect_shows_an_artifact_a_dump_and_one_weight(gammac: Run, artifact: Path) -> None:
    shown = gammac("inspect", artifact)
    assert "MatMul" not in shown.stdout and "gqa" in shown.stdout and "payload 3.000" in shown.stdout
    dump = next((artifact.parent / "ir").glob("*gamma.gir"))
    assert "@prefill" in gammac("inspect", dump).stdout
    one = gammac("inspect", dump, "--weight", "layers.0.mlp.up_proj")
    assert "scores = {w2g64" in one.stdout and "it has no format yet" in one.stdout
    allocated = next((artifact.parent / "ir").glob("*allocate.gir"))
    why = gammac("inspect", allocated, "--weight", "layers.0.mlp.up_proj").stdout
    assert "one step from w" in why and "best not taken elsewhere" in why and "decided together" in why
    fused = gammac("inspect", artifact, "--weight", "layers.0.self_attn.q_proj").stdout
    assert "q_proj-k_proj-v_proj" in fused and "scores are not in this file" in fused
    fails(
        gammac("inspect", dump, "--weight", "up_proj"), "stands for 5 weights", "model.layers.0.mlp.up_proj"
    )
    fails(gammac("inspect", dump, "--weight", "layers.0.mlp"), "there is no weight", "perhaps model.layers.0")


def test_equal_requests_give_equal_bytes(gammac: Run, artifact: Path, tmp_path: Path) -> None:
    """Also without any of the cache, and with one thread in place of several."""
    out = tmp_path / "again"
    result = gammac("compile", "tiny", "--budget", 3, "-o", out, *QUICK, "--cache", tmp_path / "cache")
    assert result.exit_code == 0, result.output
    names = sorted(p.name for p in artifact.iterdir())
    assert names == sorted(p.name for p in out.iterdir())
    for name in names:
        assert (out / name).read_bytes() == (artifact / name).read_bytes(), name


def test_another_budget_starts_at_the_allocation(gammac: Run, artifact: Path, tmp_path: Path) -> None:
    arguments = ["compile", "tiny", "--budget", "2.5", "--budget", "4MB", "-o", tmp_path / "b", *QUICK]
    result = gammac(*arguments, "--timings")
    assert result.exit_code == 0, result.output
    cached = {
        line.split("│")[1].strip(): "from the cache" in line
        for line in result.stdout.splitlines()
        if "│" in line
    }
    assert cached["gamma"] and cached["candidates"] and not cached["allocate"]
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert 2.4 < manifest["payload_bits"] <= 2.5


def test_a_budget_in_bytes_is_never_exceeded(gammac: Run, artifact: Path, tmp_path: Path) -> None:
    result = gammac("compile", "tiny", "--budget", "2.25MB", "-o", tmp_path / "b", *QUICK)
    assert result.exit_code == 0, result.output
    size = sum(p.stat().st_size for p in (tmp_path / "b").iterdir())
    assert 2_000_000 < size <= 2_250_000


def test_without_a_compiler_rows_are_split(gammac: Run, artifact: Path, tmp_path: Path) -> None:
    result = gammac(
        "compile", "tiny", "--target", "cpu-x86-avx512", "--portable", "-o", tmp_path / "p", *QUICK
    )
    assert result.exit_code == 0, result.output
    assert "rows are split" in result.stdout
    manifest = json.loads((tmp_path / "p" / "manifest.json").read_text())
    assert manifest["library"] == "" and manifest["payload_bits"] <= 3.0
    assert {f[:2] for f in manifest["allocation"].values()} <= {"w2", "w4", "w8"}
    shown = gammac("run", tmp_path / "p", "--prompt", "The", "--max-new-tokens", 4)
    assert shown.exit_code == 0


def test_uniform_and_fallback_group_sizes_are_said(gammac: Run, tmp_path: Path) -> None:
    result = gammac(
        "compile", "tiny", "--formats", "w4g96", "--quantizer", "rtn", "--strategy", "weight_mse",
        "--budget", 4, "-o", tmp_path / "u", *QUICK,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "got another group size" in result.stdout
    manifest = json.loads((tmp_path / "u" / "manifest.json").read_text())
    assert manifest["fallbacks"] and all(
        "w4g96 does not fit" in why for why in manifest["fallbacks"].values()
    )


def test_dry_run_tells_and_does_nothing(gammac: Run, tmp_path: Path) -> None:
    result = gammac("compile", "tiny", "--budget", 3, "--dry-run", "-o", tmp_path / "none")
    assert result.exit_code == 0, result.output
    for name in ("size", "true bits", "predicted decode", "memory at run time", "compile time"):
        assert name in result.stdout
    assert not (tmp_path / "none").exists()


def test_only_a_dry_run_needs_no_folder(gammac: Run) -> None:
    assert "compile memory" in gammac("compile", "tiny", "--budget", 3, "--dry-run").stdout
    refused = gammac("compile", "tiny", "--budget", 3)
    assert refused.exit_code == 2 and "Missing option '-o' / '--out'" in refused.output


def test_a_recipe_compiles_where_its_time_is_not_known(gammac: Run, tmp_path: Path) -> None:
    limit = ["--max-loss", "1", "--objective", "latency"]
    fails(gammac("compile", "tiny", "--recipe", "fast", "--dry-run", *limit), "a dry run makes none")
    said = gammac("compile", "tiny", "--recipe", "fast", *limit, *QUICK, "-o", tmp_path / "out")
    assert said.exit_code == 0 and "recipe fast: what it takes is not known beforehand" in said.stdout
    known = gammac("compile", "tiny", "--recipe", "fast", *QUICK, "-o", tmp_path / "known")
    assert re.search(r"recipe fast: about \d+ s", known.stdout)


@pytest.mark.parametrize(
    "arguments",
    [
        ["compile", "tiny", "--calibration-windows", "0"],
        ["compile", "tiny", "--calibration-length", "1"],
        ["eval", "out", "--windows", "0"],
        ["eval", "out", "--limit", "0"],
        ["bench", "out", "--rounds", "0"],
        ["run", "out", "--prompt", "a", "--top-k", "-1"],
        ["run", "out", "--prompt", "a", "--max-new-tokens", "0"],
        ["run", "out", "--prompt", "a", "--temperature", "-1"],
        ["run", "out", "--prompt", "a", "--top-p", "0"],
    ],
)
def test_numbers_out_of_range_are_refused_at_once(gammac: Run, arguments: list[str]) -> None:
    refused = gammac(*arguments)
    assert refused.exit_code == 2 and f"Invalid value for '{arguments[-2]}'" in refused.output


def test_lists(gammac: Run) -> None:
    assert "smollm2-135m" in gammac("zoo", "list").stdout
    assert gammac("zoo", "fetch", "tiny").stdout.strip().endswith("tiny")
    assert "allocate" in gammac("passes").stdout
    assert "cpu-x86-avx512" in gammac("targets").stdout
    assert "MatMulNBits" in gammac("targets", "show", "cpu").stdout
    assert "compile" in gammac("--help").stdout


# ---- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "tpu"], ["no target 'tpu'", "there are", "cpu"]),
        (["--budget", "1"], ["the smallest possible is 2.000 payload bits"]),
        (["--budget", "1MB"], ["the smallest possible is"]),
        (["--budget", "0.001ms/token"], ["the smallest possible is", "ms/token"]),
        (["--budget", "tiny"], ["tiny", "3bpw"]),
        (["--budget", "-3"], ["-3"]),
        (["--formats", "w9g64"], ["w9g64", "write w4g64"]),
        (["--quantizer", "awq2"], ["no quantizer 'awq2'", "gptq"]),
        (["--activations", "a9"], ["'a9' is no activation format", "a8token"]),
        (["--smooth-quant", "--smooth-alpha", "2"], ["alpha=2.0", "at least 0 and at most 1"]),
        (["--strategy", "gama"], ["no strategy 'gama'", "fisher"]),
        (["--strategy", "fisher{window=3}"], ["fisher: no option 'window=3'", "windows"]),
        (["--strategy", "gamma{target=9}"], ["gamma: target=9", "between 2 and 8"]),
        (["--strategy", "greedy_kl{windows=0}"], ["greedy_kl: windows=0", "at least 1"]),
        (["--strategy", "amq{initial=0}"], ["amq: initial=0", "at least 2"]),
        (["--calibration", "nowhere.txt"], ["nowhere.txt can't be read"]),
    ],
)
def test_mistakes_in_options(gammac: Run, tmp_path: Path, arguments: list[str], said: list[str]) -> None:
    fails(gammac("compile", "tiny", "-o", tmp_path / "out", *QUICK, *arguments), *said)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_directory_that_is_no_model(gammac: Run, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    fails(gammac("compile", tmp_path / "model", "-o", tmp_path / "out"), "config.json")


def test_a_name_that_nobody_knows(gammac: Run, tmp_path: Path) -> None:
    fails(gammac("compile", "no-such-model", "-o", tmp_path / "out"), "no-such-model")


def copy_of_tiny(folder: Path) -> Path:
    shutil.copytree(TINY, folder)
    return folder


def test_truncated_safetensors(gammac: Run, tmp_path: Path) -> None:
    model = copy_of_tiny(tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    fails(gammac("compile", model, "-o", tmp_path / "out"), "model.safetensors")


def test_weights_that_are_not_numbers(gammac: Run, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = copy_of_tiny(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    fails(gammac("compile", model, "-o", tmp_path / "out", *QUICK), "model.layers.1.mlp.up_proj", "NaN")


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "libgammac_op.so", "tokenizer.json"])
def test_one_flipped_byte_is_found(gammac: Run, artifact: Path, tmp_path: Path, name: str) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(artifact, damaged)
    content = bytearray((damaged / name).read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / name).write_bytes(content)
    fails(gammac("run", damaged, "--prompt", "The"), f"{name} has changed", "compile it again")


def test_a_gir_with_an_undefined_value(gammac: Run, artifact: Path, tmp_path: Path) -> None:
    text = (artifact / "module.gir").read_text()
    bad = tmp_path / "bad.gir"
    bad.write_text(text.replace("%input_ids, @", "%nothing, @", 1))
    fails(gammac("opt", bad, "-p", "fold_constants"), "bad.gir:", "%nothing is not defined here", "^")
    fails(gammac("opt", bad, "-p", "no_such_pass"), "no pass 'no_such_pass'")
    fails(gammac("opt", tmp_path / "none.gir", "-p", "quantize"), "none.gir")


def test_a_read_only_output_folder(gammac: Run, tmp_path: Path) -> None:
    """Root may write anywhere, but not below a file."""
    (tmp_path / "file").write_text("")
    fails(gammac("compile", "tiny", "-o", tmp_path / "file" / "out", *QUICK), "written")


def test_an_output_folder_with_other_things_in_it(gammac: Run, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    fails(gammac("compile", "tiny", "-o", tmp_path, *QUICK), "not an artifact")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_eval_without_anything_to_do(gammac: Run, artifact: Path) -> None:
    fails(gammac("eval", artifact), "give --text FILE")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random BERT with the tokenizer of `tiny`."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(vocab_size=2048, max_position_embeddings=256, **sizes)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder / name)
    return folder


def test_an_encoder_compiles_and_says_what_it_is_not(gammac: Run, encoder: Path, tmp_path: Path) -> None:
    for strategy in ("fisher", "hawq{probes=2}"):
        result = gammac("compile", encoder, "-o", tmp_path / "b", *QUICK, "--strategy", strategy)
        fails(result, "is an encoder", "--strategy weight_mse")
    result = gammac("compile", encoder, "-o", tmp_path / "b", *QUICK, "--strategy", "weight_mse")
    assert result.exit_code == 0, result.output
    assert "stay f32: bert.embeddings" in result.stdout and "cosine 0.99" in result.stdout
    fails(gammac("run", tmp_path / "b", "--prompt", "The"), "an encoder has no next token")
