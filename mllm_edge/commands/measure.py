"""The commands that measure and plan: bench, compare, eval, plan."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from mllm_edge.bundle.read import read_manifest
from mllm_edge.commands.frame import BundleFolder, Loading, needs, verb
from mllm_edge.commands.screen import Screen
from mllm_edge.errors import BadInput, OutOfTolerance
from mllm_edge.machine import devices
from mllm_edge.places import file_can_be_made, writing
from mllm_edge.quants import KV_TYPES, ONNX_QUANTS, PRECISIONS, QUANTS
from mllm_edge.targets import TARGETS


@verb(
    "bench my.bundle",
    "bench fp32.bundle int8.bundle -r 20 -o times.csv --plot stages.png",
    "bench all.bundle half.bundle --quality scenes-questions --curve tokens.png",
)
def bench(
    screen: Screen,
    loading: Loading,
    bundles: Annotated[
        list[Path],
        typer.Argument(metavar="BUNDLE", help="Bundles, each measured in a process of its own.", show_default=False),
    ],
    repeat: Annotated[int, typer.Option("-r", "--repeat", help="Measured repetitions.")] = 5,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="By default a drawn one.")] = None,
    gen_tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 32,
    form: Annotated[
        str, typer.Option("--format", metavar="md|csv|json|jsonl", help="The result's form; by default that of --out.")
    ] = "",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="Also write the result there.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the times by stage.")] = None,
    quality: Annotated[
        str | None, typer.Option(metavar="DATASET", help="Also score answers about scenes, as `eval` does.")
    ] = None,
    cases: Annotated[int, typer.Option(help="How many, with --quality.")] = 200,
    curve: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw scores and times over a picture's tokens.")
    ] = None,
) -> None:
    """Measure speed and memory. Times by stage, time to first token, tokens per second, peak memory."""
    from mllm_edge import bench as measuring
    from mllm_edge.machine.threads import usable_cores

    form = form or (out.suffix.removeprefix(".") if out else "md")
    measuring.check_form(form)
    for file in filter(None, (out, plot, curve)):
        file_can_be_made(file)
    measuring.check_quality(quality, cases, curve, bundles)
    draw = measuring.plotter(plot) if plot else None
    draw_curve = measuring.plotter(curve, measuring.draw_curve) if curve else None
    options: dict[str, Any] = {"repeat": repeat, "image": image, "gen_tokens": gen_tokens}
    if len(bundles) == 1:
        threads = loading.threads or usable_cores()
        options["sensor"] = measuring.sensor(gpu=measuring.uses_gpu(bundles[0], loading.target))
        options["limits"] = lambda: measuring.machine_limits(bundles[0], loading.target)
        options["load_cold_ms"] = measuring.load_cold(bundles[0], lambda: loading.open(bundles[0]))
        with screen.steps() as report, loading.open(bundles[0]) as model:
            results = [measuring.measure(model, str(bundles[0]), threads=threads, report=report, **options)]
            if quality:
                results = [measuring.measure_quality(results[0], model, quality, cases, report)]
    else:
        options |= {**vars(loading), "quality": quality, "cases": cases}
        options |= {"quiet": screen.quiet, "debug": screen.debug}
        results = []
        try:
            for bundle in bundles:
                results.append(measuring.measure_apart(bundle, options))
                screen.finished = measuring.document(results)
        except BaseException:
            if results and not screen.as_json:  # what is measured is not lost by the next bundle's failure
                screen.result({}, measuring.render(results, form))
            raise
    shown = measuring.render(results, form)
    screen.result(measuring.document(results), shown, paint=measuring.colored if form == "md" else None)
    if out:
        with writing(out):
            out.write_text(shown + "\n", encoding="utf-8")
        screen.aside(f"results: {out}")
    if draw and plot:
        with writing(plot):
            draw(results)
        screen.aside(f"times by stage: {plot}")
    if draw_curve and curve:
        with writing(curve):
            draw_curve(results)
        screen.aside(f"scores and times over tokens: {curve}")


@verb("compare old.json new.json", "compare old.json new.json --fail-above 1.1")
def compare(
    screen: Screen,
    old: Annotated[Path, typer.Argument(metavar="OLD.json", help="What `bench --json` wrote.", show_default=False)],
    new: Annotated[Path, typer.Argument(metavar="NEW.json", help="The same of what is judged.", show_default=False)],
    fail_above: Annotated[
        float | None, typer.Option(metavar="RATIO", help="Exit with 1 where a median is that much worse.")
    ] = None,
) -> None:
    """Ratios of two measurements. Above 1 is worse; their spread says what may be chance."""
    from mllm_edge import bench as measuring

    ratios = measuring.compare(old, new)
    screen.result(
        {"ratios": [dataclasses.asdict(ratio) for ratio in ratios]}, measuring.ratio_table(ratios, fail_above)
    )
    if fail_above is not None and (worse := [ratio for ratio in ratios if ratio.ratio > fail_above]):
        named = ", ".join(f"{ratio.measure} of {ratio.bundle} ({ratio.ratio:.2f})" for ratio in worse)
        raise OutOfTolerance(f"worse than {fail_above:g}: {named}; see the table")


@verb(
    "eval my.bundle scenes-referring -n 500",
    "eval my.bundle GranDf_HA_GCG_val.json --images val --out answers.jsonl --resume",
    "eval my.bundle scenes-boxes",
    "eval my.bundle scenes-drawings -n 100 --judge runs/scene-classifier",
    "eval my.bundle questions.json --instances annotations.json --images val2014",
    "eval my.bundle refs.json --instances instances.json --images train2014 --split val --teacher-forced",
)
def eval_(
    screen: Screen,
    loading: Loading,
    bundle: BundleFolder,
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="DATASET",
            help="scenes-questions, -referring, -grounded, -regions, -boxes or -captions, the same of wide- scenes, "
            "scenes-drawings, scenes-retrieval or scenes-decisions of bundles that draw or retrieve, or "
            "a JSON file like GranD-f's, RefCOCO's, COCO's captions or VQA's questions.",
            show_default=False,
        ),
    ],
    number: Annotated[
        int | None, typer.Option("-n", "--number", help="Cases; by default 500 scenes, all of a file.")
    ] = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="Of the scenes or references.")] = "",
    images: Annotated[Path, typer.Option(metavar="DIR", help="Where a file's pictures are.")] = Path(),
    instances: Annotated[
        Path | None, typer.Option(metavar="FILE", help="COCO's annotations of references, VQA's answers.")
    ] = None,
    regions: Annotated[bool, typer.Option("--regions", help="References: ask what their boxes hold.")] = False,
    as_boxes: Annotated[bool, typer.Option("--boxes", help="References: ask for a box instead of a mask.")] = False,
    teacher_forced: Annotated[
        bool, typer.Option("--teacher-forced", help="References: give the answer, judge the mask alone.")
    ] = False,
    judge: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Drawings: a run of scene-classifier, instead of the one that is shipped."),
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="FILE.jsonl", help="Keep the answers.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the answers that --out has.")] = False,
) -> None:
    """Measure quality on a data set. Scores of texts, masks and pictures; those of a file beside the paper's."""
    with needs("train"):
        from mllm_edge.evaluate import cases, drawings, lookups
        from mllm_edge.evaluate.run import evaluate
        from mllm_edge.evaluate.show import score_table

    if resume and not out:
        raise BadInput("--resume goes with --out, the file that holds the answers; add it")
    if judge and dataset != "scenes-drawings":
        raise BadInput("--judge goes with scenes-drawings; leave it out")
    scenes = 500 if number is None else number
    if dataset in lookups.KINDS:
        if out or teacher_forced:
            raise BadInput(f"{dataset} generates no answers; leave out {'--out' if out else '--teacher-forced'}")
        result = _looked_up(screen, loading, bundle, dataset, scenes, split or "test")
        screen.result({"bundle": str(bundle), **result}, score_table(str(bundle), result))
        return
    if dataset == "scenes-drawings":
        drawings.check_draws(read_manifest(bundle, verify_hash=False))
        data = drawings.drawings(scenes, split or "test", drawings.read_judge(judge))
    elif dataset in cases.SCENES:
        data = cases.scenes(dataset, scenes, split or "test")
    else:
        data = cases.files(Path(dataset), images, instances, split or "val", regions, as_boxes)
    if number is not None:
        data = dataclasses.replace(data, cases=data.cases[:number])
    screen.kept = f"the answers so far are in {out}, go on with --resume" if out else ""
    with screen.steps() as report, loading.open(bundle) as model:
        started = time.monotonic()
        result = evaluate(
            model,
            data,
            out,
            resume,
            teacher_forced,
            lambda done, total: report(data.name, 1, 1, None, done / total),
            lambda result: screen.partly({"bundle": str(bundle), **result}, score_table(str(bundle), result)),
        )
        report(data.name, 1, 1, time.monotonic() - started)
    screen.result({"bundle": str(bundle), **result}, score_table(str(bundle), result))


