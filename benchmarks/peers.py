"""One picture, one prompt, one model in several runtimes: time to first token, decoding speed, total, peak memory.

    python benchmarks/peers.py prepare build/peers          # a random 1b checkpoint, and our bundles of it
    other-env/bin/optimum-cli export openvino -m build/peers/checkpoint --weight-format int8 build/peers/openvino-int8
    python benchmarks/peers.py run build/peers --openvino-python other-env/bin/python --out docs/images/peers

The weights are the same everywhere (random, so that nothing has to be downloaded); 64 tokens of text and one picture go
in, 64 tokens come out, greedily. Our "int8" and "merged" have an int8 vision encoder and a q4_k_m decoder; "merged"
reads the picture as 144 tokens instead of 576 (--merge-tokens), unlike the others. Every runtime is loaded once in a
separate process; they take turns, and every turn has a new picture, so that no picture or prefix cache helps. OpenVINO
GenAI needs a separate environment (pip install openvino-genai "optimum-intel[openvino]==2.2" without torchvision);
without it its rows are left out.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

PEERS = (
    "ours q8_0",
    "ours q4_k_m",
    "ours int8",
    "ours merged",
    "llama.cpp q8_0",
    "llama.cpp q4_k_m",
    "transformers fp32",
    "transformers bf16",
    "transformers bf16 eager",
    "openvino int8",
    "openvino int4",
)
BUNDLES: dict[str, dict[str, Any]] = {
    "q8_0": {"quant": "q8_0", "mmproj": True},
    "q4_k_m": {"quant": "q4_k_m", "mmproj": True},
    "int8": {"quant": "q4_k_m", "precision": "int8"},  # of the vision encoder
    "merged": {"quant": "q4_k_m", "precision": "int8", "merge_tokens": 144},
}
WORKER = Path(__file__).with_name("peers_worker.py")
TEXT_TOKENS = 64
QUESTION = "What do you see in the picture? Say what lies where, how many things there are and which color they have."
FIELDS = ("first_s", "total_s", "decode_tokens_per_s", "again_s", "python_ms_per_token", "peak_mb")


def prepare(folder: Path) -> None:
    """Write the checkpoint in transformers' layout, our bundles with llama.cpp's projector, and the prompt."""
    import torch
    import transformers

    import mllm_edge
    from mllm_edge.export.export import export as make_bundle
    from mllm_edge.models.blocks.vit import VitDims
    from mllm_edge.models.llava.model import CONFIGS
    from mllm_edge.models.resolve import shipped

    dims = CONFIGS["1b"]
    checkpoint = folder / "checkpoint"
    vision, language = dims.vision, dims.language
    assert isinstance(vision, VitDims)
    if not (checkpoint / "config.json").is_file():
        image_id = _tokenizer(shipped("llava") / "tiny" / "tokenizer.model", checkpoint, vision.image_size)
        config = transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(
                hidden_size=vision.width,
                intermediate_size=vision.mlp_width,
                num_hidden_layers=vision.layers,
                num_attention_heads=vision.heads,
                image_size=vision.image_size,
                patch_size=vision.patch_size,
            ).to_dict(),
            text_config=transformers.LlamaConfig(
                vocab_size=language.vocabulary,
                hidden_size=language.width,
                intermediate_size=language.ffn_width,
                num_hidden_layers=language.layers,
                num_attention_heads=language.heads,
                num_key_value_heads=language.kv_heads,
                max_position_embeddings=language.context,
                rms_norm_eps=language.norm_eps,
            ).to_dict(),
            image_token_index=image_id,
            image_seq_length=vision.patches,
        )
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        transformers.LlavaForConditionalGeneration(config).save_pretrained(checkpoint)
        torch.set_default_dtype(torch.float32)
    for name, options in BUNDLES.items():
        bundle = folder / f"{name}.bundle"
        if not bundle.is_dir():
            print(f"{bundle} ...", file=sys.stderr)
            make_bundle("llava", str(checkpoint), out=bundle, check=False, **options)
    with mllm_edge.load(folder / "q8_0.bundle") as model:
        (folder / "prompt.json").write_text(
            json.dumps(_prompt(model, json.loads((checkpoint / "config.json").read_text())["image_token_index"]))
        )


def _tokenizer(model: Path, folder: Path, image_size: int) -> int:
    """Write the processor; returns the id of its placeholder."""
    import shutil

    from transformers import AddedToken, CLIPImageProcessor, LlamaTokenizerFast, LlavaProcessor

    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(model, folder / "tokenizer.model")
    tokenizer = LlamaTokenizerFast.from_pretrained(str(folder))
    tokenizer.add_tokens(AddedToken("<image>", special=True, normalized=False))
    size = {"height": image_size, "width": image_size}
    pictures = CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=size)
    processor = LlavaProcessor(pictures, tokenizer, patch_size=14, vision_feature_select_strategy="default")
    processor.save_pretrained(folder)
    image_id: int = tokenizer.convert_tokens_to_ids("<image>")
    return image_id


def _prompt(model: Any, image_id: int) -> dict[str, Any]:
    """The prompt with a placeholder, and as ids with the picture's positions: exactly `TEXT_TOKENS` of text."""
    bos = [model.language_model.bos]
    start = "USER: "
    question = f"\n{QUESTION} "
    while len(bos + model.tokenize(start) + model.tokenize(question)) < TEXT_TOKENS:
        question += "a "
    ids = model.tokenize(question)[: TEXT_TOKENS - len(bos + model.tokenize(start))]
    text = b"".join(map(model.language_model.piece, ids)).decode()
    places = model.manifest.stages[-1].outputs[0].shape[1]
    return {"text": f"{start}<image>{text}", "ids": [*bos, *model.tokenize(start), *[image_id] * places, *ids]}


