"""What a model would say, kept as training rows before it is tuned on something else."""

from puna.infer.llama import Llama
from puna.log import Progress
from puna.tokenizer.chat.format import Encoded

_AT_ONCE = 64


def rehearsal(llama: Llama, count: int, seq_len: int, seed: int = 0) -> list[Encoded]:
    """`count` questions that the model asks itself with its own answers, these trained; cut to `seq_len` ids.

    A chat model that is given the start of a user's turn writes a user's question (Magpie, Xu et al. 2024). Trained
    along with new tasks its own words keep what it could say before and cost little loss to keep (self-synthesized
    rehearsal, Huang et al. 2024). Long questions are cut, which is question enough; an answer that was cut has no
    stop id, so it teaches to go on and not to stop.
    """
    before, after = llama.template.around_user()
    rows: list[Encoded] = []
    with Progress("rehearsal", count) as progress:
        for start in range(0, count, _AT_ONCE):
            blank = [before] * min(_AT_ONCE, count - start)
            asked = llama.continue_ids(blank, 32, temperature=0.9, seed=seed + start)
            prompts = [[*before, *(i for i in ids if i not in llama.stop_ids), *after] for ids in asked]
            answers = llama.continue_ids(prompts, 64, temperature=0.7, seed=seed + start)
            for prompt, answer in zip(prompts, answers, strict=True):
                trained = [False] * len(prompt) + [True] * len(answer)
                rows.append(Encoded([*prompt, *answer][:seq_len], trained[:seq_len]))
            progress.update(start + len(blank))
    return [row for row in rows if any(row.trained)]
