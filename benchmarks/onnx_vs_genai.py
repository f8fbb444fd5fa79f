"""Artifacts against onnxruntime-genai's own int4 model, side by side; prints a Markdown table of ratios.

    python benchmarks/onnx_vs_genai.py ARTIFACT… --model MODEL_FOLDER --cache FOLDER
    python benchmarks/onnx_vs_genai.py ARTIFACT… --peer GENAI_FOLDER

Decode is 128 tokens after a prompt of 32, prefill 512 tokens, batch 1; after one warm-up, five rounds in
turns; a ratio is the median of the rounds' ratios, above 1 the artifact is faster. Load is the time
to the first token in a fresh process, memory the peak resident there, size that of all files. The
model builder's defaults make the peer, unless a folder is given.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from gammac.runtime.bench import BenchResult, PairResult, Rounds, Work, bench, bench_pair

MIB: Final = 1 << 20
HEAD: Final = (
    "artifact", "run by", "threads", "decode ×", "prefill ×", "load ÷", "memory ÷", "size ÷", "of limit",
    "decode tok/s (peer)", "prefill tok/s (peer)", "first token s (peer)", "memory MiB (peer)",
    "size MiB (peer)",
)  # fmt: skip


def build_peer(model: Path, cache: Path, options: Sequence[str]) -> Path:
    """The model builder's int4 model of a transformers folder, built once into `cache`."""
    name = "-".join([model.resolve().name, "int4", *(o.replace("=", "-") for o in options)])
    folder = cache / name
    if not (folder / "genai_config.json").is_file():
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        command = [*builder, "-m", str(model), "-o", str(folder), "-p", "int4", "-e", "cpu"]
        extra = ["--extra_options", *options] if options else []
        subprocess.run([*command, *extra], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder


def row(artifact: Path, runtime: str, pair: PairResult, alone: BenchResult) -> list[str]:
    """The cells of one comparison."""
    (load, load_peer), (size, size_peer) = pair.load, pair.size_bytes
    return [
        artifact.name,
        runtime,
        str(pair.threads),
        f"**{pair.decode_ratio:.2f}** {spread(*pair.decode)}",
        f"**{pair.prefill_ratio:.2f}** {spread(*pair.prefill)}",
        f"{load.first_token_seconds / load_peer.first_token_seconds:.2f}",
        f"{load.peak_rss_bytes / load_peer.peak_rss_bytes:.2f}",
        f"{size / size_peer:.2f}",
        f"{alone.share_of_limit:.0%}" if runtime == "gammac" else "",
        both(pair.decode[0].median, pair.decode[1].median, digits=1),
        both(pair.prefill[0].median, pair.prefill[1].median, digits=0),
        both(load.first_token_seconds, load_peer.first_token_seconds, digits=2),
        both(load.peak_rss_bytes / MIB, load_peer.peak_rss_bytes / MIB, digits=0),
        both(size / MIB, size_peer / MIB, digits=1),
    ]


def spread(ours: Rounds, theirs: Rounds) -> str:
    """The lowest and highest ratio of a round: how far to trust the median."""
    ratios = [a / b for a, b in zip(ours.values, theirs.values, strict=True)]
    return f"({min(ratios):.2f}–{max(ratios):.2f})"


def both(ours: float, theirs: float, digits: int) -> str:
    """`ours (theirs)`."""
    return f"{ours:.{digits}f} ({theirs:.{digits}f})"


def rows(
    artifacts: Sequence[Path], peer: Path, threads: Sequence[int], work: Work, spinning: bool
) -> Iterator[list[str]]:
    """One row for each artifact, number of threads and runtime."""
    for artifact in artifacts:
        for count in threads:
            alone = bench(artifact, threads=count, work=work, spinning=spinning)
            for runtime in ("gammac", "genai"):
                pair = bench_pair(
                    artifact, peer, threads=count, work=work, runtime=runtime, spinning=spinning
                )
                yield row(artifact, runtime, pair, alone)


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--peer", type=Path, help="a folder that onnxruntime-genai runs")
    parser.add_argument("--model", type=Path, help="the transformers folder that the peer is built from")
    parser.add_argument("--cache", type=Path, default=Path("build/peers"), help="where built peers are kept")
    parser.add_argument("--peer-option", action="append", default=[], help="for the builder: block_size=64 …")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-spinning", action="store_true", help="for both: on a machine with other work")
    args = parser.parse_args(argv)
    if (args.peer is None) == (args.model is None):
        parser.error("give either --peer or --model")
    peer = args.peer or build_peer(args.model, args.cache, args.peer_option)
    print(f"peer: {peer.name} in onnxruntime-genai; {args.rounds} rounds\n")
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
    for cells in rows(args.artifacts, peer, args.threads, Work(rounds=args.rounds), not args.no_spinning):
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
