"""The model that is trained, its configuration, its tokenizer, and Hugging Face's checkpoints of it."""

from bitquest.models.config import PRESETS, LlamaConfig
from bitquest.models.hf import load_hf, save_hf
from bitquest.models.llama import Llama
from bitquest.models.tokenizer import StreamDecoder, Tokenizer

__all__ = ["PRESETS", "Llama", "LlamaConfig", "StreamDecoder", "Tokenizer", "load_hf", "save_hf"]
