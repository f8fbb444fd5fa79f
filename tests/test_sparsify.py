"""Training 2:4 masks: curvature, hardening, the final mask, resuming, and a checkpoint for compile."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from gammac.cli import main
from gammac.diagnostics import CompileError
from gammac.driver import resolve
from gammac.formats import is_two_four, keep_two
from gammac.ir import parse
from gammac.passes.masks import gates
from gammac.passes.masks.curvature import hutchinson
from gammac.passes.masks.methods import METHODS, Clock, Dense, MaskLlm, SparseForge
from gammac.passes.masks.trainer import Trainer
from gammac.passes.training.adapters import read_adapters
from gammac.runtime import reference
from gammac.sparsify.model import LanguageModel, load_model
from gammac.sparsify.run import make_method

SPARSE = [name for name, method in METHODS.items() if method.sparse]


class Toy:
    """Two layers that are to give what a teacher of their own shapes gives."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def layer(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=generator) / columns**0.5

        self.parameters = {"up": layer(32, 16), "down": layer(8, 32), "bias": torch.zeros(8)}
        self.sparse = ("up", "down")
        self.teacher = {n: p.clone() for n, p in self.parameters.items()}

    def _output(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return (x @ parameters["up"].T).tanh() @ parameters["down"].T + parameters["bias"]

    def _loss(self, parameters: Mapping[str, Tensor], seed: int) -> Tensor:
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(seed))
        return (self._output(parameters, x) - self._output(self.teacher, x)).square().mean()

    def loss(self, parameters: Mapping[str, Tensor], step: int) -> Tensor:
        return self._loss(parameters, 1000 + step)

    def error(self, parameters: Mapping[str, Tensor]) -> float:
        with torch.no_grad():
            return float(self._loss(parameters, 1))


def trained(method: Dense, steps: int = 300, **options: float) -> Trainer:
    trainer = Trainer(Toy(), method, steps, rate=3e-3, **options)  # type: ignore[arg-type]
    trainer.run()
    return trainer


# ---- curvature and masks ------------------------------------------------------------------------


def test_hutchinson_is_unbiased_and_exact_where_the_hessian_is_diagonal() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=generator)
    hessian = root @ root.T / 12 + torch.diag(torch.arange(12.0))
    for matrix, probes, bound in ((torch.diag(hessian.diagonal()), 1, 1e-5), (hessian, 600, 0.4)):
        total = torch.zeros(12)
        for seed in range(probes):
            x = torch.randn(12, generator=torch.Generator().manual_seed(9)).requires_grad_()
            (gradient,) = torch.autograd.grad(0.5 * x @ matrix @ x, [x], create_graph=True)
            total += hutchinson([gradient], [x], seed)[0]
        assert (total / probes - hessian.diagonal()).abs().max() < bound


def test_quenching_ends_in_two_of_four() -> None:
    mask = torch.rand(6, 16, generator=torch.Generator().manual_seed(2))
    assert torch.equal(gates.quenched(mask, 1.0), mask)
    assert torch.equal(gates.quenched(mask, 0.0), keep_two(mask).float())


def test_scores_rank_as_they_say() -> None:
    weight, curvature = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[64.0, 9.0, 1.0, 0.5]])
    best = {k: gates.score(k, weight, curvature).argmax().item() for k in gates.SCORES}
    assert best == {"hessian_obd": 0, "fisher": 0, "hessian_ratio": 3, "magnitude": 3}


@pytest.mark.parametrize("score", gates.SCORES)
def test_curvature_moves_where_the_score_reads_it(score: str) -> None:
    """The released code's Fisher path returned early, so that its score was the magnitude."""
    method = trained(SparseForge(score=score), 40).method
    moved = bool(method.state["up.curvature"].any())
    assert moved == (score != "magnitude")


def test_temperature_follows_updates_not_steps() -> None:
    method = SparseForge(score="magnitude", every=5)
    trainer = trained(method, 100)
    moves = [s for s in range(trainer.main) if method._moves(Clock(s, trainer.main))]
    assert float(method.state["up.updates"][0]) == len(moves)


# ---- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPARSE)
def test_every_method_ends_in_two_of_four(name: str) -> None:
    trainer = trained(METHODS[name](), 120)
    for weight in trainer.sparse:
        assert is_two_four(trainer.problem.parameters[weight]).all()
    assert trainer.report["after"] <= 1.05 * trainer.report["behind_final_mask"]
    kept = {n: float((p != 0).float().mean()) for n, p in trainer.problem.parameters.items()}
    assert kept["up"] == pytest.approx(0.5, abs=0.01)


