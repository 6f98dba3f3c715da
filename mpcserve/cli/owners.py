"""`mpcserve deploy | models | infer`: the model owner's and the data owner's commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mpcserve.cli.options import CONFIG, FILE, INSECURE, JSON


@click.command("deploy")
@click.argument("plan", type=FILE)
@click.option("--name", help="Name of the deployed model; default: the plan's.")
@click.option("--weights", type=FILE, help="Weights file; default: the plan's name with .weights.")
@click.option("--replace", is_flag=True, help="Take the place of a model of this name.")
@CONFIG
@INSECURE
def deploy_command(
    plan: Path,
    name: str | None,
    weights: Path | None,
    replace: bool,
    config_path: Path | None,
    insecure_plaintext: bool,
) -> None:
    """Share the weights of PLAN with the servers, as the model owner.

    Each server receives masked weights and learns nothing of them. Servers keep deployments when
    they are restarted.

    \b
    Example:
      mpcserve deploy model.plan --name digits
    """
    from mpcserve.cli.output import progress
    from mpcserve.config import load_config
    from mpcserve.serving import Client

    config = load_config(config_path)
    with Client(config, plaintext=insecure_plaintext) as client, progress("sharing the weights"):
        deployed = client.deploy(plan, name=name, weights=weights, replace=replace)
    click.echo(f"{deployed}: deployed")


@click.command("models")
@CONFIG
@INSECURE
@JSON
def models_command(config_path: Path | None, insecure_plaintext: bool, as_json: bool) -> None:
    """List what is deployed.

    \b
    Example:
      mpcserve models --json
    """
    from mpcserve.cli.output import print_json, shape_text, table
    from mpcserve.config import load_config
    from mpcserve.serving import Client

    with Client(load_config(config_path), plaintext=insecure_plaintext) as client:
        models = client.models()
    if as_json:
        print_json(models)
        return
    if not models:
        click.echo("no model is deployed")
        return

    def tensors(specs: list[list[Any]]) -> str:
        return ", ".join(f"{name} {dtype} {shape_text(shape)}" for name, dtype, shape in specs)

    table(
        ("model", "inputs", "outputs", "plan"),
        (
            (
                m["name"] + (" (default)" if m["default"] else ""),
                tensors(m["inputs"]),
                tensors(m["outputs"]),
                m["digest"][:16],
            )
            for m in models
        ),
        left=4,
    )


@click.command("infer")
@click.argument("data", metavar="INPUT", type=FILE)
@click.option("--model", help="Name of a deployed model; default: the config's, or the only one.")
@click.option("-o", "--output", type=FILE, help="Write the result there (.npy, .npz).")
@JSON
@click.option("--report", type=FILE, metavar="FILE", help="Write rounds, bytes, seconds as JSON.")
@click.option(
    "--on-range",
    type=click.Choice(("error", "clamp")),
    default="error",
    show_default=True,
    help="What to do with values outside the range the model was compiled for.",
)
@CONFIG
@INSECURE
def infer_command(
    data: Path,
    model: str | None,
    output: Path | None,
    as_json: bool,
    report: Path | None,
    on_range: str,
    config_path: Path | None,
    insecure_plaintext: bool,
) -> None:
    """Evaluate a deployed model on INPUT, as the data owner: .npy, .npz (several inputs) or .csv.

    A .csv has a header that names the inputs, or as many columns as they have together. The servers
    see neither the input nor the result. More rows than the model's batch are cut into batches.

    \b
    Example:
      mpcserve infer images.npy --model digits -o logits.npy --report report.json
    """
    from mpcserve.arrays import Columns, read_arrays
    from mpcserve.cli.output import print_json, progress
    from mpcserve.cli.results import outputs_json, print_outputs, save_json, save_outputs
    from mpcserve.config import load_config
    from mpcserve.serving import Client

    given = read_arrays(data)
    config = load_config(config_path)
    with Client(config, plaintext=insecure_plaintext) as client, progress("evaluating"):
        plan = client.plan(model)
        inputs = given.fitted(plan.raw_inputs) if isinstance(given, Columns) else given
        outputs, facts = client.infer_report(
            inputs, model=model, on_range="clamp" if on_range == "clamp" else "error"
        )
    if output is not None:
        save_outputs(output, outputs)
    if report is not None:
        # Keys that only a comparison in the clear can fill: `bench` does.
        unknown = dict.fromkeys(("plaintext_seconds", "max_abs_error", "top1_agreement"))
        save_json(report, {**facts, **unknown})
    columns = {o.name: o.columns for o in plan.outputs if o.columns}
    if as_json:
        print_json({"model": facts["model"], "outputs": outputs_json(outputs, columns)})
    elif output is None:
        print_outputs(outputs, columns)
