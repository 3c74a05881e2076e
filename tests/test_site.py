"""The pages: each is in the navigation, links lead somewhere, code runs, and no name is missing."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from documents import (
    DOCS,
    OTHERS,
    PAGES,
    ROOT,
    anchors,
    blocks,
    links,
    name_of,
    sections,
    toctrees,
)

import llmloss_ext
from llmloss_ext import losses, metrics, nn, parallel, training
from llmloss_ext.cli.main import COMMANDS

ALL = [*OTHERS, *PAGES]
INTEGRATIONS = ROOT / "llmloss_ext" / "integrations"
MACHINERY = {"examination", "output_layer", "rebinding", "versions"}
"""Modules of the integrations that only the integrations use."""


def test_every_page_is_in_the_navigation():
    listed = {
        (page.parent / f"{entry}.md").resolve()
        for page in PAGES
        for entry in toctrees(page.read_text())
    }
    missing = [name_of(path) for path in listed if not path.exists()]
    assert not missing, f"the navigation names pages that are not there: {missing}"
    lost = [name_of(p) for p in PAGES if p not in listed and p != DOCS / "index.md"]
    assert not lost, f"add to a toctree of docs/index.md, so that readers find them: {lost}"


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_links_lead_somewhere(page):
    for link in links(page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert ROOT in target.parents, f"{link} leads out of the repository"
        if anchor:
            assert anchor in anchors(target.read_text()), link


def test_commands_are_there():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    seen = 0
    for page in ALL:
        shell = "\n".join(b.text for b in blocks(page.read_text()) if b.language in ("", "bash"))
        for program, word in re.findall(r"^(?:\$ )?(make|llmloss) ([\w-]+)", shell, re.MULTILINE):
            assert word in (targets if program == "make" else COMMANDS), f"{page}: {word}"
            seen += 1
    assert seen >= 10


# What a page's code may use without having made it.


class Body(torch.nn.Module):
    """Hidden states of tokens."""

    def __init__(self, classes: int, features: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(classes, features)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embedding(tokens)


def small_model(classes: int) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=classes, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    ))  # fmt: skip


def stand_ins(source: str, group: Any) -> dict[str, Any]:
    """Small tensors and modules under the names that pages use; a model if ``source`` needs one."""
    torch.manual_seed(0)
    B, S, D, V = 4, 6, 8, 32

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, requires_grad=True)

    def from_layers(*shape: int) -> torch.Tensor:
        return leaf(*shape).clone()  # which a gradient may overwrite

    def labels(*shape: int) -> torch.Tensor:
        return torch.randint(V - 2, shape)

    head, teacher = torch.nn.Linear(D, V, bias=False), torch.nn.Linear(D, V, bias=False)
    tokens, body = labels(B, S), Body(V, D)
    names: dict[str, Any] = {
        "torch": torch, "B": B, "S": S, "D": D, "V": V, "group": group, "head": head, "body": body,
        "labels": tokens, "tokens": tokens, "input_ids": tokens, "hidden": from_layers(B, S, D),
        "logits": from_layers(B, S, V), "tokens_of_the_step": 20, "advantage": torch.randn(B, S),
        "token_weight": torch.rand(B, S), "logits_of_this_rank": from_layers(B, S, V),
        "weight_of_this_rank": head.weight, "micro_batches": [(tokens[:2], tokens[:2])] * 2,
        "teacher_hidden": torch.randn(B, S, D), "teacher_weight": teacher.weight.detach(),
        "teacher_logits": torch.randn(B, S, V), "teacher_ids": torch.arange(3).expand(B, S, 3),
        "teacher_log_probs": torch.randn(B, S, V).log_softmax(-1)[..., :3],
        "answer_mask": torch.arange(S).expand(B, S) < S - 1, "rewards": torch.randn(B),
        "old_log_probs": torch.randn(B, S), "reference": torch.randn(B, S, D),
        "reference_chosen": torch.randn(B // 2), "reference_rejected": torch.randn(B // 2),
        "chosen": leaf(B // 2), "rejected": leaf(B // 2), "vocab_size": V,
        "advantages": torch.randn(B), "mask": torch.ones(B, S, dtype=torch.bool),
    }  # fmt: skip
    if "model" in source:
        names["model"] = small_model(V)
    return names


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """One rank: what there is of it, the tests of parallel losses have."""
    where = tmp_path_factory.mktemp("group") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{where}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def names_of_ours(source: str) -> None:
    """Each name that it imports of this package is there, as far as that needs no other package."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llmloss_ext"):
            if not importlib.util.find_spec(node.module):
                raise ImportError(node.module)
            if any(f"integrations.{name}" in node.module for name in ("axolotl", "torchtitan")):
                continue
            module = importlib.import_module(node.module)
            assert [n.name for n in node.names if not hasattr(module, n.name)] == []


