"""A model of your own in 20 lines: trained at 2-bit weights and 4-bit activations, packed, saved, loaded, compared.

Run: python examples/quantize_your_model.py

The model guesses the next byte of a Python source file from the 16 bytes before it. Nothing depends on that: any module
with nn.Linear layers goes the same way.
"""

import argparse
import inspect
import tempfile

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bitquest as bq


class NextByte(nn.Module):
    """uint8 values (B, 16) -> logits (B, 256)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(256, 32), nn.Linear(16 * 32, 256)
        self.hidden, self.out = nn.Linear(256, 256), nn.Linear(256, 256)

    def forward(self, bytes_BT: Tensor) -> Tensor:
        h_BD = self.mix(self.embed(bytes_BT).flatten(1)).relu()
        return self.out(h_BD + self.hidden(h_BD).relu())


torch.manual_seed(0)
text = torch.tensor(list(inspect.getsource(argparse).encode()))  # any text will do; this one comes with Python
rows = text.unfold(0, 17, 1)  # every stretch of 17 bytes
rows, inputs, targets = rows[:-2048], rows[-2048:, :-1], rows[-2048:, -1]  # the end is held out

model = bq.quantize_(NextByte(), "w2a4")  # in place, every nn.Linear; parameters stay float32 while they are trained
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(401):
    batch = rows[torch.randint(len(rows), (128,))]
    loss = cross_entropy(model(batch[:, :-1]), batch[:, -1])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        print(f"step {step:3}: {cross_entropy(model(inputs), targets):.2f} nats per held-out byte")

trained = model(inputs)
bq.pack_(model)  # in place: layers hold 2-bit integers now, and compute with integers
with tempfile.TemporaryDirectory() as folder:
    size = sum(file.stat().st_size for file in bq.save(model, f"{folder}/packed").iterdir())
    packed = bq.load(f"{folder}/packed", model=NextByte())(inputs)

# To float rounding; an activation that lies on a rounding threshold may get the neighbouring code all the same.
equal = ((packed - trained).abs().amax(1) <= 1e-5 * trained.abs().max()).sum()
print(f"loaded: {cross_entropy(packed, targets):.2f} nats per held-out byte")
print(f"{equal} of {len(packed)} outputs are the trained model's, to 1e-5")
print(f"{sum(4 * p.numel() for p in NextByte().parameters()):,} bytes in float32, {size:,} packed")
