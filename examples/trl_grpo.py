"""Trains with TRL's GRPO, whose log-probabilities and entropies this library then computes.

pip install trl
python examples/trl_grpo.py
"""

import tempfile
import warnings
from typing import Any

import datasets
import tokenizers
import torch
import transformers
import trl

from llmloss_ext.integrations.trl import stop_llmloss, use_llmloss

WORDS = ["<pad>", "<unk>", "</s>", "hello", *(f"word{i}" for i in range(60)), "please"]
STEPS, WISHED = 16, "please"
Logged = list[dict[str, float]]


def politeness(completions: list[str], **_: Any) -> list[float]:
    """The reward: which part of the words is the wished one."""
    return [text.split().count(WISHED) / max(len(text.split()), 1) for text in completions]


def tokenizer() -> Any:
    """One token for each word."""
    words = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>")
    splits = tokenizers.Tokenizer(words)
    splits.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=splits, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def train(folder: str) -> Logged:
    """What each step has logged, of the same weights each time."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=transformers.LlamaForCausalLM(config),
        reward_funcs=politeness,
        processing_class=tokenizer(),
        train_dataset=datasets.Dataset.from_list([{"prompt": "hello"}] * 64),
        args=trl.GRPOConfig(
            folder, max_steps=STEPS, per_device_train_batch_size=32, num_generations=32,
            max_completion_length=6, temperature=0.9, entropy_coef=1e-3, learning_rate=3e-2,
            logging_steps=1, disable_tqdm=True, report_to=[], save_strategy="no", use_cpu=True,
            bf16=False, gradient_checkpointing=False,
        ),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "reward" in entry]


def main() -> None:
    """Trains with TRL's own functions, then with ours: the same, but for rounding."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        theirs = train(folder)
        use_llmloss()  # every trainer of TRL, from here on
        ours = train(folder)
        stop_llmloss()
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if step % 3 == 0:
            print(
                f"step {step:2}  reward {one['reward']:.3f}  entropy {one['entropy']:.4f}  "
                f"gradient {one['grad_norm']:.4f}  (TRL's own {other['reward']:.3f}, "
                f"{other['entropy']:.4f} and {other['grad_norm']:.4f})"
            )
    error = max(
        abs(one[name] - other[name])
        for one, other in zip(ours, theirs, strict=True)
        for name in ("reward", "entropy", "loss", "grad_norm")
    )
    print(f"largest difference in {STEPS} steps: {error:.1e}")


if __name__ == "__main__":
    main()
