"""Hugging Face's models: losses and gradients, from logits and straight from hidden states."""

from __future__ import annotations

import copy
import functools
import inspect
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import assert_close

import llmloss_ext

transformers = pytest.importorskip("transformers")

from llmloss_ext.integrations.transformers import (  # noqa: E402
    causal_lm_loss,
    stop_linear_cross_entropy,
    token_lm_loss,
    use_linear_cross_entropy,
)

V, B, S = 211, 2, 9
SMALL = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "llama": ("LlamaConfig", SMALL),
    "tied": ("Qwen2Config", SMALL | {"tie_word_embeddings": True}),
    "softcap": ("Gemma2Config", SMALL | {"final_logit_softcapping": 3.0, "sliding_window": 32}),
    "scale": ("CohereConfig", SMALL | {"logit_scale": 0.25}),
    "scaling": ("GraniteConfig", SMALL | {"logits_scaling": 8.0}),
    "experts": (
        "MixtralConfig",
        SMALL | {"num_local_experts": 4, "output_router_logits": True},
    ),
    "other names": (
        "FalconH1Config",
        SMALL | {"lm_head_multiplier": 0.4, "mamba_d_ssm": 32, "mamba_n_heads": 4,
                 "mamba_d_head": 8, "mamba_d_state": 8},
    ),
    "always a softcap": ("RecurrentGemmaConfig", SMALL | {"lru_width": 32, "num_hidden_layers": 3}),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
         "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
}  # fmt: skip


OF_OTHERS = {  # whose labels stand where they are
    "masked": ("ModernBertConfig", SMALL, "AutoModelForMaskedLM"),
    "encoder and decoder": (
        "T5GemmaConfig",
        {"encoder": SMALL, "decoder": SMALL | {"final_logit_softcapping": 3.0}, "vocab_size": V},
        "AutoModelForSeq2SeqLM",
    ),
}


def model_of(name: str):
    kind, options, *others = (CONFIGS | OF_OTHERS)[name]
    auto = others[0] if others else "AutoModelForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(getattr(transformers, kind)(**options))
    for parameter in model.parameters():  # logits of a size at which a softcap matters
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    return model.train()


def batch() -> dict:
    torch.manual_seed(1)
    ids = torch.randint(3, V, (B, S))
    labels = ids.clone()
    labels[0, :4] = -100
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    labels[1, -2:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def run(model, **inputs):
    model.zero_grad()
    output = model(**(batch() | inputs))
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters()}


def check_same(one, other):
    assert_close(one[0].loss.detach(), other[0].loss.detach(), 1e-5)
    for name, grad in one[1].items():
        scale = other[1][name].abs().max().clamp_min(1e-6)
        assert_close(grad / scale, other[1][name] / scale, 1e-4)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("items", [None, 5, torch.tensor(7)])
def test_linear(name, items):
    """The same loss and gradients as the model's own, router's loss and all."""
    inputs = {} if items is None else {"num_items_in_batch": items}
    model = model_of(name)
    expected = run(model, **inputs)
    use_linear_cross_entropy(model)
    found = run(model, **inputs)
    check_same(found, expected)
    assert found[0].logits.shape == (B, 1, V)
    assert_close(found[0].logits, expected[0].logits[:, -1:], 1e-5)
    stop_linear_cross_entropy(model)
    check_same(run(model, **inputs), expected)
    assert run(model)[0].logits.shape == (B, S, V)


@pytest.mark.parametrize("name", OF_OTHERS)
def test_labels_that_stand_where_they_are(name):
    model = model_of(name)
    inputs = {"num_items_in_batch": 5}
    expected = run(model, **inputs)
    use_linear_cross_entropy(model)
    found = run(model, **inputs)
    check_same(found, expected)
    assert found[0].logits.shape == (B, 1, V)
    stop_linear_cross_entropy(model)
    model.loss_function = token_lm_loss
    check_same(run(model, **inputs), expected)