def _looked_up(screen: Screen, loading: Loading, bundle: Path, dataset: str, number: int, split: str) -> dict[str, Any]:
    """The scores of a data set that needs no answers, only vectors or decisions."""
    from mllm_edge.evaluate import lookups

    kind, started = lookups.KINDS[dataset], time.monotonic()
    lookups.check_looks(read_manifest(bundle, verify_hash=False), kind)
    with screen.steps() as report:

        def progress(done: int, total: int) -> None:
            report(dataset, 1, 1, None, done / total)

        if kind == "retrieval":
            result = lookups.retrieval(
                lambda: loading.embedder(bundle), lambda: loading.open(bundle), number, split, progress
            )
        else:
            with loading.open(bundle) as model:
                result = lookups.decisions(model, number, split, progress)
        report(dataset, 1, 1, time.monotonic() - started)
    return result


@verb(
    "plan SYSTEM --config 7b --quant q4_k_m --device orin-nano",
    "plan SYSTEM --config 1b --device this --measured bench.json",
)
def plan(
    screen: Screen,
    system: Annotated[str, typer.Argument(metavar="SYSTEM", help="A name from `mllm-edge systems`.")],
    config: Annotated[str, typer.Option(metavar="NAME", help="Its size.")] = "tiny",
    device: Annotated[
        str, typer.Option(metavar="NAME", help=f"{', '.join([devices.THIS, *devices.DEVICES])}.")
    ] = devices.THIS,
    precision: Annotated[str | None, typer.Option(metavar="|".join(PRECISIONS), help="Of the stages.")] = None,
    quant: Annotated[
        str,
        typer.Option(metavar="|".join((*QUANTS, *ONNX_QUANTS)), help="By default q4_k_m; int4 without llama.cpp."),
    ] = "",
    context: Annotated[int, typer.Option(help="Positions; by default the model's own.", show_default=False)] = 0,
    kv_type: Annotated[
        str, typer.Option(metavar="|".join(KV_TYPES), help="Of the KV cache: by default f16, or f32 without llama.cpp.")
    ] = "",
    measured: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="What `bench --json` measured there, to compare with.")
    ] = None,
) -> None:
    """Say whether a model fits a machine, and how fast it can be there. From shapes alone; nothing is downloaded."""
    from mllm_edge import bench as measuring
    from mllm_edge.bench import plan as planning
    from mllm_edge.bench.limits import this_machine

    where = this_machine() if device == devices.THIS else devices.get(device, also=[devices.THIS])
    usual = TARGETS["cuda" if where.capability else "cpu"].precision
    settings = planning.settings(precision or usual, quant, context, kv_type)
    seen = measuring.read_results(measured)[0] if measured else None
    made = planning.plan(system, config, settings, where, seen)
    screen.result(dataclasses.asdict(made), *measuring.plan_tables(made))
