"""Times an artifact's static library beside its model.so under TVM's runtime; prints a Markdown table.

    gammac compile MODEL --backend tvm --budget 4 --static-library -o ARTIFACT
    python benchmarks/static_library.py ARTIFACT [--threads 1 2] [--rounds 5]

Decode is 128 tokens after a prompt of 32, prefill 512 tokens; both are run in turns, after one warm-up, and
medians are printed, with the median of the rounds' ratios: above 1 the static library is faster.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path
from statistics import median
from typing import Final

from gammac.runtime.runners import FIRST_TOKEN, SessionRunner
from gammac.runtime.session import open_session
from gammac.targets.tvm.names import PARAMS_NAME, STATIC_NAME
from gammac.targets.tvm.toolchain import demand_linker

PROMPT, NEW, PREFILL = 32, 128, 512
PROGRAM: Final = f"""\
#define _DEFAULT_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include "gammac_model.h"

static double now(void) {{
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}}

static int likeliest(const float* logits) {{
  int best = 0;
  for (int i = 1; i < GAMMAC_VOCAB_SIZE; ++i) {{
    if (logits[i] > logits[best]) best = i;
  }}
  return best;
}}

int main(int argc, char** argv) {{
  gammac_model* model;
  const float* logits;
  int32_t tokens[{PREFILL}];
  int code = argc == 3 ? gammac_open(argv[1], atoi(argv[2]), &model) : GAMMAC_UNREADABLE;
  for (int i = 0; i < {PREFILL}; ++i) tokens[i] = ({FIRST_TOKEN} + 7 * i) % GAMMAC_VOCAB_SIZE;
  for (int round = 0; round < 2 && code == GAMMAC_OK; ++round) {{  // the first one warms up
    gammac_reset(model);
    const double start = now();
    code = gammac_prefill(model, tokens, {PREFILL}, &logits);
    const double prefill = now() - start;
    gammac_reset(model);
    if (code == GAMMAC_OK) code = gammac_prefill(model, tokens, {PROMPT}, &logits);
    const double first = now();
    for (int i = 0; i < {NEW} && code == GAMMAC_OK; ++i) {{
      code = gammac_decode(model, likeliest(logits), &logits);
    }}
    if (round == 1) printf("%g %g\\n", prefill, now() - first);
  }}
  if (code != GAMMAC_OK) fprintf(stderr, "%s\\n", gammac_message(code));
  return code != GAMMAC_OK;
}}
"""


def link(artifact: Path, work: Path) -> Path:
    """The program above with the artifact's library."""
    source, program = work / "timed.c", work / "timed"
    source.write_text(PROGRAM)
    command = [*demand_linker(), "-O2", f"-I{artifact}", "-o", str(program), str(source)]
    subprocess.run([*command, str(artifact / STATIC_NAME), "-lm", "-pthread"], check=True)
    return program


def static_seconds(program: Path, artifact: Path, threads: int) -> tuple[float, float]:
    """Seconds of the prefill and of the decode."""
    command = [str(program), str(artifact / PARAMS_NAME), str(threads)]
    prefill, decode = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(prefill), float(decode)


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    wish = parser.parse_args()
    print("| threads | | static tok/s | model.so tok/s | × |\n|--:|---|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as work:
        program = link(wish.artifact, Path(work))
        for threads in wish.threads:
            runner = SessionRunner(open_session(wish.artifact, threads))
            rounds = []
            for _ in range(wish.rounds + 1):
                ours = static_seconds(program, wish.artifact, threads)
                rounds.append((ours, (runner.prefill_seconds(PREFILL), runner.decode_seconds(PROMPT, NEW))))
            for i, (name, count) in enumerate((("prefill", PREFILL), ("decode", NEW))):
                ours, theirs = ([count / r[side][i] for r in rounds[1:]] for side in (0, 1))
                ratio = median(a / b for a, b in zip(ours, theirs, strict=True))
                print(f"| {threads} | {name} | {median(ours):.1f} | {median(theirs):.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