@pytest.mark.parametrize("name", ["llama", "softcap"])
@pytest.mark.parametrize("items", [None, 5, torch.tensor(7)])
def test_from_logits(name, items):
    inputs = {} if items is None else {"num_items_in_batch": items}
    model = model_of(name)
    expected = run(model, **inputs)
    model.loss_function = causal_lm_loss
    check_same(run(model, **inputs), expected)
    model.loss_function = functools.partial(causal_lm_loss, inplace=True)
    check_same(run(model, **inputs), expected)


def test_any_option_from_logits():
    logits, labels = torch.randn(2, 5, V), torch.randint(0, V, (2, 5))
    loss = functools.partial(causal_lm_loss, softcap=2.0, weight=torch.rand(V))
    one = loss(logits, labels, V, use_cache=False)  # a model passes on what it was called with
    expected = llmloss_ext.cross_entropy(
        logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1), **loss.keywords
    )
    assert torch.equal(one, expected)


def test_options_and_shifted_labels():
    model = model_of("llama")
    shifted = torch.nn.functional.pad(batch()["labels"][:, 1:], (0, 1), value=-100)
    plain = run(model)
    model.loss_function = functools.partial(causal_lm_loss, label_smoothing=0.1, z_loss=1e-3)
    expected = run(model)
    assert expected[0].loss > plain[0].loss
    use_linear_cross_entropy(model, label_smoothing=0.1, z_loss=1e-3, max_chunk_bytes=V * 4 * 8)
    check_same(run(model), expected)
    check_same(run(model, labels=torch.zeros_like(shifted), shift_labels=shifted), expected)


@pytest.mark.parametrize("logits", [None, "none", "last", "argmax", "all"])
@pytest.mark.parametrize("return_dict", [True, False])
def test_evaluation(logits, return_dict):
    """With labels: the loss from hidden states, and as many logits as asked for."""
    model = model_of("softcap").eval()
    inputs = batch() | {"return_dict": return_dict, "num_items_in_batch": 3}
    expected = model(**inputs)
    use_linear_cross_entropy(model, logits=logits)
    if logits is None:
        with pytest.warns(UserWarning, match="logits='all' if something reads the others"):
            found = model(**inputs)
    else:
        found = model(**inputs)
    parts = {"none": slice(0, 0), "all": slice(None)}.get(logits, slice(-1, None))
    expected_loss, whole = expected[:2]
    assert_close(found[0], expected_loss, 1e-6)
    if logits == "none":
        assert len(found) == len(expected) - 1
        assert return_dict is False or found.logits is None
    elif logits == "argmax":
        predicts = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100) != -100
        assert torch.equal(found[1], torch.where(predicts, whole.argmax(-1), -1))
    else:
        assert_close(found[1], whole[:, parts], 1e-6)
    without = {k: v for k, v in inputs.items() if k != "labels"}
    assert torch.equal(model(**without)[0], whole)
    for skips in (True, False):
        found = model(**inputs, skip_logits=skips)
        assert_close(found[0], expected_loss, 1e-6)
        assert len(found) == len(expected) - skips
        assert skips or torch.equal(found[1], whole)
    with pytest.raises(
        ValueError, match=r"logits must be one of \('none', 'last', 'argmax', 'all'\), got 'some'"
    ):
        use_linear_cross_entropy(model, logits="some")


@pytest.mark.parametrize("logits", ["none", "argmax"])
def test_a_tuple_in_which_a_routers_loss_stands_before_the_logits(logits):
    model = model_of("experts").eval()
    use_linear_cross_entropy(model, logits=logits)
    named, plain = (model(**batch(), return_dict=choice) for choice in (True, False))
    assert ("logits" in named) == (logits == "argmax")
    for one, other in zip(plain, named.to_tuple(), strict=True):
        assert not isinstance(one, torch.Tensor) or torch.equal(one, other)


