"""Masked diffusion: exact sampling steps, training, and a loop that asks the model only when something changes.

Tokens are int64 (B, L) with a [MASK] id; a model maps them to logits (B, L, V). Which positions change is decided
before what they become, so a step samples the rows it changes and no others. Every sequence has a key of its own: what
it gives does not depend on its batch. Random words: domains 12 to 15 of docs/streams.md.

`torch.compile` makes one graph of a step whose t, s and step are tensors, and compiles it once for all steps. What
samples only the rows that change wants `torch._dynamo.config.capture_dynamic_output_shape_ops = True`, or the graph
breaks where these rows are counted.
"""

from .ancestral import ancestral_step, reveal
from .confidence import confidence_step, maskgit_count, transfer_counts
from .first_hitting import FirstHit, FirstHitting, first_hit, first_hitting_step, hitting_steps
from .generate import generate
from .remask import Remasked, dfm_step_size, remask_step
from .schedules import Cosine, Geometric, LogLinear, Polynomial, Schedule
from .svdd import Selected, ancestral_candidates, select_by_value
from .tcts import select_by_score
from .training import corrupt, loss, sample_times
from .uniform import uniform_step

__all__ = [
    "Cosine",
    "FirstHit",
    "FirstHitting",
    "Geometric",
    "LogLinear",
    "Polynomial",
    "Remasked",
    "Schedule",
    "Selected",
    "ancestral_candidates",
    "ancestral_step",
    "confidence_step",
    "corrupt",
    "dfm_step_size",
    "first_hit",
    "first_hitting_step",
    "generate",
    "hitting_steps",
    "loss",
    "maskgit_count",
    "remask_step",
    "reveal",
    "sample_times",
    "select_by_score",
    "select_by_value",
    "transfer_counts",
    "uniform_step",
]
