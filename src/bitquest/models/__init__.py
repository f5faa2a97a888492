"""The Llama family in plain torch, without a branch for quantization."""
