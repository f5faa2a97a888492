"""Running a model: key-value cache, sampling, text as it comes."""

from bitquest.inference.engine import Speed, TextEngine, generate
from bitquest.inference.kv_cache import KVCache
from bitquest.inference.sampling import SamplingOptions, choose, probabilities

__all__ = ["KVCache", "SamplingOptions", "Speed", "TextEngine", "choose", "generate", "probabilities"]
