"""The teacher of a distillation: compared with the student before it is loaded, then an objective."""

from functools import partial

from puna.checkpoint.registry import load_tokenizer
from puna.dist.fsdp import shard
from puna.errors import UsageError
from puna.infer.llama import Llama, load
from puna.log import log
from puna.ops.divergence import Mix
from puna.tokenizer.tokenizer import Tokenizer
from puna.train.distill import DistillConfig, distill
from puna.train.fit import Objective


def check_teacher(config: DistillConfig, student: Tokenizer) -> None:
    """
    Raises:
        UsageError: a teacher with another tokenizer, of which nothing but that is read.
    """
    if not load_tokenizer(config.teacher).same_ids(student):
        raise UsageError(
            f"distill.teacher: {config.teacher} has another tokenizer than the student",
            cause="its probabilities are those of other ids",
            fix="a teacher of the same family (new_tokens are none of its ids), or tune on texts that it wrote",
        )


def load_teacher(config: DistillConfig, dtype: str, device: str) -> Llama:
    """The teacher, frozen, divided among the ranks; quantized weights are computed in as they lie."""
    llama = load(config.teacher, dtype=dtype, device=device, packed=True)
    llama.model.requires_grad_(False)
    log.info("teacher: %r", llama)
    shard(llama.model)
    return llama


def distillation(teacher: Llama, config: DistillConfig) -> Objective:
    """The objective of learning from `teacher`."""
    ids = teacher.tokenizer.vocab_size  # fewer than rows of either head, which may be padded to a round number
    mix = Mix(ids, config.ratio, config.divergence, config.temperature)
    return partial(distill, teacher=teacher.model, mix=mix)
