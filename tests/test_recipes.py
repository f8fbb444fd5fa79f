"""Recipes: fields that exist, and a user's own choice that holds."""

from typing import Any

import click
import pytest

from gammac.cli.compile import _follow_recipe, compile_command
from gammac.passes import Choices, default_pipeline
from gammac.passes.recipes import BEST_TRELLIS, RECIPES
from gammac.targets.target import load_target


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_pipeline(name: str) -> None:
    fields: dict[str, Any] = dict(RECIPES[name])
    names = [p.name for p in default_pipeline(Choices(**fields), "onnx", compiler=True)]
    assert ("distill" in names) == (name == "best") and ("gamma" in names) == (name != "fast")


def test_the_command_line_offers_them_all() -> None:
    (option,) = (p for p in compile_command.params if p.name == "recipe")
    assert isinstance(option.type, click.Choice) and set(option.type.choices) == set(RECIPES)


def chosen(*arguments: str) -> dict[str, Any]:
    with compile_command.make_context("compile", ["tiny", "-o", "out", *arguments]) as context:
        options = dict(context.params)
        _follow_recipe(options)
    return options


def test_a_recipe_sets_what_was_left_open() -> None:
    best = chosen("--recipe", "best", "--backend", "onnx")
    assert best["learn_rounding"] and best["distill"] and best["guided"] and best["strategy"] == "gamma"
    assert chosen("--recipe", "fast")["strategy"] == "fisher"
    assert not chosen()["learn_rounding"]


def test_the_best_is_trellis_codes_where_a_kernel_reads_them() -> None:
    for target in ("cpu-x86-avx512", "cpu-x86-avx2", "cuda", "edge"):
        found = chosen("--recipe", "best", "--target", target, "--backend", "tvm")
        assert {name: found[name] for name in BEST_TRELLIS} == BEST_TRELLIS and not found["learn_rounding"]
    # RISC-V's target lists no such kernel, and who chooses formats gets a quantizer of those
    chosen_formats = (("--formats", "w3g64"), ("--group-size", "32"), ("--symmetric",))
    for more in (("--target", "edge-riscv64-k1"), *(("--target", "cuda", *f) for f in chosen_formats)):
        found = chosen("--recipe", "best", *more)
        assert load_target(found["target"]).emitter == "tvm"
        assert found["quantizer"] == "gptq" and found["learn_rounding"] and not found["rotate"]


def test_what_the_user_says_holds() -> None:
    found = chosen("--recipe", "best", "--backend", "onnx", "--no-learn-rounding", "--strategy", "hawq")
    assert not found["learn_rounding"] and found["distill"] and found["strategy"] == "hawq"
    # even where it is the default
    assert chosen("--recipe", "fast", "--strategy", "gamma")["strategy"] == "gamma"
