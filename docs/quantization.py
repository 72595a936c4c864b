"""Writes docs/quantization.md: the certificates of SmolLM2-135M's schemes.

python docs/quantization.py TEXT CALIBRATION [FOLDER]      (some ten minutes; the directories stay in FOLDER)
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from puna.checkpoint.convert import convert
from puna.eval.certificate import CERTIFICATE, differences, packed_bits, quantize
from puna.eval.parity.material import PROMPTS
from puna.eval.parity.observe import observe
from puna.infer.llama import load

PAGE = Path(__file__).with_suffix(".md")
MODEL = "smollm2-135m"
READ = 12_000  # characters of the text: some 3,000 ids
ROWS: dict[str, dict[str, Any]] = {
    "int8": {"name": "int8"},
    "int4": {"name": "int4"},
    "int4, calibrated": {"name": "int4", "calibrate": True},
    "int8-int4": {"name": "int8-int4"},
    "nf4": {"name": "nf4"},
    "nf4-double": {"name": "nf4-double"},
    "GGUF Q8_0": {"kind": "Q8_0"},
    "GGUF Q4_0": {"kind": "Q4_0"},
}


def certificates(text: Path, calibration: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Of every row; one that is there already is not made again."""
    found, read = {}, text.read_text(encoding="utf-8")[:READ]
    for row, given in ROWS.items():
        target = folder / row.replace(", ", "-").replace(" ", "-")
        if not target.exists() and "kind" in given:
            gguf(target, given["kind"], read)
        elif not target.exists():
            words = calibration.read_text(encoding="utf-8") if given.get("calibrate") else ""
            quantize(MODEL, target, given["name"], text=read, calibration=words)
        found[row] = json.loads((target / CERTIFICATE).read_text(encoding="utf-8"))
    return found


def gguf(folder: Path, kind: str, text: str) -> None:
    """A GGUF, measured as it lies, with what a certificate says of it."""
    folder.mkdir()
    first = observe(load(MODEL, "fp32"), PROMPTS, text=text)
    file = convert(MODEL, folder / "model.gguf", kind=kind)
    after = load(file, "fp32", packed=True)
    second = observe(after, PROMPTS, text=text, rows=first.rows)
    told = {"bits": packed_bits(after), "bytes": {"after": file.stat().st_size}}
    told |= differences(first, second, len(text.encode()))
    (folder / CERTIFICATE).write_text(json.dumps(told), encoding="utf-8")


def line(row: str, told: dict[str, Any]) -> str:
    """One row of the table."""
    before, after = told["perplexity"]["before"], told["perplexity"]["after"]
    cells = [
        row, f"{told['bits']:.2f}", f"{told['bytes']['after'] / 1e6:.0f} MB",
        f"{after:.2f} ({after / before - 1:+.1%})", f"{told['kl']['mean']:.3g}", f"{told['agreement']:.0%}",
        f"{told['same_answers']} of {told['answers']}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def write(found: dict[str, dict[str, Any]], page: Path = PAGE) -> None:
    """The page around the table."""
    first = next(iter(found.values()))
    size = f"{first['bytes']['bf16'] / 1e6:.0f} MB"
    published, bits = f"{first['bytes']['before'] / 1e6:.0f} MB", packed_bits(load(MODEL, "fp32", packed=True))
    table = "\n".join(line(row, told) for row, told in found.items())
    page.write_text(
        _PAGE.format(
            table=table,
            size=size,
            published=published,
            bits=bits,
            before=first["perplexity"]["before"],
            bytes=first["text_bytes"],
        ),
        encoding="utf-8",
    )


_PAGE = """# Quantized weights

```
puna quantize my-model small --scheme int4                          # a model directory, and its certificate
puna quantize my-model small --scheme int4 --calibrate text.txt     # rounded by a text (GPTQ)
puna quantize my-model small --scheme int8 --text held_out.txt      # certified on a text of yours
puna chat small
```

`small/certificate.json` holds what the rounding changed, measured in fp32 on what was written. This table is that of
SmolLM2-135M-Instruct (perplexity {before:.2f} on the first {bytes:,} bytes of WikiText-2's validation text), written by
`python docs/quantization.py`; do not edit it. The model was taken from a GGUF whose weights had been rounded to 4 bits
before, mostly Q4_1: {published}, or {size} as bf16. So every row is a second rounding, and all
but Q4_0 are larger than what they were made from: the table shows what a rounding changes, not what it saves. What a
model loses that was never rounded was not measured.

| scheme | bits a weight | size | perplexity | KL, nats | same next id | same answers |
|---|---|---|---|---|---|---|
| as taken, Q4_1 | {bits:.2f} | {published} | {before:.2f} | 0 | 100% | 8 of 8 |
{table}

Bits are those of the packed matrices with their scales, in memory. *Same next id*: over eight prompts and the model's
own answers. *Calibrated*: on 8,192 ids of another part of that text; on so short a text a lead of a percent or two
decides nothing, so no gain is claimed. The rows of GGUF were written by `puna convert` and computed in as they lie.

| scheme | weights | what opens it, beside puna |
|---|---|---|
| `int8` | 8 bits, a scale for each row (`--group 32`, 64, 128: of a row) | transformers, compressed-tensors |
| `int4` | 4 bits in groups of 32 (64, 128); the head in 8 bits | the same |
| `int8-int4` | as `int4`; what enters a product is rounded to 8 bits too (Llama 3.2's) | the same |
| `nf4`, `nf4-double` | QLoRA's 4 bits in blocks of 64, scales in fp32 or 8 bits | transformers, PEFT, bitsandbytes |

Tried with transformers 5.24, compressed-tensors 0.20 and bitsandbytes 0.50 on a CPU: int8 and int4 give equal logits,
NF4 equal weights. With the head in 8 bits a tied embedding becomes one of its own and stays in bf16, because a look-up
reads one row of it and transformers cannot open packed ones; `--compact` packs it with the head, once, for puna alone.

A GGUF of Q8_0, Q4_0 or Q4_1 blocks is computed in as it lies by `chat`, `generate` and `eval`, and by
`puna.load(file, packed=True)`. Training and `convert` dequantize. An adapter trains over packed weights
(`puna.load(..., packed=True)`, then LoRA), and merges onto dequantized ones: `puna merge`.

## Trained to be quantized

```
puna run sft model=my-model data.path=rows.jsonl lora=null qat.group=32      # every weight; or with the default adapter
puna merge runs/sft merged                                                   # of an adapter alone
puna quantize runs/sft small --scheme int8-int4                              # the group and scales of training
```

`qat` trains under the rounding (Llama 3.2's `int8-int4`, or `int4`): each forward computes the products of the
quantized model, and gradients pass straight through. With an adapter the sum of base and adapter is rounded, so merging
and quantizing gives what was trained. Start from a model that is tuned already; a step takes two to three times as
long.

`puna.json` says `trained_for`, and `quantize` rounds by it. The scale of a group is that of its extreme: the search for
the best of 26 took 118 ms for 885,000 weights where a training step of their layer took 58, and this takes 9. The saved
weights are not rounded; GGUF's Q4_0 has the same scales at groups of 32. An adapter that is run without merging is not
rounded.
"""


if __name__ == "__main__":
    text, calibration = map(Path, sys.argv[1:3])
    with tempfile.TemporaryDirectory() as scratch:
        write(certificates(text, calibration, Path(sys.argv[3] if len(sys.argv) > 3 else scratch)))
    print(PAGE)
