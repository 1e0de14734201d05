"""A training step of a PEFT model before and after `randfuse.integrations.peft.enable`: time and peak memory.

Needs `pip install randfuse[peft]`. The models are random, of the shape of small Llama and BERT ones: nothing is
downloaded. Time is the median of interleaved steps; memory is what a step allocates beyond parameters and optimiser, at
its most. The losses of both are compared without dropout, where they must agree.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings

import torch
from randfuse import testing
from randfuse.bench.memory import peak
from torch import nn

warnings.filterwarnings("ignore")


def llama(dtype: torch.dtype, lora_dropout: float) -> nn.Module:
    import peft
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = peft.LoraConfig(r=16, lora_dropout=lora_dropout, target_modules=targets, task_type="CAUSAL_LM")
    return peft.get_peft_model(transformers.LlamaForCausalLM(config).to(dtype), lora)


def bert(dtype: torch.dtype, lora_dropout: float) -> nn.Module:
    import peft
    import transformers

    # Its other dropouts are switched off: they are not what is compared.
    config = transformers.BertConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=1000,
    )  # fmt: skip
    lora = peft.LoraConfig(
        r=16, lora_dropout=lora_dropout, target_modules=["query", "key", "value", "dense"], task_type="TOKEN_CLS"
    )
    return peft.get_peft_model(transformers.BertForTokenClassification(config).to(dtype), lora)


def step(model: nn.Module, ids: torch.Tensor) -> float:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    testing.guard_onednn()
    from randfuse.integrations import peft as integration

    ids = torch.randint(1000, (arguments.batch, arguments.tokens), generator=torch.Generator().manual_seed(0))
    size = f"{arguments.batch} x {arguments.tokens} tokens"
    print(f"{size}, r = 16, lora_dropout = 0.1, {torch.get_num_threads()} threads\n")
    print(f"{'':24} {'step, ms':>24} {'peak memory, MiB':>28}")
    print(f"{'':24} {'PEFT':>9} {'fused':>7} {'faster':>6} {'PEFT':>12} {'fused':>7} {'less':>7}")
    for name, make in (("Llama, 4 layers of 512", llama), ("BERT, 4 layers of 512", bert)):
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            plain = make(dtype, 0.1).train()
            fused = copy.deepcopy(plain)
            report = integration.enable(fused)
            assert not report.left, str(report)
            losses = [step(m.eval(), ids) for m in (plain, fused)]
            assert abs(losses[0] - losses[1]) < 1e-2, f"{name}: losses without dropout must agree, got {losses}"
            models = (plain.train(), fused.train())
            seconds: list[list[float]] = [[], []]
            for _ in range(arguments.rounds):
                for times, model in zip(seconds, models, strict=True):
                    start = time.perf_counter()
                    step(model, ids)
                    times.append(time.perf_counter() - start)
            a, b = (1e3 * statistics.median(times) for times in seconds)
            p, q = (peak(lambda model=model: step(model, ids), "cpu") / 2**20 for model in models)
            label = f"{name}, {'fp32' if dtype == torch.float32 else 'bf16'}"
            print(f"{label:28} {a:5.0f} {b:7.0f} {a / b:5.2f}x {p:12.0f} {q:7.0f} {p / q:6.2f}x", flush=True)


if __name__ == "__main__":
    main()