WITH_CODE = [p for p in ALL if any(b.language == "python" for b in blocks(p.read_text()))
             and p.name != "migrating.md"]  # fmt: skip


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
@pytest.mark.filterwarnings("ignore:.*graph.*")
def test_code_runs(page, group):
    """A page's blocks, one after the other.

    Those that need a trainer's own objects are compiled, and what they import of ours is looked up.
    """
    code = [b for b in blocks(page.read_text()) if b.language == "python"]
    names = stand_ins("".join(b.text for b in code), group)
    for block in code:
        compiled = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        if block.needs is None or (block.needs == "cuda" and torch.cuda.is_available()):
            exec(compiled, names)
        else:
            names_of_ours(block.text)


# The reference.


def public_names() -> list[str]:
    modules = {"llmloss_ext": llmloss_ext, "llmloss_ext.losses": losses,
               "llmloss_ext.metrics": metrics, "llmloss_ext.nn": nn,
               "llmloss_ext.parallel": parallel, "llmloss_ext.training": training}  # fmt: skip
    names = [
        f"{of}.{name}"
        for of, module in modules.items()
        for name in module.__all__
        if not inspect.ismodule(getattr(module, name)) and name != "__version__"
    ]
    # The rest of `linear` is in `llmloss_ext` itself.
    names += [f"llmloss_ext.linear.{n}" for n in llmloss_ext.linear.__all__
              if not hasattr(llmloss_ext, n)]  # fmt: skip
    for path in sorted(INTEGRATIONS.glob("[!_]*.py")):
        if path.stem not in MACHINERY:  # read, not imported: some need their package
            assigned = re.search(
                r"^__all__ = (\[.*?\])", path.read_text(), re.MULTILINE | re.DOTALL
            )
            of = f"llmloss_ext.integrations.{path.stem}"
            names += [f"{of}.{name}" for name in ast.literal_eval(assigned[1])]
    return names


def test_every_public_name_is_in_the_reference():
    text = "".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    described = re.findall(r"^\.\. auto\w+:: ([\w.]+)$", text, re.MULTILINE)
    missing = sorted(set(public_names()) - set(described))
    assert not missing, f"add to a page of docs/reference: {missing}"
    assert sorted(set(described) - set(public_names())) == [], "are not public"
    assert len(described) == len(set(described)), "described twice"


def described_in(tree: ast.Module, name: str) -> str | None:
    """The docstring of a function or a class, or the string behind an assignment."""
    for node, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        if getattr(node, "name", None) == name:
            return ast.get_docstring(node)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(following.value) if isinstance(following, ast.Expr) else None
    return None


@pytest.mark.parametrize("name", public_names())
def test_a_public_name_is_described(name):
    of, _, last = name.rpartition(".")
    if "integrations" in of:  # read, not imported: some need their package
        tree = ast.parse((INTEGRATIONS / f"{of.split('.')[-1]}.py").read_text())
        text = described_in(tree, last)
    else:
        text = inspect.getdoc(getattr(importlib.import_module(of), last))
    assert text
    assert len(text) > 20


def test_tests_that_are_named_are_there():
    for page in (DOCS / "numerics.md", DOCS / "integrations.md", DOCS / "architecture.md"):
        for name in re.findall(r"`(?:tests/)?([\w/]*test_\w+\.py)", page.read_text()):
            places = [ROOT / "tests" / name, *(ROOT / "tests").glob(f"*/{name}")]
            assert any(place.exists() for place in places), f"{page}: {name}"


# Migrating: theirs on the left, ours on the right.

MIGRATING = sections((DOCS / "migrating.md").read_text())


def rows_of(section: str) -> list[tuple[str, str]]:
    return re.findall(r"^\| `(.+?)` \| `(.+?)` \|$", MIGRATING[section], re.MULTILINE)


ROWS = [(peer, *row) for peer in MIGRATING for row in rows_of(peer)]


