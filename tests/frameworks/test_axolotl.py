"""The plugin in axolotl's own manager, its config, and a packed batch of a model with LoRA."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("axolotl")
pytest.importorskip("addict")

VOCAB = 40
NAME = "llmloss_ext.integrations.axolotl.LinearCrossEntropyPlugin"


@pytest.fixture
def manager():
    from axolotl.integrations.base import PluginManager

    PluginManager._instance = None
    manager = PluginManager.get_instance()
    manager.plugins.clear()
    manager.register(NAME)
    yield manager
    manager.plugins.clear()


def model():
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def packed():
    """As its collator packs two examples, whose first tokens have no label."""
    lengths = (5, 4)
    ids = torch.randint(3, VOCAB, (1, sum(lengths)))
    labels = ids.clone()
    labels[0, [0, 5]] = -100
    positions = torch.cat([torch.arange(length) for length in lengths])
    return {"input_ids": ids, "labels": labels, "position_ids": positions[None]}


def test_a_model_with_lora(manager):
    """Built, patched by the plugin, given its adapters: axolotl's order."""
    import peft
    from axolotl.utils.dict import DictDefault

    stock, ours = model(), model()
    cfg = DictDefault({"llmloss_logits": "none", "llmloss_options": {"chunk_tokens": 4}})
    manager.post_model_build(cfg, ours)
    results, batch = [], packed()
    for base in (stock, ours):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        wrapped = peft.get_peft_model(base, config).train()
        output = wrapped(**batch, num_items_in_batch=torch.tensor(11))
        output.loss.backward()
        grads = [p.grad for p in wrapped.parameters() if p.requires_grad]
        results.append([output.loss.detach(), *grads])
    assert len(results[0]) == 5
    assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
    wrapped.eval()
    assert wrapped(**batch).get("logits") is None


def test_by_default(manager):
    """Without anything in the config: the last token's logits, and no warning."""
    from axolotl.utils.dict import DictDefault

    ours = model().eval()
    manager.post_model_build(DictDefault({}), ours)
    assert ours(**packed()).logits.shape == (1, 1, VOCAB)


def test_the_config(manager):
    from axolotl.integrations.config import merge_input_args

    _, config = merge_input_args()
    fields = config.model_fields
    assert fields["llmloss_logits"].default == "last"
    assert fields["llmloss_options"].default == {}
    from llmloss_ext.integrations.axolotl import LinearCrossEntropyArgs as Args

    with pytest.raises(ValueError, match="Input should be 'none', 'last', 'argmax' or 'all'"):
        Args(llmloss_logits="some")
    with pytest.raises(ValueError, match="takes the place of cut_cross_entropy"):
        Args.model_validate({"cut_cross_entropy": True})
