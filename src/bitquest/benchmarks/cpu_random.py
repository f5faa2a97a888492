"""Packed layers and whole Llamas of random codes: made in seconds, without ever holding the float weights.

How fast a layer is does not depend on what its codes are. Steps are such that weights have the σ of an initialized
model, so activations keep their size through any number of blocks. N out_features, K in_features, V vocabulary.
"""

import torch
from torch import Tensor, nn

from bitquest.models import Llama, LlamaConfig
from bitquest.models.llama import INIT_SIGMA, RMSNorm, rope_tables
from bitquest.nn import PackedEmbedding, PackedLinear, Scheme
from bitquest.numerics import NofM, PerGroup, PerTensor, Quantizer, Rotation, UniformGrid, packed_width

_TILE = 2**20  # elements of random floats that are repeated; more would only take longer to make


def random_codes(rows: int, width: int, spec: Quantizer, generator: torch.Generator) -> dict[str, Tensor | None]:
    """packed (N, ⌈K·bits/8⌉), step and kept of a weight with random codes, as PackedLinear takes them."""
    packed = torch.randint(0, 256, (rows, packed_width(width, spec.bits)), dtype=torch.uint8, generator=generator)
    spare = -width * spec.bits % 8
    if spare:
        packed[:, -1] >>= spare  # spare bits are zero
    if isinstance(spec.granularity, PerTensor):
        shape = (1, 1)
    else:
        shape = (rows, width // spec.granularity.size if isinstance(spec.granularity, PerGroup) else 1)
    levels = 2.0**spec.bits if isinstance(spec.grid, UniformGrid) else 4.0
    unit = INIT_SIGMA * (12 / (levels**2 - 1)) ** 0.5  # σ of equally likely levels is √((4^b − 1)/12) steps
    step = unit * (0.5 + torch.rand(shape, generator=generator))
    return {"packed": packed, "step": step, "kept": _kept(rows, width, spec, generator)}


def _kept(rows: int, width: int, spec: Quantizer, generator: torch.Generator) -> Tensor | None:
    pattern = spec.sparsity
    if not isinstance(pattern, NofM):
        return None
    units = pattern.m
    scores = torch.rand(rows, width // (units * (2 if pattern.pair else 1)), units, generator=generator)
    kept = (scores.argsort(-1).argsort(-1) < pattern.n).flatten(1)
    return kept.repeat_interleave(2, 1) if pattern.pair else kept


def random_linear(
    k: int,
    n: int,
    weight: Quantizer,
    activation: Quantizer | None,
    rotation: Rotation,
    generator: torch.Generator,
    backend: str = "auto",
) -> PackedLinear:
    """A packed layer (N, K) of random codes."""
    made = random_codes(n, k, weight, generator)
    return PackedLinear(k, n, weight=weight, activation=activation, rotation=rotation, backend=backend, **made)


def random_weight(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A float weight of normal numbers that repeat after a while, in memory of its own."""
    weight = torch.empty(shape, dtype=dtype)
    flat = weight.view(-1)
    tile = (torch.randn(min(flat.numel(), _TILE), generator=generator) * INIT_SIGMA).to(dtype)
    whole = flat.numel() // tile.numel() * tile.numel()
    flat[:whole].view(-1, tile.numel()).copy_(tile.expand(whole // tile.numel(), -1))
    flat[whole:].copy_(tile[: flat.numel() - whole])
    return weight


def _empty_llama(config: LlamaConfig) -> Llama:
    with torch.device("meta"):
        model = Llama(config)
    model.model.cos, model.model.sin = rope_tables(config)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.weight = nn.Parameter(torch.ones(module.weight.shape), requires_grad=False)
    return model


def _linears(model: Llama) -> list[tuple[nn.Module, str, nn.Linear]]:
    """(owner, name, layer) of the plain linear layers in the blocks."""
    found = []
    for owner in model.model.layers.modules():
        found += [(owner, name, child) for name, child in owner.named_children() if type(child) is nn.Linear]
    return found


def packed_llama(config: LlamaConfig, scheme: Scheme, seed: int = 0, backend: str = "auto") -> Llama:
    """A Llama of random codes at a scheme that quantizes weights, token table and head."""
    assert scheme.weight is not None and scheme.embedding is not None and scheme.head is not None
    generator, model, rotation = torch.Generator().manual_seed(seed), _empty_llama(config), scheme.rotation
    for owner, name, plain in _linears(model):
        k, n = plain.in_features, plain.out_features
        setattr(owner, name, random_linear(k, n, scheme.weight, scheme.activation, rotation, generator, backend))
    v, d = config.vocab_size, config.hidden_size
    table = random_codes(v, d, scheme.embedding, generator)
    model.model.embed_tokens = PackedEmbedding(  # type: ignore[assignment]
        v,
        d,
        weight=scheme.embedding,
        rotation=rotation,
        **table,  # type: ignore[arg-type]
    )
    model.lm_head = random_linear(d, v, scheme.head, None, rotation, generator)  # type: ignore[assignment]
    return model.requires_grad_(False).eval()


def float_llama(config: LlamaConfig, dtype: torch.dtype, distinct_blocks: int | None = None, seed: int = 0) -> Llama:
    """An unquantized Llama of random weights, norms in float32.

    distinct_blocks: how many blocks have weights of their own, the others share those in turn; None: every one.
    """
    generator, model = torch.Generator().manual_seed(seed), _empty_llama(config)
    held: dict[tuple[int, str], nn.Parameter] = {}
    for number, block in enumerate(model.model.layers):
        slot = number if distinct_blocks is None else number % distinct_blocks
        for name, module in block.named_modules():
            if type(module) is nn.Linear:
                shape = (module.out_features, module.in_features)
                if (slot, name) not in held:
                    held[slot, name] = nn.Parameter(random_weight(shape, dtype, generator), requires_grad=False)
                module.weight = held[slot, name]
    table = (config.vocab_size, config.hidden_size)
    for owner in (model.model.embed_tokens, model.lm_head):
        owner.weight = nn.Parameter(random_weight(table, dtype, generator), requires_grad=False)
    return model.requires_grad_(False).eval()


def model_bytes(model: Llama) -> dict[str, int]:
    """Bytes of a model as stored (packed codes, scales, masks as bits, floats), and those that one token reads.

    A token reads one row of the token table; the key-value cache is not counted.
    """
    table = model.model.embed_tokens
    total = _stored(model.model.layers) + _stored(table) + _stored(model.lm_head) + _stored(model.model.norm)
    words = model.config.vocab_size
    return {"bytes": total, "bytes_per_token": total - _stored(table) + _stored(table) // words}


def _stored(module: nn.Module) -> int:
    size = 0
    for name, tensor in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]:
        size += -(-tensor.numel() // 8) if name.endswith("kept") else tensor.numel() * tensor.element_size()
    return size
