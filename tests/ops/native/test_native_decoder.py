"""The float loops of native decoding, one instruction set after the other, and whole steps through each of them."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bitquest.errors import ConfigError
from bitquest.inference import KVCache
from bitquest.inference.native_decode import NativeDecoder
from bitquest.models import Llama, LlamaConfig
from bitquest.nn import pack_, quantize_
from bitquest.ops import native, native_decoder
from bitquest.ops.linear_spec import LinearSpec

ISAS = native.isas() if native.availability()[0] else ("portable",)  # "portable" skips, with the reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("channels", "width"), [(1, 1), (3, 7), (5, 16), (9, 33), (18, 47), (66, 63), (130, 640)])
def test_a_matrix_times_a_vector(isa: str, channels: int, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(channels)
    w, x = torch.randn(channels, width, generator=generator).to(dtype), torch.randn(width, generator=generator)
    bias = torch.randn(channels, generator=generator)
    expected = w.double() @ x.double()
    atol = 1e-6 * math.sqrt(width)
    assert torch.allclose(native_decoder.dense_vector(w, x).double(), expected, atol=atol, rtol=1e-6)
    assert torch.allclose(native_decoder.dense_vector(w, x, bias).double(), expected + bias, atol=atol, rtol=1e-6)


def test_any_number_of_threads_gives_the_same_product(isa: str) -> None:
    w, x = torch.randn(259, 321), torch.randn(321)
    made, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            made.append(native_decoder.dense_vector(w, x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(made[0], other) for other in made)


@pytest.mark.parametrize(
    ("seen", "size"), [(1, 2), (1, 64), (2, 6), (15, 16), (16, 32), (17, 18), (33, 80), (300, 128)]
)
@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
def test_attention_of_a_head(isa: str, seen: int, size: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seen)
    q, keys, values = (torch.randn(*s, generator=generator) for s in ((size,), (seen, size), (seen, size)))
    q = q * spread
    weights = ((keys.double() @ q.double()) / math.sqrt(size)).softmax(0)
    got = native_decoder.attend(q, keys, values).double()
    assert torch.allclose(got, weights @ values.double(), atol=2e-5 if spread > 1 else 2e-6)
    torch_s = F.scaled_dot_product_attention(q.view(1, 1, -1), keys.unsqueeze(0), values.unsqueeze(0)).view(-1)
    assert torch.allclose(got.float(), torch_s, atol=2e-5 if spread > 1 else 2e-6)


def test_attention_ignores_what_is_out_of_reach_and_hands_on_nan(isa: str) -> None:
    keys = torch.zeros(20, 16)
    keys[3, 0] = 1e4  # e^-25000 of the others is nothing
    q = torch.zeros(16)
    q[0] = 10.0
    values = torch.randn(20, 16)
    assert torch.equal(native_decoder.attend(q, keys, values), values[3])
    keys[5, 1], q[1] = float("nan"), 1.0
    assert native_decoder.attend(q, keys, values).isnan().all()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "rows", "first", "size"), [(1, 1, 1, 0, 6), (4, 2, 19, 0, 32), (6, 2, 5, 17, 34)]
)
def test_a_prompt_attends_as_its_tokens_do_one_by_one(
    isa: str, heads: int, kv_heads: int, rows: int, first: int, size: int
) -> None:
    q = torch.randn(rows, heads, size).transpose(0, 1)
    memory = torch.randn(2, kv_heads, first + rows + 3, size)  # a cache with room to spare
    keys, values = memory[:, :, : first + rows]
    made, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            made.append(native_decoder.attend_rows(q, keys, values))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*made)
    for h in range(heads):
        own = h * kv_heads // heads
        for t in range(rows):
            seen = first + t + 1
            alone = native_decoder.attend(q[h, t], keys[own, :seen], values[own, :seen])
            assert torch.equal(made[0][h, t], alone)
    with pytest.raises(ConfigError, match="no attention of"):
        native_decoder.attend_rows(q.double(), keys, values)


@pytest.mark.parametrize("scheme", ["w1a1", "w4a8-h8", "w1a16-h4"])
def test_steps_equal_the_models(isa: str, scheme: str) -> None:
    config = LlamaConfig.preset("1M", vocab_size=61, max_position_embeddings=12, num_hidden_layers=2, qk_norm=True)
    model = pack_(quantize_(Llama(config).init_weights(3), scheme), "native").eval()
    assert isinstance(model, Llama)
    theirs, ours = KVCache(config), KVCache(config)
    decoder, far = NativeDecoder(model, ours), []
    with torch.no_grad():
        for token in range(12):
            expected = model(torch.tensor([[token]]), theirs)[0, -1]
            far.append(float((decoder.step(token) - expected).abs().max() / expected.abs().max()))
            ours.keys.copy_(theirs.keys), ours.values.copy_(theirs.values)
    # Attention's last bit may move a value across a threshold of the next quantizer: seldom.
    assert sorted(far)[-3] < 1e-5, far


def test_descriptions_that_do_not_fit_are_refused(isa: str) -> None:
    with pytest.raises(ConfigError, match="w has shape"):
        native_decoder.dense_vector(torch.zeros(3, 4), torch.zeros(5))
    with pytest.raises(ConfigError, match="w is torch"):
        native_decoder.dense_vector(torch.zeros(3, 4, dtype=torch.float64), torch.zeros(4))
    norm = native_decoder.Norm(torch.ones(8), 1e-5)

    def made(head: torch.Tensor, keys: torch.Tensor, weight: torch.Tensor = norm.weight) -> native_decoder.Decoder:
        spec = LinearSpec(8, 5, None, None, 1)
        return native_decoder.Decoder(
            native_decoder.Sizes(8, 16, 2, 1, 4, 5),
            [],
            native_decoder.Table(dense=torch.zeros(5, 8)),
            native_decoder.Norm(weight, 1e-5),
            native_decoder.Layer(spec, dense=head),
            (torch.zeros(3, 4), torch.zeros(3, 4)),
            (keys, torch.zeros(0, 1, 1, 3, 4)),
        )

    head, keys = torch.zeros(5, 8), torch.zeros(0, 1, 1, 3, 4)
    assert made(head, keys).step(4, 2).tolist() == [0.0] * 5  # no layers: the norm and the head
    for token, position in ((5, 0), (-1, 0), (0, 3), (0, -1)):
        with pytest.raises(ConfigError, match=f"decoding token {token} at position {position}"):
            made(head, keys).step(token, position)
    with pytest.raises(ConfigError, match="a matrix has shape"):
        made(torch.zeros(5, 7), keys)
    with pytest.raises(ConfigError, match="of the cache are no float32 memory"):
        made(head, torch.zeros(0, 1, 1, 2, 4))
    with pytest.raises(ConfigError, match="a norm's weight has shape"):
        made(head, keys, torch.ones(7))


@pytest.mark.parametrize("isa_name", ISAS)
def test_nothing_is_read_or_written_outside_the_arrays(library_of, isa_name: str) -> None:
    library_of(isa_name)
    program = Path(__file__).with_name("guarded_decoder.py")
    settings = {**os.environ, "BITQUEST_ISA": isa_name, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False, env=settings)
    last = done.stdout.rstrip().rpartition("\n")[2]
    assert done.returncode == 0, f"ended with {done.returncode} at: {last}\n{done.stderr}"
    assert last == f"done {isa_name}"
