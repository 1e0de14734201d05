"""Drop-ins for LLaDA, Dream, MDLM, ReMDM and FlashInfer: signatures, results, and that the model is asked no more."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import randfuse
import torch
from randfuse.integrations import dream, flashinfer, llada, mdlm
from test_categorical_law import ALPHA, chi_square_p

MASK, V = 9, 10


class Model:
    """Logits depend on the position, its token and the one before; [MASK] is what it likes most."""

    def __init__(self, vocab: int = V) -> None:
        self.calls, self.table = 0, torch.randn(vocab, vocab) * 3
        self.place = torch.randn(15, vocab)  # no two positions are equally sure
        self.table[:, MASK] = 30.0

    def __call__(self, x, attention_mask=None, positions=None):
        self.calls += 1
        return SimpleNamespace(logits=self.table[x] + self.table[x.roll(1, 1)] + self.place[: x.shape[1]])


def prompt() -> torch.Tensor:
    return torch.arange(6).reshape(2, 3)


def parameters(f) -> list[str]:
    return list(inspect.signature(f).parameters)


# LLaDA.


def test_llada_one_call_for_noise_and_argmax():
    """add_gumbel_noise(logits, T).argmax in law; V = 12, 2^16 draws."""
    logits = torch.randn(12)
    tokens = llada.sample_tokens(logits.expand(2**16, 12), 0.7, key=randfuse.key(0))
    assert chi_square_p(tokens.bincount(minlength=12), (logits.double() / 0.7).softmax(0)) > ALPHA
    assert int(llada.sample_tokens(logits, 0.0)) == int(logits.argmax())


def reference_llada(model, x, steps, block_length, start):
    """LLaDA's loop at temperature 0, [MASK] left out: greedy tokens, topk of their probabilities."""
    for first in range(start, x.shape[1], block_length):
        block = slice(first, first + block_length)
        for i in range(steps):
            logits = model(x).logits.clone()
            logits[..., MASK] = -torch.inf
            p, token = logits.double().softmax(-1).max(-1)
            for b in range(len(x)):
                masked = x[b] == MASK
                masked[: block.start] = False
                masked[block.stop :] = False
                n = int((x[b, block] == MASK).sum())
                k = -(-n // (steps - i))
                keep = p[b].where(masked, -1.0).topk(k).indices
                x[b, keep] = token[b, keep]
    return x


@pytest.mark.parametrize("block_length", [12, 4])
def test_llada_generate_is_its_loop(block_length):
    signature = ["model", "prompt", "attention_mask", "steps", "gen_length", "block_length", "temperature", "cfg_scale",
                 "remasking", "mask_id", "logits_eos_inf", "confidence_eos_eot_inf"]  # fmt: skip
    assert parameters(llada.generate)[:12] == signature
    model = Model()
    out = llada.generate(model, prompt(), steps=6, gen_length=12, block_length=block_length, mask_id=MASK)
    assert model.calls == 6
    start = torch.nn.functional.pad(prompt(), (0, 12), value=MASK)
    expected = reference_llada(Model.__call__.__get__(model), start, 6 * block_length // 12, block_length, 3)
    assert torch.equal(out, expected)


def test_llada_options():
    model = Model()
    common = {"steps": 6, "gen_length": 12, "block_length": 6, "mask_id": MASK, "key": randfuse.key(1)}
    for more in ({"remasking": "random"}, {"temperature": 0.8}, {"threshold": 0.9}, {"cfg_scale": 1.5},
                 {"attention_mask": torch.ones(2, 3), "cfg_scale": 0.5}):  # fmt: skip
        out = llada.generate(model, prompt(), **common, **more)
        assert torch.equal(out[:, :3], prompt())
        assert (out != MASK).all()
    with pytest.raises(NotImplementedError, match="remasking must be"):
        llada.generate(model, prompt(), remasking="x")
    with pytest.raises(ValueError, match="divisible"):
        llada.generate(model, prompt(), gen_length=12, block_length=5)


def test_llada_ends_of_text(monkeypatch):
    monkeypatch.setattr(llada, "EOS", 0)
    monkeypatch.setattr(llada, "EOT", 1)
    model = lambda x, attention_mask=None: SimpleNamespace(logits=torch.eye(V)[0].mul(9).expand(*x.shape, V))  # noqa: E731
    common = {"steps": 4, "gen_length": 4, "block_length": 4, "mask_id": MASK}
    assert not llada.generate(model, prompt(), **common)[:, 3:].any()
    assert llada.generate(model, prompt(), logits_eos_inf=True, **common)[:, 3:].all()
    assert not llada.generate(model, prompt(), confidence_eos_eot_inf=True, **common)[:, 3:].any()


# Dream.


def config(**kwargs):
    given = {"max_length": 12, "mask_token_id": MASK, "steps": 5, "eps": 1e-3, "alg": "origin", "alg_temp": None}
    given |= {"temperature": 0.9, "top_p": 0.95, "top_k": None, "return_dict_in_generate": False}
    return SimpleNamespace(**{**given, "output_history": False, **kwargs})


@pytest.mark.parametrize("alg", ["origin", "maskgit_plus", "topk_margin", "entropy", "confidence_threshold"])
@pytest.mark.parametrize("alg_temp", [None, 0.3])
def test_dream(alg, alg_temp):
    assert parameters(dream._sample)[:6] == ["self", "input_ids", "attention_mask", "generation_config",
                                             "generation_tokens_hook_func", "generation_logits_hook_func"]  # fmt: skip
    model = Model()
    seen = []
    out = dream._sample(model, prompt(), None, config(alg=alg, alg_temp=alg_temp),
                        lambda step, x, logits: seen.append(step) or x, lambda step, x, logits: logits)  # fmt: skip
    assert (out != MASK).all()
    assert torch.equal(out[:, :3], prompt())
    assert model.calls <= 5
    assert seen[0] is None
    full = dream._sample(model, prompt(), torch.tensor([[0, 1, 1], [1, 1, 1]]),
                         config(alg=alg, return_dict_in_generate=True, output_history=True))  # fmt: skip
    assert torch.equal(full.history[-1], full.sequences)
    with pytest.raises(RuntimeError, match="alg must be"):
        dream._sample(model, prompt(), None, config(alg="x"))


def test_dream_predicts_one_position_later():
    class Shifted:
        def __call__(self, x, attention, positions):
            place = torch.arange(x.shape[1]) + 1  # the row of position l votes for token l + 1
            return SimpleNamespace(logits=torch.nn.functional.one_hot(place, 20).float().mul(50).expand(*x.shape, 20))

    out = dream._sample(
        Shifted(), torch.zeros(1, 1, dtype=torch.int64), None, config(temperature=0.0, mask_token_id=19)
    )
    assert out[0, 1:].tolist() == list(range(1, 12))


# MDLM and ReMDM.


class Diffusion:
    mask_index, time_conditioning = MASK, False

    def __init__(self, sampler: str = "mdlm", nucleus_p: float = 1.0) -> None:
        self.calls = 0
        sampling = {
            "sampler": sampler,
            "eta": 0.1,
            "nucleus_p": nucleus_p,
            "t_on": 0.55,
            "t_off": 0.05,
            "alpha_on": 0.9,
        }
        self.config = SimpleNamespace(sampling=SimpleNamespace(**sampling))

    def noise(self, t):
        return -torch.log1p(-(1 - 1e-3) * t), None

    def forward(self, x, sigma):
        assert sigma.shape == (len(x),)
        self.calls += 1
        return torch.linspace(0, 1, V).expand(*x.shape, V).log_softmax(-1)


def test_mdlm_update():
    model, x = Diffusion(), torch.full((64, 200), MASK)
    x[:, 0] = 3
    out = mdlm._ddpm_update(model, x, torch.full((64, 1), 0.8), 0.2, key=randfuse.key(0))
    assert (out[:, 0] == 3).all()
    rate = (out[:, 1:] != MASK).double().mean()
    p = 0.2 / 0.8
    assert abs(rate - p) < 5 * (p * (1 - p) / (64 * 199)) ** 0.5
    law = torch.linspace(0, 1, V).double()
    law[MASK] = -torch.inf
    assert chi_square_p(out[:, 1:][out[:, 1:] != MASK].bincount(minlength=V), law.softmax(0)) > ALPHA
    assert model.calls == 1
    assert torch.equal(mdlm._ddpm_update(model, torch.zeros_like(x), torch.full((64,), 0.8), 0.2), torch.zeros_like(x))
    assert model.calls == 1, "nothing masked: the network is not run"


@pytest.mark.parametrize("sampler", mdlm.VARIANTS)
@pytest.mark.parametrize("nucleus_p", [1.0, 0.9])
def test_remdm_loop(sampler, nucleus_p):
    """ReMDM's own loop around the update decodes everything and hands the cache and confidences on."""
    model, x, cache = Diffusion(sampler, nucleus_p), torch.full((3, 50), MASK), None
    conf = torch.full(x.shape, -torch.inf, dtype=torch.bfloat16)
    times = torch.linspace(1, 0, 41)
    for t in times[:-1]:
        before = x
        cache, x, conf = mdlm._remdm_update(model, x, t * torch.ones(3, 1), 1 / 40, cache, conf, randfuse.draw_key())
        if sampler == "remdm-conf":
            assert ((conf > -torch.inf) == (x != MASK)).all()
        assert cache is None or torch.equal(x, before)
    assert (x != MASK).float().mean() > 0.97
    with pytest.raises(ValueError, match="sampler must be"):
        mdlm._remdm_update(Diffusion("x"), x, t, 0.1)


# FlashInfer.


def test_flashinfer():
    names = ["indices", "deterministic", "generator", "check_nan", "seed", "offset"]
    assert parameters(flashinfer.sampling_from_logits) == ["logits", *names]
    assert parameters(flashinfer.sampling_from_probs) == ["probs", *names, "return_valid"]
    probs = torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    tokens, valid = flashinfer.sampling_from_probs(probs, return_valid=True)
    assert tokens.dtype == torch.int32
    assert valid.tolist() == [True, True, False]
    assert int(tokens[1]) == 2
    many = torch.zeros(2**14, dtype=torch.int64)
    drawn = flashinfer.sampling_from_probs(probs, indices=many, seed=3, offset=5)
    assert drawn.dtype == torch.int64
    assert chi_square_p(drawn.bincount(minlength=3), probs[0].double()) > ALPHA, "draws of one row are independent"
    again = flashinfer.sampling_from_logits(probs.log(), many, seed=torch.tensor([3]), offset=torch.tensor([5]))
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, flashinfer.sampling_from_probs(probs, indices=many, seed=3, offset=6))
    each = flashinfer.sampling_from_logits(torch.zeros(4, 1000), seed=torch.tensor([1, 2, 1, 2]), offset=7)
    assert each[0] == each[2]
    assert each[0] != each[1]
    with pytest.raises(TypeError, match="seed and offset must be int64"):
        flashinfer.sampling_from_logits(probs, seed=torch.tensor([3], dtype=torch.int32))
    with pytest.raises(ValueError, match="NaN"):
        flashinfer.sampling_from_logits(torch.tensor([[float("nan")]]), check_nan=True)
