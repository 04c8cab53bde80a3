"""What searching an index of pictures costs on one thread, and what libraries make of it.

    python benchmarks/retrieval.py 10000 100000 1000000
    python benchmarks/retrieval.py 100000 --with usearch --with faiss

Vectors are drawn around centres, as pictures lie; what is looked for lies beside one of them. Times are of the
processor, the least of the repeats, so that other work on the machine does not count. `--with` needs usearch or
faiss-cpu, which the package does not.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mllm_edge.machine.facts import cpu_name
from mllm_edge.runtime.answers.index import BLOCK, Index

NEAREST, CENTRES, SPREAD, QUERIES = 10, 1000, 0.7, 20
Search = Callable[[NDArray[np.float32]], list[int]]


def write(folder: Path, count: int, width: int) -> NDArray[np.float32]:
    """An index of `count` vectors; returns what is looked for, [n,d]."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((CENTRES, width), np.float32)

    def drawn(number: int) -> NDArray[np.float32]:
        made = centres[random.integers(0, CENTRES, number)] + SPREAD * random.standard_normal(
            (number, width), np.float32
        )
        return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)

    vectors = np.lib.format.open_memmap(folder / "vectors.npy", "w+", "<f4", (count, width))
    for start in range(0, count, 10_000):
        vectors[start : start + 10_000] = drawn(min(10_000, count - start))
    vectors.flush()
    (folder / "items.jsonl").write_text('["a.png", 0, ""]\n' * count)
    about = {"schema": 1, "made_by": "benchmark", "width": width, "count": count, "roots": ["."]}
    (folder / "index.json").write_text(json.dumps(about))
    return drawn(QUERIES)


def halves(vectors: NDArray[np.float32]) -> Search:
    """The exact search over float16, converted in blocks."""
    stored = vectors.astype(np.float16)
    rows = BLOCK // (4 * vectors.shape[1])

    def search(query: NDArray[np.float32]) -> list[int]:
        blocks = (stored[at : at + rows].astype(np.float32) @ query for at in range(0, len(stored), rows))
        scores = np.concatenate(list(blocks))
        best = np.argpartition(-scores, NEAREST)[:NEAREST]
        return [int(number) for number in best[np.argsort(-scores[best])]]

    return search


def of_usearch(vectors: NDArray[np.float32]) -> Iterator[tuple[str, Callable[[], Search]]]:
    from usearch.index import Index as Graph  # type: ignore[import-not-found]
    from usearch.index import search as exact

    def found(matches: Any) -> list[int]:
        return [int(key) for key in matches.keys]

    def graph() -> Search:
        made = Graph(ndim=vectors.shape[1], metric="ip", dtype="f16")
        made.add(np.arange(len(vectors)), vectors, threads=1)
        return lambda query: found(made.search(query, NEAREST, threads=1))

    yield "usearch, exact", lambda: lambda query: found(exact(vectors, query, NEAREST, "ip", exact=True, threads=1))
    yield "usearch, graph (f16)", graph


def of_faiss(vectors: NDArray[np.float32]) -> Iterator[tuple[str, Callable[[], Search]]]:
    import faiss  # type: ignore[import-not-found]

    faiss.omp_set_num_threads(1)

    def filled(made: Any) -> Search:
        made.add(vectors)
        return lambda query: [int(number) for number in made.search(query[None], NEAREST)[1][0]]

    width = vectors.shape[1]
    yield "faiss, exact", lambda: filled(faiss.IndexFlatIP(width))
    yield "faiss, graph", lambda: filled(faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT))


LIBRARIES = {"usearch": of_usearch, "faiss": of_faiss}


def measure(name: str, make: Callable[[], Search], queries: NDArray[np.float32], wanted: list[list[int]]) -> None:
    """A line: seconds to build, milliseconds a search, and the share of the exact ten that is found."""
    start = time.process_time()
    search = make()
    built = time.process_time() - start
    search(queries[0])  # brings the file into memory
    times, shares = [], []
    for query, exact in zip(queries, wanted):
        start = time.process_time()
        found = search(query)
        times.append(time.process_time() - start)
        shares.append(len(set(found) & set(exact)) / NEAREST)
    print(
        f"  {name:22} {1000 * min(times):9.2f} ms   built in {built:6.1f} s   recall {np.mean(shares):.3f}", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", type=int, nargs="+", help="vectors")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--with", dest="libraries", choices=LIBRARIES, action="append", default=[])
    given = parser.parse_args()
    print(f"{cpu_name()}, one thread, vectors of {given.width} values, the nearest {NEAREST}")
    for count in given.counts:
        with tempfile.TemporaryDirectory() as place:
            queries = write(Path(place), count, given.width)
            start = time.process_time()
            index = Index(Path(place))
            print(f"{count} vectors, opened in {1000 * (time.process_time() - start):.1f} ms")

            def ours(query: NDArray[np.float32], index: Index = index) -> list[int]:
                return [number for number, _ in index.search(query, NEAREST)]

            wanted = [ours(query) for query in queries]
            measure("exact (ours)", lambda: ours, queries, wanted)
            vectors = np.load(Path(place) / "vectors.npy", mmap_mode="r")
            measure("exact, float16", lambda: halves(vectors), queries, wanted)  # noqa: B023
            for library in given.libraries:
                for name, make in LIBRARIES[library](np.ascontiguousarray(vectors)):
                    measure(name, make, queries, wanted)


if __name__ == "__main__":
    main()