def test_the_loss_beside_the_argmax_has_every_option():
    model = model_of("llama").eval()
    options = {"label_smoothing": 0.1, "z_loss": 1e-2, "focal_gamma": 0.0, "weight": torch.rand(V)}
    weights = torch.rand(B, S)
    inputs = batch() | {"token_weight": weights}
    weights[1, 2] = 0  # whose label is not looked at
    inputs["labels"][1, 2] = V + 7
    found = []
    for logits in ("last", "argmax"):
        use_linear_cross_entropy(model, logits=logits, **options)
        found.append(model(**inputs).loss)
    assert_close(found[1], found[0], 1e-6)


def test_calls_of_other_kinds():
    model = model_of("llama")
    use_linear_cross_entropy(model)
    without = {k: v for k, v in batch().items() if k != "labels"}
    with torch.no_grad():
        assert model(**without).logits.shape == (B, S, V)
    with pytest.warns(UserWarning, match="label_smoothing_factor"):
        assert model(**without).logits.shape == (B, S, V)
    loss, logits = model(**batch(), return_dict=False)[:2]
    assert loss.dim() == 0
    assert logits.shape == (B, 1, V)
    positional = model(batch()["input_ids"], batch()["attention_mask"], labels=batch()["labels"])
    assert torch.equal(positional.loss, loss)


def test_a_copy_is_bound_to_itself():
    model = model_of("llama")
    use_linear_cross_entropy(model)
    copied = copy.deepcopy(model)
    before = copied(**batch()).loss
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(copied(**batch()).loss, before)
    assert model(**batch()).loss != before


def test_a_pickled_model_is_patched():
    model = model_of("llama")
    use_linear_cross_entropy(model, z_loss=1e-3)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)
    assert torch.equal(loaded(**batch()).loss, model(**batch()).loss)
    assert loaded(**batch()).logits.shape == (B, 1, V)
    stop_linear_cross_entropy(loaded)
    assert loaded(**batch()).logits.shape == (B, S, V)


def test_the_signature_is_the_models():
    """`transformers.Trainer` chooses a batch's columns by it."""
    model = model_of("llama")
    before = inspect.signature(model.forward)
    use_linear_cross_entropy(model)
    assert inspect.signature(model.forward) == before


def test_refusals():
    model = model_of("llama")
    with pytest.raises(ValueError, match="no option z_losss"):
        use_linear_cross_entropy(model, z_losss=1.0)
    with pytest.raises(ValueError, match="labels or shift_labels"):
        causal_lm_loss(torch.randn(1, 3, V), None, V)
    encoder = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=V,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=32,
        )
    )
    with pytest.raises(ValueError, match="does not call its loss_function"):
        use_linear_cross_entropy(encoder)
    own_loss = transformers.BartForCausalLM(
        transformers.BartConfig(
            vocab_size=V,
            d_model=32,
            decoder_layers=1,
            decoder_attention_heads=4,
            decoder_ffn_dim=32,
        )
    )
    with pytest.raises(ValueError, match="does not call its loss_function"):
        use_linear_cross_entropy(own_loss)

    for wrong in ("shift", "reduction", "num_items", "linear_bias", "target"):
        with pytest.raises(ValueError, match=f"no option {wrong}"):
            use_linear_cross_entropy(model, **{wrong: None})

    # A head that is more than its weight, before or after.
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    use_linear_cross_entropy(model)
    model(**batch())
    model.lm_head.__class__ = Doubled
    with pytest.raises(ValueError, match=r"plain torch.nn.Linear, .*got .*Doubled"):
        model(**batch())
    with pytest.raises(ValueError, match=r"plain torch.nn.Linear, .*got .*Doubled"):
        use_linear_cross_entropy(model)
    model.lm_head.__class__ = torch.nn.Linear
    model.lm_head.forward = lambda x: x
    with pytest.raises(ValueError, match="forward was replaced"):
        model(**batch())
    del model.lm_head.forward
    model(**batch())
    # A hook runs around the layer, as those of FSDP do; one that changes the logits is found.
    use_linear_cross_entropy(model)
    model.lm_head.register_forward_hook(lambda _layer, _inputs, logits: 2 * logits)
    with pytest.raises(ValueError, match="use causal_lm_loss"):
        model(**batch())


