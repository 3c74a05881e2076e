"""TRL's trainers: the same losses, metrics and gradients with our functions as with TRL's own."""

from __future__ import annotations

import importlib
import re
from unittest import mock

import pytest
import torch
from helpers import assert_close

pytest.importorskip("trl")

import datasets
import peft
import tokenizers
import transformers
import trl
from trl.kernels import ChunkedLogProbFunction

from llmloss_ext.integrations import trl as integration
from llmloss_ext.integrations.trl import stop_llmloss, use_llmloss

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL, transformers and datasets

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]
SMALL = {
    "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "llama": ("LlamaConfig", SMALL),
    "softcap": ("Gemma2Config", SMALL | {"final_logit_softcapping": 2.0, "sliding_window": 32}),
    "scale": ("CohereConfig", SMALL | {"logit_scale": 0.25}),
    "experts": ("MixtralConfig", SMALL | {"num_local_experts": 4, "output_router_logits": True}),
}
TRAINING = {
    "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 2,
    "logging_steps": 1, "report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False,
    "learning_rate": 0.1, "optim": "sgd", "disable_tqdm": True, "gradient_checkpointing": False,
}  # fmt: skip
LORA = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
GENERATION = {"num_generations": 4, "max_completion_length": 6, "beta": 0.1}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder for each model: trainers load the reference model from there once more."""
    root = tmp_path_factory.mktemp("models")
    words = tokenizers.models.WordLevel(dict(zip(WORDS, range(64), strict=True)), "<unk>")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name, (kind, options) in MODELS.items():
        torch.manual_seed(0)
        config = getattr(transformers, kind)(**options)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # logits of a size at which a softcap matters
            if parameter.dim() > 1:
                parameter.data.mul_(10)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def words(count, seed):
    numbers = torch.randint(4, 64, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in numbers.tolist())


def data_for(kind):
    """Eight examples of the columns that a trainer reads."""
    columns = {
        "SFT": lambda i: {"prompt": words(3, i), "completion": " " + words(4 + i % 3, 50 + i)},
        "KTO": lambda i: columns["SFT"](i) | {"label": i % 3 > 0},
        "GRPO": lambda i: {"prompt": words(3 + i % 2, i)},
        "DPO": lambda i: {
            "prompt": words(3, i), "chosen": " " + words(4 + i % 3, 50 + i),
            "rejected": " " + words(5, 90 + i),
        },
        "TPO": lambda i: columns["DPO"](i) | {"reference": " " + words(4, 130 + i)},
    }  # fmt: skip
    same = {"RLOO": "GRPO", "ORPO": "DPO"}
    return datasets.Dataset.from_list([columns[same.get(kind, kind)](i) for i in range(8)])


def many_words(completions, **_):
    """A reward."""
    return [float(len(set(completion.split()))) for completion in completions]


class Gradients(transformers.TrainerCallback):
    """Those of every step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        named = model.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def trained(kind, folder, out, options, adapter):
    """What two steps and an evaluation have logged, and the gradients."""
    module = trl
    if kind in ("ORPO", "TPO"):
        module = importlib.import_module(f"trl.experimental.{kind.lower()}")
    load = transformers.AutoModelForCausalLM.from_pretrained
    config = getattr(module, f"{kind}Config")(str(out), **TRAINING | options)
    gradients, data = Gradients(), data_for(kind)
    given = {
        "model": load(folder), "args": config, "train_dataset": data, "eval_dataset": data,
        "processing_class": transformers.AutoTokenizer.from_pretrained(folder),
        "callbacks": [gradients],
    }  # fmt: skip
    if kind in ("GRPO", "RLOO"):
        given["reward_funcs"] = many_words
    if adapter is not None:
        given["peft_config"] = adapter
    elif kind in ("DPO", "KTO"):  # not the model itself: log-ratios of 0 would hide much
        given["ref_model"] = load(folder)
        for parameter in given["ref_model"].parameters():
            parameter.data.mul_(0.9)
    trainer = getattr(module, f"{kind}Trainer")(**given)
    trainer.train()
    trainer.evaluate()
    return trainer.state.log_history, gradients.steps


CASES = {
    "SFT": ("SFT", "llama", {}, "linear_token_stats"),
    "SFT, chunked_nll, softcap": ("SFT", "softcap", {"loss_type": "chunked_nll"}, None),
    "SFT, dft, two micro-batches": (
        "SFT", "scale",
        {"loss_type": "dft", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        None,
    ),
    "SFT, experts": ("SFT", "experts", {}, None),
    "SFT, LoRA": ("SFT", "llama", {}, None),
    "DPO": ("DPO", "llama", {}, "linear_token_stats"),
    "DPO, WPO, softcap": ("DPO", "softcap", {"use_weighting": True}, None),
    "DPO, LoRA": ("DPO", "llama", {}, None),
    "KTO": ("KTO", "llama", {}, "linear_token_stats"),
    "GRPO": ("GRPO", "llama", {"temperature": 0.7} | GENERATION, "linear_log_probs"),
    "GRPO, entropy, softcap": (
        "GRPO", "softcap",
        {"entropy_coef": 0.1, "top_entropy_quantile": 0.5, "num_iterations": 2} | GENERATION
        | {"temperature": 1.3},
        None,
    ),
    "RLOO": ("RLOO", "scale", {"temperature": 0.7} | GENERATION, "linear_token_stats"),
    "ORPO": ("ORPO", "llama", {}, "cross_entropy"),
    "TPO": ("TPO", "llama", {}, "token_stats"),
}  # fmt: skip
OURS = ("linear_token_stats", "linear_log_probs", "cross_entropy", "token_stats")


@pytest.mark.parametrize("case", CASES)
def test_a_trainer(case, folder, tmp_path, monkeypatch):
    kind, model, options, expected = CASES[case]
    adapter = LORA if "LoRA" in case else None
    arguments = (kind, folder / model, tmp_path, options, adapter)
    stock, their_gradients = trained(*arguments)

    spies = {name: mock.Mock(wraps=getattr(integration, name)) for name in OURS}
    for name, spy in spies.items():
        monkeypatch.setattr(integration, name, spy)
    monkeypatch.setattr(ChunkedLogProbFunction, "forward", mock.Mock(side_effect=AssertionError))
    use_llmloss()
    try:
        logged, gradients = trained(*arguments)
    finally:
        stop_llmloss()
    assert spies[expected or "linear_token_stats"].call_count >= 2

    assert len(gradients) == len(their_gradients) == 2
    for step, theirs in zip(gradients, their_gradients, strict=True):
        assert step.keys() == theirs.keys()
        assert any(gradient.any() for gradient in step.values())
        for name, gradient in theirs.items():
            size = gradient.abs().max().clamp_min(1e-6)
            assert_close(step[name] / size, gradient / size, 1e-4)
    assert len(logged) == len(stock) >= 4
    for entry, theirs in zip(logged, stock, strict=True):
        assert entry.keys() == theirs.keys()
        for name, value in theirs.items():
            if not any(time in name for time in ("runtime", "per_second", "step_time")):
                assert entry[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


def test_the_example(capsys):
    from examples import trl_grpo as example

    example.main()
    shown = capsys.readouterr().out
    assert re.search(r"step 15  reward 0\.9\d.*\nlargest diff.*: \d\.\de-0[4-7]", shown), shown
