"""Times llama.cpp on GGUF files, in a process of its own; a script that needs llama-cpp-python and nothing of bitquest.

Arguments: NAME=FILE … A JSON line says what was found; then each JSON line on standard input, {"model", "what"
("decode" or "prefill"), "tokens", "threads"}, is answered by one with the seconds: a token's, or the prompt's.
"""

import json
import random
import sys
import time
from typing import Any

CONTEXT = 1024


class Model:
    """One file, loaded, with a context for one stream."""

    def __init__(self, api: Any, path: str) -> None:
        self.api = api
        self.model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        if not self.model:
            raise RuntimeError("llama.cpp does not load it: a type that this version has not, or too little memory")
        params = api.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = CONTEXT
        self.context = api.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp makes no context for the model")
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))

    def step(self, ids: "list[int]") -> int:
        """The likeliest token after these."""
        import numpy as np

        array = (self.api.llama_token * len(ids))(*ids)
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(array, len(ids))):
            raise RuntimeError("llama_decode failed")
        logits = np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, -1), (self.vocabulary,))
        return int(logits.argmax())

    def measure(self, what: str, tokens: int, threads: int) -> float:
        self.api.llama_set_n_threads(self.context, threads, threads)
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        choose = random.Random(1)
        if what == "prefill":
            prompt = [choose.randrange(self.vocabulary) for _ in range(tokens)]
            began = time.perf_counter()
            self.step(prompt)
            return time.perf_counter() - began
        token = self.step([choose.randrange(self.vocabulary)])
        began = time.perf_counter()
        for _ in range(tokens):
            token = self.step([token])
        return (time.perf_counter() - began) / tokens


def say(fields: "dict[str, Any]") -> None:
    print(json.dumps(fields), flush=True)


def main() -> None:
    try:
        import llama_cpp as api
    except ImportError as error:
        say({"missing": str(error)})
        return
    quiet = api.llama_log_callback(lambda *_: None)
    api.llama_log_set(quiet, None)
    api.llama_backend_init()
    models, failed = {}, {}
    for word in sys.argv[1:]:
        name, _, path = word.partition("=")
        try:
            models[name] = Model(api, path)
        except RuntimeError as error:
            failed[name] = str(error)
    info = api.llama_print_system_info().decode().strip()
    say({"version": api.__version__, "system": info, "loaded": list(models), "failed": failed})
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            say({"seconds": models[asked["model"]].measure(asked["what"], asked["tokens"], asked["threads"])})
        except (KeyError, RuntimeError) as error:
            say({"error": str(error)})


if __name__ == "__main__":
    main()