def test_hardening_makes_masks_binary() -> None:
    last = {}
    for hardening in (True, False):
        trainer = trained(SparseForge(hardening=hardening))
        soft = [row["binarity"] for row in trainer.rows if not row["frozen"]]
        last[hardening] = soft[-1]
    assert last[True] < 0.02 and last[False] > 0.1, last


def test_the_final_mask_changes_nothing_where_masks_were_quenched() -> None:
    report = trained(SparseForge()).report
    assert report["behind_final_mask"] == pytest.approx(report["before_final_mask"], rel=1e-6)


def test_masked_weights_learn_straight_through() -> None:
    trainer = Trainer(Toy(), METHODS["ast"](), 20, rate=1e-3)
    before = {n: p.clone() for n, p in trainer.problem.parameters.items()}
    trainer._step(0)
    mask = trainer.method.state["up"]
    moved = trainer.problem.parameters["up"] != before["up"]
    assert moved[mask == 0].float().mean() > 0.9


def test_cast_shrinks_what_it_masks_out() -> None:
    free, pulled = (trained(METHODS["cast"](decay=d), 200) for d in (0.0, 0.3))  # type: ignore[call-arg]
    jumps = [t.report["behind_final_mask"] - t.report["before_final_mask"] for t in (free, pulled)]
    assert jumps[1] < 0.5 * jumps[0]
    # the toy starts at its teacher: gradients, and with them Adam's second moments, are next to nothing
    assert pulled.report["before_final_mask"] < 1


def test_maskllm_goes_down_the_slope_of_its_soft_mask() -> None:
    method, weight = MaskLlm(), torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    method.begin({"w": weight})
    at, target = Clock(3, 10), torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    assert method.mask("w", weight, at).reshape(-1, 4).sum(1).allclose(torch.tensor(2.0))
    start = method.state["w"].clone()
    method.learn("w", weight, target, None, at)
    slope = method.state["w.moved"] / (1 - method.beta)
    step, losses = 1e-5, []
    for sign in (1, -1):
        method.state["w"] = start + sign * step * slope
        losses.append(float((method.mask("w", weight, at).double() * weight * target).sum()))
    # the slope is that of the chances; logits come in times a temperature and a scale
    assert losses[0] > losses[1]


def test_dense_prunes_nothing() -> None:
    trainer = trained(METHODS["dense"](), 30)
    assert not trainer.sparse and bool((trainer.problem.parameters["up"] != 0).all())


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_run_resumes_to_equal_bits(name: str, tmp_path: Path) -> None:
    whole = Trainer(Toy(), METHODS[name](), 60, rate=1e-3, seed=3)
    whole.run()
    path = tmp_path / "state.safetensors"
    killed = Trainer(Toy(), METHODS[name](), 60, rate=1e-3, seed=3)
    killed.run(path, "key", lambda steps, _: (s for s in steps if s < 57))  # dies behind the masks' freezing
    again = Trainer(Toy(), METHODS[name](), 60, rate=1e-3, seed=3)
    again.run(path, "key")
    assert again.rows == whole.rows and again.report == whole.report
    for n, parameter in whole.problem.parameters.items():
        assert torch.equal(parameter, again.problem.parameters[n])
    other = Trainer(Toy(), METHODS[name](), 60, rate=1e-3, seed=3)
    other._restore(path, "another key")
    assert other.done == 0


def test_wrong_wishes_are_refused() -> None:
    with pytest.raises(CompileError, match="there are sparseforge, ast"):
        make_method("lottery", {})
    with pytest.raises(CompileError, match="ast has no score"):
        make_method("ast", {"score": "fisher"})
    with pytest.raises(CompileError, match="there are hessian_obd"):
        SparseForge(score="best")


# ---- the embedded model -------------------------------------------------------------------------


def test_its_attention_can_be_differentiated_twice() -> None:
    tokens = torch.randint(0, 2048, (20, 16), generator=torch.Generator().manual_seed(0))
    problem = LanguageModel(load_model(resolve("tiny")), tokens, 2, 0)
    assert len(problem.sparse) == 35 and not any("embed" in n or "head" in n for n in problem.sparse)
    trainer = Trainer(problem, SparseForge(every=1), 4)
    trainer._step(0)
    state = trainer.method.state
    assert all(bool(state[f"{n}.curvature"].any()) for n in problem.sparse)


