"""Opens a packed model: checksums first, then what config.json declares against what the tensor file holds."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from torch import Tensor

from bitquest.errors import ConfigError, DataError, FormatError
from bitquest.export.codes import packed_from_bytes
from bitquest.export.format import (
    CONFIG,
    LARGEST_SIZE,
    MANIFEST,
    MODEL,
    TOKENIZER,
    LayerSpec,
    check_step,
    common_scheme,
)
from bitquest.export.manifest import check_file, check_version, open_regular, parse_json, read_manifest
from bitquest.export.tensorfile import Entry, Header, read_header, read_tensor
from bitquest.models import LlamaConfig, Tokenizer
from bitquest.nn import Scheme
from bitquest.numerics.quantizer import Quantizer

_LARGEST_CONFIG = 1 << 26
_LARGEST_TOKENIZER = 1 << 28
_LARGEST_ROPE = 1 << 26  # elements of the tables of rotary positions, which are computed, not read
_TENSORS_PER_BLOCK = 9  # seven weights and two norms
_KEYS = {"format", "version", "architecture", "model", "scheme", "quantizers", "layers", "shared", "metadata"}


@dataclass(frozen=True)
class PackedFile:
    """An open packed model whose description has been checked; tensors are read on demand.

    llama: the model's configuration, None for a foreign module. layers: packed layers by module name. shared: tensor
    names that stand for another tensor of the file. plain: names of the tensors that belong to no packed layer.
    scheme: what all layers follow, None where they do not follow one.
    """

    folder: Path
    llama: LlamaConfig | None
    scheme: Scheme | None
    layers: dict[str, LayerSpec]
    shared: dict[str, str]
    plain: tuple[str, ...]
    metadata: dict[str, Any]
    tokenizer_json: str | None
    _file: BufferedReader
    header: Header

    @property
    def where(self) -> str:
        return str(self.folder / MODEL)

    def entry(self, name: str) -> Entry:
        """Type and shape of a tensor, under its own name or a shared one."""
        return self.header.entries[self.shared.get(name, name)]

    def read(self, name: str) -> Tensor:
        """A tensor of the file, under its own name or a shared one."""
        return read_tensor(self._file, self.header, self.shared.get(name, name), self.where)

    def read_layer(self, fqn: str) -> dict[str, Tensor]:
        """A layer's tensors as PackedLinear and PackedEmbedding take them, values checked."""
        spec, prefix = self.layers[fqn], layer_prefix(fqn)
        stored = {suffix: self.read(prefix + suffix) for suffix in spec.tensors()}
        for suffix in ("step", "activation_step"):
            if suffix in stored:
                check_step(stored[suffix], f"{self.where}, {prefix}{suffix}")
        if spec.weight is not None:
            stored["codes"], kept = packed_from_bytes(stored, spec, f"{self.where}, {prefix}codes")
            if kept is not None:
                stored["kept"] = kept
        return stored

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, None if the model was saved without one. Raises FormatError if it does not fit the model."""
        if self.tokenizer_json is None:
            return None
        path = self.folder / TOKENIZER
        try:
            tokenizer = Tokenizer.from_json(self.tokenizer_json, str(path))
        except DataError as error:
            raise FormatError(str(error)) from None
        if self.llama is not None and tokenizer.vocab_size > self.llama.vocab_size:
            raise FormatError(
                f"{path} has {tokenizer.vocab_size} words, the model {self.llama.vocab_size}: "
                "they do not belong together"
            )
        return tokenizer


def layer_prefix(fqn: str) -> str:
    """What the names of a layer's tensors begin with; nothing for a model that is itself one layer."""
    return f"{fqn}." if fqn else ""


