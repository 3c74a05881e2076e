"""llmloss plan."""

from __future__ import annotations

from llmloss_ext.cli import main


def test_the_command(capsys):
    assert main.main(["plan", "8192", "4096", "128256"]) == 0
    out = capsys.readouterr().out
    assert "3 of 8,192 x 4,096 x 128,256" in out
    assert "peak beyond inputs" in out
    assert main.main(["plan", "8192", "4096", "128256", "--float32-logits"]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("chunk's logits")]
    assert line.split()[2] == "125.2"  # 256 tokens of 4 bytes a class
    assert main.main(["plan", "8", "8", "8", "float64", "--float32-logits"]) == 1
    assert "logits_dtype must be torch.float64" in capsys.readouterr().err
    assert main.main(["plan", "8192", "4096", "128256", "--max-chunk-bytes", "10"]) == 1
    assert "the logits of one token" in capsys.readouterr().err


def rows_of(out):
    _, table = out.split("peak beyond inputs  loss\n")
    return [line.split(maxsplit=4) for line in table.splitlines()]


def test_the_losses(capsys):
    """Each with its products and its peak, beside what the command was asked for."""
    size = ["plan", "8192", "4096", "128256", "--recompute"]
    assert main.main([*size, "--sequence-tokens", "8192"]) == 0
    out = capsys.readouterr().out
    assert "4 of 8,192 x 4,096 x 128,256" in out
    rows = rows_of(out)
    assert [(int(row[0]), int(row[1])) for row in rows] == [
        (3, 0), (4, 0), (4, 1), (5, 1), (5, 1), (5, 1), (7, 3),
    ]  # fmt: skip
    (peak,) = {row[2] for row in rows}  # a reference's is no more
    assert f"peak beyond inputs {peak} MiB" in out
    assert "linear_policy_loss, ratios of tokens" in rows[2][4]
    assert "linear_preference_loss, 8,192 tokens each" in rows[4][4]
    # Chunks of whole sequences spare a product.
    assert main.main(size) == 0
    rows = rows_of(capsys.readouterr().out)
    assert [int(row[0]) for row in rows] == [3, 4, 4, 4, 4, 4, 6]
    assert float(rows[4][2].replace(",", "")) > float(rows[3][2].replace(",", ""))
    assert main.main(["plan", "64", "8", "100", "float32", "--frozen", "weight"]) == 0
    assert "       3              1 " in capsys.readouterr().out


def test_no_tokens_and_no_sequences(capsys):
    assert main.main(["plan", "0", "768", "128256", "float32"]) == 0
    assert len(rows_of(capsys.readouterr().out)) == 7
    for wrong in ("0", "-3"):
        assert main.main(["plan", "8", "768", "1000", "--sequence-tokens", wrong]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "--sequence-tokens must be at least 1" in captured.err


def test_predictions(capsys):
    assert main.main(["plan", "8192", "4096", "128256", "--gpu", "h100"]) == 0
    out = capsys.readouterr().out
    assert "Predicted, not measured, on an H100" in out
    rows = [line.split() for line in out.splitlines() if "MiB" in line and "," in line[:17]]
    (chosen,) = [row for row in rows if row[-1] == "plan"]
    assert chosen[:2] == ["8,192", "3,134.0"]
    assert [row[0] for row in rows] == ["1,024", "2,048", "4,096", "8,192"]
    assert main.main(["plan", "8192", "4096", "128256", "--device", "cuda"]) == 0
    assert "Predicted" in capsys.readouterr().out
    for without in (["float32", "--gpu", "h100"], ["bfloat16"]):
        assert main.main(["plan", "8192", "4096", "128256", *without]) == 0
        assert "Predicted" not in capsys.readouterr().out
    assert main.main(["plan", "8192", "4096", "128256", "--gpu", "abacus"]) == 1
    assert "gpu must be one of h100, h200" in capsys.readouterr().err
