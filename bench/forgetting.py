"""What a tuned model forgot: loss on the first 100 rows of a chat file it was never trained on, base beside tuned.

python bench/forgetting.py RUN ROWS [--limit 100]     exits with 1 when the loss rose by 5 % or more
RUN is a run of the sft recipe; ROWS a file of conversations, such as 100 Alpaca rows.
"""

import argparse
import sys

import puna
from puna.checkpoint.adapter import base_of
from puna.checkpoint.registry import find_model
from puna.data.conversations import ChatSource, read_conversations
from puna.data.encode import encode_conversations
from puna.data.packing import PackedLoader
from puna.eval.conversations import mean_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("rows")
    parser.add_argument("--limit", type=int, default=100)
    given = parser.parse_args()
    tuned = puna.load(given.run)
    base = puna.load(base_of(find_model(given.run)))
    conversations = list(read_conversations(ChatSource(path=given.rows, limit=given.limit)))
    losses = {}
    for name, llama in (("before", base), ("after", tuned)):
        rows = encode_conversations(conversations, tuned.template, 2048, "all")  # one template: the same ids for both
        losses[name] = mean_loss(llama.model, PackedLoader(rows, 2048, 1, tuned.tokenizer.eos_id, 0))
    rise = losses["after"] / losses["before"] - 1
    told = f"{losses['before']:.4f} -> {losses['after']:.4f} nats a token ({100 * rise:+.2f} %)"
    print(f"{len(conversations)} rows: {told}")
    sys.exit(rise >= 0.05)


if __name__ == "__main__":
    main()