def test_the_command_line_leaves_a_checkpoint_that_compile_takes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GAMMAC_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "sparse"
    wanted = ["--method", "ast", "--tokens", "192", "--length", "32", "--batch", "2"]
    result = CliRunner().invoke(main, ["sparsify", "tiny", "-o", str(out), *wanted])
    assert result.exit_code == 0, result.output
    assert "35 weights 2:4 in 3 steps" in result.output
    told = json.loads((out / "sparsify.json").read_text())
    assert told["method"] == "ast" and len(told["sparse"]) == 35
    assert len((out / "curves.csv").read_text().splitlines()) == 4
    if importlib.util.find_spec("matplotlib"):
        assert {"training.png", "training.svg"} <= {p.name for p in out.iterdir()}
    assert not list(tmp_path.glob("*.training.*"))
    source = resolve(str(out))
    weights = dict(load_model(source).named_parameters())
    assert all(is_two_four(weights[n]).all() for n in told["sparse"])
    few = CliRunner().invoke(main, ["sparsify", "tiny", "-o", str(tmp_path / "few"), "--tokens", "9"])
    assert few.exit_code == 1 and "less than a step" in few.stderr


def test_a_bypass_learns_is_counted_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAMMAC_CACHE", str(tmp_path / "cache"))
    out, run = tmp_path / "sparse", CliRunner().invoke
    wanted = ["--method", "ast", "--tokens", "4096", "--length", "64", "--batch", "4", "--rate", "1e-3"]
    result = run(main, ["sparsify", "tiny", "-o", str(out), "--bypass", "64", *wanted])
    assert result.exit_code == 0, result.output
    factors = read_adapters(out / "bypass.safetensors").factors
    assert len(factors) == 35 and all(bool(b.any()) for _, b in factors.values())
    assert all(a.shape[1] == 64 * a.shape[0] for a, _ in factors.values())
    quick = ["--calibration-windows", "4", "--calibration-length", "64", "--strategy", "uniform"]
    asked = ["compile", str(out), "--sparsity", "2:4", "--table-formats", "w8g64", "--backend", "tvm", *quick]
    result = run(main, [*asked, "--formats", "w4g64", "-o", str(tmp_path / "art")])
    assert result.exit_code == 0, result.output
    # 3 bits of 2:4 weights, and 32 for each of rows + columns numbers for 64 inputs of a weight
    module = parse((tmp_path / "art" / "module.gir").read_text())
    beside = sum(w.type.numel() for w in module.weights.values() if "adapter" in w.attrs)
    assert beside == sum(t.numel() for pair in factors.values() for t in pair)
    manifest = json.loads((tmp_path / "art" / "manifest.json").read_text())
    weights = sum(w.type.numel() for w in module.weights.values() if w.attrs.get("role") == "block")
    assert manifest["true_bits"] == pytest.approx(3 + 32 * beside / weights, rel=0.01)
    # what is left out of it would be another model
    text = tmp_path / "text"
    text.write_text("of every four inputs two are kept, and the others are zero. " * 300)
    wanted = ["eval", str(tmp_path / "art"), "--reference", str(out), "--text", str(text), "--windows", "1"]
    refused = run(main, wanted)
    assert refused.exit_code == 1 and "has a bypass" in refused.stderr
    refused = run(main, ["finetune", str(out), "--tokens", "64", "-o", str(tmp_path / "tuned")])
    assert refused.exit_code == 1 and "has a bypass" in refused.stderr
    with pytest.raises(CompileError, match="has a bypass"):
        reference.load_model(out)
    with pytest.raises(CompileError, match="has a bypass"):
        load_model(resolve(str(out)))


def test_a_bypass_is_refused_where_it_has_no_place(tmp_path: Path) -> None:
    for wrong, said in (
        (["--method", "maskllm", "--bypass", "64"], "maskllm trains no bypass"),
        (["--method", "dense", "--bypass", "64"], "dense trains no bypass"),
        (["--bypass", "100"], "no multiple of a bypass of 100"),
    ):
        result = CliRunner().invoke(main, ["sparsify", "tiny", "-o", str(tmp_path / "out"), *wrong])
        assert result.exit_code == 1 and said in result.stderr, result.output
