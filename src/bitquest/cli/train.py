"""`bitquest train`: train the model that a configuration describes, or go on where it stopped."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from bitquest.cli.console import err, print_json_object


def command(
    config: Annotated[Path, typer.Argument(help="TOML configuration; the repository's configs/ has examples.")],
    out: Annotated[
        Path | None, typer.Option(help="Run directory: checkpoints and metrics.", show_default="runs/<CONFIG's name>")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. train.steps=100.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on if the directory holds this run, or refuse to.")
    ] = True,
    from_step: Annotated[
        int | None, typer.Option(help="Go back to the checkpoint of this step; later ones are removed.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")] = False,
) -> None:
    """Train a model. Stopped by Ctrl-C, SIGTERM or a crash, the same command goes on, bit for bit."""
    from bitquest.training.config import load_config
    from bitquest.training.display import duration, make_display
    from bitquest.training.interrupt import stop_on_signals
    from bitquest.training.trainer import train

    overrides = set_ or []
    settings = load_config(config, overrides)
    run_dir = out if out is not None else Path("runs") / _name(config)
    with stop_on_signals() as stop:
        result = train(
            settings, run_dir, resume=resume, from_step=from_step, display=make_display(err), should_stop=stop
        )
    if json:
        print_json_object("train", {"run": str(run_dir), "steps": settings.train.steps, **vars(result)})
    if result.interrupted:
        words = ["bitquest", "train", str(config), "--out", str(run_dir)]
        words += [word for override in overrides for word in ("--set", override)]
        _say(f"Stopped; step {result.step} of {settings.train.steps} is saved. Go on with:\n  {shlex.join(words)}")
        raise typer.Exit(stop.exit_code)
    if result.resumed_from == result.step:
        _say(f"{run_dir} is finished already: step {result.step} of {settings.train.steps}. Nothing to do")
    else:
        _say(f"Done: {result.step} steps in {duration(result.seconds)}, {run_dir}")
    _say(f"Next: bitquest export {shlex.quote(str(run_dir))} --out packed")


def _name(config: Path) -> str:
    """The run's name: the configuration file's, or the directory's for a run's own config.toml."""
    return config.absolute().parent.name if config.name == "config.toml" else config.stem


def _say(text: str) -> None:
    err.print(text, soft_wrap=True, highlight=False, markup=False)
