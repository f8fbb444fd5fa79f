"""The command line: the only folder that prints or exits. Everything heavy is imported when needed."""

from gammac.cli.compile import compile_command
from gammac.cli.console import main
from gammac.cli.finetune import finetune_command
from gammac.cli.ir import diff, inspect, opt, passes_command
from gammac.cli.lists import zoo
from gammac.cli.run import bench_command, eval_command, run
from gammac.cli.sparsify import sparsify_command
from gammac.cli.study import study_command
from gammac.cli.sweep import sweep_command
from gammac.cli.targets import targets_group

# in the order of a user's work
for _command in (
    compile_command, finetune_command, run, eval_command, bench_command, sweep_command, study_command,
    sparsify_command, inspect, diff, opt, passes_command, targets_group, zoo,
):  # fmt: skip
    main.add_command(_command)

__all__ = ["main"]
