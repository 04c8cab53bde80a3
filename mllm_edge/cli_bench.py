"""The commands that measure and plan: bench, compare, plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from mllm_edge.errors import OutOfTolerance
from mllm_edge.options import Loading, needs, verb
from mllm_edge.show import Screen


@verb("bench my.bundle", "bench fp32.bundle int8.bundle -r 20 -o csv --plot stages.png")
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
    form: Annotated[str, typer.Option("-o", "--output", metavar="md|csv|json|jsonl", help="The result's form.")] = "md",
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the times by stage.")] = None,
) -> None:
    """Measure speed and memory. Times by stage, time to first token, tokens per second, peak memory."""
    from mllm_edge import bench as measuring
    from mllm_edge.runtime.threads import usable_cores

    form = "json" if screen.as_json else form
    measuring.check_form(form)
    draw = measuring.plotter(plot) if plot else None
    options: dict[str, Any] = {"repeat": repeat, "image": image, "gen_tokens": gen_tokens}
    if len(bundles) == 1:
        threads = loading.threads or usable_cores()
        options["limits"] = lambda: measuring.machine_limits(bundles[0])
        options["load_cold_ms"] = measuring.load_cold(bundles[0], lambda: loading.open(bundles[0]))
        with screen.steps() as report, loading.open(bundles[0]) as model:
            results = [measuring.measure(model, str(bundles[0]), threads=threads, report=report, **options)]
    else:
        options |= {**vars(loading), "quiet": screen.quiet, "debug": screen.debug}
        results = [measuring.measure_apart(bundle, options) for bundle in bundles]
    if draw:
        draw(results)
        screen.aside(f"times by stage: {plot}")
    shown = measuring.render(results, form)
    screen.result(measuring.document(results), measuring.colored(shown) if form == "md" and screen.in_color else shown)


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
    "plan SYSTEM --config 7b --quant q4_k_m --device orin-nano",
    "plan SYSTEM --config 1b --device this --measured bench.json",
)
def plan(
    screen: Screen,
    system: Annotated[str, typer.Argument(metavar="SYSTEM", help="A name from `mllm-edge systems`.")],
    config: Annotated[str, typer.Option(metavar="NAME", help="Its size.")] = "tiny",
    device: Annotated[
        str, typer.Option(metavar="NAME", help="this, orin-nano, orin-nano-super, agx-orin, thor, rtx-4060-laptop.")
    ] = "this",
    precision: Annotated[str | None, typer.Option(metavar="fp32|fp16|int8", help="Of the stages.")] = None,
    quant: Annotated[str, typer.Option(metavar="f32|f16|q8_0|q6_k|q5_k_m|q4_k_m")] = "q4_k_m",
    context: Annotated[int, typer.Option(help="Positions; by default the model's own.", show_default=False)] = 0,
    kv_type: Annotated[str, typer.Option(metavar="f32|f16|q8_0", help="Element type of the KV cache.")] = "f16",
    measured: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="What `bench --json` measured there, to compare with.")
    ] = None,
) -> None:
    """Say whether a model fits a machine, and how fast it can be there. From shapes alone; nothing is downloaded."""
    from mllm_edge import bench as measuring
    from mllm_edge.bench import devices

    with needs("export"):
        from mllm_edge.bench import plan as planning
    where = devices.get(device)
    settings = planning.settings(precision or ("fp32" if device == devices.THIS else "fp16"), quant, context, kv_type)
    seen = measuring.read_results(measured)[0] if measured else None
    made = planning.plan(system, config, settings, where, seen)
    screen.result(dataclasses.asdict(made), *measuring.plan_tables(made))