@contextmanager
def open_packed(folder: Path) -> Iterator[PackedFile]:
    """Open a packed model after every check that needs no tensor in memory.

    Raises FormatError: not a packed model, from a later version, damaged, or describing what the files do not hold.
    """
    manifest = read_manifest(folder)
    with ExitStack() as stack:
        files = {name: stack.enter_context(open_regular(folder / name)) for name in manifest}
        for name, (size, digest) in manifest.items():
            check_file(files[name], folder / name, size, digest)
        for name, largest in ((CONFIG, _LARGEST_CONFIG), (TOKENIZER, _LARGEST_TOKENIZER)):
            if name in manifest and manifest[name][0] > largest:
                raise FormatError(f"{folder / name} has {manifest[name][0]} bytes; at most {largest} make sense")
        where = str(folder / CONFIG)
        fields = parse_json(files[CONFIG].read(), where)
        header = read_header(files[MODEL], str(folder / MODEL))
        tokenizer_json = None
        if TOKENIZER in files:
            data = files[TOKENIZER].read()
            parse_json(data, str(folder / TOKENIZER))
            tokenizer_json = data.decode("utf-8")
        yield _described(folder, fields, header, tokenizer_json, files[MODEL])


def _described(
    folder: Path, fields: dict[str, Any], header: Header, tokenizer_json: str | None, file: BufferedReader
) -> PackedFile:
    where = str(folder / CONFIG)
    check_version(fields, where)
    if set(fields) != _KEYS:
        odd = sorted(set(fields) ^ _KEYS)
        raise FormatError(f"{where}: unknown or missing keys: {', '.join(map(repr, odd))}")
    for key, kind in (("quantizers", list), ("layers", dict), ("shared", dict), ("metadata", dict)):
        if not isinstance(fields[key], kind):
            raise FormatError(f"{where}: {key} must be {'an object' if kind is dict else 'a list'}")
    llama = _llama(fields["architecture"], fields["model"], where)
    quantizers = _quantizers(fields["quantizers"], where)
    layers = {
        name: LayerSpec.from_json(entry, quantizers, f"{where}, layer {name!r}")
        for name, entry in fields["layers"].items()
    }
    shared = _shared(fields["shared"], header, where)
    plain = _check_tensors(layers, shared, header, str(folder / MODEL))
    if llama is not None:
        _check_llama(llama, shared, header, where)
    scheme = common_scheme(layers)
    if fields["scheme"] != (None if scheme is None else scheme.to_json()):
        raise FormatError(f"{where}: its scheme is not the one its layers follow")
    return PackedFile(folder, llama, scheme, layers, shared, plain, fields["metadata"], tokenizer_json, file, header)


def _llama(architecture: Any, model: Any, where: str) -> LlamaConfig | None:
    if architecture is None and model is None:
        return None
    if architecture != "llama" or not isinstance(model, dict):
        raise FormatError(f"{where}: an architecture {architecture!r} is beyond this reader, which builds 'llama'")
    try:
        return LlamaConfig.from_json(model)
    except (ConfigError, TypeError, OverflowError) as error:
        raise FormatError(f"{where}: {error}") from None


def _quantizers(listed: list[Any], where: str) -> list[Quantizer]:
    try:
        return [Quantizer.from_json(entry) for entry in listed]
    except (ConfigError, TypeError, OverflowError) as error:
        raise FormatError(f"{where}: {error}") from None


def _shared(shared: dict[str, Any], header: Header, where: str) -> dict[str, str]:
    for name, owner in shared.items():
        if not isinstance(owner, str) or owner not in header.entries or name in header.entries:
            raise FormatError(f"{where}: {name!r} is said to be {owner!r}, which the tensors do not bear out")
    return shared