def test_logits_that_are_something_else():
    model = model_of("softcap")
    use_linear_cross_entropy(model)
    model._llmloss_linear_cross_entropy._options["softcap"] = 2.0  # the config says 3
    with pytest.raises(ValueError, match="use causal_lm_loss"):
        model(**batch())


def test_what_a_config_or_a_call_asks_for():
    model = model_of("llama")
    expected = run(model)
    use_linear_cross_entropy(model)
    loss, logits = model(**batch(), return_dict=False)[:2]
    assert_close(loss, expected[0].loss, 1e-5)
    assert logits.shape == (B, 1, V)
    stop_linear_cross_entropy(model)
    ids = batch()["input_ids"]
    whole = {"labels": ids, "attention_mask": None}  # a masked token would be no target
    other = whole | {"ignore_index": int(ids[0, 3])}
    expected_of_other = run(model, **other)
    assert not torch.equal(expected_of_other[0].loss, run(model, **whole)[0].loss)
    use_linear_cross_entropy(model)
    check_same(run(model, **other), expected_of_other)
    # Checkpointed layers are run again in backward, and the hidden states kept once.
    model.gradient_checkpointing_enable()
    check_same(run(model, use_cache=False), expected)
    # In training mode, without labels: as ever.
    assert model.generate(ids, max_new_tokens=2, do_sample=False, use_cache=False).shape == (
        B,
        S + 2,
    )


