"""A runtime for `peers.py`: reads a picture's number per line, answers with a line of JSON."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SIDE = 336
GENERATED = 64
Times = dict[str, float]  # first_s and decode_s; again_s if a second question was asked
Turn = Callable[[np.ndarray], Times]


def ours(folder: Path, threads: int, bundle: str) -> Turn:
    """Through the public Python interface, text assembly and stop rules included."""
    import mllm_edge
    from mllm_edge.runtime.engines.llama.library import library

    llama: Any = library()
    decode, inside = llama.llama_decode, []

    def timed_decode(*arguments: Any) -> Any:
        started = time.perf_counter()
        status = decode(*arguments)
        inside.append(time.perf_counter() - started)
        return status

    llama.llama_decode = timed_decode
    model = mllm_edge.load(folder / f"{bundle}.bundle", threads=threads)
    prompt = _prompt(folder)["text"]

    def turn(picture: np.ndarray) -> Times:
        model.generate("</s>", raw=True, max_tokens=1)  # clears the last turn's prompt from the cache
        started = time.perf_counter()
        answer = model.generate(prompt, picture, raw=True, max_tokens=GENERATED, stop=[])
        total = time.perf_counter() - started
        if answer.tokens.generated != GENERATED:
            raise RuntimeError(f"the answer ended after {answer.tokens.generated} tokens; take another seed")
        decode_s = answer.timings["decode"] / 1000
        python_s = decode_s - sum(inside[1 - GENERATED :])
        again = model.generate(prompt + " Why?", picture, raw=True, max_tokens=1)
        return {
            "first_s": total - decode_s,
            "decode_s": decode_s,
            "again_s": again.timings["total"] / 1000,
            "python_ms_per_token": 1000 * python_s / (GENERATED - 1),
        }

    return turn


def llama_cpp(folder: Path, threads: int, bundle: str) -> Turn:
    """libmtmd through the same binding, on the same GGUF and our projector file; decoding is a bare loop."""
    from llama_cpp import mtmd_cpp as mtmd

    from mllm_edge.runtime.engines.llama.library import library

    llama: Any = library()
    home = folder / f"{bundle}.bundle"
    manifest = json.loads((home / "bundle.json").read_text())
    gguf = home / manifest["language_model"]["file"]
    model = llama.llama_model_load_from_file(os.fsencode(gguf), llama.llama_model_default_params())
    settings = llama.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = 2048, 2048, 512
    settings.n_threads = settings.n_threads_batch = threads
    context = llama.llama_init_from_model(model, settings)
    options = mtmd.mtmd_context_params_default()
    options.use_gpu, options.print_timings, options.warmup, options.n_threads = False, False, False, threads
    vision = mtmd.mtmd_init_from_file(os.fsencode(home / "mmproj.gguf"), model, options)
    marker = mtmd.mtmd_default_marker().decode()
    prompt = _prompt(folder)["text"].replace("<image>", marker).encode()
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))

    def turn(picture: np.ndarray) -> Times:
        started = time.perf_counter()
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        pixels = np.ascontiguousarray(picture).ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = mtmd.mtmd_bitmap_init(SIDE, SIDE, pixels)
        chunks = mtmd.mtmd_input_chunks_init()
        text = mtmd.mtmd_input_text(text=prompt, text_len=len(prompt), add_special=True, parse_special=True)
        _check(mtmd.mtmd_tokenize(vision, chunks, ctypes.byref(text), (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap), 1))
        past = ctypes.c_int32(0)
        _check(mtmd.mtmd_helper_eval_chunks(vision, context, chunks, 0, 0, 2048, True, ctypes.byref(past)))
        mtmd.mtmd_input_chunks_free(chunks)
        mtmd.mtmd_bitmap_free(bitmap)
        first, token = 0.0, 0
        for number in range(GENERATED):
            if number:
                _check(llama.llama_decode(context, llama.llama_batch_get_one((ctypes.c_int32 * 1)(token), 1)))
            token = int(np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), (vocabulary,)).argmax())
            first = first or time.perf_counter() - started
        return {"first_s": first, "decode_s": time.perf_counter() - started - first}

    return turn


def transformers(folder: Path, threads: int, dtype: str, attention: str) -> Turn:
    """A greedy loop over the model itself: cheaper than `generate`."""
    import torch
    from transformers import LlavaForConditionalGeneration

    torch.set_num_threads(threads)
    model = LlavaForConditionalGeneration.from_pretrained(
        folder / "checkpoint", dtype=getattr(torch, dtype), attn_implementation=attention
    ).eval()
    ids = torch.tensor([_prompt(folder)["ids"]])
    mean = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
    std = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

    @torch.inference_mode()
    def turn(picture: np.ndarray) -> Times:
        started = time.perf_counter()
        pixels = ((picture.astype(np.float32) / 255 - mean) / std).transpose(2, 0, 1)[None]
        values = torch.from_numpy(pixels).to(model.dtype)
        out = model(input_ids=ids, pixel_values=values, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        first = time.perf_counter() - started
        for _ in range(GENERATED - 1):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
        return {"first_s": first, "decode_s": time.perf_counter() - started - first}

    return turn


def openvino(folder: Path, threads: int, form: str) -> Turn:
    """OpenVINO GenAI's own pipeline and measures."""
    import openvino
    import openvino_genai

    pipeline = openvino_genai.VLMPipeline(str(folder / f"openvino-{form}"), "CPU", INFERENCE_NUM_THREADS=threads)
    prompt = _prompt(folder)["text"].replace("<image>", "<ov_genai_image_0>")
    settings = openvino_genai.GenerationConfig(
        max_new_tokens=GENERATED, ignore_eos=True, do_sample=False, apply_chat_template=False
    )

    def turn(picture: np.ndarray) -> Times:
        started = time.perf_counter()
        result = pipeline.generate(prompt, images=[openvino.Tensor(picture[None])], generation_config=settings)
        total = time.perf_counter() - started
        first = result.perf_metrics.get_ttft().mean / 1000
        return {"first_s": first, "decode_s": total - first}

    return turn


def runtime(name: str, folder: Path, threads: int) -> Turn:
    """The runtime called `name` in `peers.PEERS`."""
    kind, *form = name.split()
    if kind == "ours":
        return ours(folder, threads, form[0])
    if kind == "llama.cpp":
        return llama_cpp(folder, threads, form[0])
    if kind == "openvino":
        return openvino(folder, threads, form[0])
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[form[0]]
    return transformers(folder, threads, dtype, form[1] if len(form) > 1 else "sdpa")


def main() -> None:
    name, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep libraries' output out of the results
    turn = runtime(name, folder, threads)
    print(json.dumps({"ready": 1}), file=out, flush=True)
    for line in sys.stdin:
        picture = np.random.default_rng(int(line)).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        times = turn(picture)
        decode = times.pop("decode_s")
        row = {**times, "total_s": times["first_s"] + decode, "decode_tokens_per_s": (GENERATED - 1) / decode}
        row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(row), file=out, flush=True)


def _prompt(folder: Path) -> dict[str, Any]:
    prompt: dict[str, Any] = json.loads((folder / "prompt.json").read_text())
    return prompt


def _check(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"llama.cpp gave status {status}")


if __name__ == "__main__":
    main()
