"""The model in OpenVINO or ONNX Runtime in a process of its own, without a server: for scale beside the packed loop.

Runs in the environment that `environments` makes for them, where neither torch nor vecmill is. Reads JSON on stdin, and
writes vectors to a file and one line of JSON to stdout. Tokenization is not timed. The texts are given to the runtime
either all sorted by length, which a server cannot do, or in batches of the tokens and the order that vecmill's are of.

    python other_runtimes.py openvino sorted model.onnx vectors.npy < tokens.json
"""

import json
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

BATCH = 32  # texts that were sorted
Rows = Sequence[Sequence[int]]
Run = Callable[[np.ndarray, np.ndarray], np.ndarray]


def openvino(file: str) -> Run:
    """bfloat16, on all cores, as it does throughput best."""
    import openvino as ov  # type: ignore[import-not-found]  # of an environment of its own

    settings = {"INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY"}
    request = ov.Core().compile_model(file, "CPU", settings).create_infer_request()
    return lambda ids, mask: request.infer({"ids": ids, "mask": mask})["vectors"].copy()


def onnxruntime(file: str) -> Run:
    """float32, with every optimisation of the graph."""
    import onnxruntime as ort  # type: ignore[import-not-found]  # as above

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda ids, mask: session.run(None, {"ids": ids, "mask": mask})[0]


def batches(rows: Rows, order: str, tokens: int) -> list[list[int]]:
    """Indexes of the rows of each batch: `sorted` in 32s, `arrival` in as many as `tokens` hold."""
    if order == "sorted":
        ordered = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        return [ordered[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    cut: list[list[int]] = [[]]
    held = 0
    for index, row in enumerate(rows):
        if cut[-1] and held + len(row) > tokens:
            cut.append([])
            held = 0
        cut[-1].append(index)
        held += len(row)
    return cut


def run_all(run: Run, rows: Rows, cut: Sequence[Sequence[int]]) -> np.ndarray:
    """(N, dimensions) in the rows' order; each batch is padded to its longest."""
    vectors: list[np.ndarray] = [np.empty(0)] * len(rows)
    for batch in cut:
        lengths = np.array([len(rows[index]) for index in batch])
        mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        ids = np.zeros_like(mask)
        for number, index in enumerate(batch):
            ids[number, : len(rows[index])] = rows[index]
        for index, vector in zip(batch, run(ids, mask), strict=True):
            vectors[index] = vector
    return np.stack(vectors)


def main() -> None:
    """Measure the tokens on stdin."""
    runtime, order, file, vectors_file = sys.argv[1:]
    given = json.load(sys.stdin)
    run = {"openvino": openvino, "onnxruntime": onnxruntime}[runtime](file)
    rows = given["rows"]
    cut = batches(rows, order, given["batch_tokens"])
    run_all(run, rows, cut)  # makes ready what each shape needs
    started = time.perf_counter()
    vectors = run_all(run, rows, cut)
    seconds = time.perf_counter() - started
    np.save(vectors_file, vectors.astype(np.float32))
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
