"""BitQuEST: train Llama-type language models with 1- to 8-bit weights and activations, and run exactly those bits."""

__version__ = "0.1.0"
