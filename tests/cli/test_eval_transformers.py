"""llmloss eval of folders of transformers: as in Hugging Face's own loop, and without logits."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("rich")

from llmloss_ext.cli.main import main  # noqa: E402

TEXT = "".join(f"Line {i}: the quick brown föx jumps {i * i}.\n" for i in range(9))
SMALL = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "softcap": lambda: transformers.Gemma2Config(**SMALL, final_logit_softcapping=0.5),
    "scale": lambda: transformers.CohereConfig(**SMALL, logit_scale=3.0),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=0,
        eos_token_id=1, tie_word_embeddings=True,
    ),
}  # fmt: skip


def save_tokenizer(folder: Path, *, begins: bool) -> None:
    """Bytes, some pairs of them, and perhaps a token that begins each text."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT], trainer)
    if begins:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory):
    made: dict[tuple, Path] = {}

    def of(name: str, begins: bool = False) -> Path:
        if (name, begins) not in made:
            folder = tmp_path_factory.mktemp(name)
            torch.manual_seed(3)
            model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
            model.get_output_embeddings().weight.data.mul_(20)  # sure of some tokens
            model.save_pretrained(folder)
            save_tokenizer(folder, begins=begins)
            made[name, begins] = folder
        return made[name, begins]

    return of


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def as_hugging_face_does(folder: Path, window: int, stride: int) -> tuple[float, int, int]:
    """Nats, tokens and right predictions, by the loop of its guide to perplexity, in float64."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    nats, tokens, right, previous = 0.0, 0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + window, ids.shape[1])
        input_ids = ids[:, begin:end]
        target_ids = input_ids.clone()
        target_ids[:, : previous - end] = -100 if previous else target_ids[:, : previous - end]
        with torch.no_grad():
            logits = model(input_ids).logits[0, :-1]
        labels = target_ids[0, 1:]
        valid = labels != -100
        log_p = logits.log_softmax(-1)[valid].gather(1, labels[valid, None])
        nats -= log_p.sum().item()
        tokens += int(valid.sum())
        right += int((logits.argmax(-1) == labels)[valid].sum())
        previous = end
        if end == ids.shape[1]:
            break
    return nats, tokens, right


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("window", "stride"), [(32, 16), (32, 5), (8, 7)])
def test_the_perplexity_of_the_guide(
    folder_of, text, tmp_path, capsys, name, begins, window, stride
):
    folder, out = folder_of(name, begins), tmp_path / "out.json"
    argv = ["--window", str(window), "--stride", str(stride), "--out", str(out)]
    assert main(["eval", str(folder), str(text), *argv]) == 0
    assert "scored from hidden states" in capsys.readouterr().out
    result = json.loads(out.read_text())
    nats, tokens, right = as_hugging_face_does(folder, window, stride)
    assert result["tokens"] == tokens
    assert result["nats"] == pytest.approx(nats, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert result["top_k_accuracy"]["1"] == pytest.approx(right / tokens, abs=1.5 / tokens)
    bits = nats / math.log(2) / len(TEXT.encode())
    assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_defaults_and_dtype(folder_of, text, tmp_path):
    out = tmp_path / "out.json"
    argv = ["eval", str(folder_of("llama")), str(text), "--out", str(out), "--overwrite"]
    assert main(argv) == 0
    plain = json.loads(out.read_text())
    assert plain["settings"]["window"] == 32
    assert plain["settings"]["stride"] == 16
    assert main([*argv, "--dtype", "bfloat16"]) == 0
    rounded = json.loads(out.read_text())
    assert rounded["nats"] != plain["nats"]
    assert rounded["nats"] == pytest.approx(plain["nats"], rel=3e-2)


@pytest.mark.parametrize("begins", [False, True])
def test_a_ranking(folder_of, tmp_path, begins):
    """Choices are encoded with their contexts; an empty context is the token that begins texts."""
    folder, out, path = folder_of("llama", begins), tmp_path / "out.json", tmp_path / "q.jsonl"
    questions = [
        {"context": "Line 1: the quick", "choices": [" brown", " föx jumps"], "label": 0},
        {"context": "", "choices": ["Line", "the quick"], "label": 1},
    ]
    path.write_text("\n".join(json.dumps(question) for question in questions))
    assert main(["eval", str(folder), str(path), "--out", str(out)]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
    for question, item in zip(questions, json.loads(out.read_text())["items"], strict=True):
        for number, choice in enumerate(question["choices"]):
            plain = {"add_special_tokens": False}
            context = tokenizer(question["context"], **plain).input_ids
            own = tokenizer(question["context"] + choice, **plain).input_ids[len(context) :]
            ids = ([0] if begins or not context else []) + context + own
            with torch.no_grad():
                log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            at = range(len(ids) - len(own), len(ids))
            expected = sum(log_p[i - 1, ids[i]].item() for i in at)
            assert item["sum"][number] == pytest.approx(expected, rel=1e-5)
            assert item["tokens"][number] == len(own)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("llmloss: error: ")
    assert error.count("\n") == 1
    assert "LLMLOSS_TRACEBACK" not in error
    return error


def test_folders_that_are_not_whole(folder_of, text, tmp_path, capsys):
    """What is missing or damaged is told; weights are never made up."""
    import shutil

    for wrong, message in (
        (lambda f: [p.unlink() for p in f.glob("*.safetensors")], "cannot open"),
        (lambda f: (f / "model.safetensors").write_bytes(b"no weights"), "cannot open"),
        (lambda f: [p.unlink() for p in f.glob("tokenizer*")], ""),
        (lambda f: (f / "config.json").write_text("{"), "cannot open"),
        (lambda f: (f / "config.json").write_text('{"model_type": "unheard"}'), "cannot open"),
        (more_layers, "lacks 9 of the model's weights, such as model.layers.1."),
    ):
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(folder_of("llama"), folder)
        wrong(folder)
        assert main(["eval", str(folder), str(text)]) == 1
        assert message in one_line(capsys)


def more_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))


def test_a_model_that_reads_both_ways(text, tmp_path, capsys):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.BertLMHeadModel(config)
    for parameter in model.parameters():
        parameter.data.mul_(20)
    model.save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert", begins=False)
    assert main(["eval", str(tmp_path / "bert"), str(text)]) == 1
    assert "is no causal language model" in one_line(capsys)


def test_without_transformers(folder_of, text, capsys, monkeypatch):
    monkeypatch.setattr("llmloss_eval.pretrained.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("llmloss_eval.command.missing_packages", list)
    assert main(["eval", str(folder_of("llama")), str(text)]) == 1
    assert "needs transformers: pip install 'llmloss_ext[eval]'" in one_line(capsys)
