"""Data, optimisation, checkpoints: from a text file to a trained model."""