def _check_tensors(layers: dict[str, LayerSpec], shared: dict[str, str], header: Header, where: str) -> tuple[str, ...]:
    """Raise FormatError unless each layer has its tensors, of the right type and shape. Returns the other names."""
    named = {name: header.entries[shared.get(name, name)] for name in (*header.entries, *shared)}
    of_layers: set[str] = set()
    for fqn, spec in layers.items():
        for suffix, (dtype, shape) in spec.tensors().items():
            name = layer_prefix(fqn) + suffix
            if name not in named:
                raise FormatError(f"{where}: tensor {name!r} is missing")
            entry = named[name]
            if entry.shape != shape or (entry.dtype != dtype if dtype else not entry.dtype.is_floating_point):
                raise FormatError(
                    f"{where}: tensor {name!r} is {entry.dtype} {entry.shape}, expected {dtype or 'a float'} {shape}"
                )
            of_layers.add(name)
    return tuple(name for name in named if name not in of_layers)


def _check_llama(config: LlamaConfig, shared: dict[str, str], header: Header, where: str) -> None:
    """Sizes that no honest file has, before a model of them is built."""
    queries = config.num_attention_heads * config.head_size
    sizes = (config.vocab_size, config.hidden_size, config.intermediate_size, config.max_position_embeddings, queries)
    if max(sizes) > LARGEST_SIZE or config.max_position_embeddings * config.head_size > _LARGEST_ROPE:
        raise FormatError(f"{where}: a model of these sizes is beyond this reader: {config}")
    if config.num_hidden_layers * _TENSORS_PER_BLOCK > len(header.entries) + len(shared):
        raise FormatError(f"{where}: {config.num_hidden_layers} layers, but the file has {len(header.entries)} tensors")
    tied = [name for name, owner in shared.items() if name.startswith("lm_head.") and owner.startswith("model.embed_")]
    if config.tie_word_embeddings != bool(tied):
        raise FormatError(f"{where}: tie_word_embeddings is {config.tie_word_embeddings}, the stored tensors differ")


def read_tokenizer(dir: str | Path) -> Tokenizer | None:
    """The tokenizer of a packed model; None if it was saved without one. Raises FormatError as `load` does."""
    with open_packed(Path(dir)) as packed:
        return packed.tokenizer()


def packed_sizes(dir: str | Path) -> dict[str, int]:
    """What the tensors of a packed model take, in bytes.

    total_bytes: all tensors, scales and norms included. linear_bytes, embedding_bytes, head_bytes: of the blocks'
    linear layers, of the token tables, of `lm_head` (0 where tied to the table). file_bytes: of the whole directory.
    parameters: weights, biases and norms, counted once where tied.
    """
    with open_packed(Path(dir)) as packed:
        sizes = {"linear_bytes": 0, "embedding_bytes": 0, "head_bytes": 0}
        parameters = 0
        layer_of = {layer_prefix(fqn) + s: (fqn, s) for fqn, spec in packed.layers.items() for s in spec.tensors()}
        for name, entry in packed.header.entries.items():
            fqn, suffix = layer_of.get(name, (name.rpartition(".")[0], "weight"))
            spec = packed.layers.get(fqn) if name in layer_of else None
            parameters += _parameters(entry, spec, suffix)
            leaf = fqn.rsplit(".", 1)[-1]
            if leaf == "lm_head":
                sizes["head_bytes"] += entry.bytes
            elif leaf == "embed_tokens" or (spec is not None and spec.kind == "embedding"):
                sizes["embedding_bytes"] += entry.bytes
            elif spec is not None or len(entry.shape) == 2:
                sizes["linear_bytes"] += entry.bytes
        total = sum(entry.bytes for entry in packed.header.entries.values())
        files = sum(path.stat().st_size for path in packed.folder.iterdir() if path.is_file())
    return {"total_bytes": total, **sizes, "file_bytes": files, "parameters": parameters}


def _parameters(entry: Entry, spec: LayerSpec | None, suffix: str) -> int:
    if spec is None or suffix == "bias":
        return entry.elements if entry.dtype.is_floating_point else 0
    return spec.out_features * spec.in_features if suffix in ("codes", "float_weight") else 0


def is_packed(folder: Path) -> bool:
    """Whether a directory looks like a packed model: it has a manifest beside its tensors."""
    return (folder / MANIFEST).exists() and (folder / MODEL).exists()