class Worker:
    """A runtime in a separate process."""

    def __init__(self, python: str, name: str, folder: Path, threads: int):
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
        self._process = subprocess.Popen(
            [python, str(WORKER), name, str(folder), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._read()

    def turn(self, seed: int) -> dict[str, float]:
        """One measured answer about picture number `seed`."""
        assert self._process.stdin
        self._process.stdin.write(f"{seed}\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, float]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker {self._process.args!r} died; see above")
        answer: dict[str, float] = json.loads(line)
        return answer


def run(folder: Path, names: list[str], rounds: int, threads: int, openvino: str | None) -> list[dict[str, Any]]:
    """Rows of measurements, one per runtime and round; the first round warms up and does not count."""
    workers: dict[str, Worker] = {}
    rows = []
    try:
        for name in names:
            print(f"loading {name} ...", file=sys.stderr)
            python = openvino if name.startswith("openvino") else sys.executable
            workers[name] = Worker(python or sys.executable, name, folder, threads)
        for number in range(rounds + 1):
            for place, (name, worker) in enumerate(workers.items()):
                row = worker.turn(number * len(workers) + place)
                if number:
                    rows.append({"runtime": name, "round": number, **row})
                told = ", ".join(f"{key} {value:.2f}" for key, value in row.items())
                print(f"{number}/{rounds} {name}: {told}", file=sys.stderr)
    finally:
        for worker in workers.values():
            worker.close()
    return rows


def summary(rows: list[dict[str, Any]]) -> str:
    """Medians, and how many times as long as ours each runtime takes, as a Markdown table."""
    by: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by[row["runtime"]].append(row)

    def median(name: str, field: str) -> float | None:
        values = [row[field] for row in by[name] if field in row]
        return statistics.median(values) if values else None

    base = next(iter(by))
    lines = [
        "| runtime | first token s | ratio | decode tok/s | ratio | total s | ratio | second question s | "
        "Python ms/token | peak MB |",
        "|---|" + "---:|" * 9,
    ]
    for name in by:
        cells = [name]
        for field, digits in (("first_s", 2), ("decode_tokens_per_s", 1), ("total_s", 2)):
            value, ours = median(name, field), median(base, field)
            assert value and ours
            cells += [f"{value:.{digits}f}", f"{value / ours:.2f}"]
        for field, form in (("again_s", ".2f"), ("python_ms_per_token", ".2f"), ("peak_mb", ".0f")):
            value = median(name, field)
            cells.append("" if value is None else format(value, form))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Bars of the total time, its first part up to the first token."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["runtime"] for row in rows))[::-1]
    first, total = (
        [statistics.median(row[field] for row in rows if row["runtime"] == name) for name in names]
        for field in ("first_s", "total_s")
    )
    figure, axes = pyplot.subplots(figsize=(8, 0.45 * len(names) + 1.4))
    axes.barh(names, total, color="#9ecae1", label="64 tokens in all")
    axes.barh(names, first, color="#3182bd", label="to the first token")
    for place, (a, b) in enumerate(zip(first, total, strict=True)):
        axes.text(b, place, f" {a:.2f} / {b:.2f}", va="center", fontsize=8)
    axes.set_xlim(0, max(total) * 1.2)
    axes.set_xlabel("seconds, median")
    axes.set_title(title, fontsize=10)
    axes.legend(loc="lower right", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("prepare", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None, help="of each runtime; by default the physical cores")
    parser.add_argument("--only", action="append", help="a runtime's name; may be repeated")
    parser.add_argument("--openvino-python", help="the interpreter that has openvino-genai")
    parser.add_argument("--out", type=Path, help="PATH.csv and PATH.png are written")
    options = parser.parse_args()
    if options.verb == "prepare":
        prepare(options.folder)
        return
    from mllm_edge.machine.facts import cpu_name
    from mllm_edge.machine.threads import usable_cores

    threads = options.threads or usable_cores()
    names = options.only or [name for name in PEERS if options.openvino_python or not name.startswith("openvino")]
    rows = run(options.folder, names, options.rounds, threads, options.openvino_python)
    print(summary(rows))
    if options.out:
        with options.out.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ("runtime", "round", *FIELDS), restval="")
            writer.writeheader()
            writer.writerows(rows)
        title = f"CLIP-L/336 + 1.1 B LLaMA, 640 tokens in (merged: 208), 64 out; {cpu_name()}, {threads} threads"
        plot(rows, options.out.with_suffix(".png"), title)


if __name__ == "__main__":
    main()
