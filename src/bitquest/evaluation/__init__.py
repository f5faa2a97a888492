"""Measuring models: perplexity, verification, comparisons, reports."""
