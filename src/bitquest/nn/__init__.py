"""Layers that train on quantized weights and activations, and layers that run packed ones."""
