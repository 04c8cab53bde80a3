"""A BLIP-2 on Flan-T5, which is LION without its additions, by our bundle and by transformers.

    python benchmarks/encoder_decoder.py prepare build/t5 [--layers 24] [--eva-layers 39]
    python benchmarks/encoder_decoder.py run build/t5 [--threads 2] [--rounds 3] [--json FILE]

The widths are those of LION's 4b config (EVA ViT-g, Q-Former of 12 layers, Flan-T5-XL); --layers are the T5's, each
side, where the machine cannot hold 24. The weights are random and the same for all, saved once by transformers. One
picture and 32 words go in, 64 tokens come out, greedily. Every runtime has a process of its own, one after another, and
every round another picture; the first does not count, medians of the others are told. Memory is the most that a process
ever held.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from mllm_edge.machine.facts import cpu_name

OURS = ("fp32", "int8", "int4")
THEIRS = ("float32", "bfloat16")
SIDE, WORDS, ANSWERED, VOCABULARY = 224, 32, 64, 32128


def prepare(folder: Path, layers: int, eva_layers: int) -> None:
    """Write transformers' checkpoint and our bundles of it."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    from mllm_edge.export.export import export

    checkpoint = folder / "checkpoint"
    if not (checkpoint / "tokenizer.json").is_file():
        torch.manual_seed(0)
        text: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_heads": 32}
        text |= {"num_layers": layers, "model_type": "t5", "feed_forward_proj": "gated-gelu"}
        text |= {"tie_word_embeddings": False, "decoder_start_token_id": 0}
        config = transformers.Blip2Config(
            vision_config={"num_hidden_layers": eva_layers}, text_config=text, image_token_index=VOCABULARY - 1
        )
        transformers.Blip2ForConditionalGeneration(config).save_pretrained(checkpoint)
        pieces = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{number}": number for number in range(3, VOCABULARY)}
        words = Tokenizer(models.WordLevel(pieces, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        words.add_special_tokens(["<pad>", "</s>", "<unk>"])
        words.save(str(checkpoint / "tokenizer.json"))
    for form in OURS:
        if not (folder / f"{form}.bundle").exists():
            precision = "fp32" if form == "fp32" else "int8"
            export("lion", str(checkpoint), out=folder / f"{form}.bundle", quant=form, precision=precision, check=False)


def ours(folder: Path, form: str, threads: int, rounds: int) -> list[dict[str, float]]:
    """Our runtime, through its public interface."""
    import mllm_edge

    model = mllm_edge.load(folder / f"{form}.bundle", threads=threads)
    rows = []
    for number in range(rounds + 1):
        answer = model.generate(question(), picture(number), beams=1, repeat_penalty=1.0, max_tokens=ANSWERED, stop=[])
        if answer.tokens.generated != ANSWERED:
            raise SystemExit(f"the answer ended after {answer.tokens.generated} tokens; take another seed")
        seconds = {name: value / 1000 for name, value in answer.timings.items()}
        seen = seconds["vision_encoder"] + seconds["queries"]
        decode = (ANSWERED - 1) / seconds["decode"]
        rows.append({"encoder_s": seen, "prefill_s": seconds["prefill"], "decode_tokens_per_s": decode})
    return rows


def theirs(folder: Path, dtype: str, threads: int, rounds: int) -> list[dict[str, float]]:
    """transformers' own parts, and its `generate`, whose time for one token is the prefill's."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.Blip2ForConditionalGeneration.from_pretrained(
        folder / "checkpoint", dtype=getattr(torch, dtype)
    ).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "checkpoint" / "tokenizer.json"))
    ids = torch.tensor([[*tokenizer(question()).input_ids, 1]])
    mean, std = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    rows = []

    def seconds(embeds: Any, tokens: int) -> float:
        began = time.perf_counter()
        model.language_model.generate(
            inputs_embeds=embeds, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, num_beams=1
        )
        return time.perf_counter() - began

    with torch.inference_mode():
        for number in range(rounds + 1):
            began = time.perf_counter()
            pixels = (np.asarray(picture(number), np.float32) / 255 - mean) / std
            values = torch.from_numpy(pixels.transpose(2, 0, 1)[None]).to(model.dtype)
            seen = model.vision_model(values).last_hidden_state
            queries = model.query_tokens.expand(1, -1, -1).to(model.dtype)
            read = model.qformer(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state
            rows_of_picture = model.language_projection(read.to(model.dtype))
            looked = time.perf_counter() - began
            embeds = torch.cat([rows_of_picture, model.get_input_embeddings()(ids)], dim=1)
            first, whole = seconds(embeds, 1), seconds(embeds, ANSWERED)
            decode = (ANSWERED - 1) / (whole - first)
            rows.append({"encoder_s": looked, "prefill_s": first, "decode_tokens_per_s": decode})
    return rows


def question() -> str:
    """Words that the checkpoint's tokenizer knows."""
    return " ".join(f"w{number}" for number in range(100, 100 + WORDS))


def picture(number: int) -> Image.Image:
    """Noise of the encoder's size."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), np.uint8))


def worker(folder: Path, name: str, threads: int, rounds: int) -> None:
    """One runtime's rows on the standard output; the first warms up."""
    measure = ours if name in OURS else theirs
    rows = measure(folder, name, threads, rounds)[1:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    row = {key: statistics.median(one[key] for one in rows) for key in rows[0]}
    print(json.dumps({"runtime": name, **row, "peak_mb": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "run", "worker"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--eva-layers", type=int, default=39)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runtime", default="")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.what == "prepare":
        prepare(options.folder, options.layers, options.eva_layers)
        return
    if options.what == "worker":
        worker(options.folder, options.runtime, options.threads, options.rounds)
        return
    table = Table(title=f"{cpu_name()}, {options.threads} threads")
    for column in ("runtime", "encoder, s", "prefill, s", "decode, tokens/s", "most memory, MB"):
        table.add_column(column, justify="left" if column == "runtime" else "right")
    rows = []
    for name in (*OURS, *THEIRS):
        if name in OURS and not (options.folder / f"{name}.bundle").exists():
            print(f"{name}.bundle is not there, so it is left out; prepare makes it", file=sys.stderr)
            continue
        command = [sys.executable, __file__, "worker", str(options.folder), "--runtime", name]
        command += ["--threads", str(options.threads), "--rounds", str(options.rounds)]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
        rows.append(row)
        label = f"ours {name}" if name in OURS else f"transformers {name}"
        numbers = (row["encoder_s"], row["prefill_s"], row["decode_tokens_per_s"])
        table.add_row(label, *(f"{number:.2f}" for number in numbers), f"{row['peak_mb']:.0f}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({"machine": cpu_name(), "rows": rows}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
