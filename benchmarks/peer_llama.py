"""llama.cpp on the same decoder: how it is exported, and the engines that `peer_worker` runs under an interpreter with llama_cpp and gguf.

A folder holds job.json (the shape, the prompt, the token after it), weights/NAME.npy (f16 matrices, f32 vectors) and expected.npy, the
logits of that token f64[vocabulary]. Every engine writes its own GGUF file there.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.peer_engines import Call, Case, Engine

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
"""Of a layer, in transformers and in GGUF."""
FILE_TYPES = {"F16": 1, "Q8_0": 7, "Q4_0": 2}
"""GGUF's numbers for what most tensors are stored as."""


def export(model: Any, prompt: list[int], token: int, logits: Any, folder: Path) -> None:
    """Write a LlamaForCausalLM with untied logits. prompt, token: ids; logits: float[vocabulary] of the token after the prompt."""
    import numpy as np

    shape = model.config
    (folder / "weights").mkdir(parents=True)
    for name, tensor in model.state_dict().items():
        array = tensor.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            array = _interleaved(array, shape.num_attention_heads if "q_proj" in name else shape.num_key_value_heads)
        np.save(folder / "weights" / f"{_name(name)}.npy", array.astype(np.float32 if array.ndim == 1 else np.float16))
    job = {
        "hidden": shape.hidden_size, "ffn": shape.intermediate_size, "layers": shape.num_hidden_layers, "heads": shape.num_attention_heads,
        "kv_heads": shape.num_key_value_heads, "vocabulary": shape.vocab_size, "eps": shape.rms_norm_eps,
        "theta": shape.rope_parameters["rope_theta"], "context": len(prompt) + 128, "prompt": prompt, "token": token,
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job))
    np.save(folder / "expected.npy", np.asarray(logits, dtype=np.float64))


def _name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight."""
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    if name in whole:
        return whole[name]
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{NAMES[part.removesuffix('.weight')]}.weight"


def _interleaved(rows: Any, heads: int) -> Any:
    """llama.cpp rotates neighbouring features of a head, transformers those half a head apart: rows in the other order."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _gguf(case: Case, kind: str) -> str:
    """The model stored as `kind`, quantized by gguf's own code where it is a quantized type."""
    import gguf
    import numpy as np

    path, job = case.folder / f"{kind}.gguf", case.job()
    if path.exists():
        return str(path)
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(str(partial), "llama")
    writer.add_context_length(job["context"])
    writer.add_embedding_length(job["hidden"])
    writer.add_block_count(job["layers"])
    writer.add_feed_forward_length(job["ffn"])
    writer.add_head_count(job["heads"])
    writer.add_head_count_kv(job["kv_heads"])
    writer.add_layer_norm_rms_eps(job["eps"])
    writer.add_rope_dimension_count(job["hidden"] // job["heads"])
    writer.add_rope_freq_base(job["theta"])
    writer.add_vocab_size(job["vocabulary"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(FILE_TYPES[kind])
    stored = gguf.GGMLQuantizationType[kind]
    for file in sorted((case.folder / "weights").glob("*.npy")):
        array = np.load(file)
        if array.ndim == 1:
            writer.add_tensor(file.stem, array.astype(np.float32))
        elif kind == "F16":
            writer.add_tensor(file.stem, array)
        else:
            writer.add_tensor(file.stem, gguf.quants.quantize(array.astype(np.float32), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)
    return str(path)


def llama_cpp(case: Case, kind: str) -> Call:
    """One token after the prompt, whose keys and values stay in the cache between calls."""
    import ctypes

    import llama_cpp as lib
    import numpy as np

    job = case.job()
    lib.llama_backend_init()
    weights = lib.llama_model_default_params()
    weights.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(_gguf(case, kind).encode(), weights)
    how = lib.llama_context_default_params()
    how.n_ctx = how.n_batch = job["context"]
    how.n_threads = how.n_threads_batch = case.threads
    context = lib.llama_init_from_model(model, how)

    def decode(tokens: list[int], at: int) -> None:
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, at + i, 1, 0
            batch.logits[i] = i == len(tokens) - 1
        failed = lib.llama_decode(context, batch)
        lib.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode gave {failed}")

    prompt = job["prompt"]
    for at, token in enumerate(prompt):  # a batch of quantized products goes to AMX tiles, which crash in 0.3.36; one token does not
        decode([token], at)

    def step() -> Any:
        decode([job["token"]], len(prompt))
        logits = np.ctypeslib.as_array(ctypes.cast(lib.llama_get_logits(context), ctypes.POINTER(ctypes.c_float)), (job["vocabulary"],))
        lib.llama_memory_seq_rm(lib.llama_get_memory(context), 0, len(prompt), -1)
        return logits

    return step


DECODERS = {
    f"llama.cpp {kind}": Engine("llama_cpp", kind.lower(), False, ("llama_cpp_python",), lambda case, kind=kind: llama_cpp(case, kind))
    for kind in FILE_TYPES
}
