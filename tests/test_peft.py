"""The real PEFT: same numbers without dropout, same masks with it, states, several adapters, what is left alone."""

from __future__ import annotations

import copy
import importlib
import pickle

import pytest
import randfuse
import torch
import torch.nn.functional as F
from torch import nn

peft = pytest.importorskip("peft", reason="pip install randfuse[peft]")
transformers = pytest.importorskip("transformers", reason="pip install randfuse[peft]")
integration = importlib.import_module("randfuse.integrations.peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # of other packages, about each other

TINY = {"vocab_size": 101, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
LLAMA = {**TINY, "hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2}
OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # BERT's other dropouts
BERT = {**TINY, **OFF, "hidden_size": 48, "intermediate_size": 64}


@pytest.fixture(autouse=True)
def small_inputs_too(monkeypatch):
    monkeypatch.setattr(integration, "SMALL", 0)


def llama(**lora):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    options = {"r": 4, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj", "down_proj"], **lora}
    return randomised(peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options)))


def bert(**lora):
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**BERT))
    options = {"r": 4, "lora_dropout": 0.0, "target_modules": ["query", "value"], **lora}
    return randomised(peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", **options)))


def randomised(model):
    """lora_B starts at zero, which would hide everything."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model


def step(model, seed=0):
    """Loss and gradients of one training step."""
    torch.manual_seed(seed)
    ids = torch.randint(101, (3, 20), generator=torch.Generator().manual_seed(1))
    causal = "ForCausalLM" in type(model.get_base_model()).__name__
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids if causal else torch.tensor([0, 1, 0])).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(a, b, **tolerance):
    assert a[1].keys() == b[1].keys()
    torch.testing.assert_close(a, b, **(tolerance or {"rtol": 1e-4, "atol": 1e-6}))


@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_without_dropout_a_training_step_is_that_of_peft(make, use_rslora):
    model = make(use_rslora=use_rslora)
    before = step(model)
    report = integration.enable(model)
    assert len(report.switched) == (6 if make is llama else 4)
    assert not report.left
    assert_same(step(model), before)
    assert sorted(integration.disable(model)) == sorted(report.switched)
    assert type(model.get_submodule(report.switched[0])) is peft.tuners.lora.Linear
    assert_same(step(model), before, rtol=0, atol=0)


class MaskedDropout(nn.Dropout):
    """PEFT's dropout given the masks of ours: the key is drawn where `lora_linear` draws it."""

    def forward(self, x):
        if not self.training:
            return x
        key = randfuse.draw_key(x.device)
        mask = randfuse.dropout_mask((x.numel() // x.shape[-1], x.shape[-1]), self.p, key=key)
        return torch.where(mask.view(x.shape), x / (1 - randfuse.effective_p(self.p)), 0)


@pytest.mark.parametrize("make", [llama, bert])
def test_with_dropout_a_training_step_is_that_of_peft_under_the_same_masks(make):
    model = make(lora_dropout=0.3)
    expected = copy.deepcopy(model)
    for module in list(expected.modules()):
        if isinstance(module, peft.tuners.lora.Linear):
            module.lora_dropout["default"] = MaskedDropout(0.3)
    integration.enable(model)
    got = step(model)
    assert_same(got, step(expected))
    assert not torch.equal(got[0], step(model, seed=1)[0])
    assert torch.equal(got[0], step(model)[0]), "torch.manual_seed governs the masks"
    model.eval(), expected.eval()
    assert_same(step(model), step(expected))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_redraws_the_same_masks(reentrant):
    model = llama(lora_dropout=0.3)
    integration.enable(model)
    expected = step(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = step(model)
    gradients = {n: g for n, g in got[1].items() if n in expected[1]}
    assert_same((got[0], gradients), expected)


def test_bfloat16_model_with_float32_adapters():
    """PEFT's default for a bfloat16 model: not farther from float64 than PEFT is, and x is never kept in float32."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(256, 128).bfloat16())
    config = peft.LoraConfig(r=8, lora_dropout=0.0, target_modules=["0"])
    model = randomised(peft.get_peft_model(layer, config))
    x = torch.randn(64, 256).bfloat16()
    assert model.base_model.model[0].lora_A["default"].weight.dtype == torch.float32
    exact = copy.deepcopy(model).double()(x.double())
    plain = model(x)
    integration.enable(model)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        got = model(x)
    randfuse.testing.assert_close_to_float64(got, exact, plain)
    assert got.dtype == torch.bfloat16
    assert not [t for t in saved if t.shape == x.shape and t.dtype == torch.float32]


def test_autocast():
    model = llama()
    with torch.autocast("cpu", torch.bfloat16):
        before = step(model)
        integration.enable(model)
        assert_same(step(model), before, rtol=0.1, atol=0.02)


def two_adapters():
    model = llama(lora_dropout=0.2)
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=3, lora_dropout=0.0, target_modules=["q_proj"]))
    return randomised(model).eval()


@pytest.mark.parametrize("active", ["default", "other", ["default", "other"]])
def test_active_adapters(active):
    model = two_adapters()
    ids = torch.arange(20).view(1, 20)
    run = lambda: model(input_ids=ids).logits  # noqa: E731
    model.base_model.set_adapter(active)
    before = run()
    integration.enable(model)
    torch.testing.assert_close(run(), before, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        disabled = run()
    assert not torch.allclose(disabled, before)
    integration.disable(model)
    with model.disable_adapter():
        torch.testing.assert_close(run(), disabled, rtol=0, atol=0)
    integration.enable(model)
    model.merge_adapter()
    torch.testing.assert_close(run(), before, rtol=1e-3, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(run(), before, rtol=1e-3, atol=1e-4)


def test_mixed_batches_are_those_of_peft():
    model = two_adapters()
    ids = torch.arange(40).view(2, 20)
    names = ["default", "other"]
    before = model(input_ids=ids, adapter_names=names).logits
    integration.enable(model)
    torch.testing.assert_close(model(input_ids=ids, adapter_names=names).logits, before, rtol=0, atol=0)


def test_second_adapters_of_a_bfloat16_model_keep_no_float32_copy_of_x():
    layer = nn.Sequential(nn.Linear(256, 128).bfloat16())
    config = peft.LoraConfig(r=8, lora_dropout=0.3, target_modules=["0"])
    model = randomised(peft.get_peft_model(layer, config))
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    assert model.base_model.model[0].lora_A["second"].weight.dtype == torch.float32
    integration.enable(model)
    x, saved = torch.randn(64, 256).bfloat16(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x)
    assert {t.data_ptr() for t in saved if t.numel() == x.numel()} == {x.data_ptr()}


def test_two_adapters_in_training_have_masks_of_their_own():
    model = llama(lora_dropout=0.5)
    model.add_adapter("twin", peft.LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj"]))
    layer = next(m for n, m in model.named_modules() if n.endswith("layers.0.self_attn.q_proj"))
    with torch.no_grad():
        layer.lora_A["twin"].weight.copy_(layer.lora_A["default"].weight)
        layer.lora_B["default"].weight.normal_()
        layer.lora_B["twin"].weight.copy_(-layer.lora_B["default"].weight)
    model.base_model.set_adapter(["default", "twin"])
    integration.enable(model)
    x = torch.randn(30, 64)
    model.eval()
    torch.testing.assert_close(layer(x), layer.base_layer(x), msg="opposite adapters cancel")
    model.train()
    assert (layer(x) - layer.base_layer(x)).abs().max() > 0.1, "under different masks they do not"


def test_checkpoints_are_interchangeable(tmp_path):
    fused = llama(lora_dropout=0.1)
    integration.enable(fused)
    torch.manual_seed(0)
    optimizer = torch.optim.Adam([p for p in fused.parameters() if p.requires_grad], 1e-2)
    step(fused)
    optimizer.step()
    fused.eval().save_pretrained(tmp_path)
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    plain.load_state_dict(fused.unload().state_dict())
    plain = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    ids = torch.arange(20).view(1, 20)
    expected = plain(input_ids=ids).logits
    assert integration.enable(plain).switched
    torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    for twin in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        torch.testing.assert_close(twin(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_what_is_left_alone_is_said():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.hooked, self.dora = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.conv, self.embed = nn.Conv1d(8, 8, 1), nn.Embedding(9, 8)

        def forward(self, ids):
            x = self.dora(self.hooked(self.plain(self.embed(ids))))
            return self.conv(x.mT)

    net = Net()
    net.hooked.register_forward_hook(lambda *_: None)
    config = {"r": 2, "lora_dropout": 0.1}
    model = peft.get_peft_model(net, peft.LoraConfig(target_modules=["plain", "hooked", "conv", "embed"], **config))
    model.add_adapter("with_dora", peft.LoraConfig(target_modules=["dora"], use_dora=True, **config))
    report = integration.enable(model)
    assert report.switched == ["base_model.model.plain"]
    reasons = {name.rsplit(".", 1)[1]: reason for name, reason in report.left.items()}
    assert sorted(reasons) == ["conv", "dora", "embed", "hooked"]
    assert "hooks" in reasons["hooked"]
    assert "DoraLinearVariant" in reasons["dora"]
    assert "Embedding" in reasons["embed"]
    assert "1 LoRA layers switched, 4 left to PEFT" in str(report)
    assert model(torch.arange(5).view(1, 5)).shape == (1, 8, 5)
    assert integration.enable(model).switched == report.switched, "enabling twice changes nothing"
    with pytest.raises(ValueError, match="^enable: model must have LoRA layers of PEFT, got none"):
        integration.enable(nn.Linear(2, 2))


def test_a_hook_added_later_is_called():
    model = llama()
    integration.enable(model)
    layer = next(m for m in model.modules() if isinstance(m, integration.FusedLinear))
    calls = []
    layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    step(model)
    assert calls == [1]


def one_layer(**lora):
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(r=2, target_modules=["0"], **lora))
    return randomised(model), model.base_model.model[0]


class OwnDropout(nn.Dropout):
    pass


def hooked():
    dropout = nn.Dropout(0.5)
    dropout.register_forward_hook(lambda *_: None)
    return dropout


def replaced():
    dropout = nn.Dropout(0.5)
    dropout.forward = lambda x: x
    return dropout


@pytest.mark.parametrize("make", [lambda: OwnDropout(0.5), hooked, replaced, lambda: nn.AlphaDropout(0.5)])
def test_another_dropout_is_left_to_peft(make):
    model, layer = one_layer()
    layer.lora_dropout["default"] = make()
    assert "lora_dropout is not a plain nn.Dropout" in integration.enable(model).left["base_model.model.0"]


def test_our_dropout_is_taken():
    model, layer = one_layer()
    layer.lora_dropout["default"] = randfuse.nn.Dropout(1.0)
    assert integration.enable(model).switched
    x = torch.randn(5, 8)
    torch.testing.assert_close(layer(x), layer.base_layer(x))


def test_a_replaced_forward_is_left_alone():
    model, layer = one_layer()
    layer.forward = lambda x: 2 * x
    assert integration.enable(model).left == {"base_model.model.0": "its forward is replaced"}


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("case", ["plain", "tensor scaling", "subclass", "nothing to save", "small"])
def test_calls_that_are_pefts(case, monkeypatch):
    model, layer = one_layer(lora_dropout=0.0)
    integration.enable(model)
    calls = []
    own = integration.lora_linear
    monkeypatch.setattr(integration, "lora_linear", lambda *args: calls.append(1) or own(*args))
    if case == "small":
        monkeypatch.setattr(integration, "SMALL", 5 * 8 + 1)
    if case == "tensor scaling":
        layer.scaling["default"] = torch.tensor(2.0)
    if case == "subclass":
        layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach().as_subclass(Subclass), False)
    with torch.set_grad_enabled(case != "nothing to save"):
        layer(torch.randn(5, 8))
    assert len(calls) == (case == "plain")


def test_compiles_without_a_break():
    model = llama(lora_dropout=0.3)
    integration.enable(model)
    layer = next(m for m in model.modules() if isinstance(m, integration.FusedLinear))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(6, 64, requires_grad=True)
    torch.manual_seed(0)
    expected = layer(x)
    torch.manual_seed(0)
    got = compiled(x)
    torch.testing.assert_close(got, expected)
    got.sum().backward()
    assert x.grad is not None


def test_layer_takes_an_adapter_of_a_peft_checkpoint(tmp_path):
    model = llama(lora_dropout=0.2).eval()
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    state = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj"
    source = model.get_submodule(name)
    layer = randfuse.nn.LoRALinear.from_linear(source.base_layer, r=4, lora_alpha=8, p=0.2).eval()
    layer.load_adapter(state, prefix=f"{name}.")
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x), source(x))
    in_memory = randfuse.nn.LoRALinear.from_linear(source.base_layer, r=4, lora_alpha=8).eval()
    in_memory.load_adapter(source.state_dict())
    torch.testing.assert_close(
        in_memory(x), F.linear(x, layer.weight) + 2 * x @ layer.lora_A.weight.T @ layer.lora_B.weight.T
    )
