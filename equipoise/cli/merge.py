"""``equipoise merge``: several models that were fine-tuned from one base become one, without training."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equipoise.errors import ArgumentError, check_choice, refuse

if TYPE_CHECKING:
    from equipoise.merging.method import MergingMethod

# The name on the command line, the slug, and what it stands for beyond it.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "pcb": ("pcb-merging", {}),
    "average": ("weight-averaging", {}),
    "task-arithmetic": ("task-arithmetic", {}),
    "ties": ("ties", {}),
    "dare-linear": ("dare", {"elect_sign": False}),
    "dare-ties": ("dare", {"elect_sign": True}),
}


def merge(
    base: Annotated[
        Path, typer.Argument(help="The model that all were fine-tuned from: a folder, or a .safetensors file.")
    ],
    models: Annotated[list[Path] | None, typer.Argument(help="The fine-tuned models.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the merged model.")] = None,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = "pcb",
    ratio: Annotated[
        float | None, typer.Option(help="Share of the entries kept, in (0, 1] (pcb: 0.1; ties: 0.2).")
    ] = None,
    coefficient: Annotated[
        float | None, typer.Option(help="Factor on what is merged (task-arithmetic: on the sum, 0.4; else 1).")
    ] = None,
    coefficients: Annotated[
        str | None, typer.Option(help="One factor for each model, separated by commas (pcb).")
    ] = None,
    clip: Annotated[
        float | None, typer.Option(help="Share of the magnitudes clamped at either end (pcb: 1e-4).")
    ] = None,
    inter: Annotated[str | None, typer.Option(help="sum, normalized_sum or pairwise (pcb: sum).")] = None,
    form: Annotated[str | None, typer.Option(help="tanh, or softmax as printed in the paper (pcb: tanh).")] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of the entries kept at random, in (0, 1] (dare: 0.5).")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="A tensor, module or pattern that stays the base's; may be repeated.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the entries kept at random (dare: 0).")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Merge fine-tuned models into one, without training and without data.

    All must be fine-tuned from BASE: `equipoise merge base model-a model-b --method pcb --out merged`. At most one tensor of each
    model is in memory. The folder has the base's configuration and tokenizer, and nothing is written if anything is wrong.
    """
    if not models:
        raise ArgumentError("MODEL: at least one model is needed, as in equipoise merge BASE MODEL MODEL --out DIR")
    if out is None:
        raise ArgumentError(
            "--out: the folder of the merged model is needed, as in equipoise merge BASE MODEL MODEL --out DIR"
        )
    check_choice("method", method, list(METHODS))
    options: dict[str, Any] = {"ratio": ratio, "clip": clip, "inter": inter, "form": form, "density": density}
    options |= {"coefficient": coefficient, "coefficients": _numbers(coefficients, len(models)), "seed": seed}
    from equipoise.merging.files import merge_files

    merging, given = _method(method, {name: value for name, value in options.items() if value is not None})
    start = time.perf_counter()
    record = {"method": method, "options": given, "base": str(base), "models": [str(path) for path in models]}
    done = merge_files(
        merging.plan(given.get("seed", 0)),
        base,
        models,
        out,
        exclude=exclude or (),
        overwrite=overwrite,
        record={**record, "exclude": exclude or []},
    )
    seconds = round(time.perf_counter() - start, 1)
    for warning in done.warnings:
        typer.echo(f"warning: {warning}", err=True)
    counts = {"tensors_merged": done.merged, "tensors_copied": done.copied, "parameters": done.entries}
    if as_json:
        typer.echo(json.dumps({**record, **counts, "out": str(done.folder), "seconds": seconds}, indent=2))
        return
    settings = ", ".join(f"{name} {value}" for name, value in given.items())
    typer.echo(
        f"{done.models} models merged by {method} ({settings})\n"
        f"  {done.merged} tensors with {done.entries:,} parameters merged, {done.copied} tensors copied from the base\n"
        f"  {done.folder} ({seconds} s)"
    )


def _method(name: str, given: dict[str, Any]) -> tuple[MergingMethod, dict[str, Any]]:
    """The method with the options given, and all its options."""
    import inspect

    from equipoise import catalogue

    slug, fixed = METHODS[name]
    cls = catalogue.find("method", slug).load()
    known = [key for key in inspect.signature(cls).parameters if key not in ("exclude", *fixed)]
    if name.startswith("dare"):
        known.append("seed")
    if "coefficients" in known:
        known.append("coefficient")
    for key in given:
        if key not in known:
            options = ", ".join(f"--{other}" for other in known) or "no options of its own"
            raise ArgumentError(f"--{key}: is no option of {name}, which has {options}")
    if "coefficient" in given and "coefficients" in given:
        raise ArgumentError("--coefficient, --coefficients: give one number for all models, or one for each; not both")
    settings = {key: value for key, value in given.items() if key != "seed"}
    if "coefficients" in known and "coefficient" in settings:
        settings["coefficients"] = settings.pop("coefficient")
    method: MergingMethod = cls(**settings, **fixed)
    seed = {"seed": given.get("seed", 0)} if "seed" in known else {}
    return method, {key: value for key, value in method.settings().items() if key not in ("exclude", *fixed)} | seed


def _numbers(text: str | None, count: int) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        refuse("--coefficients", text, "be numbers separated by commas")
    if len(numbers) != count:
        refuse("--coefficients", text, f"be {count} numbers, one for each model")
    return numbers
