"""Training on integers in several processes: DDP and FSDP2 give the gradients of one process."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bitquest.models import Llama, LlamaConfig
from bitquest.models.fuse import fuse_
from bitquest.nn import QuantizedLinear, quantize_, weights_held
from bitquest.nn.integer_training import TrainingPlan
from bitquest.ops import Backend
from bitquest.ops.linear_spec import LinearSpec

pytestmark = pytest.mark.distributed
WORLD = 2


def make(config: LlamaConfig, scheme: str) -> Llama:
    """On the integer path whatever backend is there: the torch engine stands in."""
    model = quantize_(Llama(config).init_weights(0), scheme, backend="torch").train()
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            operands = layer.weight_quantizer.spec, layer.activation_quantizer.spec
            spec = LinearSpec(layer.in_features, layer.out_features, *operands, layer.rotation.block)
            layer._plan = TrainingPlan(spec, Backend.TORCH)
    assert isinstance(model, Llama)
    return fuse_(model)


def batch(rank: int) -> Tensor:
    return torch.randint(0, 50, (4, 17), generator=torch.Generator().manual_seed(rank))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def train(model: nn.Module, batches: list[Tensor], steps: int = 3, held: bool = False) -> None:
    """A few steps of SGD, each on two micro-batches of every batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        if held:
            with weights_held(model):
                _accumulate(model, batches)
        else:
            _accumulate(model, batches)
        optimizer.step()


def _accumulate(model: nn.Module, batches: list[Tensor]) -> None:
    for ids in batches:
        for part in ids.chunk(2):
            (loss_of(model, part) / (2 * len(batches))).backward()


def _worker(rank: int, folder: str, config: LlamaConfig, wrap: str, scheme: str, held: bool) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    try:
        model: nn.Module = make(config, scheme)
        if wrap == "ddp":
            model = nn.parallel.DistributedDataParallel(model)
        else:
            from torch.distributed.fsdp import fully_shard

            for block in model.model.layers:  # type: ignore[union-attr]
                fully_shard(block)
            fully_shard(model)
        train(model, [batch(rank)], held=held)
        trained = {
            name.removeprefix("module."): (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()
            for name, p in model.named_parameters()
        }
        if rank == 0:
            save_file({name: tensor.clone() for name, tensor in trained.items()}, f"{folder}/trained.safetensors")
    finally:
        dist.destroy_process_group()


def spawn(function: Callable[..., None], *arguments: object) -> None:
    torch.multiprocessing.start_processes(function, arguments, nprocs=WORLD, start_method="spawn")


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("scheme", ["w1a1", "w4a4"])
@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_several_processes_train_as_one(
    wrap: str, scheme: str, held: bool, grouped_config: LlamaConfig, tmp_path: Path
) -> None:
    if wrap == "fsdp2" and held:
        pytest.skip("held weights are whole weights; FSDP2 gathers them in each forward pass")
    spawn(_worker, str(tmp_path), grouped_config, wrap, scheme, held)
    single = make(grouped_config, scheme)
    train(single, [batch(rank) for rank in range(WORLD)])
    trained = load_file(tmp_path / "trained.safetensors")
    for name, parameter in single.named_parameters():
        difference = float((trained[name] - parameter.detach()).norm() / parameter.detach().norm())
        assert difference < 1e-3, name
