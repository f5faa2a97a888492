"""torchao's 8-bit layers on the CPU, compiled, as another baseline where torchao is installed."""

import warnings
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from bitquest.benchmarks.cpu_random import random_weight

# Of its CPU layers, those that do what one of our schemes does.
CONFIGS = {"w8a8": "Int8DynamicActivationInt8WeightConfig", "w8a16": "Int8WeightOnlyConfig"}
NAME = "torchao, compiled"


def torchao_layer(scheme: str, x: Tensor, width: int) -> tuple[Callable[[], Tensor] | None, str]:
    """A call of torchao's layer (width×width) for the scheme on x (T, K), and what it is or why there is none."""
    if scheme not in CONFIGS:
        return None, "torchao has no CPU layer of this scheme"
    if find_spec("torchao") is None:
        return None, "not measured: torchao is not installed (pip install 'bitquest[bench]')"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import torchao
            from torchao import quantization

            linear, generator = nn.Linear(width, width, bias=False), torch.Generator().manual_seed(0)
            linear.weight = nn.Parameter(random_weight((width, width), torch.float32, generator), requires_grad=False)
            plain = nn.Sequential(linear)
            quantization.quantize_(plain, getattr(quantization, CONFIGS[scheme])())
            compiled = torch.compile(plain, dynamic=False)
            compiled(x)
        except Exception as error:  # another project's code, and a compiler that may be missing
            return None, f"not measured: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return lambda: compiled(x), f"torchao {torchao.__version__}, {CONFIGS[scheme]}, torch.compile"