def sides(group: Any) -> dict[str, Any]:
    """The names that lines of either side use."""
    names = stand_ins("model", group)
    B, S, D, V = (names[n] for n in "BSDV")
    labels = torch.randint(V, (B * S,))
    return names | {
        "F": F, "Shard": llmloss_ext.Shard, "labels": labels, "labels3": labels.view(B, S),
        "logits": torch.randn(B * S, V, requires_grad=True).clone(), "bias": torch.randn(V),
        "logits3": torch.randn(B, S, V), "class_weight": torch.rand(V), "items": 9,
        "probabilities": torch.rand(B * S, V).softmax(-1), "teacher": torch.randn(B * S, V),
        "weight": torch.randn(V, D), "hidden": torch.randn(B, S, D),
        "hidden2": torch.randn(B * S, D), "teacher_hidden": torch.randn(B * S, D),
    }  # fmt: skip


def ours(group: Any) -> dict[str, Any]:
    from llmloss_ext.integrations import megatron, transformers

    return sides(group) | vars(llmloss_ext) | {"megatron": megatron, "transformers": transformers}


def stubs(section: str) -> tuple[dict[str, Any], list[tuple[str, str, ast.AST]]]:
    """The quoted signatures as callables, and each with its module and package."""
    names: dict[str, Any] = {}
    quoted = []
    for block in blocks(MIGRATING[section]):
        heads = re.split(r"^# ([\w.]+) of (.+)$", block.text, flags=re.MULTILINE)
        for module, package, source in zip(heads[1::3], heads[2::3], heads[3::3], strict=True):
            exec(source, names)
            quoted += [(module, package, node) for node in ast.parse(source).body]
    for thing in list(names.values()):
        if inspect.isclass(thing):
            forward = vars(thing)["forward"]
            thing.__call__ = forward
            if isinstance(forward, staticmethod):  # an autograd function's
                thing.apply = lambda *args, f=forward: f(None, *args)
    return names, quoted


def test_the_lines_of_a_migration_are_found():
    assert {peer for peer, *_ in ROWS} == set(MIGRATING) >= {"torch", "Liger", "CCE", "apex"}
    assert len(ROWS) > 40
    for peer in MIGRATING:  # none of another form
        table = re.findall(r"^\| (?!---).*\|$", MIGRATING[peer], re.MULTILINE)
        assert len(table) - 1 == len(rows_of(peer))


@pytest.mark.parametrize(("peer", "theirs", "here"), ROWS)
def test_a_line_of_a_migration(peer, theirs, here, group):
    result = eval(here, ours(group))
    if peer != "torch":
        eval(theirs, sides(group) | stubs(peer)[0])  # a TypeError where it does not fit
        return
    expected = eval(theirs, sides(group))
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5, check_dtype=False)


QUOTED = [(*quoted, peer) for peer in MIGRATING for quoted in stubs(peer)[1]]


@pytest.mark.parametrize(
    ("module", "package", "quoted"), [q[:3] for q in QUOTED], ids=[q[2].name for q in QUOTED]
)
def test_a_quoted_signature(module, package, quoted):
    """Read from the package's source: importing it may need a GPU."""
    top, *rest = module.split(".")
    found = importlib.util.find_spec(top)
    if found is None:
        pytest.skip(f"{top} is not installed")
    distribution, _, version = package.partition(" ")
    if re.match(r"\d", version):
        installed = importlib.metadata.version(distribution)
        if installed != version:
            pytest.skip(f"{distribution} {installed} is installed, {version} is quoted")
    folder = Path(next(iter(found.submodule_search_locations)))
    tree = ast.parse((folder.joinpath(*rest)).with_suffix(".py").read_text())
    real = next(n for n in tree.body if getattr(n, "name", None) == quoted.name)
    pairs = [(real, quoted)]
    if isinstance(quoted, ast.ClassDef):
        methods = {n.name: n for n in real.body if isinstance(n, ast.FunctionDef)}
        pairs = [(methods[n.name], n) for n in quoted.body]
    for theirs, ours in pairs:
        given, real = parameters(ours), parameters(theirs)
        assert [name for name, _ in given] == [name for name, _ in real]
        for (name, default), (_, wanted) in zip(given, real, strict=True):
            # Of a constant by its name, only that there is a default.
            assert default == wanted or (wanted is ... and default is not None), name


def parameters(function: ast.FunctionDef) -> list[tuple[str, Any]]:
    """Names, with the default as text, None without one, and ... if it is not a literal."""
    arguments = function.args
    others = [*arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    assert not any(others)
    names = [a.arg for a in arguments.args]
    defaults = [default_of(d) for d in arguments.defaults]
    return list(zip(names, [None] * (len(names) - len(defaults)) + defaults, strict=True))


def default_of(node: ast.expr) -> Any:
    try:
        return repr(ast.literal_eval(node))
    except ValueError:
        return ...
