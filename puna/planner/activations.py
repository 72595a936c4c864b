"""Bytes that a block keeps of a token for its backward: what `model/transformer.py` and `ops/` save, term by term."""

from collections.abc import Mapping

from puna.planner.work import Weight, Work

_FP32 = 4


def kept_by_block(work: Work) -> dict[str, float]:
    """Bytes a token of everything one block keeps.

    A linear layer keeps its input where its weight is trained or adapted; RMSNorm and SwiGLU keep their inputs and make
    the rest again; attention keeps queries, keys and values, and its weights for texts of up to KEEP ids.
    """
    shape, s = work.known.shape, work.item
    heads, kv_heads = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    block = block_weights(work)
    read = {n.removesuffix(".weight").rpartition(".")[2]: w for n, w in block.items()}
    dropped = bool(work.lora and work.lora["dropout"])  # adapters then keep what is left of their inputs instead
    learns = {name: w.trained or (w.rank > 0 and not dropped) for name, w in read.items()}
    entering = any(learns[name] for name in ("q_proj", "k_proj", "v_proj"))
    widening = learns["gate_proj"] or learns["up_proj"]
    on_cuda = work.known.device.type == "cuda"  # keys and values are repeated for every query head, the output is kept
    terms = {
        "residual stream, into both norms": 2 * (shape.dim * s + _FP32),
        "input of q, k, v": shape.dim * s * entering,
        "queries": heads * s,
        "keys and values": 2 * (heads if on_cuda else kv_heads) * s,
        "attention weights": 0.0 if on_cuda else shape.n_heads * work.texts.kept * s,
        "output of attention": heads * s * on_cuda,
        "input of o": heads * s * learns["o_proj"],
        "input of gate and up": shape.dim * s * widening,
        "gate and up": 2 * shape.ffn_dim * s,
        "input of down": shape.ffn_dim * s * learns["down_proj"],
    }
    return {name: float(size) for name, size in {**terms, **_of_adapters(work, block)}.items() if size}


def cast_by_block(work: Work) -> float:
    """Bytes of the weights of a block that are kept a second time, in the compute dtype (`Linear.forward`)."""
    s, block = work.item, block_weights(work).values()
    if s == _FP32:
        return 0.0
    return float(sum(s * (w.numbers * w.trained * (len(w.shape) == 2) + w.adapter) for w in block))


def transient_of_block(work: Work) -> float:
    """Bytes that a block's backward takes at most beyond what is kept, of all tokens of a micro-batch.

    At SwiGLU: the gradients of its output and both inputs, and their product, when the input of down is gone; then the
    gradient of the largest weight before it is cast, or the weight that a quantized one is expanded to.
    """
    shape, s = work.known.shape, work.item
    largest = max(w.numbers for w in block_weights(work).values())
    return work.tokens * s * (3 * shape.ffn_dim + 2 * shape.dim) + largest * s


def block_weights(work: Work) -> Mapping[str, Weight]:
    return {name: weight for name, weight in work.weights.items() if name.startswith("layers.0.")}


def _of_adapters(work: Work, block: Mapping[str, Weight]) -> dict[str, float]:
    lora, s = work.lora, work.item
    if lora is None:
        return {}
    adapted = [w for w in block.values() if w.rank]
    terms = {"between A and B": float(sum(w.rank for w in adapted) * s)}
    if lora["dropout"]:
        mask = 1 if work.known.device.type == "cuda" else s
        terms["dropped inputs and their masks"] = float(sum(w.shape[1] for w in adapted) * (s + mask))
    if lora["dora"]:
        terms["outputs before DoRA's stretch"] = float(sum(w.shape[0] for w in adapted) * s)
    return terms
