"""Texts per second of vecmill and of the servers it may replace: same weights, same texts, each at its best.

Compared are a server as people write it by hand (`reference`), Infinity and vLLM, the last two from their packages in
environments that the first run makes; and in process, for scale, vecmill's model code without a server (the packed
loop) and sentence-transformers. Each round starts one server at a time, warms it up, sends it functions and classes of
Python's standard library over several connections, and stops it again. The rounds alternate; a pass during which other
programs used the processor is repeated.

    python -m benchmarks.throughput
    python -m benchmarks.throughput --servers vecmill,reference
    python -m benchmarks.throughput --vllm="VLLM_CPU_NUM_OF_RESERVED_CPU=0 --runner pooling --dtype bfloat16"
    python -m benchmarks.throughput --serve --dtype float32   # all after --serve goes to `vecmill serve`

Ends with status 1 where vecmill was not measured or two sides' vectors differ; a target that is missed is only told.
"""

import argparse
import sys
from typing import Any

from benchmarks.host import describe_host
from benchmarks.results import publish
from benchmarks.server_options import add_server_options, wanted
from benchmarks.texts import sample_texts, tokenize
from benchmarks.throughput_report import OURS, agrees, print_summary, summarise
from benchmarks.throughput_rounds import Plan, measure_rounds


def parse_arguments() -> argparse.Namespace:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--warm-up", type=int, default=200, help="texts before each round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of each side (default: %(default)s)")
    parser.add_argument(
        "--retries", type=int, default=5, help="passes repeated when other programs were busy (default: %(default)s)"
    )
    parser.add_argument(
        "--minutes", type=float, default=12, help="no round begins that would end later (default: %(default)s)"
    )
    parser.add_argument("--connections", type=int, default=4, help="at a time (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="texts per request (default: %(default)s)")
    parser.add_argument("--no-store", action="store_true", help="write no file under benchmarks/results")
    add_server_options(parser)
    return parser.parse_args()


def main() -> int:
    """Measure, print, store; the exit status."""
    options = parse_arguments()
    servers = wanted(options)
    texts = sample_texts(options.texts)
    tokens = sum(map(len, tokenize(servers.model_folder, texts)))
    plan = Plan(
        texts, options.warm_up, options.connections, options.batch, options.rounds, options.retries, options.minutes
    )
    found = summarise(measure_rounds(options.servers, servers, plan), len(texts), tokens)
    print_summary(found, len(texts), tokens)
    settings: dict[str, Any] = {
        key: getattr(options, key) for key in ("servers", "warm_up", "connections", "batch", "serve")
    }
    about = {"texts": len(texts), "tokens": tokens, "repeated": plan.repeated, **settings}
    publish(
        "throughput",
        {"host": describe_host(), "settings": about, **found, "same_vectors": agrees(found)},
        store=not options.no_store,
    )
    return 0 if OURS in found["sides"] and agrees(found) else 1


if __name__ == "__main__":
    sys.exit(main())
