"""Artifacts beside other runtimes' own models of the same source; prints a Markdown table of ratios.

    python benchmarks/side_by_side.py ARTIFACT… --vs llama.cpp:Q4_0,openvino,onnxruntime --model MODEL

Decode is 128 tokens after a prompt of 32, prefill 512 tokens, batch 1; after one warm-up, five rounds in
turns; a ratio is the median of the rounds' ratios, above 1 the artifact is faster. Load is the time
to the first token in a fresh process, memory the peak resident there, size that of all files. Each artifact
meets every peer in turns of its own, so that the peers' caches and threads don't add up.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from gammac.models_zoo.fetch import default_cache
from gammac.peers import peers_of
from gammac.runtime.bench import Rounds, Timed, Work, bench, bench_together, ratio
from gammac.runtime.peers import Contestant

HEAD: Final = (
    "artifact", "peer", "threads", "decode ×", "prefill ×", "load ÷", "memory ÷", "size ÷",
    "decode tok/s (peer)", "prefill tok/s (peer)", "first token s (peer)", "memory MB (peer)",
    "size MB (peer)", "GB/s (peer)",
)  # fmt: skip


def row(ours: Timed, peer: Timed, threads: int) -> list[str]:
    """The cells of one comparison."""
    load, load_peer = ours.load, peer.load
    return [
        ours.contestant.label,
        peer.contestant.label,
        str(threads),
        f"**{ratio(ours.decode, peer.decode):.2f}** {spread(ours.decode, peer.decode)}",
        f"**{ratio(ours.prefill, peer.prefill):.2f}** {spread(ours.prefill, peer.prefill)}",
        f"{load.first_token_seconds / load_peer.first_token_seconds:.2f}",
        f"{load.peak_rss_bytes / load_peer.peak_rss_bytes:.2f}",
        f"{ours.size_bytes / peer.size_bytes:.2f}",
        both(ours.decode.median, peer.decode.median, digits=1),
        both(ours.prefill.median, peer.prefill.median, digits=0),
        both(load.first_token_seconds, load_peer.first_token_seconds, digits=2),
        both(load.peak_rss_bytes / 1e6, load_peer.peak_rss_bytes / 1e6, digits=0),
        both(ours.size_bytes / 1e6, peer.size_bytes / 1e6, digits=1),
        both(ours.bytes_per_second / 1e9, peer.bytes_per_second / 1e9, digits=1),
    ]


def spread(ours: Rounds, theirs: Rounds) -> str:
    """The lowest and highest ratio of a round: how far to trust the median."""
    ratios = [a / b for a, b in zip(ours.values, theirs.values, strict=True)]
    return f"({min(ratios):.2f}–{max(ratios):.2f})"


def both(ours: float, theirs: float, digits: int) -> str:
    """`ours (theirs)`."""
    return f"{ours:.{digits}f} ({theirs:.{digits}f})"


def rows(
    artifacts: Sequence[Path], peers: Sequence[Contestant], threads: Sequence[int], work: Work
) -> Iterator[list[str]]:
    """One row for each artifact, number of threads and peer."""
    for artifact in artifacts:
        ours = Contestant(artifact.name, "gammac", artifact)
        for count in threads:
            for peer in peers:
                mine, theirs = bench_together([ours, peer], threads=count, work=work)
                yield row(mine, theirs, count)


def main(argv: list[str] | None = None) -> None:
    """Print the table, and how near each artifact comes to the memory's limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--vs", required=True, help="runtimes with types, or paths, separated by commas")
    parser.add_argument("--model", help="what the peers' models are built from")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--genai", action="store_true", help="run ONNX artifacts in onnxruntime-genai as well"
    )
    args = parser.parse_args(argv)
    peers = peers_of(args.vs, args.model, default_cache(), print)
    if args.genai:
        peers += [Contestant(f"{a.name} in genai", "onnxruntime", a) for a in args.artifacts]
    work = Work(rounds=args.rounds)
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
    for cells in rows(args.artifacts, peers, args.threads, work):
        print("| " + " | ".join(cells) + " |", flush=True)
    for artifact in args.artifacts:
        for count in args.threads:
            share = bench(artifact, threads=count, work=work).share_of_limit
            print(f"{artifact.name}, {count} threads: {share:.0%} of the streaming read", flush=True)


if __name__ == "__main__":
    main()