def test_an_own_forward_of_the_model_stays():
    """Wrapped before or after: as an autocast, a compiler or an adapter would."""
    model = model_of("llama")
    calls = []
    inner = model.forward

    def wrapped(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    model.forward = wrapped
    use_linear_cross_entropy(model)
    assert model(**batch()).logits.shape == (B, 1, V)
    # Called by another module's forward, and not by the model's hooks.
    assert model.forward(**batch()).logits.shape == (B, 1, V)
    stop_linear_cross_entropy(model)
    assert model.forward is wrapped
    assert model(**batch()).logits.shape == (B, S, V)
    assert len(calls) == 3
    del model.forward
    use_linear_cross_entropy(model)
    inner = model.forward
    model.forward = wrapped
    assert model(**batch()).logits.shape == (B, 1, V)
    stop_linear_cross_entropy(model)
    assert model.forward is wrapped
    assert model(**batch()).logits.shape == (B, S, V)


def test_stopping_leaves_others_settings():
    model = model_of("llama")
    before = set(vars(model))
    use_linear_cross_entropy(model)
    stop_linear_cross_entropy(model)
    assert set(vars(model)) == before
    use_linear_cross_entropy(model)
    model.loss_function = causal_lm_loss
    stop_linear_cross_entropy(model)
    assert model.loss_function is causal_lm_loss


def test_a_call_that_fails_leaves_nothing_behind():
    model = model_of("llama")
    use_linear_cross_entropy(model)
    with pytest.raises(IndexError, match="Target 1000"):
        model(**batch() | {"labels": torch.full((B, S), 1000)})
    copied = copy.deepcopy(model)
    assert_close(copied(**batch()).loss, model(**batch()).loss.detach(), 1e-6)


def test_replicas_are_refused():
    model = model_of("llama")
    use_linear_cross_entropy(model)
    replica = model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        replica(**batch())


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_sixteen_bits(how):
    model = model_of("llama")
    expected = run(model)[0].loss
    if how == "bfloat16":
        model = model.bfloat16()
    use_linear_cross_entropy(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        loss, logits = model(**batch(), return_dict=False)[:2]
    loss.backward()
    assert logits.shape == (B, 1, V)
    assert loss.dtype == torch.float32
    assert_close(loss, expected, 3e-2)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
def test_compiled():
    """In one graph, with the gradients of the eager model."""
    model = model_of("llama")
    expected = run(model)
    use_linear_cross_entropy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    output = compiled(**batch())
    output.loss.backward()
    assert output.logits.shape == (B, 1, V)
    assert_close(output.loss, expected[0].loss, 1e-5)
    assert_close(model.lm_head.weight.grad, expected[1]["lm_head.weight"], 1e-5)
    assert "forward" not in vars(model.lm_head)


PACKED = {
    "position_ids": [*range(5), *range(4)],
    "seq_idx": [0] * 5 + [1] * 4,
    "cu_seq_lens_q": [0, 5, 9],
    "document_ids": [0] * 5 + [1] * 4,
    "cu_seqlens": [0, 5, 9],
}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("how", ["hidden states", "logits"])
def test_packed_documents(name, how):
    """Whoever reads it: this Mamba knows none of them, and hands all on to its loss."""
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=V, hidden_size=32, state_size=4, num_hidden_layers=1
    )
    model = transformers.MambaForCausalLM(config).train()
    given = torch.tensor(PACKED[name], dtype=torch.int32)
    ids = batch()["input_ids"][:1]
    labels = ids.clone()
    labels[0, 5] = -100  # which transformers' own loss needs
    whole = {"input_ids": ids, "attention_mask": None}
    expected = run(model, **whole, labels=labels)
    if how == "logits":
        model.loss_function = causal_lm_loss
    else:
        use_linear_cross_entropy(model)
    given = given if name.startswith("cu") else given[None]
    check_same(run(model, **whole, labels=ids, **{name: given}), expected)


def test_labels_of_the_last_positions():
    """With logits_to_keep, labels are of as many positions."""
    model = model_of("llama")
    inputs = batch() | {"logits_to_keep": 4, "attention_mask": None}
    inputs["labels"] = inputs["labels"][:, -4:]
    expected = model(**inputs).loss
    use_linear_cross_entropy(model)
    assert_close(model(**inputs).loss, expected, 1e-6)


def gradients_of(model, **inputs):
    model.zero_grad()
    loss = model(**(batch() | inputs)).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


ADAPTERS = {
    "body": {"target_modules": ["q_proj"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head alone": {"target_modules": ["lm_head"], "r": 3, "lora_alpha": 5},
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("patched_first", [True, False])
def test_adapters(name, patched_first):
    """Of PEFT: every parameter's gradient is that of the stock model."""
    peft = pytest.importorskip("peft")
    results = []
    for is_ours in (False, True):
        model = model_of("llama")
        if is_ours and patched_first:
            use_linear_cross_entropy(model)
        torch.manual_seed(3)
        config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **ADAPTERS[name])
        adapted = peft.get_peft_model(model, config).train()
        if is_ours and not patched_first:
            use_linear_cross_entropy(adapted)
        found = [gradients_of(adapted)]
        if is_ours:
            assert adapted(**batch()).logits.shape == (B, 1, V)
        with adapted.disable_adapter():
            found.append((adapted(**batch()).loss.detach(), {}))
        adapted.merge_adapter()
        found.append((adapted(**batch()).loss.detach(), {}))
        results.append(found)
    for stock, ours in zip(*results, strict=True):
        assert_close(ours[0], stock[0], 1e-5)
        assert ours[1].keys() == stock[1].keys()
        for key, grad in ours[1].items():
            scale = stock[1][key].abs().max().clamp_min(1e-6)
            assert_close(grad / scale, stock[1][key] / scale, 1e-4)


@pytest.mark.parametrize("tokens", [[1, 5], {"embed_tokens": [1, 5]}, {"lm_head": [1, 5]}])
@pytest.mark.parametrize("name", ["llama", "tied"])
def test_trainable_tokens(tokens, name):
    """Of PEFT: rows of the embeddings or of the layer are trained alone. Right, or refused."""
    peft = pytest.importorskip("peft")
    results = []
    for is_ours in (False, True):
        model = model_of(name)
        torch.manual_seed(3)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=tokens,
            init_lora_weights=False,
        )  # fmt: skip
        adapted = peft.get_peft_model(model, config).train()
        if is_ours:
            if "lm_head" in tokens or name == "tied":  # whose weight is no parameter then
                with pytest.raises(ValueError, match="TrainableTokens"):
                    use_linear_cross_entropy(adapted)
                return
            use_linear_cross_entropy(adapted)
        results.append(gradients_of(adapted))
    stock, ours = results
    assert_close(ours[0], stock[0], 1e-5)
    assert ours[1].keys() == stock[1].keys()
    for key, grad in ours[1].items():
        scale = stock[1][key].abs().max().clamp_min(1e-6)
        assert_close(grad / scale, stock[1][key] / scale, 1e-4)


def test_models_in_threads():
    models = [model_of(name) for name in ("llama", "tied")]
    expected = [run(model) for model in models]
    for model in models:
        use_linear_cross_entropy(model)
    given = batch()  # drawn here: the threads have one generator
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            results = pool.map(lambda model: run(model, **given), models)
            for found, right in zip(results, expected, strict=True):
                check_same(found, right)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"use_dora": True}, "variant"), ({"lora_dropout": 0.1}, "lora_dropout")],
)
def test_adapters_that_no_weight_expresses(options, message):
    peft = pytest.importorskip("peft")
    model = model_of("llama")
    use_linear_cross_entropy(model)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"], **options)
    adapted = peft.get_peft_model(model, config).train()
    with pytest.raises(ValueError, match=message):
        adapted(**batch())


def test_an_adapter_of_three_factors():
    peft = pytest.importorskip("peft")
    model = model_of("llama")
    use_linear_cross_entropy(model)
    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"], total_step=9)
    adapted = peft.get_peft_model(model, config).train()
    with pytest.raises(ValueError, match="SVDLinear"):
        adapted(**batch())


@pytest.mark.parametrize(
    ("nothing_in_a_step", "smoothing"), [(False, 0.0), (True, 0.0), (False, 0.2)]
)
@pytest.mark.slow
def test_the_trainer(tmp_path, nothing_in_a_step, smoothing):
    """Two steps of accumulated micro-batches; in one case a step of masked examples alone."""
    pytest.importorskip("accelerate")

    class Examples(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            ids = torch.randint(3, V, (12,), generator=torch.Generator().manual_seed(i))
            labels = ids.clone()
            labels[3 + i :] = -100
            if nothing_in_a_step and i < 4:
                labels[:] = -100
            return {"input_ids": ids, "labels": labels}

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    def trained(is_ours):
        model = model_of("llama")
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / str(is_ours)), per_device_train_batch_size=2,
            gradient_accumulation_steps=2, max_steps=2, learning_rate=1e-2, optim="sgd",
            lr_scheduler_type="constant", logging_steps=1, report_to=[], save_strategy="no",
            use_cpu=True, disable_tqdm=True, max_grad_norm=0.0, label_smoothing_factor=smoothing,
        )  # fmt: skip
        trainer = InOrder(
            model=model, args=arguments, train_dataset=Examples(), eval_dataset=Examples()
        )
        if is_ours:
            for _ in range(2):  # once more changes nothing
                use_linear_cross_entropy(trainer if smoothing else model, logits="none")
            assert trainer.label_smoother is None
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        loss = trainer.evaluate()["eval_loss"]
        stop_linear_cross_entropy(trainer)
        assert (trainer.label_smoother is not None) == bool(smoothing)
        return losses, loss, model.state_dict()

    stock, ours = trained(False), trained(True)
    assert ours[0] == pytest.approx(stock[0], abs=2e-4)
    if not nothing_in_a_step:
        assert ours[1] == pytest.approx(stock[1], abs=1e-4)
    for name, value in ours[2].items():
        assert value.isfinite().all()
        assert_close(value, stock[2][name], 1e-5)


def test_the_logits_are_never_there():
    """What a training step keeps for backward holds no tensor of the logits' size."""
    model = model_of("llama")
    use_linear_cross_entropy(model)
    sizes = []

    def pack(tensor):
        sizes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch()).loss.backward()
    assert sizes
    assert not [s for s in sizes if s[-1:] == (V,) and s[:-1] in [(B * S,), (B, S), (B, S - 1)]]
